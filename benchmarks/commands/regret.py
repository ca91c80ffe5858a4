"""``python -m benchmarks regret``: what ``auto`` loses by its choice, on loads that it was not tuned on.

Its table holds even loads of some layers; here other layers meet uneven loads. In each cell ``auto`` and what
it chooses from are timed in the same rounds.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.commands import peers, tune
from benchmarks.commands.peers import rounded
from benchmarks.options import RESULTS
from benchmarks.sweep import journal, record
from benchmarks.sweep.workload import taken, undeclared
from benchmarks.timing import measure, ratio
from benchmarks.workloads import MODES, flops
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls import auto
from moe_impls.interface import Implementation, check_choice, dtype_name
from moe_impls.registry import resolve
from reporting import provenance
from reporting.pages import check_writable, markdown_table, write_atomically

# None has the sizes of one in tune.LAYERS: the notebook's layer, which is there, has half of its H here.
LAYERS = (
    peers.LAYERS[1],  # Qwen3-30B-A3B with 32 experts
    peers.LAYERS[2],  # a quarter of Mixtral 8x7B
    replace(peers.LAYERS[4], name="notebook, half", H=512),
    Problem("small", T=1, D=384, H=256, O=384, E=48, K=6, bias=False),
)
QUICK_LAYERS = LAYERS[2:]
# The experts 0 to `last` are a quarter of all, or K. In `router` clusters of tokens meet a linear router.
LOADS = ("zipf", "zipf_2", "one_hot_expert", "hot_experts_4", "experts_0-{last}", "router")
QUICK_LOADS = ("zipf", "hot_experts_4", "router")
TOKENS, QUICK_TOKENS = (16, 256, 2048), (256,)
DTYPES = {dtype_name(dtype): dtype for dtype in tune.DTYPES}
SECONDS, ROUNDS = 0.2, ratio.LEAST_ROUNDS
CLOSE = (1.02, 1.03)  # choice_regret up to which a choice counts as good
PART = "regret.part.csv"  # what is measured so far


@dataclass(frozen=True)
class Cell:
    """One call, by ``auto`` and by what it chooses from.

    busiest: rows of the busiest expert over the mean. choice_regret: the time of what ``auto`` took over
    that of the fastest, in the same rounds; 1 if it took the fastest. regret, low, high: ``auto`` itself
    over the fastest, with the interval of `ratio.compare`. times_ms: the medians of all that were timed.
    """

    layer: str
    load: str
    dtype: str
    mode: str
    T: int
    D: int
    H: int
    E: int
    K: int
    busiest: float
    fastest: str
    fastest_ms: float
    auto_took: str
    auto_ms: float
    choice_regret: float
    regret: float
    low: float
    high: float
    rounds: int
    times_ms: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Writes regret.csv and regret.md; what an interrupted run has measured is in {PART}, and the same "
        "command goes on from there."
    )
    parser.add_argument("--quick", action="store_true", help="two layers, three loads, one T")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help=(
        f"one of {', '.join(DTYPES)} (default: float32)"
    ))  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=(
        f"{RESULTS.name}/ unless given, over what it has of an earlier run"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    check_writable("--out", options.out / "regret.csv")
    check_choice("--dtype", options.dtype, tuple(DTYPES))
    made = _made(options.quick, options.dtype)
    print(*write(options.out, measure_all(options.out, made), made), sep="\n")
    return 0


def planned(quick: bool, dtype: torch.dtype) -> Iterator[tuple[Problem, list[tuple[int, str]]]]:
    """List each layer and load with its most tokens, and the numbers of tokens and modes to measure."""
    layers, loads, tokens = (QUICK_LAYERS, QUICK_LOADS, QUICK_TOKENS) if quick else (LAYERS, LOADS, TOKENS)
    for layer, load in itertools.product(layers, loads):
        p = replace(layer, dtype=dtype, load=load.format(last=max(layer.E // 4, layer.K) - 1))
        pairs = itertools.product(tokens, MODES)
        cells = [(T, m) for T, m in pairs if flops(replace(p, T=T), m) <= tune.MAX_FLOPS["cpu"]]
        yield replace(p, T=max(T for T, _ in cells)), cells


def busiest_over_mean(expert_ids: Tensor, E: int) -> float:
    """Compute the rows of the busiest expert over the mean of all E, from expert_ids [T, K]."""
    return int(expert_ids.flatten().bincount().max()) * E / expert_ids.numel()


def measure_cell(
    problem: Problem, mode: str, inputs: Inputs, implementations: Sequence[Implementation]
) -> Cell:
    """Time in common rounds ``auto``, what it took, and all that come near the fastest in a first try."""
    p, chooses = problem, resolve("auto")
    took = taken(chooses, p, inputs, mode)
    subjects = {i.name: i for i in (*implementations, resolve(took)) if undeclared(i, p, mode) is None}
    calls = {name: measure.call_of(i.forward, p, inputs, mode) for name, i in subjects.items()}
    near = measure.near_the_fastest(calls, took, hopeless=auto.LEFT_OUT)
    near |= {took: calls[took], "auto": measure.call_of(chooses.forward, p, inputs, mode)}
    timings = measure.all_timed(measure.interleave(near, seconds=SECONDS, min_rounds=ROUNDS))
    median_s = {name: statistics.median(timing.samples_s) for name, timing in timings.items()}
    fastest = min(median_s.keys() - {"auto"}, key=median_s.__getitem__)
    timed, choice = (
        ratio.compare(timings[fastest].samples_s, timings[name].samples_s) for name in ("auto", took)
    )
    return Cell(
        layer=p.name,
        load=p.load,
        dtype=dtype_name(p.dtype),
        mode=mode,
        **{size: getattr(p, size) for size in ("T", "D", "H", "E", "K")},
        busiest=rounded(busiest_over_mean(inputs.routing.expert_ids, p.E)),
        fastest=fastest,
        fastest_ms=rounded(median_s[fastest] * 1e3),
        auto_took=took,
        auto_ms=rounded(median_s["auto"] * 1e3),
        choice_regret=rounded(choice.ratio),
        regret=rounded(timed.ratio),
        low=rounded(timed.low),
        high=rounded(timed.high),
        rounds=timed.rounds,
        times_ms="; ".join(f"{n} {s * 1e3:.4g}" for n, s in sorted(median_s.items(), key=itemgetter(1))),
    )


def measure_all(folder: Path, made: dict[str, object]) -> pd.DataFrame:
    """Measure every cell. Each is in ``folder`` at once, and a run is continued there.

    Raises:
        RecordError: what was begun there is of another version, machine, table or choice of cells.
    """
    implementations = tune.candidates()
    with journal.opened(folder / PART, Cell, made) as begun:
        done = {(cell.layer, cell.load, cell.T, cell.mode) for cell in begun.rows}
        for whole, cells in track(list(planned(bool(made["quick"]), DTYPES[str(made["dtype"])])), "loads"):
            left = [(T, mode) for T, mode in cells if (whole.name, whole.load, T, mode) not in done]
            inputs = make_inputs(whole) if left else None
            for T, mode in left:
                assert inputs is not None
                begun.append(measure_cell(replace(whole, T=T), mode, inputs.first(T), implementations))
        return pd.DataFrame([made | asdict(cell) for cell in begun.rows])


def _made(quick: bool, dtype: str) -> dict[str, object]:
    shipped = auto.shipped_path()
    table = shipped if auto.table("cpu") == auto.read(shipped) else auto.tuned_path()
    ours = {"table": table.name, "dtype": dtype, "quick": quick}
    return {**provenance.columns(), **record.threads(), **ours}


def summary(cells: pd.DataFrame, by: str) -> pd.DataFrame:
    """Sum up what was lost in a line for each value of a column."""
    lines = []
    for value, rows in cells.groupby(by, sort=False):
        lost, worst = rows["choice_regret"], rows.loc[rows["choice_regret"].idxmax()]
        call = f"{worst['layer']}, {worst['load']}, {worst['mode']}, T={worst['T']}"
        lines.append(
            {
                by: value,
                "cells": len(rows),
                "choice_regret, geometric mean": f"{ratio.geometric_mean(lost.tolist()):.3f}",
                "worst": f"{worst['choice_regret']:.2f}",
                "where": f"{call}: took {worst['auto_took']}, fastest {worst['fastest']}",
                **{f"up to {close:g}": f"{(lost <= close).mean():.0%}" for close in CLOSE},
                "regret, geometric mean": f"{ratio.geometric_mean(rows['regret'].tolist()):.3f}",
                "surely slower": int((rows["low"] > 1 + ratio.MINIMUM_EFFECT).sum()),
            }
        )
    return pd.DataFrame(lines)


def write(folder: Path, cells: pd.DataFrame, made: dict[str, object]) -> list[Path]:
    """Write regret.csv and its page; remove what was kept of the run so far."""
    some = " --quick" * bool(made["quick"]) + f" --dtype {made['dtype']}" * (made["dtype"] != "float32")
    shown = ["layer", "load", "mode", "T", "busiest", "fastest", "fastest_ms", "auto_took", "auto_ms",
             "choice_regret", "regret", "low", "high"]  # fmt: skip
    page = f"""# What `auto` loses by its choice

