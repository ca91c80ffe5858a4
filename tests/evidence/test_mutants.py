"""Every mutant is rejected, by the check that is meant to reject it and for the reason stated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from evidence.mutants import MUTANTS, table
from evidence.mutants.mutant import Mutant, judge, require_killed, verdicts


def test_mutant_is_killed(mutant: Mutant, pytestconfig: pytest.Config, record_property: Callable) -> None:
    """By the check meant for it; with ``--mutants`` every other check judges it as well, for the table."""
    if pytestconfig.getoption("mutants"):
        found = verdicts(mutant)
        record_property("mutant", table.row(mutant, found))
        require_killed(mutant, found.get(mutant.killed_by))
    else:
        require_killed(mutant, judge(mutant, mutant.killed_by))


def test_mutants_have_names_of_their_own() -> None:
    assert [n for n, count in Counter((m.kind, m.name) for m in MUTANTS).items() if count > 1] == []


def test_mutants_name_checks_that_exist() -> None:
    assert {(m.kind, m.killed_by) for m in MUTANTS} <= {
        (kind, check) for kind, checks in table.CHECKS.items() for check in checks
    }


def test_an_edit_of_a_line_that_is_not_there_is_refused() -> None:
    mutant = Mutant("m", "- no such line\n+ x", "values", "", "family", "evidence.mutants.grouped")
    with pytest.raises(ValueError, match=r"\['no such line'\] occurs 0 times in evidence.mutants.grouped"):
        mutant.load()


HARMLESS = Mutant(
    "harmless",
    "- y.index_add_(0, token, gate * f)\n+ y.index_add_(0, token, f * gate)",
    "values",
    "y is wrong",
    "family",
    "evidence.mutants.grouped",
    on="small-float32-silu",
)


def test_a_mutant_that_survives_fails() -> None:
    with pytest.raises(AssertionError, match="mutant harmless survived: 'values' on small-float32-silu must"):
        require_killed(HARMLESS, judge(HARMLESS, "values"))


def test_a_mutant_killed_for_another_reason_fails() -> None:
    with pytest.raises(
        AssertionError, match="for another reason: .* must say 'y is wrong', it says 'the grad"
    ):
        require_killed(HARMLESS, "the gradient of x is missing")
