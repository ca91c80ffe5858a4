"""What hangs is ended, whether it computes or waits; what is merely slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from correctness.judging.finding import Timeout
from correctness.session import limits
from correctness.session.limits import limited
from reporting.provenance import ROOT


def compute(seconds: float) -> None:
    """Take so much of this thread's processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_an_endless_loop_ends_when_it_has_computed_for_as_long_as_it_may() -> None:
    begin = time.thread_time()
    with pytest.raises(Timeout, match=r"^longer than 0.2 s \(--timeout\)$"), limited(0.2, wall_s=60) as limit:
        compute(60)
    assert limit.reached and 0.2 <= time.thread_time() - begin < 1


def test_an_endless_sleep_ends_by_the_clock_on_the_wall() -> None:
    begin = time.monotonic()
    with (
        pytest.raises(Timeout, match=r"longer than 0.2 s \(--cell-timeout\): it computed 0.* s in \d s"),
        limited(0.2, option="--cell-timeout"),
    ):
        time.sleep(60)
    assert 0.2 * limits.WAITING <= time.monotonic() - begin < 5


def test_an_endless_loop_that_stops_the_clocks_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Timeout), limited(0.2):
        for clock in ("monotonic", "thread_time", "perf_counter", "process_time"):
            monkeypatch.setattr(time, clock, lambda: 0.0)
        while True:
            pass


def test_a_deadlock_in_native_code_ends_with_its_process() -> None:
    code = (
        "from correctness.session import limits\n"
        "import ctypes\n"
        "limits.GRACE_S = 0.2\n"
        "libc, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(128)\n"
        "with limits.limited(0.1):\n"
        "    libc.pthread_mutex_lock(lock)\n"
        "    libc.pthread_mutex_lock(lock)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:00.6") and 'File "<string>", line 7' in done.stderr


BUSY = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from correctness.session.limits import limited
from tests.correctness.test_limits import compute
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(10)]
time.sleep(1)
begin = time.monotonic()
try:
    with limited(1):
        compute(0.15)
    print(time.monotonic() - begin)
finally:
    for other in others:
        other.kill()
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="processes are bound to a CPU on Linux alone"
)
def test_a_computation_that_is_slow_because_others_keep_the_machine_busy_is_no_hang() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1  # by the clock it would have been one


def test_a_limit_within_another_leaves_the_outer_one_as_it_was() -> None:
    outermost_s, _ = signal.getitimer(signal.ITIMER_REAL)  # of pytest-timeout, if it runs
    with pytest.raises(Timeout, match="longer than 0.3 s"), limited(0.3):
        with limited(30):
            compute(0.1)
        compute(60)
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (outermost_s > 0)


def test_what_may_pass_on_the_wall_can_be_chosen() -> None:
    with pytest.raises(Timeout), limited(30, wall_s=0.1):
        time.sleep(60)


def test_a_call_that_is_ended_while_gradients_are_off_leaves_them_on() -> None:
    with pytest.raises(Timeout), limited(0.05):
        torch.set_grad_enabled(False)
        compute(60)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_without_seconds_there_is_no_limit(seconds: float | None) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with limited(seconds) as limit:
        assert signal.getsignal(signal.SIGALRM) is before
    assert not limit.reached


def test_a_limit_outside_of_the_main_thread_is_refused() -> None:
    found: list[BaseException] = []

    def use() -> None:
        try:
            with limited(1):
                pass
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])
