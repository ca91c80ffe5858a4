"""Every implementation is right on every problem that it declares: see ``correctness.checks``."""

from collections.abc import Callable

from correctness.checks import Case


def test_implementation(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("fractions", case.run())
