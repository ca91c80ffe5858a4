"""``python -m benchmarks compare``: two implementations, or two versions of one, in rounds."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import options as shared
from benchmarks.sweep.plan import SIZES
from benchmarks.sweep.workload import faults
from benchmarks.timing import measure, ratio, versions
from benchmarks.timing.measure import Timing
from benchmarks.timing.ratio import Ratio
from benchmarks.workloads import MODES, Workloads
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem, unsupported
from moe_impls.interface import Implementation, dtype_name
from moe_impls.registry import resolve
from reporting.pages import check_writable, markdown_table, write_atomically
from reporting.provenance import ROOT

# Few tokens, a middle, and many on few experts.
PROBLEMS = (
    Workloads(T=(16,), D=(128,), H=(128,), E=(8,), K=(2,)),
    Workloads(T=(256,), D=(128,), H=(128,), E=(8,), K=(2,)),
    Workloads(T=(1024,), D=(64,), H=(64,), E=(8,), K=(2,), load=("zipf",)),
)
SECONDS = 1.0  # of samples for each of the two on each problem, if measure.MAX_ROUNDS do not end it sooner
# However slow the machine makes each call, timing ends so many times the seconds after the start, if every
# problem has been visited often enough for an interval.
LONGEST = 2
LEAST_VISITS = math.ceil(ratio.LEAST_ROUNDS / measure.VISIT_ROUNDS)
Tell = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("impl", nargs="*", metavar="NAME", help=(
        "two names as for --impl elsewhere (default: index_add sorted_dispatch), or with --base one"
    ))  # fmt: skip
    shared.add_workload(parser.add_argument, repeatable=True)
    add_timing(parser, base_required=False)


def add_timing(parser: argparse.ArgumentParser, *, base_required: bool) -> None:
    """Add the options that `compare` and `gate` share."""
    parser.add_argument("--base", metavar="REF", required=base_required, help=(
        "a commit, or a folder with another version of moe_impls; in a checkout only"
    ))  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=(
        f"for the samples of each of the two on each problem (default: {SECONDS:g})"
    ))  # fmt: skip
    shared.add_threads(parser.add_argument)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")


def settle(options: argparse.Namespace) -> None:
    """Check what `add_timing` added, its files before anything is measured, and set the threads."""
    if not options.seconds > 0:
        raise ValueError(f"--seconds is {options.seconds}; it must be above 0")
    for option, path in (("--csv", options.csv), ("--markdown", options.markdown)):
        if path is not None:
            check_writable(option, path)
    shared.set_threads(options.threads)


def run(options: argparse.Namespace) -> int:
    settle(options)
    names = options.impl or (["sorted_dispatch"] if options.base else ["index_add", "sorted_dispatch"])
    wanted = 1 if options.base else 2
    if len(names) != wanted:
        raise ValueError(f"{len(names)} implementations are given; it must be {wanted}")
    given = options.load or shared.sizes_of(options)
    cells = shared.cells(options, (Workloads(),) if given else PROBLEMS)
    first, *second = [resolve(name) for name in names]
    with progress() as tell:
        if options.base:
            with versions.checked_out(options.base) as base:
                found = list(base_and_here(base, first, options.seconds, cells, tell))
            title = f"{names[0]} here, relative to {options.base}"
        else:
            found = implementations(first, second[0], options.seconds, cells, tell)
            title = f"{second[0].name}, relative to {first.name}"
    write(options, found, title)
    return 0 if any(c.ratio for c in found) else 1


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Tell on standard error what is being done: in one line that changes on a terminal, else a line each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False)
        return
    with console.status("") as status:
        yield lambda text: status.update(f"{text} ...")


@dataclass(frozen=True)
class Compared:
    """Two implementations on one workload: times, and how many times as long the second takes."""

    problem: Problem
    mode: str
    first: str
    second: str
    first_ms: float | None = None
    second_ms: float | None = None
    ratio: Ratio | None = None
    reason: str = ""  # why there is no ratio

    @property
    def label(self) -> str:
        """Name, sizes, load and mode in one line."""
        sizes = " ".join(f"{size}={getattr(self.problem, size)}" for size in SIZES)
        return f"{self.problem.name} {sizes} {self.problem.load} {self.mode}"

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
    """List the default problems in every mode."""
    return [(problem, mode) for block in PROBLEMS for problem in block.problems() for mode in MODES]


def implementations(
    first: Implementation,
    second: Implementation,
    seconds: float,
    cells: Sequence[tuple[Problem, str]],
    tell: Tell,
) -> list[Compared]:
    """Compare two on each problem and mode, all on one device: check, time in turns, check again."""
    begin, budget_s = time.monotonic(), 2 * seconds * len(cells)
    other = replace(second, name=f"{second.name} (again)") if second.name == first.name else second
    found = [Compared(problem, mode, first.name, other.name) for problem, mode in cells]
    tell(f"{first.name} and {other.name}: {len(cells)} calls, samples of {budget_s:g} s in all")
    for i, c in enumerate(found):
        tell(f"check {i + 1} of {len(found)}: {c.label}")
        failed = [f"{name}: {why}" for name, why in faults(c.problem, c.mode, (first, other)).items()]
        found[i] = replace(c, reason="; ".join(failed))
    right = [c for c in found if not c.reason]
    # The checks after the timing are twice those before it.
    until = begin + LONGEST * budget_s - 2 * (time.monotonic() - begin)
    visits = [_visits(c, (first, other), until, tell) for c in right]
    timed = iter(measure.in_turns(visits, seconds=seconds, device=cells[0][0].device))
    for i, c in enumerate(found):
        if not c.reason:
            tell(f"check after timing, {i + 1} of {len(found)}: {c.label}")
            found[i] = _if_still_right(_with_times(c, next(timed)), (first, other))
    return found


def _visits(
    c: Compared, of: Sequence[Implementation], until: float, tell: Tell
) -> Callable[[], dict[str, measure.Call]]:
    """Make a function that makes the calls of a visit, or none when it is late and there are enough."""
    done = 0

    def visit() -> dict[str, measure.Call]:
        nonlocal done
        done += 1
        if done > LEAST_VISITS and time.monotonic() > until:
            return {}
        tell(f"timing, visit {done} of {measure.VISITS}: {c.label}")
        return calls(c.problem, c.mode, of)

    return visit


def _if_still_right(compared: Compared, of: Sequence[Implementation]) -> Compared:
    """Keep the times only if the results are right after them, too."""
    wrong = faults(compared.problem, compared.mode, of, timed=True)
    reason = "; ".join(f"{name}: {why}" for name, why in wrong.items())
    return replace(compared, first_ms=None, second_ms=None, ratio=None, reason=reason) if wrong else compared


def calls(problem: Problem, mode: str, of: Sequence[Implementation]) -> dict[str, measure.Call]:
    """Make the calls of these implementations on new inputs."""
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
    base: Path,
    implementation: Implementation,
    seconds: float,
    cells: Sequence[tuple[Problem, str]],
    tell: Tell,
) -> Iterator[Compared]:
    """Compare one implementation as it is in another version (first) and here (second), cell by cell."""
    for number, (problem, mode) in enumerate(cells, 1):
        made = Compared(problem, mode, f"{implementation.name} at base", implementation.name)
        if reason := unsupported(implementation.support, problem):
            yield replace(made, reason=reason)
            continue
        if mode == "forward_backward" and not implementation.support.gradients:
            continue
        tell(f"{implementation.name}, {number} of {len(cells)}: {made.label}")
        yield two_versions(made, base, seconds)


def two_versions(compared: Compared, base: Path, seconds: float) -> Compared:
    """Time one cell of two versions, each in a process of its own."""
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


def write(options: argparse.Namespace, found: Sequence[Compared], title: str) -> None:
    """Show the table, and write it into the files that the options of `add_timing` name."""
    show(found, title)
    for path, write_to in ((options.csv, write_csv), (options.markdown, write_markdown)):
        if path is not None:
            write_to(path, found)
            print(path)


def show(found: Sequence[Compared], title: str) -> None:
    """Print the table, 80 columns wide, with differences that count in words."""
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
