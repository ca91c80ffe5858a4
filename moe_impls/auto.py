"""The implementation that measurements say is fastest for the call at hand.

A table lists cells, each a kind of call and sizes with the implementations that were measured there on even
loads, the fastest first. A call takes the nearest cell of its kind, by the logarithms of the sizes, and in it
the first implementation that declares all that the call needs and does not depend on a load that is not
there. ``python -m benchmarks tune`` measures the
table of a machine; without one, the table that comes with the package is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_impls.interface import GATED_ACTIVATIONS, Experts, Implementation, Routing, Support, dtype_name
from moe_impls.registry import resolve

SUPPORT = Support(autocast=True)
DEFAULTS = Path(__file__).with_name("auto_defaults.json")
VERSION = 1
ALWAYS = "sorted_dispatch"  # takes every call that the contract allows
FOR_EVEN_LOADS = ("padded",)  # computes as many rows for every expert as the busiest one has


_resolved = functools.cache(resolve)


@dataclass(frozen=True)
class Cell:
    """A measured call, and the implementations there from the fastest to the slowest."""

    device: str
    dtype: str
    gradients: bool
    gated: bool
    T: int
    D: int
    H: int
    E: int
    K: int
    fastest: tuple[str, ...]


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tuned_path() -> Path:
    """Where the table of this machine lies: of one processor, number of threads and version of torch."""
    key = "\n".join([processor(), str(torch.get_num_threads()), torch.__version__])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "moe_impls" / f"auto-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def dumps(cells: Sequence[Cell]) -> str:
    """A table as JSON, with what it was measured on."""
    rows = ",\n".join(json.dumps(asdict(cell)) for cell in cells)
    made = {"torch": torch.__version__, "processor": processor(), "threads": torch.get_num_threads()}
    return f'{{"version": {VERSION}, "made_with": {json.dumps(made)}, "cells": [\n{rows}\n]}}\n'


def read(path: Path) -> tuple[Cell, ...]:
    """The cells of a table.

    Raises:
        ValueError: the file is no table of this version; the message says why.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version is {content['version']!r}, this one reads {VERSION}")
        cells = tuple(Cell(**cell | {"fastest": tuple(cell["fastest"])}) for cell in content["cells"])
        for cell in cells:
            if not all(isinstance(n, int) and n > 0 for n in (cell.T, cell.D, cell.H, cell.E, cell.K)):
                raise ValueError(f"a cell has sizes that are no positive numbers: {cell}")
            for name in cell.fastest:
                resolve(name)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return cells


@functools.cache
def table() -> tuple[Cell, ...]:
    """The table of this machine, or the one that comes with the package."""
    path = tuned_path()
    if path.exists():
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(f"{path} is ignored, as it is no table of `benchmarks tune`: {error}", stacklevel=2)
    return read(DEFAULTS)


@functools.lru_cache(maxsize=4096)
def _nearest(
    kind: tuple[Any, ...], sizes: tuple[int, ...], needs: tuple[Any, ...], without: tuple[str, ...] = ()
) -> Implementation:
    def distance(cell: Cell) -> float:
        of_cell = (cell.T, cell.D, cell.H, cell.E, cell.K)
        return sum(math.log2(max(a, 1) / b) ** 2 for a, b in zip(sizes, of_cell, strict=True))

    alike = [c for c in table() if (c.device, c.dtype, c.gradients, c.gated) == kind]
    for cell in sorted(alike, key=distance)[:1]:
        for name in cell.fastest:
            found = _resolved(name)
            if name not in without and _takes(found.support, *needs) and found.is_available():
                return found
    return _resolved(ALWAYS)


def _takes(
    support: Support,
    device: str,
    dtype: torch.dtype,
    gradients: bool,
    activation: str,
    output_activation: str,
    combine: str,
    bias: bool,
    autocast: bool,
) -> bool:
    return (
        device in support.devices
        and dtype in support.dtypes
        and activation in support.activations
        and output_activation in support.output_activations
        and combine in support.combines
        and bias in support.biases
        and (support.gradients or not gradients)
        and (support.autocast or not autocast)
    )


def _is_even(expert_ids: Tensor, E: int) -> bool:
    """Whether the busiest expert has little more than twice the mean number of rows: what chance makes."""
    N = expert_ids.numel()
    return N == 0 or int(expert_ids.flatten().bincount().max()) * E <= 2 * N + 8 * E


def choose(x: Tensor, routing: Routing, experts: Experts, combine: str = "sum") -> Implementation:
    """The implementation for a call with these arguments; of their values only ``expert_ids`` may count."""
    if torch.compiler.is_compiling():
        return _resolved("dense_mask")  # the one that is one graph
    device, dtype = x.device.type, x.dtype
    gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, routing.gates, *experts.tensors.values())
    )
    E, features, D = experts.w_in.shape
    gated = experts.activation in GATED_ACTIVATIONS
    bias = experts.b_in is not None or experts.b_out is not None
    call = (
        (device, dtype_name(dtype), gradients, gated),
        (x.shape[0], D, features // 2 if gated else features, E, routing.expert_ids.shape[1]),
        (
            device, dtype, gradients, experts.activation, experts.output_activation, combine, bias,
            torch.is_autocast_enabled(device),
        ),
    )  # fmt: skip
    found = _nearest(*call)
    if found.name in FOR_EVEN_LOADS and not _is_even(routing.expert_ids, E):
        return _nearest(*call, FOR_EVEN_LOADS)
    return found


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return choose(x, routing, experts, combine).forward(x, routing, experts, combine=combine)
