"""What judges subjects: every check of every implementation, router, layer and set of losses."""

from __future__ import annotations

from collections.abc import Callable

from correctness.checks.case import Case


def test_subject(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("fractions", case.run())
