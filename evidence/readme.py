"""``python -m evidence.readme`` writes the README's figures on verification, from results/."""

from __future__ import annotations

from evidence import error_budget, published
from evidence.mutants import table
from reporting import provenance
from reporting.pages import markdown_table, with_block, write_atomically

README = provenance.ROOT / "README.md"


def content() -> str:
    """How many wrong subjects are rejected and right ones accepted, here and by published suites."""
    rows = published.read()
    compared = published.results_table([*published.own_rows(), *rows.to_dict(orient="records")])
    budgets = error_budget.headline(error_budget.read())
    return f"""- Wrong is rejected: {table.headline(table.read())} ([table](results/mutants.md)).
- Right is accepted: {budgets} ([how error is budgeted](docs/error-budget.md)).

The same wrong expert computations under the rules and problems of published test suites, re-created here.
[results/verification.md](results/verification.md) says what was re-created and what was not, and what each
column counts:

{markdown_table(compared)}
"""


def page_with(text: str) -> str:
    """The README with its figures on verification replaced by those of the committed tables."""
    return with_block(text, "python -m evidence.readme", content())


if __name__ == "__main__":
    write_atomically(README, page_with(README.read_text(encoding="utf-8")).encode())
