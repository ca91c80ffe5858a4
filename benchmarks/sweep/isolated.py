"""``--isolate``: workloads are measured in a child process, and what ends it becomes a row.

The implementations of a workload are still timed side by side, in that one process. It tells by shared memory
which of them is running and until when it may; when the process dies, or has to be killed, that one gets the
row, and a new process measures the others.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.sweep.record import Environment, Row
from benchmarks.sweep.workload import Settings, failed_row, measure_workload
from correctness.problems.problem import Problem
from correctness.session.isolation import CHILDREN, ending
from moe_impls.interface import Implementation
from moe_impls.registry import resolve

GRACE_S = 5.0  # after the time limit, in which what Python can interrupt ends by itself
POLL_S = 0.1
NOBODY = -1


class Task(NamedTuple):
    """The arguments of ``measure_workload``, with implementations by name."""

    problem: Problem
    mode: str
    names: list[str]
    environment: Environment
    settings: Settings


class Child:
    """Measures workloads in a process of its own, which is replaced when it ends."""

    def __init__(self) -> None:
        self._process: Any = None
        # Who is running, and until what time.
        self._who = CHILDREN.Value("i", NOBODY, lock=False)
        self._until = CHILDREN.Value("d", math.inf, lock=False)

    def measure(
        self,
        problem: Problem,
        mode: str,
        implementations: Sequence[Implementation],
        environment: Environment,
        settings: Settings,
    ) -> dict[str, Row]:
        """What ``measure_workload`` returns; see there."""
        rows: dict[str, Row] = {}
        names = [implementation.name for implementation in implementations]
        while left := [name for name in names if name not in rows]:
            task = Task(problem, mode, left, environment, settings)
            try:
                rows |= self._ask(task)
            except _Ended as end:
                failed = left if end.who == NOBODY else [left[end.who]]
                for name in failed:
                    rows[name] = failed_row(problem, mode, name, end.status, end.reason, environment)
        return {name: rows[name] for name in names}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _ask(self, task: Task) -> dict[str, Row]:
        if self._process is None:
            self._connection, theirs = CHILDREN.Pipe()
            self._process = CHILDREN.Process(
                target=_serve, args=(theirs, self._who, self._until), daemon=True
            )
            self._process.start()
            theirs.close()
        self._who.value, self._until.value = NOBODY, math.inf
        try:
            self._connection.send(task)
            while not self._connection.poll(POLL_S):
                if time.monotonic() > self._until.value:
                    who = self._who.value
                    self.close()
                    raise _Ended(who, "timeout", "ran on after its time limit; its process was killed")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status, self._process = self._process.exitcode, None
            killed = status == -signal.SIGKILL
            raise _Ended(self._who.value, "out_of_memory" if killed else "error", ending(status)) from None


class _Ended(Exception):
    """The process ended; ``who`` was running."""

    def __init__(self, who: int, status: str, reason: str) -> None:
        super().__init__(reason)
        self.who, self.status, self.reason = who, status, reason


def _serve(connection: Connection, who: Any, until: Any) -> None:
    """Measure what comes over the connection until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, which then ends this process
    resolved = functools.cache(resolve)

    def running(name: str, seconds: float) -> None:
        until.value = math.inf
        who.value = task.names.index(name) if name else NOBODY
        until.value = time.monotonic() + seconds + GRACE_S

    with contextlib.suppress(EOFError):
        while True:
            task: Task = connection.recv()
            torch.set_num_threads(task.environment.threads)
            implementations = [resolved(name) for name in task.names]
            connection.send(
                measure_workload(
                    task.problem, task.mode, implementations, task.environment, task.settings, running
                )
            )
