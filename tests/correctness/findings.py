"""What checks find in a subject, check by check."""

from __future__ import annotations

from collections.abc import Iterable

from correctness.checks.case import Check, Subject, cases
from correctness.judging.finding import CheckFailed


def first_finding(subject: Subject, check: Check) -> str | None:
    """Return what a check finds on the first problem where a subject fails it; None if it passes."""
    for case in cases([subject], [check]):
        if not case.skip:
            try:
                case.run()
            except CheckFailed as failure:
                return str(failure)
    return None


def findings(subject: Subject, checks: Iterable[Check] | None = None) -> dict[str, str]:
    """Return for each check that a subject fails its first finding; empty if it is right."""
    found = {}
    for check in subject.kind.checks if checks is None else checks:
        if finding := first_finding(subject, check):
            found[check.name] = finding
    return found
