"""Problems that Hypothesis makes up are declared and possible, and a failure is told for the smallest."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from correctness.checks.case import Case, Check
from correctness.checks.generated import generated_values
from correctness.checks.search import P
from correctness.checks.table import implementation
from correctness.judging.finding import CheckFailed
from correctness.problems import generated
from correctness.problems.gates import GATES
from correctness.problems.loads import LOADS, TRAPS
from correctness.problems.problem import possible, unsupported
from moe_impls import sorted_dispatch
from moe_impls.interface import (
    ACTIVATIONS,
    COMBINES,
    DTYPES,
    OUTPUT_ACTIVATIONS,
    Experts,
    Forward,
    Implementation,
    Routing,
    Support,
)


def loses_tokens(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """Nothing from the 23rd token on."""
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (torch.arange(len(x)) < 22).to(y.dtype).unsqueeze(1)


def raises(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    if experts.w_out.shape[1] % 16 == 0:
        raise RuntimeError("misaligned address")
    return sorted_dispatch.forward(x, routing, experts, combine=combine)


def failure_of(forward: Forward) -> CheckFailed:
    """What the search finds out about a wrong implementation without gradients."""
    subject = implementation(Implementation(forward.__name__, forward, Support(gradients=False)))
    with pytest.raises(CheckFailed) as failure:
        Case(subject, Check(generated_values, drawn=generated.problems)).run()
    return failure.value


def test_a_failure_is_shown_for_the_smallest_problem_and_for_the_first() -> None:
    failure = failure_of(loses_tokens)
    smallest, _, first = str(failure).partition("\nThe first problem that failed: ")
    assert re.match(r"loses_tokens fails 'generated_values': y (at \[22, 0\]|is wrong at token 22)", smallest)
    code = "Problem(name='generated', T=23, D=1, H=1, O=1, E=1, K=1"  # exact or not
    assert code in smallest
    assert first.startswith("loses_tokens fails 'generated_values': y ")
    assert "  reproduce: Problem(name='generated', T=" in first and code not in first


def test_an_exception_is_shown_with_the_smallest_problem_on_which_it_is_raised() -> None:
    smallest = str(failure_of(raises)).partition("\nThe first problem that failed: ")[0]
    assert "RuntimeError: misaligned address" in smallest
    assert "\n  reproduce: Problem(name='generated', T=1, D=" in smallest
    assert re.search(r"O=(16|32|48), E=1, K=1", smallest)


def test_a_failure_that_does_not_come_again_is_a_failure_too() -> None:
    calls = itertools.count(1)

    def wrong_once(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        y = sorted_dispatch.forward(x, routing, experts, combine=combine)
        return y + 1 if next(calls) == 11 else y

    message = str(failure_of(wrong_once))
    assert message.startswith("wrong_once fails 'generated_values': y ")
    assert message.endswith("\nThe same problem passes when it is tried again.")


def drawn(problems: SearchStrategy[P], count: int) -> list[P]:
    found: list[P] = []

    @settings(max_examples=count)
    @given(problems)
    def draw(problem: P) -> None:
        found.append(problem)

    draw()
    return found


LIMITED = Support(
    dtypes=(torch.float16,),
    activations=("reglu", "swiglu_clamped"),
    output_activations=("relu",),
    biases=(False,),
    combines=("logsumexp", "sum"),
)


@pytest.mark.parametrize("support", [Support(), LIMITED, Support(compiles_per_case=True)])
def test_only_problems_that_are_declared_and_possible_are_drawn(support: Support) -> None:
    for problem in drawn(generated.problems(support), 100):
        assert unsupported(support, problem) is None
        assert possible(problem)
        assert not problem.exact or generated.first_rounded(problem) == ""
        if support.compiles_per_case:
            assert min(problem.T, problem.D, problem.H, problem.O, problem.E) >= 2


def test_a_hundred_problems_reach_every_option() -> None:
    found = drawn(generated.problems(Support()), 100)
    for option, declared in {
        "dtype": DTYPES,
        "activation": ACTIVATIONS,
        "output_activation": OUTPUT_ACTIVATIONS,
        "combine": COMBINES,
        "bias": (True, False),
        "exact": (True, False),
        "load": LOADS | TRAPS,
        "gates": GATES,
    }.items():
        assert {getattr(problem, option) for problem in found} == set(declared)
