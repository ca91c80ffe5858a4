"""The smallest problem that a check still fails on, so that a failure on a large one can be looked at.

``hypothesis.find`` begins with problems of its own, not with the one that failed: it makes 4 to 40 times the
calls, and does not find what fails only at one corner of the sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from correctness.checks.case import Case
from correctness.judging.finding import CheckFailed, Timeout
from correctness.problems.problem import Problem, possible

SECONDS = 3.0  # for one case
SECONDS_OF_A_RUN = 15.0
SPENT = pytest.StashKey[dict[tuple[str, str], float]]()  # seconds by subject and check
SIZES = ("T", "K", "E", "D", "H", "O")
OPTIONS = ("load", "gates", "low_gates", "x_scale", "seed")  # which take their defaults
# Tried in this order before the sizes between them: every power of two and its neighbours.
LANDMARKS = sorted({2**n + step for n in range(17) for step in (-1, 0, 1)})


def shrink(fails: Callable[[Problem], bool], problem: Problem, seconds: float = SECONDS) -> Problem:
    """Return the smallest problem found for which ``fails`` holds; ``problem`` itself if none is smaller.

    Options take their defaults and sizes become small, one at a time, until nothing more can be changed or
    ``seconds`` are over. It is exact where failing starts at some size and goes on from there.
    """
    end = time.thread_time() + seconds  # as tests are limited: the machine may be busy
    smallest = problem

    def attempt(name: str, value: object) -> bool:
        nonlocal smallest
        smaller = replace(smallest, **{name: value})
        if not possible(smaller) or time.thread_time() > end or not fails(smaller):
            return False
        smallest = smaller
        return True

    plain = {field.name: field.default for field in fields(Problem)}
    before = None
    while smallest != before:
        before = smallest
        for name in OPTIONS:
            if getattr(smallest, name) != plain[name]:
                attempt(name, plain[name])
        for name in SIZES:
            below = [size for size in LANDMARKS if size < getattr(smallest, name)]
            passed = -1
            for size in below:
                if attempt(name, size):
                    break
                passed = size
            while getattr(smallest, name) - passed > 1:
                middle = (passed + getattr(smallest, name)) // 2
                if not attempt(name, middle):
                    passed = middle
    return smallest


def smallest_failure(case: Case, seconds: float = SECONDS) -> Problem:
    """Return the smallest problem found on which a case of an implementation fails.

    A smaller problem counts only if the check itself finds fault with it: an exception of another kind may
    come from the check, which needs some tokens to work with.
    """

    def fails(smaller: Problem) -> bool:
        now = replace(case, problem=smaller)
        if now.skip:
            return False
        try:
            now.run()
        except CheckFailed as failure:
            return isinstance(failure.__cause__, CheckFailed)
        return False

    return shrink(fails, case.problem, seconds)


def smaller_failure(config: pytest.Config, case: Case) -> str:
    """Return a line that makes the smallest failing problem again, once for each check of a subject."""
    key, spent = (case.subject.name, case.check.name), config.stash.setdefault(SPENT, {})
    if not isinstance(case.problem, Problem) or key in spent or sum(spent.values()) > SECONDS_OF_A_RUN:
        return ""
    begin = time.thread_time()
    try:
        smallest = smallest_failure(case)
    except Timeout:  # the failure itself is still to be told
        smallest = case.problem
    spent[key] = time.thread_time() - begin
    return "" if smallest == case.problem else f"\n  smallest failing case: {smallest.code()}"
