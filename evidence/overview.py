"""What the verification is worth, in one part of docs/evidence.md, from the committed tables."""

from __future__ import annotations

from evidence import error_budget, published, tables
from evidence.mutants import table
from evidence.mutation import table as mutation
from reporting import provenance
from reporting.pages import markdown_table, with_block

PAGE = provenance.ROOT / "docs" / "evidence.md"


def page() -> str:
    """Return the page with its figures replaced by those of the committed tables."""
    mutants, budgets, suites = (tables.read(m.CSV) for m in (table, error_budget, published))
    drawn = tables.read(mutation.CSV)
    compared = published.results_table([*published.own_rows(mutants, suites), *tables.records(suites)])
    content = f"""- Wrong is rejected: {table.headline(mutants)} ([table](../results/mutants.md),
  {tables.made_at(mutants)}).
- So is what nobody chose: {mutation.headline(drawn)} ([table](../results/mutation.md),
  {tables.made_at(drawn)}).
- Right is accepted: {error_budget.headline(tables.records(budgets))}
  ([how error is budgeted](error-budget.md); {tables.made_at(budgets)}).

The same wrong expert computations under the rules and problems of published test suites, re-created here.
[results/verification.md](../results/verification.md) says what was re-created and what was not, and what each
column counts. The table was {tables.made_at(suites)}.

{markdown_table(compared)}
"""
    return with_block(PAGE.read_text(encoding="utf-8"), error_budget.COMMAND, content)
