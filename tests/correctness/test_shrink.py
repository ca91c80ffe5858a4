"""A failing problem becomes as small as it can while the same check still fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness.checks import table, values
from correctness.checks.case import Case, Check
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.problem import Problem, possible
from correctness.session.shrink import shrink, smallest_failure
from moe_impls import sorted_dispatch
from moe_impls.interface import Experts, Implementation, Routing, Support

LARGE = Problem("large", T=4500, D=48, H=40, O=56, E=11, K=2, load="zipf", gates="unnormalised", seed=3)


def test_what_does_not_matter_becomes_as_small_as_possible() -> None:
    assert shrink(lambda p: True, LARGE) == Problem("large", T=0, D=1, H=1, O=1, E=1, K=1)


@pytest.mark.parametrize("name, least", [("T", 301), ("D", 17), ("O", 56), ("E", 5), ("K", 2)])
def test_a_limit_is_found_exactly(name: str, least: int) -> None:
    smallest = shrink(lambda p: getattr(p, name) >= least, LARGE)
    assert getattr(smallest, name) == least
    product = smallest.D * smallest.H * smallest.O
    assert product == (least if name in "DHO" else 1)


def test_sizes_that_belong_together_shrink_one_after_the_other() -> None:
    smallest = shrink(lambda p: p.T * p.K >= 100 and p.E % 2 == 1, LARGE)
    assert (smallest.T, smallest.K, smallest.E) == (50, 2, 3)


def test_a_problem_that_cannot_shrink_is_returned() -> None:
    assert shrink(lambda p: p == LARGE, LARGE) == LARGE


def test_it_ends_in_time() -> None:
    assert shrink(lambda p: True, LARGE, seconds=-1) == LARGE


def test_the_problems_of_the_suite_are_possible() -> None:
    assert all(possible(problem) for check in table.CHECKS for problem in check.problems if problem)


def loses_tokens(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (torch.arange(len(x)) < 22).to(y.dtype).unsqueeze(1)


def spreads_nan(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y + 0 * y.sum()


def test_a_check_of_the_suite_fails_on_a_small_problem() -> None:
    subject = Implementation("loses_tokens", loses_tokens, Support(dtypes=(torch.float64,)))
    problem = replace(catalogue.named("thousands"), dtype=torch.float64)
    case = Case(table.implementation(subject), Check(values.values), problem)
    smallest = smallest_failure(case, seconds=60)
    assert smallest == Problem("thousands", T=23, D=1, H=1, O=1, E=1, K=1, dtype=torch.float64)


def test_a_problem_too_small_for_the_check_is_no_failure() -> None:
    subject = Implementation("spreads_nan", spreads_nan)
    case = Case(table.implementation(subject), Check(values.non_finite_contained), catalogue.SMALL)
    smallest = smallest_failure(case, seconds=60)
    assert 0 < smallest.T < catalogue.SMALL.T
    with pytest.raises(CheckFailed, match="y is wrong at token 0"):
        values.non_finite_contained(subject, smallest)
