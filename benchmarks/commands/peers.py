"""``python -m benchmarks peers``: the implementations of this project beside those of other libraries.

Layers of models, most of them smaller in one of their sizes so that they fit, in three regimes. All that take
a call are timed in the same rounds; the figures are ratios of the best peer and the best of ours, each chosen
by its median.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

from benchmarks.options import RESULTS
from benchmarks.report import peers as report
from benchmarks.report.styles import png
from benchmarks.sweep import journal, record
from benchmarks.sweep.workload import taken, undeclared
from benchmarks.timing import load, measure, memory, ratio, roofline
from benchmarks.timing.measure import Call
from benchmarks.workloads import MODELS
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Forward, Implementation, check_choice, dtype_name
from moe_impls.processor import multiplies
from moe_impls.registry import IMPLEMENTATIONS, PEERS, resolve, usable
from reporting import provenance
from reporting.pages import check_writable, markdown_table, write_atomically


def _layer(model: str, name: str = "", **smaller: int) -> Problem:
    """Take a model's layer, without the output activation that no peer has; the regime sets T."""
    layer = next(MODELS[model].problems())
    smaller = {"O": smaller.get("D", layer.O), **smaller}
    return replace(layer, name=name or model, T=1, output_activation="none", **smaller)


LAYERS = (
    _layer("olmoe-1b-7b"),
    _layer("qwen3-30b-a3b", "qwen3-30b-a3b, 32 experts", E=32),
    _layer("mixtral-8x7b", "mixtral-8x7b, a quarter", D=1024, H=3584),
    _layer("gpt-oss-20b", "gpt-oss-20b, half", D=1440, H=1440),
    _layer("notebook"),
)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Regime:
    """Numbers of tokens in one mode, and of them those of a quick run.

    pause_s: what passes before each call, as a decode loop does other things. busy: processes that compute
    beside, for each CPU.
    """

    name: str
    mode: str
    tokens: tuple[int, ...]
    quick: tuple[int, ...]
    pause_s: float = 0.0
    busy: int = 0


REGIMES = (
    Regime("few tokens", "forward", (1, 4, 16, 64, 256), (1, 64)),
    Regime("many tokens", "forward", (1024, 4096), (1024,)),
    Regime("training", "forward_backward", (256, 2048), (256,)),
    Regime("few tokens, after a pause", "forward", (1, 4, 16, 64, 256), (1,), pause_s=0.05),
    Regime("few tokens, CPUs busy", "forward", (1, 4, 16, 64, 256), (1,), busy=1),
    Regime("few tokens, CPUs twice as busy", "forward", (1, 4, 16, 64, 256), (1,), busy=2),
)
QUICK_LAYERS = (LAYERS[2], LAYERS[4])
# Growth with the number of experts at a fixed number of slots, and with K.
GROWTH = Problem("growth", T=256, D=256, H=256, O=256, E=32, K=4, bias=False)
GROWN = {"E": (8, 16, 32, 64, 128, 256), "K": (1, 2, 4, 8, 16)}
QUICK_GROWN = {"E": (8, 32, 128, 256), "K": (1, 4, 8, 16)}
SECONDS, ROUNDS, ROUNDS_PAUSED = 0.3, ratio.LEAST_ROUNDS, 40
HOPELESS = 1.2  # times the fastest of ours, or of the peers: what takes longer in a first try is no candidate
HOPELESS_BESIDE = 2.0  # the same beside other work, where a try tells less
MEMORY_BYTES = 8 * 2**30  # of one call: what gathers more weights than this is no candidate, either
CANDIDATES = 3  # of a side, at most
MOST, MOST_S = 5.0, 1.0  # times the fastest of ours, and seconds: what takes longer than both is not timed
FEWER = (1, 4, 16, 64, 256, 1024)  # tokens of the calls that show who is hopeless before the whole is tried
PART = "peers.part.csv"  # what is measured so far


