"""``python -m benchmarks compare`` and ``gate``: two implementations, or two versions of one."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.sweep.plan import SIZES
from benchmarks.sweep.workload import faults
from benchmarks.timing import measure, ratio, versions
from benchmarks.timing.measure import Timing
from benchmarks.timing.ratio import Ratio
from benchmarks.workloads import MODES, Workloads
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem, unsupported
from moe_impls.interface import Implementation, dtype_name
from reporting.pages import markdown_table, write_atomically
from reporting.provenance import ROOT

# Few tokens, a middle, and many on few experts: a comparison of two takes less than 20 s.
PROBLEMS = (
    Workloads(T=(16,), D=(128,), H=(128,), E=(8,), K=(2,)),
    Workloads(T=(256,), D=(128,), H=(128,), E=(8,), K=(2,)),
    Workloads(T=(1024,), D=(64,), H=(64,), E=(8,), K=(2,), load=("zipf",)),
)
SECONDS = 1.0  # of samples for each of the two on each problem, if measure.MAX_ROUNDS do not end it sooner


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
        sizes = {size: getattr(p, size) for size in SIZES}
        found = (
            asdict(self.ratio) if self.ratio else dict.fromkeys(["ratio", "low", "high", "rounds", "verdict"])
        )
        line = {"first": self.first, "second": self.second, "workload": p.name, **sizes, "load": p.load}
        line |= {"dtype": dtype_name(p.dtype), "device": p.device, "mode": self.mode}
        return line | {"first_ms": self.first_ms, "second_ms": self.second_ms, **found, "reason": self.reason}


def default_cells() -> list[tuple[Problem, str]]:
    """The default problem set in every mode."""
    return [(problem, mode) for block in PROBLEMS for problem in block.problems() for mode in MODES]


def implementations(
    first: Implementation, second: Implementation, seconds: float, *, cells: Sequence[tuple[Problem, str]]
) -> list[Compared]:
    """Each of these problems and modes, all on one device, checked like any other and timed in turns."""
    other = replace(second, name=f"{second.name} (again)") if second.name == first.name else second
    found: list[Compared] = []
    for problem, mode in cells:
        failed = [f"{name}: {why}" for name, why in faults(problem, mode, (first, other)).items()]
        found.append(Compared(problem, mode, first.name, other.name, reason="; ".join(failed)))
    right = [c for c in found if not c.reason]
    problems = [functools.partial(calls, c.problem, c.mode, (first, other)) for c in right]
    timed = iter(measure.in_turns(problems, seconds=seconds, device=cells[0][0].device))
    return [c if c.reason else _if_still_right(_with_times(c, next(timed)), (first, other)) for c in found]


def _if_still_right(compared: Compared, of: Sequence[Implementation]) -> Compared:
    """A comparison whose times count, as the results are right after them, too."""
    wrong = faults(compared.problem, compared.mode, of, timed=True)
    reason = "; ".join(f"{name}: {why}" for name, why in wrong.items())
    return replace(compared, first_ms=None, second_ms=None, ratio=None, reason=reason) if wrong else compared


def calls(problem: Problem, mode: str, of: Sequence[Implementation]) -> dict[str, measure.Call]:
    """The calls of these implementations on inputs made anew."""
    inputs = make_inputs(problem)
    return {i.name: measure.call_of(i.ready(inputs.experts), problem, inputs, mode) for i in of}


def _with_times(compared: Compared, outcomes: Mapping[str, Timing | BaseException]) -> Compared:
    failed = [f"{name}: {error}" for name, error in outcomes.items() if isinstance(error, BaseException)]
    if failed:
        return replace(compared, reason="; ".join(failed))
    first_s, second_s = (timing.samples_s for timing in measure.all_timed(outcomes).values())
    first_ms, second_ms = (statistics.median(s) * 1e3 for s in (first_s, second_s))
    return replace(compared, first_ms=first_ms, second_ms=second_ms, ratio=ratio.compare(first_s, second_s))


def base_and_here(
    base: Path, implementation: Implementation, seconds: float, *, cells: Sequence[tuple[Problem, str]]
) -> Iterator[Compared]:
    """The same for one implementation as it is in another version (first) and here (second)."""
    for problem, mode in cells:
        made = Compared(problem, mode, f"{implementation.name} at base", implementation.name)
        if reason := unsupported(implementation.support, problem):
            yield replace(made, reason=reason)
            continue
        if mode == "forward_backward" and not implementation.support.gradients:
            continue
        yield again(made, base, seconds)


def again(compared: Compared, base: Path, seconds: float) -> Compared:
    """Measure one cell of two versions."""
    c = compared
    timings = versions.measure_versions((base, ROOT), c.second, c.problem, c.mode, seconds=seconds)
    return _with_times(c, dict(zip((c.first, c.second), timings, strict=True)))


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
        sizes = " ".join(str(getattr(p, size)) for size in SIZES) + f" {p.load[:7]}"
        mode = {"forward": "fwd", "forward_backward": "fwd+bwd"}[c.mode]
        if c.ratio is None:
            table.add_row(sizes, mode, "", "", "", "", "", "none: see below")
            continue
        r = c.ratio
        table.add_row(
            sizes, mode, f"{c.first_ms:.3g}", f"{c.second_ms:.3g}", f"{r.ratio:.3f}",
            f"{r.low:.3f}-{r.high:.3f}", str(r.rounds), r.verdict,
        )  # fmt: skip
    console = Console(width=80)
    console.print(table)
    for reason in dict.fromkeys(c.reason for c in found if c.ratio is None):
        console.print(reason, soft_wrap=True, markup=False, highlight=False)


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
        for found in base_and_here(base, subject, seconds, cells=default_cells()):
            if is_slower(found):
                found = again(found, base, 2 * seconds)
                slower += [found] * is_slower(found)
            everything.append(found)
    return everything, slower
