"""Limits of a run: no import and no test of a subject goes on for ever, nor do its hangs and crashes.

The limit is that of pytest-timeout for each test, the exception one of our own. What Python can interrupt
ends with it, and the run goes on. What it cannot, such as a deadlock in native code, ends with its process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

import pytest
from pytest_timeout import Settings, get_env_settings, is_debugging

from correctness.judging.finding import Timeout

AGAIN_S = 5.0  # until the exception is raised once more: one in a callback of the garbage collector is lost
GRACE_S = 30.0  # after the limit the process ends
STDERR = 2
MAX_HANGS, MAX_CRASHES = 3, 10  # of one subject, then the run ends


def time_limit(config: pytest.Config) -> float:
    """Seconds that each test may take: --timeout, PYTEST_TIMEOUT or the configured ones; 0 is no limit."""
    return get_env_settings(config).timeout or 0.0


@contextlib.contextmanager
def limited(seconds: float, output: int | TextIO = STDERR) -> Iterator[None]:
    """Raise Timeout inside after ``seconds`` (0: no limit); if that is of no use, end the process."""
    if not seconds:
        yield
        return

    def expire(*_: object) -> None:
        if not is_debugging():
            raise Timeout(f"longer than {seconds:g} s (--timeout)")

    with hard_limit(seconds + GRACE_S, output):
        if not hasattr(signal, "setitimer"):  # on Windows
            yield
            return
        before = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def hard_limit(seconds: float, output: int | TextIO) -> Iterator[None]:
    """End the process after ``seconds``, with status 1 and the stacks of its threads as last words."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=output)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Limits:
    """The pytest plugin that ends tests for pytest-timeout, and the run after too many hangs or crashes."""

    def __init__(self, config: pytest.Config) -> None:
        self.seconds = time_limit(config)
        self.stderr = os.dup(STDERR)  # during tests pytest puts a file in its place
        self.output: int | TextIO = self.stderr
        self.timer = contextlib.ExitStack()
        self.broken: Counter[tuple[str, str]] = Counter()  # by subject and what it did

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_unconfigure(self) -> None:
        os.close(self.stderr)

    def pytest_timeout_set_timer(self, settings: Settings) -> bool:
        self.timer.enter_context(limited(settings.timeout, self.output))
        return True

    def pytest_timeout_cancel_timer(self) -> bool:
        self.timer.close()
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = dict(report.user_properties).get("subject")
        hung = 0 < self.seconds * 0.9 <= report.duration
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