@dataclass(frozen=True)
class Cell:
    """One call, by ours and by the peers.

    ratio, low, high: the best peer over the best of ours, with the interval of `ratio.compare`.
    auto_ratio, auto_low, auto_high: auto over the best of ours that takes the weights as they are.
    pause_ms: before each call. busy: processes that compute beside, for each CPU.
    of_products: the time of dense products of the same FLOPs over that of ours.
    of_reading: the time of the traffic, at the bandwidth measured beside it, over that of ours.
    """

    regime: str
    layer: str
    dtype: str
    mode: str
    T: int
    D: int
    H: int
    E: int
    K: int
    ours: str
    ours_ms: float
    peer: str
    peer_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    verdict: str
    auto_took: str
    auto_ratio: float
    auto_low: float
    auto_high: float
    of_products: float
    of_reading: float
    times_ms: str
    pause_ms: float = 0.0
    busy: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Needs the packages of `pip install 'moe-impls[suite,peers]'`. Writes peers.csv, peers.md and their "
        f"plots; what an interrupted run has measured is in {PART}, and the same command goes on from there."
    )
    parser.add_argument("--quick", action="store_true", help="a subset of every regime")
    parser.add_argument("--dtype", metavar="NAME", help=(
        f"only this of {', '.join(map(dtype_name, DTYPES))}; bfloat16 takes most of the time on a CPU "
        "without instructions for it"
    ))  # fmt: skip
    parser.add_argument("--regime", action="append", metavar="NAME", help=(
        f"only this (repeatable): {'; '.join(regime.name for regime in REGIMES)}"
    ))  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=(
        f"{RESULTS.name}/ unless given, over what it has of an earlier run"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    check_writable("--out", options.out / "peers.csv")
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
    if options.dtype is not None:
        check_choice("--dtype", options.dtype, tuple(dtypes))
        dtypes = {options.dtype: dtypes[options.dtype]}
    known = {regime.name: regime for regime in REGIMES}
    for name in options.regime or ():
        check_choice("--regime", name, tuple(known))
    asked = tuple(regime for name, regime in known.items() if name in (options.regime or known))
    made = _made(options.quick, tuple(dtypes), asked)
    cells = measure_all(options.out, tuple(dtypes.values()), asked, made)
    print(*write(options.out, cells, measure_growth(options.quick), made), sep="\n")
    return 0


@functools.cache
def compared() -> tuple[str, ...]:
    """Name the peers that run on a CPU and combine by sums; those of some libraries if they are there."""
    asked_for = ("transformers", "einsum")
    if_there = ("onnxruntime", "zentorch", "vllm", "kt_kernel", "torchtitan")
    there = usable([name for name in PEERS if name.partition(".")[0] in if_there], print)
    return tuple(name for name in PEERS if name.partition(".")[0] in asked_for or name in there)


def subjects() -> tuple[list[Implementation], list[Implementation]]:
    """Find ours, without what compiles for each shape, and the peers.

    Raises:
        ResolveError: the package of a peer is missing; the message names the extra.
    """
    ours = [resolve(name) for name in IMPLEMENTATIONS]
    ours = [i for i in ours if not i.support.compiles_per_case and i.is_available()]
    return ours, [resolve(name) for name in compared()]


def samples(
    problem: Problem,
    mode: str,
    inputs: Inputs,
    groups: Sequence[Sequence[Implementation]],
    pause_s: float = 0.0,
    hopeless: float = HOPELESS,
) -> dict[str, tuple[float, ...]]:
    """Time, in common rounds, each that takes the call and comes near the fastest of its group.

    One that in its first try takes more memory than MEMORY_BYTES, or than there is, is left out, and so is
    one that takes MOST times as long as the first group. ``pause_s`` passes before each call.
    """
    near: dict[str, Call] = {}
    at_most_s: float | None = None
    # Tried first: what others take is limited by what it took, and it is one of the fastest.
    first = taken(resolve("auto"), problem, inputs, mode)
    with memory.memory_limit("cpu", min(MEMORY_BYTES, memory.available_memory_bytes("cpu"))):
        for group in groups:
            ready = {i.name: i.ready(inputs.experts) for i in group if undeclared(i, problem, mode) is None}
            calls = {name: measure.call_of(f, problem, inputs, mode) for name, f in ready.items()}
            auto = {name: calls.pop(name) for name in ("auto",) if name in calls}  # timed however slow it is
            smaller = {name: _on_fewer_tokens(ready[name], problem, inputs, mode) for name in calls}
            near |= auto | measure.near_the_fastest(
                calls, first, hopeless=hopeless, most=CANDIDATES, at_most_s=at_most_s, smaller=smaller
            )
            if at_most_s is None:  # the first group is of ours
                ours_s = min(measure.time_calls(call, 1, "cpu") for call in near.values())
                at_most_s = max(MOST * ours_s, MOST_S)
    before = dict.fromkeys(near, functools.partial(time.sleep, pause_s)) if pause_s else None
    most = ROUNDS_PAUSED if pause_s else measure.MAX_ROUNDS  # the pauses take most of the time
    timed = measure.interleave(near, seconds=SECONDS, min_rounds=ROUNDS, max_rounds=most, before=before)
    timings = measure.all_timed(timed)
    return {name: timing.samples_s for name, timing in timings.items()}


def _on_fewer_tokens(forward: Forward, problem: Problem, inputs: Inputs, mode: str) -> list[Call]:
    """Make calls on fewer tokens, where the CPU has no instructions for the dtype and some are very slow."""
    if multiplies(problem.dtype):
        return []
    tokens = [T for T in FEWER if T < problem.T]
    return [measure.call_of(forward, replace(problem, T=T), inputs.first(T), mode) for T in tokens]


def measure_cell(
    regime: Regime,
    problem: Problem,
    inputs: Inputs,
    ours: Sequence[Implementation],
    peers: Sequence[Implementation],
) -> Cell | None:
    """Measure one cell; None if no peer takes the call at a fifth of our speed."""
    p, mode = problem, regime.mode
    prepared = [i for i in ours if i.prepare is not None]
    as_they_are = [i for i in ours if i.prepare is None]
    hopeless = HOPELESS_BESIDE if regime.busy else HOPELESS
    with load.busy(regime.busy * (os.cpu_count() or 1)):
        found = samples(p, mode, inputs, [as_they_are, prepared, peers], regime.pause_s, hopeless)
    median_s = {name: statistics.median(s) for name, s in found.items()}

    def fastest(of: Sequence[Implementation]) -> str:
        return min((i.name for i in of if i.name in found and i.name != "auto"), key=median_s.__getitem__)

    if not any(i.name in found for i in peers):
        return None
    best, peer = fastest(ours), fastest(peers)
    between = ratio.compare(found[best], found[peer])
    of_auto = ratio.compare(found[fastest(as_they_are)], found["auto"])
    limits = roofline.measure_roofline(p, mode, inputs.routing)
    ours_ms = median_s[best] * 1e3
    return Cell(
        regime=regime.name,
        layer=p.name,
        dtype=dtype_name(p.dtype),
        mode=mode,
        **{size: getattr(p, size) for size in ("T", "D", "H", "E", "K")},
        ours=best,
        ours_ms=rounded(ours_ms),
        peer=peer,
        peer_ms=rounded(median_s[peer] * 1e3),
        **{n: v if isinstance(v, str | int) else rounded(v) for n, v in asdict(between).items()},
        auto_took=taken(resolve("auto"), p, inputs, mode),
        auto_ratio=rounded(of_auto.ratio),
        auto_low=rounded(of_auto.low),
        auto_high=rounded(of_auto.high),
        of_products=rounded(limits.compute_limit_ms / ours_ms),
        of_reading=rounded(limits.traffic_limit_ms / ours_ms),
        times_ms="; ".join(f"{n} {s * 1e3:.4g}" for n, s in sorted(median_s.items(), key=lambda i: i[1])),
        pause_ms=rounded(regime.pause_s * 1e3),
        busy=regime.busy,
    )


def rounded(value: float) -> float:
    """Round to four digits."""
    return float(f"{value:.4g}")


def planned(
    quick: bool, dtypes: Sequence[torch.dtype], regimes: Sequence[Regime]
) -> Iterator[tuple[Problem, list[tuple[Regime, int]]]]:
    """List each layer and dtype with its most tokens, and the regimes and numbers of tokens to measure."""
    for dtype in dtypes:
        for layer in QUICK_LAYERS if quick else LAYERS:
            cells = [(r, T) for r in regimes for T in (r.quick if quick else r.tokens)]
            yield replace(layer, dtype=dtype, T=max(T for _, T in cells)), cells


def measure_all(
    folder: Path, dtypes: Sequence[torch.dtype], regimes: Sequence[Regime], made: dict[str, object]
) -> pd.DataFrame:
    """Measure every cell of the regimes. Each is in ``folder`` at once, and a run is continued there.

    Args:
        folder: where the rows go.
        dtypes, regimes: of the layers, and what of each to measure.
        made: by what the rows are made, as by `_made`; columns of the table.

    Raises:
        RecordError: what was begun there is of another version, machine, set of peers or choice of cells.
    """
    ours, peers = subjects()
    with journal.opened(folder / PART, Cell, made) as begun:
        done = {(cell.regime, cell.layer, cell.dtype, cell.T) for cell in begun.rows}
        for whole, cells in track(list(planned(bool(made["quick"]), dtypes, regimes)), "layers"):
            dtype = dtype_name(whole.dtype)
            left = [(regime, T) for regime, T in cells if (regime.name, whole.name, dtype, T) not in done]
            inputs = make_inputs(whole) if left else None
            for regime, T in left:
                assert inputs is not None
                if cell := measure_cell(regime, replace(whole, T=T), inputs.first(T), ours, peers):
                    begun.append(cell)
        return pd.DataFrame([made | asdict(cell) for cell in begun.rows])


def _made(quick: bool, dtypes: Sequence[str], regimes: Sequence[Regime] = REGIMES) -> dict[str, object]:
    ours = {
        "peers": " ".join(compared()),
        "dtypes": " ".join(dtypes),
        "regimes": "; ".join(regime.name for regime in regimes),
        "quick": quick,
    }
    return {**provenance.columns(), **record.threads(), **ours}


def _options(made: dict[str, object]) -> str:
    dtypes, regimes = str(made["dtypes"]).split(), str(made["regimes"]).split("; ")
    some = "".join(f' --regime "{name}"' for name in regimes) * (len(regimes) < len(REGIMES))
    return " --quick" * bool(made["quick"]) + f" --dtype {dtypes[0]}" * (len(dtypes) < len(DTYPES)) + some


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


@dataclass(frozen=True)
class Growth:
    """The time of one implementation at one number of experts, or of experts per token."""

    axis: str
    value: int
    mode: str
    implementation: str
    median_ms: float


def measure_growth(quick: bool) -> list[Growth]:
    """Time against E at a fixed T and K, and against K at a fixed E; the number of slots grows with K."""
    found = []
    names = ("sorted_dispatch", "recompute", "native", "auto")
    implementations = [i for i in map(resolve, names) if i.is_available()]
    for axis, values in (QUICK_GROWN if quick else GROWN).items():
        for value in track(values, f"growth with {axis}"):
            p = replace(GROWTH, **{axis: value})
            inputs = make_inputs(p)
            for mode in ("forward", "forward_backward"):
                for name, s in samples(p, mode, inputs, [[i] for i in implementations]).items():
                    found.append(Growth(axis, value, mode, name, rounded(statistics.median(s) * 1e3)))
    return found


def write(folder: Path, cells: pd.DataFrame, grown: list[Growth], made: dict[str, object]) -> list[Path]:
    """Write peers.csv, peers-growth.csv, their page and its plots; remove what was kept of the run so far."""
    growth = pd.DataFrame([made | asdict(point) for point in grown])
    share = report.quadratic_share(growth)
    shown = ["regime", "layer", "dtype", "T", "ours", "ours_ms", "peer", "peer_ms", "ratio", "low", "high",
             "auto_took", "auto_ratio", "of_products", "of_reading"]  # fmt: skip
    commit = str(made["git_commit"])[:12]
    page = f"""# Beside other libraries

Written by `python -m benchmarks peers{_options(made)}` at commit {commit} with torch
{made["torch_version"]} on {made["device_name"]}, {made["threads"]} threads. *Ours* is the fastest
implementation of this project in a cell, *peer* the fastest of the others: {", ".join(compared())}.
Both were timed in the same rounds. *Ratio* is the median of the ratios of each round, from *low* to *high*;
where the machine did other things, too, it is not that of the two medians. Above 1 the peer takes longer. Who
takes longer in a first try than {HOPELESS:g} times the fastest of its side, or more memory than
{MEMORY_BYTES / 2**30:g} GiB, or comes after the {CANDIDATES} fastest, was not timed further, nor a peer that
takes more than {MOST:g} times as long as ours and {MOST_S:g} s: where all of them do, there is no cell.
*auto_ratio*: `auto` over the fastest of ours
that needs no `prepare`. *of_products*: the time of dense products of the same FLOPs over ours. *of_reading*:
the time of the least traffic at the bandwidth measured beside it, over ours. A peer is *ahead* where the
whole interval of the ratio is below 1. *After a pause*: 50 ms before
each call. *Busy*: a process for each CPU computed beside the calls, *twice as busy*: two. The limits are
those of a machine that is idle.

{markdown_table(report.by_regime(cells))}

Beside the limits, and `auto` beside the fastest of ours, *surely slower* where the whole interval of
*auto_ratio* is above 1.03:

{markdown_table(report.beside_limits(cells))}

![The best peer's time over ours](peers.png)

## Growth

T={GROWTH.T} D={GROWTH.D} H={GROWTH.H}, float32; against E at K={GROWTH.K}, against K at E={GROWTH.E}.

![Time against E and K](peers-growth.png)

What the square in a parabola adds at the largest value:

{markdown_table(share)}

## Every cell

{markdown_table(cells[shown])}
"""
    contents = {
        "peers.csv": _csv(cells),
        "peers-growth.csv": _csv(growth),
        "peers.png": png(report.ratios_figure(cells)),
        "peers-growth.png": png(report.growth_figure(growth)),
        "peers.md": page.encode(),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    journal.discard(folder / PART)
    return [folder / name for name in contents]