Written by `python -m benchmarks regret{some}` at commit {str(made["git_commit"])[:12]} with torch
{made["torch_version"]} on {made["device_name"]}, {made["threads"]} threads, in {made["dtype"]}. `auto` chose
by `{made["table"]}`, which holds even loads; the loads and the sizes of the layers are others here.
*choice_regret*: the time of what `auto` took over that of the fastest that it can choose, in common rounds,
1 if it took the fastest. *regret*: `auto` itself over the fastest, with its interval (*low*, *high*): with
the time of choosing, and the noise of one function timed twice. *surely slower*: cells whose whole interval
is above {1 + ratio.MINIMUM_EFFECT:g}. The fastest is found by the same samples: of two that are as fast, the
one that `auto` did not take may come out ahead. *busiest*: rows of the busiest expert over the mean. Who
takes longer in a first try than {auto.LEFT_OUT:g} times the fastest was not timed further, unless `auto`
took it.

{markdown_table(summary(cells, "mode"))}

By load:

{markdown_table(summary(cells, "load"))}

## Every cell

{markdown_table(cells[shown])}
"""
    contents = {"regret.csv": cells.to_csv(index=False, lineterminator="\n"), "regret.md": page}
    for name, content in contents.items():
        write_atomically(folder / name, content.encode())
    journal.discard(folder / PART)
    return [folder / name for name in contents]
