"""Every implementation and every router is right on problems that Hypothesis makes up.

``pytest correctness -k generated --hypothesis-profile thorough`` draws 2000 new ones for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from correctness import compare, generated, router_checks
from correctness.checks import Case, Check
from correctness.compare import CheckFailed, Reference
from correctness.problems import GATES, LOADS, Problem, make_inputs, unsupported
from correctness.router_checks import Route, RouterCase, RouterCheck, RouterProblem
from correctness.shrink import possible
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
from moe_impls.registry import one_line

P = TypeVar("P")
SEEDS = 8


def search(holds: Callable[[P], object], problems: SearchStrategy[P]) -> None:
    """Look for a problem on which ``holds`` raises, and raise CheckFailed for the smallest such problem.

    The message ends with the first one found: it is larger, and the pattern of what is wrong may tell more.
    """
    failures: list[CheckFailed] = []

    @given(problems)
    def no_problem_fails(problem: P) -> None:
        try:
            holds(problem)
        except CheckFailed as failure:
            failures.append(failure)
            raise
        except Exception as error:
            failures.append(CheckFailed(f"{one_line(error)}\n  reproduce: {problem!r}"))
            raise failures[-1] from error

    try:
        no_problem_fails()
    except CheckFailed as failure:
        raise CheckFailed(f"{failure}\nThe first problem that failed: {failures[0]}") from failure


def generated_values(subject: Implementation, problem: Problem) -> None:
    """Output and gradients are right, with and without gradients, and again on the same inputs."""
    inputs = make_inputs(problem)
    for gradients in (True, False, True) if subject.support.gradients else (False, False):
        results = compare.run(subject.forward, inputs, problem.combine, gradients=gradients)
        try:
            compare.hold(results, problem)
        except CheckFailed:
            if problem.exact:
                raise
            compare.require(results, _with_budget_of_many(problem))


def _with_budget_of_many(problem: Problem) -> Reference:
    """The reference with the largest budget of several such problems.

    A budget is what a plain computation loses in its worst row; a problem of few rows may not have a bad one.
    """
    others = [compare.reference(replace(problem, seed=problem.seed + n)).budget for n in range(SEEDS)]
    largest = {name: max(filter(math.isfinite, (b[name] for b in others)), default=0.0) for name in others[0]}
    return replace(compare.reference(problem), budget=largest)


VALUES = Check(generated_values, ())


def test_values_hold_on_generated_problems(subject: Implementation) -> None:
    search(lambda problem: Case(subject, VALUES, problem).run(), generated.problems(subject.support))


def generated_routing(route: Route, problem: RouterProblem) -> None:
    """The experts, the gates and the gradient of the logits are right."""
    router_checks.values(route, problem)
    router_checks.gradients(route, problem)


ROUTING = RouterCheck(generated_routing, ())


def test_routing_holds_on_generated_problems(router: Route) -> None:
    search(lambda problem: RouterCase(ROUTING, problem).run(router), generated.router_problems())


# --------------------------------------------------------------------------------------------- the search


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
    subject = Implementation(forward.__name__, forward, Support(gradients=False))
    with pytest.raises(CheckFailed) as failure:
        search(lambda problem: Case(subject, VALUES, problem).run(), generated.problems(subject.support))
    return failure.value


def test_a_failure_is_shown_for_the_smallest_problem_and_for_the_first() -> None:
    failure = failure_of(loses_tokens)
    smallest, _, first = str(failure).partition("\nThe first problem that failed: ")
    assert smallest.startswith("loses_tokens fails 'generated_values': y at [22, 0] is -0.0, exactly -32.0")
    code = "Problem(name='generated', T=23, D=1, H=1, O=1, E=1, K=1, exact=True)"
    assert smallest.endswith(f"  reproduce: {code}")
    assert first.startswith("loses_tokens fails 'generated_values': y ")
    assert "  reproduce: Problem(name='generated', T=" in first and code not in first


def test_an_exception_is_shown_with_the_smallest_problem_on_which_it_is_raised() -> None:
    smallest = str(failure_of(raises)).partition("\nThe first problem that failed: ")[0]
    assert "RuntimeError: misaligned address" in smallest
    assert "\n  reproduce: Problem(name='generated', T=1, D=1, H=1, O=16, E=1, K=1" in smallest


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
        "load": LOADS,
        "gates": GATES,
    }.items():
        assert {getattr(problem, option) for problem in found} == set(declared)
