"""``python -m benchmarks compare`` and ``gate``: two implementations, or two versions of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import measure, ratio, record, versions
from benchmarks.ratio import Ratio
from benchmarks.sweep import Settings, measure_workload
from benchmarks.workloads import MODES, Workloads
from correctness.pages import markdown_table, write_atomically
from correctness.problems import Problem, unsupported
from correctness.provenance import ROOT
from moe_impls.interface import Implementation

# Few tokens, a middle, and many on few experts: a comparison of two takes less than 20 s.
PROBLEMS = (
    Workloads(T=(16,), D=(256,), H=(128,), E=(32,), K=(4,)),
    Workloads(T=(256,), D=(256,), H=(128,), E=(32,), K=(4,)),
    Workloads(T=(1024,), D=(128,), H=(128,), E=(8,), K=(2,), load=("zipf",)),
)
SECONDS = 0.5  # of samples for each of the two on each problem


@dataclass(frozen=True)
class Compared:
    """Two on one workload: times, and how many times as long the second takes as the first."""

    problem: Problem
    mode: str
    first: str
    second: str
    first_ms: float | None = None
    second_ms: float | None = None
    ratio: Ratio | None = None
    reason: str = ""  # why there is no ratio

    @property
    def columns(self) -> dict[str, object]:
        """One line of the CSV."""
        p = self.problem
        sizes = {size: getattr(p, size) for size in ("T", "D", "H", "E", "K")}
        found = (
            asdict(self.ratio) if self.ratio else dict.fromkeys(["ratio", "low", "high", "rounds", "verdict"])
        )
        line = {"first": self.first, "second": self.second, **sizes, "load": p.load, "mode": self.mode}
        return line | {"first_ms": self.first_ms, "second_ms": self.second_ms, **found, "reason": self.reason}


def cells() -> Iterator[tuple[Problem, str]]:
    """The default problem set."""
    for block in PROBLEMS:
        for problem in block.problems():
            yield from ((problem, mode) for mode in MODES)


def implementations(first: Implementation, second: Implementation, seconds: float) -> Iterator[Compared]:
    """Each cell of the default problem set, checked and timed like any other."""
    other = replace(second, name=f"{second.name} (again)") if second.name == first.name else second
    environment = record.environment("cpu", "compare")
    settings = Settings(seconds, min_rounds=ratio.LEAST_ROUNDS)
    for problem, mode in cells():
        rows = measure_workload(problem, mode, [first, other], environment, settings)
        one, two = rows[first.name], rows[other.name]
        made = Compared(problem, mode, first.name, other.name, one.median_ms, two.median_ms)
        if one.samples_ms and two.samples_ms:
            yield replace(made, ratio=ratio.compare(one.samples_ms, two.samples_ms))
        else:
            failed = one if one.status != "ok" else two
            yield replace(made, reason=f"{failed.implementation}: {failed.status}, {failed.reason}")


def base_and_here(
    base: Path, implementation: Implementation, seconds: float, *, rounds: int = measure.MAX_ROUNDS
) -> Iterator[Compared]:
    """The same for one implementation as it is in another version (first) and here (second)."""
    for problem, mode in cells():
        made = Compared(problem, mode, f"{implementation.name} at base", implementation.name)
        if reason := unsupported(implementation.support, problem):
            yield replace(made, reason=reason)
            continue
        if mode == "forward_backward" and not implementation.support.gradients:
            continue
        yield again(made, base, seconds, rounds)


def again(compared: Compared, base: Path, seconds: float, rounds: int) -> Compared:
    """Measure one cell of two versions."""
    c = compared
    first, second = versions.measure_versions(
        (base, ROOT), c.second, c.problem, c.mode, seconds=seconds, rounds=rounds
    )
    medians = [pd.Series(t.samples_s).median() * 1e3 for t in (first, second)]
    return replace(
        c, first_ms=medians[0], second_ms=medians[1], ratio=ratio.compare(first.samples_s, second.samples_s)
    )


def frame(found: Sequence[Compared]) -> pd.DataFrame:
    return pd.DataFrame([compared.columns for compared in found])


def write_csv(path: Path, found: Sequence[Compared]) -> None:
    write_atomically(path, frame(found).to_csv(index=False, lineterminator="\n").encode())


def write_markdown(path: Path, found: Sequence[Compared]) -> None:
    shown = frame(found)
    for name in ("first_ms", "second_ms", "ratio", "low", "high"):
        shown[name] = ["" if pd.isna(value) else f"{value:.3g}" for value in shown[name]]
    write_atomically(path, (markdown_table(shown.fillna("")) + "\n").encode())


def show(found: Sequence[Compared], title: str) -> None:
    """The table on the terminal, 80 columns wide; differences that count are said in words."""
    table = Table(title=title, box=None, pad_edge=False)
    for name in ("T D H E K load", "mode", "ms", "ms", "ratio", "interval", "n", "verdict"):
        table.add_column(name, justify="left" if name in ("T D H E K load", "mode", "verdict") else "right")
    for c in found:
        p = c.problem
        sizes = " ".join(str(getattr(p, size)) for size in ("T", "D", "H", "E", "K")) + f" {p.load[:7]}"
        mode = {"forward": "fwd", "forward_backward": "fwd+bwd"}[c.mode]
        if c.ratio is None:
            table.add_row(sizes, mode, "", "", "", "", "", c.reason[:30])
            continue
        r = c.ratio
        table.add_row(
            sizes, mode, f"{c.first_ms:.3g}", f"{c.second_ms:.3g}", f"{r.ratio:.3f}",
            f"{r.low:.3f}-{r.high:.3f}", str(r.rounds), r.verdict,
        )  # fmt: skip
    Console(width=80).print(table)


def gate(
    base: Path, subjects: Sequence[Implementation], threshold: float, seconds: float
) -> tuple[list[Compared], list[Compared]]:
    """All cells of these implementations, and those that are slower here by more than ``threshold``.

    What is slower is measured a second time, for twice as long; it counts if it is slower both times.
    """

    def is_slower(c: Compared) -> bool:
        return c.ratio is not None and c.ratio.verdict == "slower" and c.ratio.ratio > 1 + threshold

    everything, slower = [], []
    for subject in subjects:
        for found in base_and_here(base, subject, seconds):
            if is_slower(found):
                found = again(found, base, 2 * seconds, measure.MAX_ROUNDS)
                slower += [found] * is_slower(found)
            everything.append(found)
    return everything, slower
