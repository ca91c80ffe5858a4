"""Pages are made from tables alone, of whatever commit, and generated parts replace nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from evidence import error_budget, freshness, overview, published, tables
from evidence.__main__ import main
from evidence.mutants import table
from evidence.mutation import table as mutation
from reporting.pages import with_block

PAGE = "above\n<!-- begin: command -->\nold\n<!-- end -->\nbelow\n<!-- begin: other -->\nkept\n<!-- end -->\n"


def test_a_generated_part_is_replaced_and_the_rest_is_kept() -> None:
    page = with_block(PAGE, "command", "new\n")
    assert page == PAGE.replace("old\n", "\nnew\n\n")
    assert with_block(page, "command", "new") == page


@pytest.mark.parametrize("page", ["", PAGE + PAGE, "<!-- end -->\n<!-- begin: command -->\n"])
def test_a_page_without_a_place_for_its_generated_part_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="must hold the lines '<!-- begin: command -->'"):
        with_block(page, "command", "new")


MADE = {"git_commit": "0123456789abcdef" * 2 + "01234567", "torch_version": "2.13.0", "device_name": "a CPU"}
AT = "made at commit 0123456789ab with torch 2.13.0 on a CPU"
MUTANT = {
    "kind": "experts",
    "family": "f",
    "source": "",
    "meant_check": "a_check_of_then",
    "verdict": "killed",
}
MUTANTS_OF_THEN = [
    MADE | MUTANT | {"mutant": "m", "experts:a_check_of_then": "killed", "experts:values": "killed"},
    MADE | MUTANT | {"mutant": "n", "experts:a_check_of_then": "killed", "experts:values": "passed"},
    MADE | MUTANT | {"kind": "router", "mutant": "m", "experts:a_check_of_then": "", "experts:values": ""},
]
SUITE = {"suite": "a suite of then", "accepted": "0", "comparisons": "1", "rejected_by": ""}
SUITES_OF_THEN = [
    MADE | SUITE | {"kind": "right", "subject": "r", "concern": "", "verdict": "survived", "shown": "no"},
    MADE | SUITE | {"kind": "zeros", "subject": "zeros", "concern": "", "verdict": "killed", "shown": "no"},
    MADE
    | SUITE
    | {"kind": "mutant", "subject": "m", "concern": "forward", "verdict": "survived", "shown": "yes"},
]
BUDGETS_OF_THEN = [
    MADE
    | {"implementation": "a_lookalike_of_then", "dtype": "float32", "tensor": tensor, "seeds": "4"}
    | {"comparisons": "10", "false_alarms": "0", "worst_fraction": "0.5", "problem": "p"}
    for tensor in ("y", error_budget.EXACT)
]
DRAWN_THEN = [
    MADE
    | {
        "seed": "7",
        "of": "90",
        "files": "3",
        "key": key,
        "file": "moe_impls/a.py",
        "line": "1",
        "function": "f",
    }
    | {"operator": "constant", "before": "1", "after": "2", "verdict": verdict, "check": check}
    for key, verdict, check in (("k", "killed", "values-problem-name"), ("s", "survived", ""))
]


@pytest.fixture
def then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tables of another commit into a folder: checks, suites and lookalikes have other names now."""
    for module, rows in (
        (table, MUTANTS_OF_THEN),
        (published, SUITES_OF_THEN),
        (error_budget, BUDGETS_OF_THEN),
        (mutation, DRAWN_THEN),
    ):
        monkeypatch.setattr(module, "CSV", tmp_path / module.CSV.name)
        tables.write(module.CSV, rows, {})
    for module in freshness.PAGES:
        monkeypatch.setattr(module, "PAGE", tmp_path / module.PAGE.name)
    for module in (error_budget, overview):
        module.PAGE.write_text(f"words\n<!-- begin: {error_budget.COMMAND} -->\n<!-- end -->\n", "utf-8")
    return tmp_path


def test_every_page_is_made_from_tables_of_another_commit_and_names_it(then: Path) -> None:
    assert main(["pages"]) == 0
    for name in ("mutants.md", "mutation.md", "verification.md", "error-budget.md", "evidence.md"):
        assert AT in (then / name).read_text("utf-8")


def test_the_page_of_mutants_counts_the_checks_of_its_table(then: Path) -> None:
    by_check = table.by_check(tables.read(table.CSV))
    assert by_check.to_numpy().tolist() == [
        ["experts", "a_check_of_then", 2, 2, 1],
        ["experts", "values", 0, 1, 0],
    ]
    assert (
        "3 of 3 mutants (2 expert computations, 1 routers, 0 whole layers, 0 losses and loads, "
        "0 distributed computations)" in table.page()
    )


def test_the_comparison_counts_what_both_tables_have(then: Path) -> None:
    compared = published.results_table(
        [*published.own_rows(tables.read(table.CSV), tables.read(published.CSV)), *SUITES_OF_THEN]
    )
    assert compared[["suite", "forward", "all"]].to_numpy().tolist() == [
        ["this suite", "1 of 1", "1 of 1"],
        ["a suite of then", "0 of 1", "0 of 1"],
    ]
    assert "| a suite of then | m |" in published.page()


def test_the_page_of_drawn_mutants_names_what_survives(then: Path) -> None:
    text = "Of 2 single edits, drawn by seed 7 from the 90 that operators make in 3 files, 1 are found"
    assert text in mutation.page()
    assert "| s | moe_impls/a.py:1 | f | `1` to `2` |" in mutation.page()
    assert "| values | 1 |" in mutation.page()


def test_the_figures_of_the_budget_are_those_of_its_table(then: Path) -> None:
    assert "1 right implementations that look different, on up to 4 seeds" in error_budget.page()
    assert "| a_lookalike_of_then |  | 0.50 |  |  |" in error_budget.page()


def test_what_is_stale_is_said_with_the_command_that_makes_it_anew(
    then: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_of = {f"check experts:{i}": "x" for i in range(20)}
    monkeypatch.setattr(
        freshness, "TABLES", {"mutants": SimpleNamespace(CSV=table.CSV, made_of=lambda: made_of)}
    )
    main(["pages"])
    capsys.readouterr()
    assert main(["check"]) == 1
    said = capsys.readouterr().out
    assert f"mutants.csv, {AT}: stale\n  added: check experts:0, check experts:1," in said
    assert "and 12 more\n  to make it anew: python -m evidence mutants\n" in said


def test_what_is_fresh_is_said_with_its_commit(
    then: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(freshness, "TABLES", {"mutants": SimpleNamespace(CSV=table.CSV, made_of=dict)})
    main(["pages"])
    capsys.readouterr()
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"mutants.csv, {AT}: fresh\n"
    overview.PAGE.write_text(
        overview.PAGE.read_text("utf-8").replace("3 of 3 mutants", "4 of 4 mutants"), "utf-8"
    )
    assert main(["check"]) == 1
    assert "evidence.md does not say what its tables say" in capsys.readouterr().out


@pytest.mark.parametrize("module", [table, mutation, error_budget, published])
def test_what_a_table_is_made_of_is_named_once_and_does_not_depend_on_the_process(module) -> None:
    made_of = module.made_of()
    assert made_of == module.made_of()
    assert {name.partition(" ")[0] for name in made_of} <= {
        "mutant",
        "check",
        "file",
        "lookalike",
        "problem",
        "suite",
    }
    assert not any("0x" in value for value in pd.Series(made_of))
