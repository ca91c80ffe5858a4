"""The balance losses: closed forms, finite differences, balance and padding. Wrong ones are caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from correctness.checks import balance as checks
from correctness.judging.finding import CheckFailed
from moe_impls import auxiliary_loss, cv_squared, load_balancing_loss, z_loss

RIGHT = (
    (checks.cv_squared_values, cv_squared),
    (checks.cv_squared_gradients, cv_squared),
    (checks.auxiliary_loss_values, auxiliary_loss),
    (checks.load_balancing_values, load_balancing_loss),
    (checks.z_loss_values, z_loss),
)


@pytest.mark.parametrize(("check", "loss"), RIGHT, ids=lambda f: f.__name__)
def test_loss(check: Callable, loss: Callable) -> None:
    check(loss)


def _cv_by_std(v: Tensor, *, population: bool = False) -> Tensor:
    """Squares the standard deviation, whose derivative is infinite at perfect balance."""
    v = v.float() if v.dtype != torch.float64 else v
    if len(v) == 1:
        return v.new_zeros(())
    return v.var(correction=0 if population else 1).sqrt() ** 2 / (v.mean() ** 2 + 1e-10)


def _f_of_chosen_only(logits: Tensor, expert_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean probability is taken over the chosen experts only."""
    chosen = torch.zeros_like(logits).scatter(1, expert_ids, 1.0)
    return load_balancing_loss(logits.masked_fill(chosen == 0, -1e9), expert_ids, mask=mask)


WRONG = {
    "cv² by way of the standard deviation": (checks.cv_squared_gradients, _cv_by_std),
    "cv² of the population only": (checks.cv_squared_values, lambda v, **_: cv_squared(v, population=True)),
    "cv² of the unbiased variance only": (checks.cv_squared_values, lambda v, **_: cv_squared(v)),
    "cv, not its square": (checks.cv_squared_values, lambda v, **o: cv_squared(v, **o).sqrt()),
    "the load is left out": (checks.auxiliary_loss_values, lambda i, l, c=1e-2, **o: c * cv_squared(i, **o)),
    "the coefficient is applied twice": (
        checks.auxiliary_loss_values,
        lambda i, l, c=1e-2, **o: c * auxiliary_loss(i, l, c, **o),
    ),
    "padding counts in the balance": (
        checks.load_balancing_values,
        lambda z, ids, mask=None: load_balancing_loss(z, ids),
    ),
    "softmax of a softmax": (
        checks.load_balancing_values,
        lambda z, ids, mask=None: load_balancing_loss(z.softmax(1), ids, mask=mask),
    ),
    "only the first choice counts": (
        checks.load_balancing_values,
        lambda z, ids, mask=None: load_balancing_loss(z, ids[:, :1], mask=mask),
    ),
    "probabilities of the chosen only": (checks.load_balancing_values, _f_of_chosen_only),
    "padding counts in the z-loss": (checks.z_loss_values, lambda z, mask=None: z_loss(z)),
    "exp without a shift": (
        checks.z_loss_values,
        lambda z, mask=None: z_loss(z.exp().sum(1, keepdim=True).log(), mask=mask),
    ),
    "a sum, not a mean": (checks.z_loss_values, lambda z, mask=None: z_loss(z, mask=mask) * len(z)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses_fail(name: str) -> None:
    check, wrong = WRONG[name]
    with pytest.raises(CheckFailed):
        check(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cv_squared(torch.zeros(2, 3)), r"v has shape \[2, 3\]; it must be \[E\]"),
        (lambda: z_loss(torch.zeros(3)), r"logits has shape \[3\]; it must be \[T, E\]"),
        (lambda: load_balancing_loss(torch.zeros(3), torch.zeros(3, 1).long()), r"logits has shape \[3\]"),
        (lambda: z_loss(torch.zeros(3, 2), mask=torch.ones(3)), "mask is torch.float32"),
        (lambda: z_loss(torch.zeros(3, 2), mask=torch.ones(2).bool()), r"mask is .* \[2\]; .* \[3\]"),
        (lambda: load_balancing_loss(torch.zeros(3, 2), torch.zeros(2, 1).long()), r"expert_ids has shape"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
