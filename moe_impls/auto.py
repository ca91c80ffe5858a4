"""The implementation that measurements say is fastest for the call at hand.

A table lists cells, each a kind of call and sizes with the times of the implementations that came near the
fastest there, on even loads. A call takes the one that is fastest on average over the nearest cells of its
kind, of those that declare all that it needs. A call with a hot expert is looked up as one with fewer
experts. ``python -m benchmarks tune`` measures the table of a machine; without one, a table that comes with
the package is used: that of a CPU with instructions for bfloat16, with AVX-512 alone, or with neither.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_impls.functional import constant_in_graphs, needs_gradients
from moe_impls.interface import (
    CLAMPED,
    GATED_ACTIVATIONS,
    Clamp,
    Experts,
    Implementation,
    Routing,
    Support,
    dtype_name,
)
from moe_impls.operators import operator
from moe_impls.processor import instructions, multiplies, processor
from moe_impls.registry import resolve

SUPPORT = Support(autocast=True, fullgraph=True, exports=True)
VERSION = 2
ALWAYS = "sorted_dispatch"  # takes every call that the contract allows
# Where what a table names is not available, and what it names beside that was measured on other calls alone.
WITHOUT = "recompute"
UNMEASURED = {"cuda": "triton_fused"}  # where no table knows the device: two products, not two an expert
# Computes every expert for every token, which with K = E is what is asked for; of few, reading the weights
# takes longer than that.
ALL_EXPERTS, LEAST_TOKENS = "dense_mask", 64
FOR_EVEN_LOADS = ("padded",)  # computes as many rows for every expert as the busiest one has
FOR_FEW_ROWS = ("native",)  # reads the weights fast, and multiplies many rows slower than others
FEW_ROWS = 512  # of one expert, for which it is about as fast
NEIGHBOURS = 4
LEFT_OUT = 1.5  # times the fastest: who takes longer is not in a cell, and counts as that slow there


_implementations: dict[str, Implementation] = {}
_told: set[str] = set()  # of which it was said that they are not available


def _resolved(name: str) -> Implementation:
    """Resolve a name once; not by functools.cache, which torch.compile traces into and imports by."""
    if name not in _implementations:
        _implementations[name] = resolve(name)
    return _implementations[name]


@dataclass(frozen=True)
class Cell:
    """A measured call, and the median times of the implementations that came near the fastest there."""

    device: str
    dtype: str
    gradients: bool
    gated: bool
    T: int
    D: int
    H: int
    E: int
    K: int
    times_ms: Mapping[str, float]


def shipped_path() -> Path:
    """Path of the table that comes with the package for CPUs like this one."""
    if multiplies(torch.bfloat16):
        like = "with_bfloat16"
    else:
        like = "without_bfloat16" if "avx512f" in instructions() else "avx2"
    return Path(__file__).with_name(f"auto_{like}.json")


def tuned_path(device: str = "cpu") -> Path:
    """Path of the table of a processor and a number of threads, or of a GPU, and of a torch version."""
    if device == "cuda":
        computes = [torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"]
    else:
        computes = [processor(), str(torch.get_num_threads())]
    key = "\n".join([*computes, torch.__version__])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moe_impls" / f"auto-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def dumps(cells: Sequence[Cell]) -> str:
    """Write a table as JSON, with what it was measured on."""
    rows = ",\n".join(json.dumps(asdict(cell)) for cell in cells)
    made = {"torch": torch.__version__, "processor": processor(), "threads": torch.get_num_threads()}
    return f'{{"version": {VERSION}, "made_with": {json.dumps(made)}, "cells": [\n{rows}\n]}}\n'


def read(path: Path) -> tuple[Cell, ...]:
    """Read the cells of a table.

    Raises:
        ValueError: the file is no table of this version; the message says why.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version is {content['version']!r}, this one reads {VERSION}")
        cells = tuple(Cell(**cell) for cell in content["cells"])
        if not cells:
            raise ValueError("it has no cells")
        for cell in cells:
            if not all(isinstance(n, int) and n > 0 for n in (cell.T, cell.D, cell.H, cell.E, cell.K)):
                raise ValueError(f"a cell has sizes that are no positive numbers: {cell}")
            for name, ms in cell.times_ms.items():
                resolve(name)
                if not ms > 0:
                    raise ValueError(f"the time of {name} is {ms} in {cell}")
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return cells


