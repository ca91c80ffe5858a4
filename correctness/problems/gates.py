"""Gates of problems, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from correctness.problems.problem import Problem


def _softmax(p: Problem, g: torch.Generator) -> Tensor:
    return torch.randn(p.T, p.K, generator=g, dtype=torch.float64).softmax(dim=1)


def _unnormalised(p: Problem, g: torch.Generator) -> Tensor:
    """Draw positive gates of unequal sizes from 0.1 to 2.5, not summing to one."""
    return 0.1 + 2.4 * torch.rand(p.T, p.K, generator=g, dtype=torch.float64)


def _signed(p: Problem, g: torch.Generator) -> Tensor:
    return torch.randn(p.T, p.K, generator=g, dtype=torch.float64)


def _one_zero(p: Problem, g: torch.Generator) -> Tensor:
    """Give one slot of each token a gate of exactly zero (with K = 1: of every third token)."""
    gates = _unnormalised(p, g)
    rows = torch.arange(0, p.T, 1 if p.K > 1 else 3)
    gates[rows, rows % p.K] = 0
    return gates


def _zero_rows(p: Problem, g: torch.Generator) -> Tensor:
    """Make all gates of every third token zero."""
    gates = _unnormalised(p, g)
    gates[::3] = 0
    return gates


def _wide(p: Problem, g: torch.Generator) -> Tensor:
    """Draw positive gates from 1e-25 to 1e5, or as far as sums in float16 go, from 1e-3 to 1e2."""
    least, largest = (-3, 2) if p.dtype == torch.float16 and p.combine == "sum" else (-25, 5)
    exponents = torch.rand(p.T, p.K, generator=g, dtype=torch.float64)
    return 10 ** (least + (largest - least) * exponents)


def _cancelling(p: Problem, g: torch.Generator) -> Tensor:
    """Repeat 256, 1, -256: where the outer slots agree, a sum kept in bfloat16 loses the middle one."""
    return torch.tensor([256.0, 1.0, -256.0], dtype=torch.float64).repeat(p.T, p.K)[:, : p.K]


GATES: dict[str, Callable[[Problem, torch.Generator], Tensor]] = {
    "softmax": _softmax,
    "unnormalised": _unnormalised,
    "signed": _signed,
    "one_zero": _one_zero,
    "zero_rows": _zero_rows,
    "wide": _wide,
    "cancelling": _cancelling,
}
