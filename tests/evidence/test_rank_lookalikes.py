"""No check rejects a right distributed implementation, however different it looks.

All checks and their problems are spread over the lookalikes.
"""

from __future__ import annotations

import pytest

from correctness.checks.case import Case
from correctness.ranks.checks import CHECKS, distributed
from correctness.ranks.work import by_name
from evidence import rank_lookalikes
from moe_impls.interface import Support

NAMES = (
    "evidence.mutants.ranks:forward",
    *(
        f"evidence.rank_lookalikes:{name}"
        for name in ("last_slots_first", "an_exchange_for_each_expert", "gathered")
    ),
)


def spread() -> list[Case]:
    pairs = [(check, problem) for check in CHECKS for problem in check.problems]
    subjects = [distributed(name, rank_lookalikes.SUPPORT, by_name, name) for name in NAMES]
    # Shifted by one in each round, so that a lookalike does not meet one number of ranks alone.
    return [Case(subjects[(i + i // len(subjects)) % len(subjects)], *pair) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("checked", spread(), ids=lambda case: case.id)
def test_every_check_accepts_every_lookalike(checked: Case) -> None:
    checked.run()


def test_problems_fit_what_is_declared() -> None:
    """Experts of which each rank has as many, and as many tokens on each rank."""
    support = Support(distributed=True, even_experts=True, equal_tokens=True, combines=("sum",))
    (kind,) = {case.subject.kind for case in spread()}
    subject = distributed("narrow", support, by_name, "narrow")
    checks = [check for check in CHECKS if check.fits]
    fitted = [kind.fit(subject, check, problem) for check in checks for problem in check.problems]
    assert all(spread.problem.E % spread.ranks == 0 and len(set(spread.sizes)) == 1 for spread in fitted)
    assert all(spread.problem.combine == "sum" for spread in fitted)
