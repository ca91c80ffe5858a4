"""What is measured, as data: grids of synthetic layers and the layers of released models.

A workload is a ``Problem`` (shapes, dtype, device, load, seed) and a mode. The name of the problem is the
``workload`` column: ``sweep`` for synthetic layers, otherwise the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from correctness.problems.loads import LOADS, load_named
from correctness.problems.problem import Problem
from moe_impls import models
from moe_impls.interface import GATED_ACTIVATIONS, Clamp, check_choice
from moe_impls.router_interface import RouterSpec

# forward: inference, no gradients recorded. forward_backward: y, then the gradients of x, the gates and
# every weight from a random dy.
MODES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Workloads:
    """A block of problems: every combination of the tuples, without those with K > E, which do not exist."""

    name: str = "sweep"
    T: tuple[int, ...] = (512,)
    D: tuple[int, ...] = (256,)
    H: tuple[int, ...] = (128,)
    E: tuple[int, ...] = (32,)
    K: tuple[int, ...] = (4,)
    O: int | None = None  # D unless given
    load: tuple[str, ...] = ("uniform",)
    activation: str = "swiglu"
    clamp: Clamp = Clamp()  # of swiglu_clamped
    output_activation: str = "none"
    bias: bool = False
    router: RouterSpec | None = None  # of a model; None is softmax over the logits, top K
    modes: tuple[str, ...] = MODES

    def problems(self) -> Iterator[Problem]:
        for load, D, H, E, K, T in itertools.product(self.load, self.D, self.H, self.E, self.K, self.T):
            if K <= E:
                yield Problem(
                    self.name, T, D, H, self.O or D, E, K,
                    activation=self.activation, clamp=self.clamp, output_activation=self.output_activation,
                    bias=self.bias, load=load,
                )  # fmt: skip


# The routed experts of released models. T is a small batch, so that a CPU can take weights of full size; --T
# takes others.
MODELS = {
    model.name: Workloads(
        model.name, T=(16,), D=(model.D,), H=(model.H,), E=(model.E,), K=(model.K,), bias=model.bias,
        activation=model.activation, clamp=model.clamp, output_activation=model.output_activation,
        router=model.router,
    )
    for model in models.MODELS.values()
    if not model.gap
}  # fmt: skip

# A full product of T, E and K; the same layer in its middle under every other load; real models.
GRIDS: dict[str, tuple[Workloads, ...]] = {
    "smoke": (Workloads(T=(16, 64), D=(64,), H=(32,), E=(4, 8), K=(2,)),),
    "default": (
        Workloads(T=(16, 128, 512), E=(8, 16, 32), K=(2, 4, 8)),
        Workloads(T=(512,), E=(16,), K=(4,), load=tuple(load for load in LOADS if load != "uniform")),
        replace(MODELS["olmoe-1b-7b"], modes=("forward",)),  # its gradients would take most of the time
    ),
    # Few tokens: the weights that are read decide.
    "latency": (
        Workloads(T=(1, 2, 4, 8, 16, 32, 64), D=(1024,), H=(512,), E=(8, 64), K=(2, 8)),
        *(replace(MODELS[name], T=(1, 4, 16, 64)) for name in ("olmoe-1b-7b", "notebook")),
    ),
    # Many tokens, up to what fits: cells that need more memory than there is become rows that say so.
    "throughput": (
        Workloads(T=(1024, 4096, 16384, 65536), D=(1024,), H=(512,), E=(8, 64), K=(2, 8)),
        *(replace(MODELS[name], T=(1024, 4096, 16384)) for name in ("olmoe-1b-7b", "notebook")),
    ),
    "full": (
        Workloads(T=(1, 16, 128, 1024, 4096), E=(8, 32, 128), K=(1, 2, 4, 8)),
        Workloads(
            T=(1024, 4096), E=(32, 128), K=(4,), load=tuple(load for load in LOADS if load != "uniform")
        ),
        *(replace(model, T=(1, 16, 128)) for model in MODELS.values()),
    ),
}

# Seconds to spend on the samples of each cell, unless its minimum number of rounds takes longer.
SECONDS = {"smoke": 0.05, "default": 0.1, "latency": 0.5, "throughput": 0.5, "full": 1.0}


def chosen(
    blocks: Sequence[Workloads],
    names: Sequence[str],
    sizes: Mapping[str, Sequence[int]],
    loads: Sequence[str],
) -> list[Workloads]:
    """Choose the blocks, or the layers of models instead, with the given sizes and loads in their place.

    Raises:
        ValueError: something given is not valid; the message names the option.
    """
    for name in names:
        check_choice("--model", name, tuple(MODELS))
    given = {size: tuple(dict.fromkeys(values)) for size, values in sizes.items() if values}
    for size, values in given.items():
        if min(values) < 1:
            raise ValueError(f"--{size} is {min(values)}; it must be at least 1")
    fixed = [f"--{size}" for size in given if size != "T"]
    if names and fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be given with --model, whose layer is fixed; valid is --T"
        )
    changes: dict[str, Any] = dict(given)
    for load in loads:
        load_named(load, "--load")
    if loads:
        changes["load"] = tuple(dict.fromkeys(loads))
    found = [replace(block, **changes) for block in ([MODELS[name] for name in names] or blocks)]
    for problem in (problem for block in found for problem in block.problems()):
        load_named(problem.load)(replace(problem, T=1), torch.Generator())  # raises if it takes more experts
    if {"E", "K"} & set(given):
        for block in found:
            if max(block.K) > min(block.E):
                raise ValueError(f"--K is {max(block.K)}; it must not exceed E, here {min(block.E)}")
    return found


def flops(problem: Problem, mode: str) -> int:
    """Count the floating-point operations of the expert products of one call, two for a multiply-add.

    2·T·K·(F·D + O·H), and three times that with the backward: 6·T·K·D·H and 18 for gated experts with
    O = D, 4 and 12 for others. The router, activations and the combine are not counted.
    """
    p = problem
    rows_in = p.H * (2 if p.activation in GATED_ACTIVATIONS else 1)
    forward = 2 * p.T * p.K * (rows_in * p.D + p.O * p.H)
    return forward * {"forward": 1, "forward_backward": 3}[mode]