@functools.cache
def table(device: str) -> tuple[Cell, ...]:
    """Find the table of this machine, or the one that comes with the package, which knows no GPU."""
    path = tuned_path(device)
    if path.exists():
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(f"{path} is ignored, as it is no table of `benchmarks tune`: {error}", stacklevel=2)
    return () if device == "cuda" else read(shipped_path())


class _Needs(NamedTuple):
    """What an implementation has to declare to take a call."""

    device: str
    dtype: torch.dtype
    gradients: bool
    activation: str
    clamp: Clamp | None  # of swiglu_clamped
    output_activation: str
    combine: str
    bias: bool
    autocast: bool

    def are_declared_by(self, support: Support) -> bool:
        return (
            self.device in support.devices
            and self.dtype in support.dtypes
            and self.activation in support.activations
            and (self.clamp is None or support.takes_clamp(self.activation, self.clamp))
            and self.output_activation in support.output_activations
            and self.combine in support.combines
            and self.bias in support.biases
            and (support.gradients or not self.gradients)
            and (support.autocast or not self.autocast)
        )


@functools.lru_cache(maxsize=4096)
def _nearest(
    needs: _Needs, T: int, K: int, w_in_shape: tuple[int, int, int], without: tuple[str, ...] = ()
) -> Implementation:
    E, features, D = w_in_shape
    gated = needs.activation in GATED_ACTIVATIONS
    kind = (needs.device, dtype_name(needs.dtype), needs.gradients, gated)
    place = _place(T, D, features // 2 if gated else features, E, K)

    def distance(cell: Cell) -> float:
        return math.dist(place, _place(cell.T, cell.D, cell.H, cell.E, cell.K)) ** 2

    def declares(name: str) -> bool:
        return name not in without and needs.are_declared_by(_resolved(name).support)

    def takes(name: str) -> bool:
        return declares(name) and _resolved(name).is_available()

    if K == E and (T >= LEAST_TOKENS or needs.gradients) and not without and takes(ALL_EXPERTS):
        return _resolved(ALL_EXPERTS)
    alike = [
        c for c in table(needs.device) if (c.device, c.dtype, c.gradients, c.gated) == kind and c.times_ms
    ]
    slowness: dict[str, float] = {}
    near = sorted(alike, key=distance)[:NEIGHBOURS]
    declared = sorted({name for cell in near for name in cell.times_ms if declares(name)})
    for cell in near:
        fastest = min(cell.times_ms.values())
        for name in declared:
            slower = math.log(cell.times_ms.get(name, LEFT_OUT * fastest) / fastest)
            slowness[name] = slowness.get(name, 0.0) + slower / (distance(cell) + 0.05) ** 2
    names = [name for name in declared if takes(name)]
    if not names and takes(unmeasured := UNMEASURED.get(needs.device, ALWAYS)):
        return _resolved(unmeasured)
    taken = min(names, key=slowness.__getitem__, default=ALWAYS)
    wanted = min(declared, key=slowness.__getitem__, default=taken)
    if not takes(wanted):
        # What is far slower than that is in few cells, and in those of other calls than this one.
        measured = [name for name in names if name in near[0].times_ms]
        other = WITHOUT if takes(WITHOUT) else ALWAYS
        taken = min(measured, key=slowness.__getitem__, default=other)
        weight = sum((distance(cell) + 0.05) ** -2 for cell in near)
        longest = weight * math.log(LEFT_OUT)
        _tell(wanted, taken, math.exp((slowness.get(taken, longest) - slowness[wanted]) / weight))
    return _resolved(taken)


def _tell(wanted: str, taken: str, slower: float) -> None:
    """Warn, once in a process, that an implementation is not available, and what that costs."""
    if wanted in _told:
        return
    _told.add(wanted)
    warnings.warn(
        f"'auto' takes {taken!r} in place of {wanted!r}: {_resolved(wanted).missing()}. By the table of "
        f"measurements this call takes {slower:.1f} times as long or more, others lose more or less",
        stacklevel=2,
    )


def _place(T: int, D: int, H: int, E: int, K: int) -> tuple[float, float, float]:
    """Place a call among others: by the rows of an expert, its weights, and the number of experts.

    Rows decide most; with these weights of the others the shipped table agrees best with a default sweep.
    """
    return math.log2(max(T * K, 1) / E), 0.7 * math.log2(max(D * H, 1)), 0.7 * math.log2(E)


def _experts_in_use(expert_ids: Tensor, E: int) -> int:
    """Count as many experts as would each have the rows of the busiest, if it has more than chance makes.

    That is little more than twice the mean. A power of two, so that few such calls differ.
    """
    N = expert_ids.numel()
    if N <= 8:
        return E
    busiest = int(expert_ids.flatten().bincount().max())
    return E if busiest * E <= 2 * N + 8 * E else 2 ** round(math.log2(N / busiest))


@constant_in_graphs
def _in_one_graph(device: str, dtype: torch.dtype, autocast: bool) -> str:
    """Choose what a graph takes on a GPU: it reads nothing on the host."""
    fused, _ = _resolved(UNMEASURED["cuda"]), _resolved(ALL_EXPERTS)  # so that neither is looked up in it
    takes = device == "cuda" and dtype in fused.support.dtypes and fused.is_available()
    return fused.name if takes and not autocast else ALL_EXPERTS


def choose(x: Tensor, routing: Routing, experts: Experts, combine: str = "sum") -> Implementation:
    """Choose the implementation for these arguments; of their values only ``expert_ids`` may count."""
    w_in, b_in, w_out, b_out = experts.w_in, experts.b_in, experts.w_out, experts.b_out
    device, expert_ids = x.device.type, routing.expert_ids
    gradients = needs_gradients(x, routing.gates, w_in, b_in, w_out, b_out)
    clamp = experts.clamp if experts.activation == CLAMPED else None
    found, needs = _on_an_even_load(
        device, x.dtype, gradients, experts.activation, clamp, experts.output_activation, combine,
        b_in is not None or b_out is not None, torch.is_autocast_enabled(device),
        expert_ids.shape, w_in.shape,
    )  # fmt: skip
    if needs is None:
        return found
    E, features, D = w_in.shape
    in_use = _experts_in_use(expert_ids, E)
    return found if in_use == E else _nearest(needs, *expert_ids.shape, (in_use, features, D), FOR_EVEN_LOADS)


@functools.lru_cache(maxsize=4096)
def _on_an_even_load(*key: Any) -> tuple[Implementation, _Needs | None]:
    """Find what a call takes, and where that depends on how even its load is, what the call needs.

    One look-up by values that are read off the call in microseconds.
    """
    *declared, (T, K), w_in_shape = key
    needs = _Needs(*declared)
    found = _nearest(needs, T, K, w_in_shape)
    counts = found.name in FOR_EVEN_LOADS or (found.name in FOR_FEW_ROWS and T > FEW_ROWS)
    return found, needs if counts else None


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    if torch.compiler.is_compiling() and (device := x.device.type) != "cpu":
        taken = _resolved(_in_one_graph(device, x.dtype, torch.is_autocast_enabled(device)))
        return taken.forward(x, routing, experts, combine=combine)
    return _chosen(x, routing, experts, combine=combine)


@operator(SUPPORT)
def _chosen(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    return choose(x, routing, experts, combine).forward(x, routing, experts, combine=combine)
