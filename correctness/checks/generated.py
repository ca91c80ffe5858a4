"""What implementations are held to on problems that Hypothesis makes up."""

from __future__ import annotations

import math
from dataclasses import replace

from correctness.judging import calling, compare
from correctness.judging.compare import Reference
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls.interface import Implementation

SEEDS = 8


def generated_values(subject: Implementation, problem: Problem) -> None:
    """Return the right output and gradients on problems that nobody thought of, again on the same inputs."""
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
    """Make the reference with the largest budget of several such problems.

    A budget is what a plain computation loses in its worst row; a problem of few rows may not have a bad one.
    """
    others = [compare.reference(replace(problem, seed=problem.seed + n)).budget for n in range(SEEDS)]
    budget = {
        name: max((b[name] for b in others if math.isfinite(b[name])), default=math.inf) for name in others[0]
    }
    return replace(compare.reference(problem), budget=budget)
