"""No check rejects a right implementation, however different it looks: see ``evidence.lookalikes``.

All checks and some of their problems are spread over the lookalikes, and one seed is drawn of some problems;
many seeds of all are `python -m evidence lookalikes`.
"""

from __future__ import annotations

import pytest

from correctness.checks.case import Case
from correctness.checks.table import CHECKS, implementation
from correctness.problems.problem import Problem
from evidence import error_budget
from evidence.error_budget import NUMERIC
from evidence.lookalikes import LOOKALIKES

# A prime apart, so that every dtype, combine, activation and size class is among them.
SELECTION = list(NUMERIC.values())[::59]
TURNS = 2 * len(LOOKALIKES)
EVERY = 3  # of the turns of a check, beginning with another one for the next check


def spread() -> list[Case]:
    """Pair every check with a third of the lookalikes, in turn with its problems, spread over a long list."""
    found = {}
    for turn, check in enumerate(check for check in CHECKS if not check.drawn):
        for i in range(turn % EVERY, min(max(len(check.problems), len(LOOKALIKES)), TURNS), EVERY):
            # Shifted by one in each round, so that a lookalike does not meet one dtype alone.
            subject = LOOKALIKES[(i + i // len(LOOKALIKES)) % len(LOOKALIKES)]
            # Spread over a long list of problems by a prime that divides no list's length.
            problem = check.problems[i * 31 % len(check.problems)]
            case = Case(implementation(subject), check, problem)
            if case.skip is None:
                found[case] = None
    return list(found)


@pytest.mark.parametrize("checked", spread(), ids=lambda case: case.id)
def test_every_check_accepts_lookalikes(checked: Case) -> None:
    checked.run()


@pytest.mark.parametrize("problem", SELECTION, ids=lambda problem: problem.id)
def test_no_seed_is_a_false_alarm(problem: Problem) -> None:
    rows, alarms = error_budget.judge(problem, 1)
    assert alarms == []
    assert {row["implementation"] for row in rows} == {
        subject.name for subject in error_budget.takers(problem, error_budget.FIRST_SEED)
    }


def test_lines_of_one_implementation_dtype_and_tensor_are_joined() -> None:
    row = {"implementation": "i", "dtype": "float32", "tensor": "y", "seeds": "3", "comparisons": "3"}
    small = row | {"false_alarms": "0", "worst_fraction": "0.2", "problem": "p"}
    large = row | {"false_alarms": "1", "worst_fraction": "inf", "problem": "q"}
    other = small | {"tensor": "x"}
    joined = row | {"comparisons": "6", "false_alarms": "1", "worst_fraction": "inf", "problem": "q"}
    assert error_budget.summed([small, other, large]) == [joined, other]
    assert error_budget.summed([large, small]) == [joined]
