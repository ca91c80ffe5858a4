"""``python -m benchmarks figures``: what the measurement itself is worth, measured.

Experiments, each with the figure that it must reach: equal calls are called equal; slowdowns of known size
are found; ratios repeat under load; and the harness adds next to nothing to what it measures.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

from benchmarks import measure, ratio
from benchmarks.comparison import SECONDS
from benchmarks.measure import Call
from correctness import provenance
from correctness.pages import markdown_table, write_atomically
from correctness.problems import Problem, make_inputs
from moe_impls.registry import resolve

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
AGREEMENT = 0.05
LOAD = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Figure:
    """What was done, how often, what share or value came out of it, and what is asked for."""

    experiment: str
    trials: int
    value: float
    limit: str
    reached: bool
    note: str


def problem(sizes: tuple[int, ...]) -> Problem:
    T, D, H, E, K = sizes
    return Problem("figures", T, D, H, D, E, K)


def call(name: str, sizes: tuple[int, ...]) -> Call:
    p = problem(sizes)
    return measure.call_of(resolve(name).forward, p, make_inputs(p), "forward")


def compared(first: Call, second: Call) -> ratio.Ratio:
    """Two calls at the settings of `benchmarks compare`."""
    outcomes = measure.interleave(
        {"first": first, "second": second}, seconds=SECONDS, min_rounds=ratio.LEAST_ROUNDS
    )
    return ratio.compare(*(timing.samples_s for timing in measure.all_timed(outcomes).values()))


def later(first: Call, seconds: float) -> Call:
    """The same call, and then a busy wait of known length."""

    def both() -> None:
        first()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return both


def equal_calls(trials: int) -> Figure:
    """An implementation against itself: how often a difference is claimed."""
    calls = [(call(SUBJECT, sizes), call(SUBJECT, sizes)) for sizes in SIZES]
    pairs = list(itertools.islice(itertools.cycle(calls), trials))
    claims = sum(compared(*pair).verdict != "same" for pair in track(pairs, "equal calls"))
    return Figure(
        "equal calls: a difference is claimed",
        trials,
        claims / trials,
        "at most 1 %",
        claims / trials <= 0.01,
        f"{SUBJECT} against itself, calls from 0.1 to 50 ms",
    )


def planted_slowdown(size: float, least: float, trials: int) -> Figure:
    first = call(SUBJECT, PLANTED)
    typical = statistics.median(measure.time_calls(first, 1, "cpu") for _ in range(20))
    second = later(first, size * typical)
    found = [compared(first, second) for _ in track(range(trials), f"slower by {size:.0%}")]
    share = sum(r.verdict == "slower" for r in found) / trials
    most = max(r.rounds for r in found)
    return Figure(
        f"slower by {size:.0%}: it is found",
        trials,
        share,
        f"at least {least:.0%}",
        share >= least,
        f"a busy wait after each call of {typical * 1e3:.2g} ms; at most {most} rounds",
    )


def _spin(parent: int) -> None:
    while os.getppid() == parent:  # killed or not, it leaves nothing behind that computes
        sum(range(1000))


def repeated_sweep(sizes: list[tuple[int, ...]]) -> Figure:
    """The ratios of all pairs of implementations, measured twice while another process keeps one CPU busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    load = LOAD.Process(target=_spin, args=(os.getpid(),), daemon=True)
    load.start()
    try:
        ratios = [list(_all_ratios(sizes)) for _ in track(range(2), "the same sweep, under load")]
    finally:
        load.kill()
        torch.set_num_threads(threads)
    agree = [abs(a / b - 1) <= AGREEMENT for a, b in zip(*ratios, strict=True)]
    share = sum(agree) / len(agree)
    return Figure(
        f"ratios repeat within {AGREEMENT:.0%}",
        len(agree),
        share,
        "at least 95 %",
        share >= 0.95,
        "all pairs of " + ", ".join(REPEATED) + "; one CPU kept busy, one thread for each other",
    )


def _all_ratios(sizes: list[tuple[int, ...]]) -> Iterator[float]:
    for s in sizes:
        calls = {name: call(name, s) for name in REPEATED}
        outcomes = measure.interleave(calls, seconds=2 * SECONDS, min_rounds=ratio.LEAST_ROUNDS)
        for a, b in itertools.combinations(measure.all_timed(outcomes).values(), 2):
            yield ratio.compare(a.samples_s, b.samples_s).ratio


def overhead() -> Figure:
    timing = measure.all_timed(measure.interleave({"nothing": lambda: None}))["nothing"]
    microseconds = statistics.median(timing.samples_s) * 1e6
    return Figure(
        "measured time of a call that does nothing, µs",
        len(timing.samples_s),
        microseconds,
        "below 5",
        microseconds < 5,
        f"{timing.calls_per_sample} calls a sample",
    )


def all_figures(quick: bool) -> list[Figure]:
    trials = 20 if quick else 300
    sizes = [(T, D, D, E, K) for T in (16, 128, 512) for D in (64, 256) for E, K in ((8, 2), (32, 4))]
    return [
        equal_calls(trials),
        planted_slowdown(0.10, 0.95, trials // 3),
        planted_slowdown(0.05, 0.80, trials // 3),
        repeated_sweep(sizes[::6] if quick else sizes),
        overhead(),
    ]


def write(folder: Path, found: list[Figure], quick: bool) -> list[Path]:
    """measurement.csv and measurement.md."""
    made = provenance.columns() | {"threads": torch.get_num_threads(), "quick": quick}
    table = pd.DataFrame([made | asdict(figure) for figure in found])
    shown = pd.DataFrame(
        {
            "experiment": [f.experiment for f in found],
            "trials": [f.trials for f in found],
            "result": [f"{f.value:.2g}" if "µs" in f.experiment else f"{f.value:.1%}" for f in found],
            "asked for": [f.limit for f in found],
            "reached": ["yes" if f.reached else "no" for f in found],
            "how": [f.note for f in found],
        }
    )
    page = f"""# What the measurement is worth

Written by `python -m benchmarks figures{" --quick" * quick}` at commit {made["git_commit"][:12]} with torch
{made["torch_version"]} on {made["device_name"]}, {made["threads"]} threads. A comparison is one of
`benchmarks compare`: {SECONDS:g} s of samples for each of the two, at most {measure.MAX_ROUNDS} rounds; a
difference is claimed if the {ratio.CONFIDENCE:.0%} interval of the ratio excludes 1 and the ratio is at least
{ratio.MINIMUM_EFFECT:.0%} from it.

{markdown_table(shown)}
"""
    paths = [folder / "measurement.csv", folder / "measurement.md"]
    write_atomically(paths[0], table.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(paths[1], page.encode())
    return paths
