"""A sweep under way: each workload is measured when it is asked for, and on disk before the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from benchmarks.sweep import journal, plan
from benchmarks.sweep.isolated import Isolated
from benchmarks.sweep.journal import Journal
from benchmarks.sweep.progress import SweepProgress
from benchmarks.sweep.record import Row
from benchmarks.sweep.request import Request
from benchmarks.sweep.workload import WorkloadRun


class SweepRun:
    """A sweep whose file is open. planned: the names of implementations to measure by workload."""

    def __init__(
        self,
        request: Request,
        planned: Mapping[str, Sequence[str]],
        rows: Journal[Row],
        isolated: Isolated | None,
    ) -> None:
        self.request, self.planned, self._journal, self._isolated = request, planned, rows, isolated
        self._before = plan.by_workload(rows.rows)
        self._finished = 0

    def rows(self, workload: str) -> dict[str, Row]:
        """The rows of a workload: those of the file, and the others, measured side by side and written."""
        rows = dict(self._before.get(workload, {}))
        left = [self.request.implementations[n] for n in self.planned[workload] if n not in rows]
        if left:
            run = WorkloadRun(*self.request.workloads[workload], left, self.request.settings)
            environment = self.request.environment
            new = self._isolated.rows(run, environment) if self._isolated else run.rows(environment)
            for row in new.values():
                self._journal.append(row)
            rows |= new
        self._finished += 1
        return rows

    def remarks(self) -> list[str]:
        """What is to be told when the sweep ends."""
        lines = []
        if self._journal.was_torn:
            lines.append("the last line of the file was not whole; its row was measured again")
        if self._finished < len(self.planned):
            lines.append(f"incomplete: {self._finished} of {len(self.planned)} workloads were measured")
        return lines


@contextlib.contextmanager
def begun(request: Request, planned: Mapping[str, Sequence[str]]) -> Iterator[SweepRun]:
    """Begin or continue a sweep, of which some workloads or implementations may be left out.

    Raises:
        RecordError, OSError: its file cannot be written, see ``journal.opened``.
    """
    options = {"options": request.options.given(), "cells": planned}
    what = journal.read_plan(request.csv) if request.resumes else options
    with journal.opened(request.csv, Row, what) as rows, contextlib.ExitStack() as stack:
        isolated = Isolated() if request.options.isolate else None
        if isolated:
            stack.callback(isolated.close)
        yield SweepRun(request, planned, rows, isolated)


def measure_all(request: Request, stream: TextIO) -> list[Row]:
    """Measure everything that is requested, with progress on a stream; returns all rows of the file."""
    planned = {workload: list(request.implementations) for workload in request.workloads}
    found: list[Row] = []
    with begun(request, planned) as run, SweepProgress.on(stream, len(planned)) as progress:
        for workload in planned:
            progress.begin(workload)
            rows = list(run.rows(workload).values())
            progress.finish(workload, rows)
            found += rows
    return found
