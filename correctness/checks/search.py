"""The search for a problem that fails, among those that Hypothesis makes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from correctness.judging.finding import CheckFailed

P = TypeVar("P")


def search(holds: Callable[[P], object], problems: SearchStrategy[P]) -> None:
    """Look for a problem on which ``holds`` raises CheckFailed, and raise it for the smallest such problem.

    The message ends with the first one found: it is larger, and the pattern of what is wrong may tell more.
    """
    failures: list[CheckFailed] = []

    @settings(report_multiple_bugs=False)
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
