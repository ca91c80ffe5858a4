"""``--isolate``: workloads are measured in a child process, and what ends it becomes a row.

The implementations of a workload are still timed side by side, in that one process. It tells by shared memory
which of them is running and until when it may; when the process dies, or has to be killed, that one gets the
row, and a new process measures the others.
"""

from __future__ import annotations

import functools
import math
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.sweep.record import Environment, Row, Status
from benchmarks.sweep.workload import Settings, WorkloadRun
from correctness.problems.problem import Problem
from correctness.session.child import Child, Ended
from moe_impls.registry import resolve

GRACE_S = 5.0  # after the time limit, in which what Python can interrupt ends by itself
NOBODY = -1


class Task(NamedTuple):
    """A workload to measure, with the names of its implementations."""

    problem: Problem
    mode: str
    names: list[str]
    settings: Settings
    environment: Environment
    state: Path


def _status(ended: Ended) -> Status:
    if ended.status is None:
        return "timeout"
    return "out_of_memory" if ended.status == -signal.SIGKILL else "error"


class Isolated:
    """Measures workloads in a process of its own, which is replaced when it ends."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="moe-sweep-")
        self._path = Path(self._folder.name) / "state"
        self._state = _shared(self._path, "w+")  # who is running, and until what time

    def rows(self, run: WorkloadRun, environment: Environment) -> dict[str, Row]:
        """The rows of a workload; see ``WorkloadRun.rows``."""
        rows: dict[str, Row] = {}
        while left := [name for name in run.cells if name not in rows]:
            task = Task(run.problem, run.mode, left, run.settings, environment, self._path)
            self._state[:] = NOBODY, math.inf
            self._child = self._child or Child.of_functions()
            try:
                rows |= self._child.call(_measure, task, is_over=self._is_over)
            except Ended as ended:
                self._child, who = None, int(self._state[0])
                for name in left if who == NOBODY else [left[who]]:
                    cell = run.cells[name]
                    cell.status, cell.reason = _status(ended), str(ended)
                    rows[name] = run.row_of(cell, environment)
        return {name: rows[name] for name in run.cells}

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.end()
            self._child = None
        self._folder.cleanup()

    def _is_over(self) -> bool:
        return time.monotonic() > self._state[1]


def _shared(path: Path, mode: str) -> np.ndarray:
    """Two numbers that processes share: the index of who is running, and until what time it may."""
    return np.memmap(path, dtype=np.float64, mode=mode, shape=2)  # type: ignore[call-overload]


_resolved = functools.cache(resolve)
_state = functools.cache(_shared)


def _measure(task: Task) -> dict[str, Row]:
    """Measure a workload here, in the child."""
    state = _state(task.state, "r+")

    def watch(name: str, seconds: float) -> None:
        state[1] = math.inf
        state[0] = task.names.index(name) if name else NOBODY
        state[1] = time.monotonic() + seconds + GRACE_S

    torch.set_num_threads(task.environment.threads)
    implementations = [_resolved(name) for name in task.names]
    return WorkloadRun(task.problem, task.mode, implementations, task.settings, watch).rows(task.environment)
