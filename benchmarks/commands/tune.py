"""``python -m benchmarks tune``: measure which implementation is fastest where, for ``moe_impls.auto``."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.options import add_device
from benchmarks.sweep import journal, record
from benchmarks.sweep.workload import undeclared
from benchmarks.timing import measure
from benchmarks.workloads import MODES, flops
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem, check_device
from moe_impls import auto
from moe_impls.interface import GATED_ACTIVATIONS, Implementation, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, PREPARED, resolve
from reporting import provenance
from reporting.pages import check_writable, write_atomically

TOKENS = {"cpu": (1, 4, 16, 64, 256, 1024, 4096), "cuda": (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)}
# D, H, E, K, activation and whether there are biases: small experts, the notebook's, and those of models.
LAYERS = (
    (64, 64, 8, 2, "relu", True),
    (256, 128, 32, 4, "swiglu", False),
    (512, 1024, 16, 4, "relu", True),
    (1024, 1024, 8, 2, "swiglu", False),
    (2048, 1024, 64, 8, "swiglu", False),
)
DTYPES = (torch.float32, torch.bfloat16)
SECONDS, ROUNDS = 0.15, 5
# Of a call; beyond, cells with fewer tokens tell as much.
MAX_FLOPS = {"cpu": 1.2e11, "cuda": 2e13}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ten minutes, twenty on a CPU without instructions for bfloat16, or with --quick a third of "
        "that. The table is kept for this processor, its number of threads and this version of torch, and is "
        "written once all is measured; killed before, the same command goes on where it was."
    )
    parser.add_argument("--quick", action="store_true", help="a third of the cells")
    parser.add_argument("--out", type=Path, metavar="FILE", help=(
        "where auto looks, unless given: moe_impls/ in $XDG_CACHE_HOME or ~/.cache"
    ))  # fmt: skip
    add_device(parser.add_argument)


def run(options: argparse.Namespace) -> int:
    check_device(options.device, "--device")
    path = options.out or auto.tuned_path(options.device.partition(":")[0])
    check_writable("--out", path)
    tune(path, quick=options.quick, device=options.device)
    print(path)
    return 0


def candidates() -> list[Implementation]:
    """Find those that auto may choose: not itself, what it would have to prepare, or to compile for long.

    Kernels for a GPU alone are compiled in seconds.
    """
    found = [resolve(name) for name in IMPLEMENTATIONS if name != "auto" and not name.endswith(PREPARED)]
    fast = [i for i in found if not i.support.compiles_per_case or "cpu" not in i.support.devices]
    return [i for i in fast if i.is_available()]


def layers(quick: bool, device: str = "cpu") -> list[tuple[Problem, list[tuple[int, str]]]]:
    """List what is measured: each layer with its most tokens, and the numbers of tokens and modes.

    quick: every second number of tokens and every second layer.
    """
    step, found, kind = 2 if quick else 1, [], device.partition(":")[0]
    for dtype, (D, H, E, K, activation, bias) in itertools.product(DTYPES, LAYERS[::step]):
        of = Problem("tune", 1, D, H, D, E, K, activation=activation, bias=bias, dtype=dtype, device=device)
        pairs = list(itertools.product(TOKENS[kind][::step], MODES))
        cells = [(T, m) for T, m in pairs if flops(replace(of, T=T), m) <= MAX_FLOPS[kind]]
        found.append((replace(of, T=max(T for T, _ in cells)), cells))
    return found


def measure_cell(
    problem: Problem,
    mode: str,
    inputs: Inputs,
    implementations: Sequence[Implementation],
    first: str = auto.ALWAYS,
) -> auto.Cell:
    """Time the implementations that take this call and come near the fastest, in order of their medians.

    first: the one whose time limits the tries of the others.
    """
    calls = {
        i.name: measure.call_of(i.forward, problem, inputs, mode)
        for i in implementations
        if undeclared(i, problem, mode) is None
    }
    device = problem.device
    near = measure.near_the_fastest(calls, first, device, hopeless=auto.LEFT_OUT)
    timings = measure.all_timed(measure.interleave(near, device=device, seconds=SECONDS, min_rounds=ROUNDS))
    median_s = {name: statistics.median(timing.samples_s) for name, timing in timings.items()}
    return auto.Cell(
        device=device.partition(":")[0],
        dtype=dtype_name(problem.dtype),
        gradients=mode == "forward_backward",
        gated=problem.activation in GATED_ACTIVATIONS,
        **{size: getattr(problem, size) for size in ("T", "D", "H", "E", "K")},
        times_ms={name: float(f"{s * 1e3:.4g}") for name, s in sorted(median_s.items(), key=itemgetter(1))},
    )


@dataclass(frozen=True)
class Measured:
    """A cell in the journal, as JSON."""

    place: int
    cell: str


def tune(path: Path, *, quick: bool, device: str = "cpu") -> None:
    """Measure every cell of a device, then write the table, whole or not at all."""
    implementations, plan = candidates(), layers(quick, device)
    names = [i.name for i in implementations]
    what = {
        **provenance.columns(),
        **record.threads(),
        "device": device,
        "quick": quick,
        "implementations": names,
    }
    part = path.with_suffix(".part.csv")
    with journal.opened(part, Measured, what) as begun:
        cells = {row.place: auto.Cell(**json.loads(row.cell)) for row in begun.rows}
        places = itertools.count()
        for whole, pairs in track(plan, "measuring"):
            inputs, fastest = None, {}  # of each mode, with the number of tokens before
            for T, mode in pairs:
                if (place := next(places)) not in cells:
                    inputs = inputs or make_inputs(whole)
                    of, first = inputs.first(T), fastest.get(mode, auto.ALWAYS)
                    cell = measure_cell(replace(whole, T=T), mode, of, implementations, first)
                    begun.append(Measured(place, json.dumps(asdict(cell))))
                    cells[place] = cell
                fastest[mode] = next(iter(cells[place].times_ms), auto.ALWAYS)
        write_atomically(path, auto.dumps([cells[place] for place in sorted(cells)]).encode())
    journal.discard(part)
