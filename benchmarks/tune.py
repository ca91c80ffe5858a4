"""``python -m benchmarks tune``: measure which implementation is fastest where, for ``moe_impls.auto``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
from rich.progress import track

from benchmarks import measure
from benchmarks.sweep import undeclared
from benchmarks.workloads import MODES, flops
from correctness.pages import write_atomically
from correctness.problems import Inputs, Problem, make_inputs
from moe_impls import auto
from moe_impls.interface import GATED_ACTIVATIONS, Implementation, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, PREPARED, resolve

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
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
MAX_FLOPS = 1.2e11  # of a call; beyond, cells with fewer tokens tell as much


def candidates() -> list[Implementation]:
    """Those that auto may choose: not itself, what it would have to prepare, or to compile for long."""
    found = [resolve(name) for name in IMPLEMENTATIONS if name != "auto" and not name.endswith(PREPARED)]
    return [i for i in found if not i.support.compiles_per_case and i.is_available()]


def layers(quick: bool) -> list[tuple[Problem, list[tuple[int, str]]]]:
    """What is measured: each layer with its most tokens, and the numbers of tokens and modes.

    quick: every second number of tokens and every second layer.
    """
    step, found = 2 if quick else 1, []
    for dtype, (D, H, E, K, activation, bias) in itertools.product(DTYPES, LAYERS[::step]):
        whole = Problem("tune", max(TOKENS), D, H, D, E, K, activation=activation, bias=bias, dtype=dtype)
        pairs = itertools.product(TOKENS[::step], MODES)
        found.append((whole, [(T, m) for T, m in pairs if flops(replace(whole, T=T), m) <= MAX_FLOPS]))
    return found


def measure_cell(
    problem: Problem, mode: str, inputs: Inputs, implementations: Sequence[Implementation]
) -> auto.Cell:
    """The implementations that take this call and come near the fastest, by the median of their times."""
    calls = {
        i.name: measure.call_of(i.forward, problem, inputs, mode)
        for i in implementations
        if undeclared(i, problem, mode) is None
    }
    near = measure.near_the_fastest(calls, auto.ALWAYS, hopeless=auto.LEFT_OUT)
    timings = measure.all_timed(measure.interleave(near, seconds=SECONDS, min_rounds=ROUNDS))
    median_s = {name: statistics.median(timing.samples_s) for name, timing in timings.items()}
    return auto.Cell(
        device="cpu",
        dtype=dtype_name(problem.dtype),
        gradients=mode == "forward_backward",
        gated=problem.activation in GATED_ACTIVATIONS,
        **{size: getattr(problem, size) for size in ("T", "D", "H", "E", "K")},
        times_ms={name: float(f"{s * 1e3:.4g}") for name, s in sorted(median_s.items(), key=itemgetter(1))},
    )


def tune(path: Path, *, quick: bool) -> None:
    """Measure every cell, then write the table, whole or not at all."""
    implementations, found = candidates(), []
    for whole, pairs in track(layers(quick), "measuring"):
        inputs = make_inputs(whole)
        for T, mode in pairs:
            found.append(measure_cell(replace(whole, T=T), mode, inputs.first(T), implementations))
    write_atomically(path, auto.dumps(found).encode())
