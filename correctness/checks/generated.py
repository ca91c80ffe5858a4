from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from hypothesis import given
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from correctness.checks import routers
from correctness.checks.routers import Route, RouterCheck
from correctness.checks.table import Check
from correctness.judging import calling, compare
from correctness.judging.compare import Reference
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from correctness.problems.routers import RouterProblem
from moe_impls.interface import (
    Implementation,
)

P = TypeVar("P")
SEEDS = 8


def search(holds: Callable[[P], object], problems: SearchStrategy[P]) -> None:
    """Look for a problem on which ``holds`` raises CheckFailed, and raise it for the smallest such problem.

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

    try:
        no_problem_fails()
    except CheckFailed as failure:
        raise CheckFailed(f"{failure}\nThe first problem that failed: {failures[0]}") from failure
    except Flaky as flaky:
        raise CheckFailed(f"{failures[0]}\nThe same problem passes when it is tried again.") from flaky


def generated_values(subject: Implementation, problem: Problem) -> None:
    """Output and gradients are right, with and without gradients, and again on the same inputs."""
    inputs = make_inputs(problem)
    for gradients in (True, False, True) if subject.support.gradients else (False, False):
        results = calling.run(subject.forward, inputs, problem.combine, gradients=gradients)
        try:
            compare.require_right(results, problem)
        except CheckFailed:
            if problem.exact:
                raise
            compare.require_within(results, _with_budget_of_many(problem))


def _with_budget_of_many(problem: Problem) -> Reference:
    """The reference with the largest budget of several such problems.

    A budget is what a plain computation loses in its worst row; a problem of few rows may not have a bad one.
    """
    others = [compare.reference(replace(problem, seed=problem.seed + n)).budget for n in range(SEEDS)]
    budget = {
        name: max((b[name] for b in others if math.isfinite(b[name])), default=math.inf) for name in others[0]
    }
    return replace(compare.reference(problem), budget=budget)


VALUES = Check(generated_values, ())


def generated_routing(route: Route, problem: RouterProblem) -> None:
    """The experts, the gates and the gradient of the logits are right."""
    routers.values(route, problem)
    routers.gradients(route, problem)


ROUTING = RouterCheck(generated_routing, ())
