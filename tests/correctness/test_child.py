"""A child process answers, says how it ended, and leaves nothing behind."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from correctness.session.child import Child, Ended
from reporting.provenance import ROOT


@pytest.fixture
def child() -> Iterator[Child]:
    started = Child.of_functions()
    yield started
    started.end()


def is_gone(pid: int, within_s: float = 20.0) -> bool:
    """Whether a process is soon gone, or waits for its parent to take notice."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def fork_a_sleeper() -> int:
    """The number of a process of this one that sleeps, in a session of its own."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(60)
    return pid


def fork_and_exit() -> None:
    fork_a_sleeper()
    os._exit(3)


def test_a_function_is_called_in_another_process_and_its_answer_comes_back(child: Child) -> None:
    assert child.call(os.getpid) == child.process.pid != os.getpid()
    assert child.call(operator.add, [1], [2]) == [1, 2]


def test_what_a_function_raises_is_raised_here_and_the_child_goes_on(child: Child) -> None:
    with pytest.raises(ZeroDivisionError):
        child.call(operator.truediv, 1, 0)
    assert child.call(operator.add, 1, 2) == 3


@pytest.mark.parametrize(
    ("function", "argument", "how"),
    [
        (os._exit, 7, "ended its process with exit status 7"),
        (sys.exit, 0, "ended its process with exit status 0"),
        (signal.raise_signal, signal.SIGSEGV, "ended its process by SIGSEGV"),
        (signal.raise_signal, signal.SIGKILL, "ended its process by SIGKILL, as when memory runs out"),
    ],
)
def test_how_a_child_ended_is_told(child: Child, function, argument: int, how: str) -> None:
    for _ in range(2):  # of one that has ended, too
        with pytest.raises(Ended) as caught:
            child.call(function, argument)
        assert str(caught.value) == how


def test_a_process_that_a_child_has_forked_does_not_hide_its_end(child: Child) -> None:
    with pytest.raises(Ended, match="exit status 3"):
        child.call(fork_and_exit)


def test_a_child_whose_time_is_over_is_ended(child: Child) -> None:
    with pytest.raises(Ended, match="ran on after its time limit; its process was killed") as caught:
        child.call(time.sleep, 60, is_over=lambda: True)
    assert caught.value.status is None and is_gone(child.process.pid)


def test_what_a_child_has_started_ends_with_it(child: Child) -> None:
    sleeper = child.call(fork_a_sleeper)
    assert psutil.pid_exists(sleeper)
    child.end()
    assert is_gone(sleeper) and is_gone(child.process.pid)


def test_a_command_is_run_and_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        child = Child([sys.executable, "-c", "print(6 * 7); raise SystemExit(3)"], stdout=log)
        assert child.wait(60) == 3
        endless = Child([sys.executable, "-c", "while True: pass"])
        assert endless.wait(0.1) is None
        endless.end()
        assert endless.wait() == -signal.SIGKILL
    assert (tmp_path / "log").read_text() == "42\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_child_that_computes_ends_with_its_parent_however_that_ends() -> None:
    code = (
        "import sys, time\n"
        "from correctness.session.child import Child\n"
        "child = Child([sys.executable, '-c', 'while True: pass'])\n"
        "print(child.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(1)  # it has begun to compute by then
        parent.kill()
    assert is_gone(pid)
