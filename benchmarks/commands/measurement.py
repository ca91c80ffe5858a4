"""``python -m benchmarks measurement``: what the measurement itself is worth, measured.

Outcomes, each with the figure that it must reach: equal calls are called equal; slowdowns of known size
are found; ratios repeat under load; and the harness adds next to nothing to what it measures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

from benchmarks.commands.compare import SECONDS, calls
from benchmarks.options import RESULTS
from benchmarks.sweep import record
from benchmarks.timing import load, measure, ratio
from benchmarks.timing.measure import Call, Timing
from correctness.problems.problem import Problem
from moe_impls.registry import resolve
from reporting import provenance
from reporting.pages import markdown_table, write_atomically

SUBJECT = "sorted_dispatch"
# Calls from 0.1 ms to some 50 ms on two CPU cores.
SIZES = (
    (4, 32, 32, 4, 1),
    (64, 64, 64, 8, 2),
    (256, 256, 128, 16, 4),
    (1024, 256, 256, 32, 4),
    (4096, 256, 256, 32, 4),
)
PLANTED = SIZES[2]
REPEATED = ("dense_mask", "sorted_dispatch", "index_add", "padded")
REPEATED_S = 10.0  # of samples for each of them: enough for measure.MAX_ROUNDS
AGREEMENT = 0.05
Pair = Callable[[], dict[str, Call]]  # two calls, made anew


@dataclass(frozen=True)
class Outcome:
    """Outcome of an experiment: how often it was done, what came out, and what is asked for."""

    experiment: str
    trials: int
    value: float
    limit: str
    reached: bool
    note: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer trials: a minute")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=(
        "folder of measurement.csv and measurement.md"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    found = all_outcomes(options.quick)
    print(*write(options.out, found, options.quick), sep="\n")
    return 0 if all(outcome.reached for outcome in found) else 1


def problem(sizes: tuple[int, ...]) -> Problem:
    T, D, H, E, K = sizes
    return Problem("measurement", T, D, H, D, E, K)


def twice(sizes: tuple[int, ...]) -> dict[str, Call]:
    """Make two equal calls, as `benchmarks compare` does."""
    subject = resolve(SUBJECT)
    return calls(problem(sizes), "forward", [subject, replace(subject, name="again")])


def compare_pairs(problems: Sequence[Pair]) -> list[ratio.Ratio]:
    """Compare the two calls of each pair as `benchmarks compare` does: a handful of problems in turns."""
    found = []
    for start in track(range(0, len(problems), len(SIZES)), "comparisons"):
        for outcomes in measure.in_turns(problems[start : start + len(SIZES)], seconds=SECONDS):
            found.append(ratio.compare(*(t.samples_s for t in measure.all_timed(outcomes).values())))
    return found


def slowed(first: Call, seconds: float) -> Call:
    """Make a call with a busy wait of known length at its end."""

    def both() -> None:
        first()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return both


def equal_calls(trials: int) -> Outcome:
    """Compare an implementation with itself: how often is a difference claimed?"""

    cycle = itertools.islice(itertools.cycle(SIZES), trials)
    claims = sum(
        r.verdict != "same" for r in compare_pairs([functools.partial(twice, sizes) for sizes in cycle])
    )
    return Outcome(
        "equal calls: a difference is claimed",
        trials,
        claims / trials,
        "at most 1 %",
        claims / trials <= 0.01,
        f"{SUBJECT} against itself, calls from 0.1 to 50 ms",
    )


def planted_slowdown(size: float, least: float, trials: int) -> Outcome:
    """Compare a call with itself and a busy wait: how often is it found slower?"""
    alone = twice(PLANTED)[SUBJECT]
    typical = statistics.median(measure.time_calls(alone, 1, "cpu") for _ in range(20))

    def pair() -> dict[str, Call]:
        first, second = twice(PLANTED).values()
        return {"first": first, "second": slowed(second, size * typical)}

    found = compare_pairs([pair] * trials)
    share = sum(r.verdict == "slower" for r in found) / trials
    most = max(r.rounds for r in found)
    return Outcome(
        f"slower by {size:.0%}: it is found",
        trials,
        share,
        f"at least {least:.0%}",
        share >= least,
        f"a busy wait after each call of {typical * 1e3:.2g} ms; at most {most} rounds",
    )


def repeated_sweep(sizes: list[tuple[int, ...]]) -> list[Outcome]:
    """Measure the ratios of all pairs of implementations twice while another process keeps one CPU busy.

    In two ways: in turns, as `benchmarks compare` does, and each problem in one go, as a sweep does.
    """
    subjects = [resolve(name) for name in REPEATED]
    problems = [functools.partial(calls, problem(s), "forward", subjects) for s in sizes]

    def in_turns() -> list[float]:
        return [r for outcomes in measure.in_turns(problems, seconds=REPEATED_S) for r in _ratios(outcomes)]

    def in_one_go() -> list[float]:
        outcomes = [
            measure.interleave(make(), seconds=REPEATED_S, min_rounds=ratio.LEAST_ROUNDS) for make in problems
        ]
        return [r for of_one in outcomes for r in _ratios(of_one)]

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    try:
        with load.busy(1):
            measured = {
                how: [sweep() for _ in track(range(2), f"the same sweep, {how}, under load")]
                for how, sweep in (("in turns", in_turns), ("in one go", in_one_go))
            }
    finally:
        torch.set_num_threads(threads)
    found = []
    for how, ratios in measured.items():
        agree = [abs(a / b - 1) <= AGREEMENT for a, b in zip(*ratios, strict=True)]
        share = sum(agree) / len(agree)
        found.append(
            Outcome(
                f"ratios repeat within {AGREEMENT:.0%}, each problem measured {how}",
                len(agree),
                share,
                "at least 95 %",
                share >= 0.95,
                "all pairs of "
                + ", ".join(REPEATED)
                + f", up to {measure.MAX_ROUNDS} rounds each; one CPU kept busy, one thread for them",
            )
        )
    return found


def _ratios(outcomes: Mapping[str, Timing | BaseException]) -> Iterator[float]:
    for a, b in itertools.combinations(measure.all_timed(outcomes).values(), 2):
        yield ratio.compare(a.samples_s, b.samples_s).ratio


def overhead() -> Outcome:
    """Time a call that does nothing."""
    timing = measure.all_timed(measure.interleave({"nothing": lambda: None}))["nothing"]
    microseconds = statistics.median(timing.samples_s) * 1e6
    return Outcome(
        "measured time of a call that does nothing, µs",
        len(timing.samples_s),
        microseconds,
        "below 5",
        microseconds < 5,
        f"{timing.calls_per_sample} calls a sample",
    )


def all_outcomes(quick: bool) -> list[Outcome]:
    trials = 20 if quick else 300
    sizes = [(T, D, D, E, K) for T in (16, 128, 512) for D in (64, 256) for E, K in ((8, 2), (32, 4))]
    return [
        equal_calls(trials),
        planted_slowdown(0.10, 0.95, trials // 3),
        planted_slowdown(0.05, 0.80, trials // 3),
        *repeated_sweep(sizes[::6] if quick else sizes),
        overhead(),
    ]


def write(folder: Path, found: list[Outcome], quick: bool) -> list[Path]:
    """Write measurement.csv and measurement.md."""
    made = {**provenance.columns(), **record.threads(), "quick": quick}
    table = pd.DataFrame([made | asdict(outcome) for outcome in found])
    shown = pd.DataFrame(
        {
            "experiment": [o.experiment for o in found],
            "trials": [o.trials for o in found],
            "result": [f"{o.value:.2g}" if "µs" in o.experiment else f"{o.value:.1%}" for o in found],
            "asked for": [o.limit for o in found],
            "reached": ["yes" if o.reached else "no" for o in found],
            "how": [o.note for o in found],
        }
    )
    page = f"""# What the measurement is worth

Written by `python -m benchmarks measurement{" --quick" * quick}` at commit {made["git_commit"][:12]} with
torch {made["torch_version"]} on {made["device_name"]}, {made["threads"]} threads. A comparison is one of
`benchmarks compare`: {SECONDS:g} s of samples for each of the two, at most {measure.MAX_ROUNDS} rounds, in
{measure.VISITS} visits between which other problems are measured and after which the inputs are made anew; a
difference is claimed if the {ratio.CONFIDENCE:.0%} interval of the ratio excludes 1 and the ratio is at least
{ratio.MINIMUM_EFFECT:.0%} from it.

{markdown_table(shown)}
"""
    paths = [folder / "measurement.csv", folder / "measurement.md"]
    write_atomically(paths[0], table.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(paths[1], page.encode())
    return paths
