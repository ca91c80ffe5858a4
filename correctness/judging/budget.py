"""The one place that says how far from the oracle a right result may be: every tolerance is derived here.

An error is a multiple of a scale, which the oracle derives from the terms of each sum. What is allowed is
FACTOR times what a plain computation of the same precision loses in its worst place, and never less than
FACTOR * eps. Right implementations in other summation orders stay below 6 times the plain one; wrong ones
are 30 to 40,000,000 times off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from correctness.judging.finding import CannotTell, CheckFailed
from correctness.oracle.layer import Terms
from moe_impls.interface import dtype_name

FACTOR = 8.0
STANDARD_ERRORS = 4.0  # that the mean of random samples may be off
# In which what must be computed in at least float32 is computed, and what it loses is measured.
NARROW = torch.float32


def eps(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next larger number of a dtype."""
    return torch.finfo(dtype).eps


def underflow(dtype: torch.dtype) -> float:
    """Return how far roundings below the smallest normal number of a dtype may be off."""
    return FACTOR * torch.finfo(dtype).smallest_normal * eps(dtype)


def roundings(eps: float) -> float:
    """Return the relative error of a right computation of which only its precision, eps, is known."""
    return FACTOR * eps


def relative_errors(got: Tensor, want: Tensor, scale: Tensor, floor: float = 0.0) -> Tensor:
    """Return |got - want| / scale for each entry, in float64; infinite where it is no number.

    Equal infinities agree. NaN is never right, and over a scale of zero only the right value is.

    Args:
        floor: errors up to this size count as none, such as those below a dtype's smallest normal number.
    """
    got = got.to(want.dtype)
    error = (got - want).abs()
    none = (got == want) | (error <= floor) if floor else got == want
    relative = torch.where(none, 0.0, error / scale)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def row_errors(got: Tensor, want: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return the largest relative error of each row of an implementation's result of that name.

    A row is a token for y and x, [T]; a slot for gates, [T, K]; a row of one expert's gradient for weights,
    [experts, rows].
    """
    if name in ("y", "x"):
        scale = scale.unsqueeze(-1)
    errors = relative_errors(got, want, scale)
    if errors.dim() == 1 or name in ("gates", "b_in", "b_out"):
        return errors  # every entry is a row
    return errors.amax(dim=-1) if errors.shape[-1] else errors.new_zeros(errors.shape[:-1])


def worst(errors: Tensor) -> float:
    """Return the largest error; 0 if there is none."""
    return float(errors.max()) if errors.numel() else 0.0


def allowed_error(plain_errors: Tensor, plain: torch.dtype, judged: torch.dtype) -> float:
    """Return the relative error that a right computation in the dtype ``judged`` may show.

    Args:
        plain_errors: those of a plain computation in the dtype ``plain``; from another dtype they are scaled,
            since rounding errors are proportional to eps.
    """
    return FACTOR * max(eps(judged), eps(judged) / eps(plain) * worst(plain_errors))


def storing(dtype: torch.dtype) -> float:
    """Return the relative error of one rounding, where a result computed in float32 is stored in less."""
    return eps(dtype) if eps(dtype) > eps(NARROW) else 0.0


def by_logarithm(want: Tensor, computed: torch.dtype) -> Tensor:
    """Return the relative error of exp(log(want)) where the logarithm is rounded to eps of its size."""
    return eps(computed) * torch.where(want == 0, 0.0, want.abs().log().abs())


def entry_budgets(right: Terms, plain: Terms, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return how far each entry may be off, by name: FACTOR * max(eps, worst plain error) * scale.

    Raises:
        CannotTell: the plain computation overflows, and such a budget would let anything pass.
    """
    budgets = {}
    for name, want in right.values.items():
        lost = relative_errors(plain.values[name], want, right.scale[name])
        allowed = allowed_error(lost, dtype, dtype)
        if math.isinf(allowed):
            raise CannotTell(f"a plain computation of {name} in {dtype_name(dtype)} overflows")
        budgets[name] = allowed * right.scale[name].expand_as(want)
    return budgets


def require_close(what: str, got: Tensor | float, want: Tensor | float, eps: float) -> None:
    """Raise CheckFailed unless each entry is within FACTOR * eps of its own size and of the largest.

    The largest counts since terms of that size cancel.
    """
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want, dtype=torch.float64)
    if got.shape != want.shape:
        raise CheckFailed(f"{what} has shape {list(got.shape)}; it must be {list(want.shape)}")
    allowed = roundings(eps) * (want.abs() + want.abs().max()) if want.numel() else want
    if not bool(((got - want).abs() <= allowed).all()):
        raise CheckFailed(f"{what} is {got.tolist()}; right is {want.tolist()}")


def allowed_by_differences(
    coarse: Tensor, fine: Tensor, terms: Tensor, step: float, dtype: torch.dtype
) -> float:
    """Return how far a derivative may be from a sum of differences, ``fine``, of which each took half a step.

    Halving the step shows what the differences lack; what rounds results of the size ``terms`` is divided by
    the step.
    """
    return FACTOR * float((coarse - fine).abs().sum() + eps(dtype) / step * terms.sum())
