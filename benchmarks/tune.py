"""``python -m benchmarks tune``: measure which implementation is fastest where, for ``moe_impls.auto``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from benchmarks import measure
from benchmarks.measure import Timing
from benchmarks.workloads import MODES, flops
from correctness.pages import write_atomically
from correctness.problems import Problem, make_inputs, unsupported
from moe_impls import auto
from moe_impls.interface import GATED_ACTIVATIONS, Implementation, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, PREPARED, resolve

TOKENS = (1, 4, 16, 64, 256, 1024)
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
HOPELESS = 3.0  # times the fastest, in a first call: these are not measured further
MAX_FLOPS = 1e11  # of a call; beyond, cells with fewer tokens tell as much


def candidates() -> list[Implementation]:
    """Those that auto may choose: not itself, what it would have to prepare, or to compile for long."""
    found = [resolve(name) for name in IMPLEMENTATIONS if name != "auto" and not name.endswith(PREPARED)]
    return [i for i in found if not i.support.compiles_per_case and i.is_available()]


def cells(quick: bool) -> Iterator[tuple[Problem, str]]:
    """What is measured; quick: every second number of tokens and every second layer."""
    step = 2 if quick else 1
    for dtype, (D, H, E, K, activation, bias), T in itertools.product(DTYPES, LAYERS[::step], TOKENS[::step]):
        problem = Problem("tune", T, D, H, D, E, K, activation=activation, bias=bias, dtype=dtype)
        yield from ((problem, mode) for mode in MODES if flops(problem, mode) <= MAX_FLOPS)


def measure_cell(problem: Problem, mode: str, implementations: list[Implementation]) -> auto.Cell:
    """The implementations that take this call and come near the fastest, by the median of their times."""
    gradients = mode == "forward_backward"
    inputs = make_inputs(problem)
    calls = {
        i.name: measure.call_of(i.forward, problem, inputs, mode)
        for i in implementations
        if unsupported(i.support, problem) is None and (i.support.gradients or not gradients)
    }
    once = _median_s(measure.interleave(calls, seconds=0, min_rounds=1))
    near = {name: calls[name] for name, s in once.items() if s <= HOPELESS * min(once.values())}
    median_s = _median_s(measure.interleave(near, seconds=SECONDS, min_rounds=ROUNDS))
    return auto.Cell(
        device="cpu",
        dtype=dtype_name(problem.dtype),
        gradients=gradients,
        gated=problem.activation in GATED_ACTIVATIONS,
        **{size: getattr(problem, size) for size in ("T", "D", "H", "E", "K")},
        fastest=tuple(sorted(median_s, key=median_s.__getitem__)),
    )


def _median_s(outcomes: dict[str, Timing | BaseException]) -> dict[str, float]:
    return {n: statistics.median(t.samples_s) for n, t in outcomes.items() if isinstance(t, Timing)}


def tune(path: Path, *, quick: bool) -> None:
    """Measure every cell, then write the table, whole or not at all."""
    implementations = candidates()
    todo = list(cells(quick))
    found = [measure_cell(p, mode, implementations) for p, mode in track(todo, "measuring")]
    write_atomically(path, auto.dumps(found).encode())
