"""Other work on the machine while something is timed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.synchronize import Semaphore

SPAWN = multiprocessing.get_context("spawn")


def _spin(parent: int, started: Semaphore) -> None:
    started.release()
    while os.getppid() == parent:  # killed or not, it leaves nothing behind that computes
        sum(range(1000))


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes computing while the block runs, each on a CPU if it gets one."""
    started = SPAWN.Semaphore(0)
    loads = [SPAWN.Process(target=_spin, args=(os.getpid(), started), daemon=True) for _ in range(processes)]
    try:
        for load in loads:
            load.start()
        for _ in loads:
            started.acquire()
        yield
    finally:
        for load in loads:
            if load.pid is not None:
                load.kill()
                load.join()
