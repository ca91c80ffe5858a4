"""How much error is allowed follows from one place, and the rules there are what they say."""

from __future__ import annotations

import re

import pytest
import torch

from correctness.judging import budget
from correctness.judging.budget import (
    allowed_error,
    entry_budgets,
    relative_errors,
    require_close,
    row_errors,
)
from correctness.judging.finding import CheckFailed
from correctness.oracle.layer import Terms
from reporting.provenance import ROOT

NAN, INF = float("nan"), float("inf")
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}


def test_the_factor_is_named_in_one_file() -> None:
    houses = ("moe_impls", "correctness", "evidence", "benchmarks")
    naming = [
        path.relative_to(ROOT).as_posix()
        for house in houses
        for path in (ROOT / house).rglob("*.py")
        if re.search(r"\bFACTOR\b", path.read_text(encoding="utf-8"))
    ]
    assert naming == ["correctness/judging/budget.py"]


@pytest.mark.parametrize(
    ("got", "want", "scale", "error"),
    [
        (1.5, 1.0, 2.0, 0.25),
        (0.0, 0.0, 0.0, 0.0),
        (1e-30, 0.0, 0.0, INF),  # over a scale of zero only the right value is right
        (NAN, 1.0, 1.0, INF),
        (NAN, NAN, 1.0, INF),  # NaN is never right
        (1.0, 1.0, NAN, 0.0),
        (1.5, 1.0, NAN, INF),
        (INF, INF, 1.0, 0.0),
        (-INF, INF, 1.0, INF),
        (INF, 1.0, 4.0, INF),
    ],
)
def test_an_error_is_relative_to_its_scale(got: float, want: float, scale: float, error: float) -> None:
    g, w, s = (torch.tensor([v], dtype=torch.float64) for v in (got, want, scale))
    assert relative_errors(g, w, s).tolist() == [error]


def test_nothing_is_owed_below_the_floor() -> None:
    one = torch.ones(3)
    assert relative_errors(one + torch.tensor([0.0, 0.25, 0.5]), one, one, floor=0.25).tolist() == [0, 0, 0.5]


def test_rows_are_tokens_slots_and_rows_of_an_experts_gradient() -> None:
    got = torch.zeros(2, 3, 4)
    got[1, 2, 3] = 1
    scale = torch.full((2, 3, 4), 2.0)
    assert row_errors(got, torch.zeros(2, 3, 4), scale, "w_in").tolist() == [[0, 0, 0], [0, 0, 0.5]]
    assert row_errors(got[1], torch.zeros(3, 4), scale[0, 0, :3], "y").tolist() == [0, 0, 0.5]
    assert row_errors(got[1], torch.zeros(3, 4), scale[0], "gates").shape == (3, 4)
    assert row_errors(got[:, :, :0], torch.zeros(2, 3, 0), scale[:, :, :0], "w_out").tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", EPS)
def test_at_least_the_rounding_of_one_operation_is_allowed(dtype: torch.dtype) -> None:
    nothing_lost = torch.zeros(5)
    assert allowed_error(nothing_lost, dtype, dtype) == budget.FACTOR * EPS[dtype]
    assert allowed_error(nothing_lost[:0], dtype, dtype) == budget.FACTOR * EPS[dtype]


def test_what_a_plain_computation_loses_in_its_worst_place_is_allowed_times_the_factor() -> None:
    lost = torch.tensor([1e-6, 3e-6], dtype=torch.float64)
    assert allowed_error(lost, torch.float32, torch.float32) == budget.FACTOR * 3e-6
    in_float64 = allowed_error(lost, torch.float32, torch.float64)
    assert in_float64 == budget.FACTOR * 3e-6 * EPS[torch.float64] / EPS[torch.float32]


def test_a_plain_computation_that_overflows_gives_no_budget() -> None:
    right = Terms({"y": torch.ones(2)}, {"y": torch.ones(2)})
    for lost in (INF, NAN):
        plain = Terms({"y": torch.tensor([1.0, lost])}, {})
        with pytest.raises(CheckFailed, match="a plain computation of y in float16 overflows"):
            entry_budgets(right, plain, torch.float16)


def test_a_loss_is_close_within_the_factor_of_its_size_and_of_the_largest() -> None:
    want = torch.tensor([0.0, 1.0])
    within = 0.99 * budget.FACTOR * EPS[torch.float32]
    require_close("v", want.double() + within, want, EPS[torch.float32])
    for wrong in (want.double() + 2.1 * within, torch.tensor([NAN, 1.0]), want[:1]):
        with pytest.raises(CheckFailed, match="v "):
            require_close("v", wrong, want, EPS[torch.float32])
