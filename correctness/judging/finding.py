"""A finding about a subject, and the exceptions that carry it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from moe_impls.registry import one_line


class Timeout(BaseException):
    """The end of what takes too long. No Exception, so that neither a subject nor Hypothesis tries again."""


class CheckFailed(AssertionError):
    """A check's finding about an implementation: what is wrong, where, how much, how to see it again.

    fractions: the worst error of each tensor as a fraction of its budget, where that was measured.
    """

    def __init__(self, finding: str, fractions: dict[str, float] | None = None) -> None:
        super().__init__(finding)
        self.fractions = fractions or {}


class CannotTell(CheckFailed):
    """What is right cannot be told: no choice of experts is clear, or a plain computation overflows."""


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Say of what is raised inside in which call it was."""
    try:
        yield
    except CheckFailed as failure:
        raise CheckFailed(f"{what}: {failure}", failure.fractions) from (failure.__cause__ or failure)
    except Exception as error:
        raise CheckFailed(f"{what} raises {one_line(error)}") from error


def what(name: str) -> str:
    """Put the name of a result into words: y, or the gradient of an input."""
    return "y" if name == "y" else f"the gradient of {name}"
