"""A finding about a subject, and the exceptions that carry it."""

from __future__ import annotations


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


def what(name: str) -> str:
    """Put the name of a result into words: y, or the gradient of an input."""
    return "y" if name == "y" else f"the gradient of {name}"
