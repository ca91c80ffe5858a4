"""Every mutant is rejected, by the check that is meant to reject it and for the reason stated."""

from __future__ import annotations

from importlib import import_module

import pytest

from evidence.mutants import MUTANTS, Mutant, table
from evidence.mutants.judge import check_names, finding, judge, require_killed, trials, verdicts
from evidence.mutants.mutant import KINDS, parse


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kind}-{mutant.name}")
def test_mutant_is_killed(mutant: Mutant) -> None:
    require_killed(mutant, judge(mutant, mutant.killed_by))


@pytest.mark.parametrize(("kind", "base"), [(kind, base) for kind, bases in KINDS.items() for base in bases])
def test_what_mutants_are_made_of_is_accepted_by_every_check_of_its_kind(kind: str, base: str) -> None:
    """On all problems; expert computations, which are lookalikes too, on the first of each check."""
    found = trials(kind, base, import_module(f"evidence.mutants.{base}"))
    if kind == "experts":
        found = list({trial.check: trial for trial in reversed(found)}.values())
    assert {f"{t.check} {t.problem}": text for t in found if (text := finding(t)) is not None} == {}


def test_mutants_name_checks_that_exist() -> None:
    assert [m.name for m in MUTANTS if m.killed_by not in check_names(m.kind)] == []


FORM = """
# a comment
[family]

name | values | y is wrong|NaN | on: small | source: owner/repository#1
  rows = x[token]
+ rows = rows + 1
- y = y
+ y = 2 * y

other | exact | y at
- y = y
+ y = 3 * y
"""


def test_a_text_holds_mutants_with_their_edits() -> None:
    first, second = parse(FORM, "experts")
    assert first == Mutant(
        "name", "experts", "family", "evidence.mutants.grouped", "values", "y is wrong|NaN", "small",
        "owner/repository#1", ["  rows = x[token]", "+ rows = rows + 1", "- y = y", "+ y = 2 * y"],
    )  # fmt: skip
    assert (second.name, second.on, second.source) == ("other", "", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "source:",
            "sauce:",
            r"text, line 5: unknown field 'sauce'; there are 'on' and 'source'; it is 'name",
        ),
        ("other | exact |", "other |", "line 11: a mutant is 'name . check . finding'"),
        ("other |", "name |", "line 11: there are two mutants 'name'"),
        ("[family]", "[family | sparse]", "line 3: a base of kind 'experts' is one of grouped, dense"),
        ("[family]", "", r"line 5: the line '\[family\]' comes before its mutants"),
        ("  rows = x[token]\n", "", "line 6: an edit begins below .* with a line of the base"),
        ("- y = y\n+ y = 3 * y\n", "", "other must change a line"),
    ],
)
def test_a_text_that_is_not_of_this_form_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(FORM.replace(old, new), "experts")


def mutant_of(edit: str, finding: str = "") -> Mutant:
    (mutant,) = parse(f"[family]\nm | values | {finding} | on: small-float32-silu\n{edit}", "experts")
    return mutant


@pytest.mark.parametrize(("line", "times"), [("no such line", 0), ("for e, tile in tiles(counts):", 2)])
def test_a_line_that_does_not_occur_once_in_the_base_is_refused(line: str, times: int) -> None:
    with pytest.raises(ValueError, match=rf"m: \['.*'\] occurs {times} times in .*grouped, not once"):
        mutant_of(f"- {line}\n+ x = 1").load()


def test_a_mutant_that_survives_fails() -> None:
    harmless = mutant_of(
        "- y.index_add_(0, token, gate * f)\n+ y.index_add_(0, token, f * gate)", "y is wrong"
    )
    with pytest.raises(AssertionError, match="mutant m survived: 'values' on small-float32-silu must"):
        require_killed(harmless, judge(harmless, "values"))


def test_a_mutant_killed_for_another_reason_fails() -> None:
    with pytest.raises(
        AssertionError, match="for another reason: .* must say 'y is wrong', it says 'the grad"
    ):
        require_killed(mutant_of("- y = y\n+ y = 1", "y is wrong"), "the gradient of x is missing")


def test_a_line_of_the_table_says_which_checks_kill_a_mutant() -> None:
    mutant = next(m for m in MUTANTS if m.name == "nan_for_one_expert")
    line = table.row(mutant, verdicts(mutant))
    assert (line["verdict"], line["loss:cv_squared_values"]) == ("killed", "killed")
    assert line["loss:z_loss_values"] == "passed"
    assert "cv_squared([7.0], {}) is nan" in line["finding"]
