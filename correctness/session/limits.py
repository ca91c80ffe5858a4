"""The one limit of time: no import, test or timed call of a subject goes on for ever.

What is limited is the processor time that the calling thread takes: a subject that computes slowly because
other programs keep the machine busy, or that waits for a compiler, does not hang. What does not compute, a
deadlock or an endless sleep, ends by the clock on the wall, WAITING times later. What Python can interrupt
ends with an exception of our own, and the run goes on; what it cannot, such as a deadlock in native code,
ends with its process, where that is asked for.

The plugin ``Limits`` ends tests for pytest-timeout, and the run after many hangs or crashes of a subject.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, thread_time  # as they are now, whatever a subject makes of them
from typing import TextIO

import pytest
import torch
from pytest_timeout import Settings, get_env_settings, is_debugging

from correctness.judging.finding import Timeout

WAITING = 4.0  # times the limit is what may pass on the wall
AGAIN_S = 5.0  # until the exception is raised once more: one in a callback of the garbage collector is lost
LEAST_S = 0.005  # between two looks at what was computed
GRACE_S = 30.0  # after the limit on the wall the process ends
STDERR = 2
MAX_HANGS, MAX_CRASHES = 3, 10  # of one subject, then the run ends


def time_limit(config: pytest.Config) -> float:
    """Seconds that each test may take: --timeout, PYTEST_TIMEOUT or the configured ones; 0 is no limit."""
    return get_env_settings(config).timeout or 0.0


@dataclass
class Limit:
    """What ``limited`` yields: whether the limit was reached."""

    reached: bool = False


@contextlib.contextmanager
def limited(
    seconds: float | None,
    output: int | TextIO | None = STDERR,
    *,
    wall_s: float | None = None,
    option: str = "--timeout",
) -> Iterator[Limit]:
    """Raise Timeout in the block when it has taken ``seconds`` of the main thread's processor time.

    Args:
        seconds: None or 0 is no limit.
        output: where the stacks are written before the process is ended, if the exception is of no use; None
            never ends it.
        wall_s: what may pass on the wall, whoever computes; WAITING * seconds unless given.
        option: by which the limit was chosen, for the message.

    Raises:
        Timeout: as soon as control is back in Python.
        RuntimeError: outside of the main thread, which alone handles signals.
    """
    limit = Limit()
    if not seconds:
        yield limit
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit can only be set in the main thread")
    wall_s = WAITING * seconds if wall_s is None else wall_s
    begun_s, computed_s = monotonic(), thread_time()

    def look(*_: object) -> None:
        used_s, passed_s = thread_time() - computed_s, monotonic() - begun_s
        left_s = AGAIN_S if is_debugging() else min(seconds - used_s, wall_s - passed_s)
        if left_s > 0:  # no sooner than that: a thread computes at most as long as passes
            signal.setitimer(signal.ITIMER_REAL, max(left_s, LEAST_S))
            return
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        limit.reached = True
        told = f"longer than {seconds:g} s ({option})"
        raise Timeout(
            told if used_s >= seconds else f"{told}: it computed {used_s:.2g} s in {passed_s:.0f} s"
        )

    gradients = torch.is_grad_enabled()
    with contextlib.nullcontext() if output is None else hard_limit(wall_s + GRACE_S, output):
        if not hasattr(signal, "setitimer"):  # on Windows
            yield limit
            return
        handler = signal.signal(signal.SIGALRM, look)
        outer_s, again_s = signal.setitimer(signal.ITIMER_REAL, min(seconds, wall_s))
        try:
            yield limit
        except Timeout:
            # It may have been raised where a `with torch.no_grad()` ends, before the mode was set back.
            torch.set_grad_enabled(gradients)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if outer_s:  # of the limit that this one is within
                left_s = outer_s - (monotonic() - begun_s)
                signal.setitimer(signal.ITIMER_REAL, max(left_s, LEAST_S), again_s)


@contextlib.contextmanager
def hard_limit(seconds: float, output: int | TextIO) -> Iterator[None]:
    """End the process after ``seconds``, with status 1 and the stacks of its threads as last words."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=output)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Limits:
    """The pytest plugin that ends tests for pytest-timeout, and the run after too many hangs or crashes.

    A report of a test that reached its limit has the property ``hung``, which comes along from a worker.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.seconds = time_limit(config)
        self.stderr = os.dup(STDERR)  # during tests pytest puts a file in its place
        self.output: int | TextIO = self.stderr
        self.limit = Limit()
        self.timer = contextlib.ExitStack()
        self.broken: Counter[tuple[str, str]] = Counter()  # by subject and what it did

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_unconfigure(self) -> None:
        os.close(self.stderr)

    def pytest_timeout_set_timer(self, settings: Settings) -> bool:
        self.limit = self.timer.enter_context(limited(settings.timeout, self.output))
        return True

    def pytest_timeout_cancel_timer(self) -> bool:
        self.timer.close()
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        if self.limit.reached:
            report.user_properties.append(("hung", True))
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        facts, hung = properties.get("subject"), "hung" in properties
        crashed = report.when not in ("setup", "call", "teardown")
        if crashed and self.session.shouldfail:  # --maxfail, which pytest-xdist does not apply to crashes
            raise self.session.Failed(self.session.shouldfail)
        if not (isinstance(facts, dict) and report.failed and (hung or crashed)):
            return
        what, most = ("hung", MAX_HANGS) if hung else ("ended its process", MAX_CRASHES)
        self.broken[facts["name"], what] += 1
        if self.broken[facts["name"], what] >= most:
            self.session.shouldfail = (
                f"{facts['name']} {what} in {most} tests: the run ends here, and what follows was not run"
            )
            raise self.session.Failed(self.session.shouldfail)
