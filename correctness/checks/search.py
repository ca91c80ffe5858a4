"""The search for a problem that fails, among those that Hypothesis makes up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from hypothesis import given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from correctness.judging.finding import CheckFailed

P = TypeVar("P")


SHRINKING = 20.0  # seconds of processor time after the first failure


def search(holds: Callable[[P], object], problems: SearchStrategy[P], share: float = 1.0) -> None:
    """Look for a problem on which ``holds`` raises CheckFailed, and raise it for the smallest such problem.

    The message ends with the first one found: it is larger, and the pattern of what is wrong may tell more.

    Args:
        problems: hashable ones.
        share: of the examples of the profile, how many are tried.
    """
    failures: list[CheckFailed] = []
    failing: set[P] = set()
    end = math.inf

    @settings(report_multiple_bugs=False, max_examples=max(1, round(share * settings().max_examples)))
    @given(problems)
    def no_problem_fails(problem: P) -> None:
        nonlocal end
        if time.process_time() > end and problem not in failing:
            return  # the smallest so far will do
        try:
            holds(problem)
        except CheckFailed as failure:
            failures.append(failure)
            failing.add(problem)
            end = min(end, time.process_time() + SHRINKING)
            raise

    try:
        no_problem_fails()
    except CheckFailed as failure:
        raise CheckFailed(f"{failure}\nThe first problem that failed: {failures[0]}") from failure
    except Flaky as flaky:
        raise CheckFailed(f"{failures[0]}\nThe same problem passes when it is tried again.") from flaky
