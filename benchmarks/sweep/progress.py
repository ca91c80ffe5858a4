"""Progress of a sweep: a bar with the time left on a terminal, a line for each workload elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.sweep.record import Row


class SweepProgress:
    """Told when a workload begins and finishes; those left are taken to last as long as those done."""

    @classmethod
    @contextlib.contextmanager
    def on(cls, stream: TextIO, total: int, *, bar: bool = True) -> Iterator[SweepProgress]:
        """Progress on a stream while the block runs; a bar on a terminal, if one is wanted."""
        progress = cls(total, stream, bar=bar and stream.isatty())
        try:
            yield progress
        finally:
            progress.close()

    def __init__(self, total: int, stream: TextIO, *, bar: bool) -> None:
        self.total, self.done, self.started, self.stream = total, 0, time.monotonic(), stream
        self.bar = None
        if bar:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            left = (TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
            console = Console(file=stream)
            self.bar = Progress(
                *columns,
                *left,
                console=console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.task = self.bar.add_task("sweep", total=total)
            self.bar.start()

    def begin(self, workload: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=workload)
            self.bar.refresh()

    def finish(self, workload: str, rows: list[Row]) -> None:
        self.done += 1
        failures = [f"{r.implementation} {r.status} ({r.reason})" for r in rows if r.status != "ok"]
        if self.bar:
            for failure in failures:
                self.bar.console.print(f"{workload}: {failure}", markup=False, highlight=False)
            self.bar.advance(self.task)
            self.bar.refresh()
            return
        times = [f"{r.implementation} {r.median_ms:.3g} ms" for r in rows if r.median_ms is not None]
        left_s = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        line = (
            f"[{self.done}/{self.total}] {workload}: {', '.join(times + failures)}; about {left_s:.0f} s left"
        )
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
