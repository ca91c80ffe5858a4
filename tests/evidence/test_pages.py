"""Pages hold the figures of the tables beside them, and generated parts replace nothing else."""

from __future__ import annotations

import pytest

from evidence import error_budget, readme
from evidence.lookalikes import LOOKALIKES
from evidence.mutants import MUTANTS, table
from evidence.mutants.mutant import KILLED
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


def test_the_committed_kill_table_is_of_the_mutants_of_this_checkout() -> None:
    frame = table.read()
    assert list(zip(frame["kind"], frame["mutant"], frame["meant_check"], strict=True)) == [
        (m.kind, m.name, m.killed_by) for m in MUTANTS
    ]
    assert set(frame["verdict"]) == {KILLED}
    assert table.SUMMARY.read_text(encoding="utf-8") == table.summary(frame)


def test_the_committed_table_of_error_budgets_is_of_the_lookalikes_of_this_checkout() -> None:
    rows = error_budget.read()
    assert list(dict.fromkeys(row["implementation"] for row in rows)) == [s.name for s in LOOKALIKES]
    assert {row["false_alarms"] for row in rows} == {"0"}
    page = error_budget.PAGE.read_text(encoding="utf-8")
    assert error_budget.page_with(page, rows) == page


def test_the_readme_holds_the_figures_of_the_committed_tables() -> None:
    page = readme.README.read_text(encoding="utf-8")
    assert readme.page_with(page) == page
