from __future__ import annotations


class Timeout(BaseException):
    """A subject takes longer than it may. No Exception, so that neither it nor Hypothesis tries again."""


class CheckFailed(AssertionError):
    """A check's finding about an implementation: what is wrong, where, how much, how to see it again.

    fractions: the worst error of each tensor as a fraction of its budget, where that was measured.
    """

    def __init__(self, finding: str, fractions: dict[str, float] | None = None) -> None:
        super().__init__(finding)
        self.fractions = fractions or {}


def what(name: str) -> str:
    """A result in words, by its name: y, or the gradient of an input."""
    return "y" if name == "y" else f"the gradient of {name}"
