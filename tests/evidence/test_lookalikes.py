"""No check rejects a right implementation, however different it looks: see ``evidence.lookalikes``.

The default run spreads all checks and their problems over the lookalikes, and draws one seed. The whole is

    pytest tests/evidence/test_lookalikes.py --seeds 200 --error-budget results/error_budget.csv

every problem with a rounding budget or exact numbers, on 200 seeds: of the smaller problems, which hold every
combination of options, by every lookalike; of the larger ones each seed goes to one lookalike in turn. Parts
of it may be run apart and joined by ``evidence.error_budget``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from correctness.checks.case import Case
from correctness.checks.table import CHECKS, implementation
from correctness.judging.calling import run_both_ways
from correctness.judging.compare import reference, require_right
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from evidence import error_budget
from evidence.lookalikes import LOOKALIKES
from moe_impls.interface import Implementation

FIRST_SEED = 1000
NUMERIC = [problem for check in CHECKS if check.name in ("values", "exact") for problem in check.problems]
LARGE = 2**9  # tokens and rows of weights, above which a seed of a problem goes to one lookalike
SELECTION = NUMERIC[::37]  # a prime, so that every dtype, combine, activation and size class is among them


def spread() -> list[Case]:
    """Every check on every lookalike and on each of its problems, but not on each pair of the two."""
    found = {}
    for check in (check for check in CHECKS if not check.drawn):
        for i in range(max(len(check.problems), len(LOOKALIKES))):
            # Shifted by one in each round, so that a lookalike does not meet one dtype alone.
            subject = LOOKALIKES[(i + i // len(LOOKALIKES)) % len(LOOKALIKES)]
            case = Case(implementation(subject), check, check.problems[i % len(check.problems)])
            if case.skip is None:
                found[case] = None
    return list(found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numeric_problem" in metafunc.fixturenames:
        seeds = metafunc.config.getoption("seeds")
        limit = [pytest.mark.timeout(0)] if seeds else []  # the seeds of a problem are one test, however many
        metafunc.parametrize(
            "numeric_problem",
            [pytest.param(p, id=p.id, marks=limit) for p in (NUMERIC if seeds else SELECTION)],
        )


@pytest.fixture(scope="session")
def worst(request: pytest.FixtureRequest) -> Iterator[error_budget.Worst]:
    """Collects the largest errors of the run; --error-budget writes them to a file."""
    found = error_budget.Worst()
    yield found
    if path := request.config.getoption("error_budget"):
        found.write(path)


@pytest.mark.parametrize("checked", spread(), ids=lambda case: case.id)
def test_every_check_accepts_every_lookalike(checked: Case) -> None:
    checked.run()


def takers(problem: Problem, seed: int) -> tuple[Implementation, ...]:
    """Who judges a seed of a problem."""
    if problem.T + problem.E * (problem.F + problem.O) <= LARGE:
        return LOOKALIKES
    turn = seed % len(LOOKALIKES)
    return LOOKALIKES[turn : turn + 1]


def test_no_seed_is_a_false_alarm(
    numeric_problem: Problem, worst: error_budget.Worst, request: pytest.FixtureRequest
) -> None:
    alarms = []
    for seed in range(FIRST_SEED, FIRST_SEED + (request.config.getoption("seeds") or 1)):
        problem = replace(numeric_problem, seed=seed)
        inputs = make_inputs(problem)
        for subject in takers(problem, seed):
            try:
                fractions = require_right(next(run_both_ways(subject, problem, inputs)), problem)
            except CheckFailed as failure:
                alarms.append(f"{subject.name}: {failure}")
                fractions = failure.fractions or {"y": math.inf}
            assert problem.exact or all(math.isfinite(reference(problem).budget[n]) for n in fractions)
            if problem.exact:
                fractions = {error_budget.EXACT: max(fractions.values())}
            worst.add(subject, problem, fractions)
    assert not alarms, "\n".join([f"{len(alarms)} false alarms", *alarms[:10]])
