"""Every implementation is right on every problem that it declares: see ``correctness.checks``."""

from correctness.checks import Case


def test_implementation(case: Case) -> None:
    case.run()
