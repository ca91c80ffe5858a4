"""How much of the error budget right implementations use: a CSV, and the tables of docs/error-budget.md.

The first command measures, the second writes the tables of that file into the page:

    pytest tests/evidence/test_lookalikes.py --seeds 200 --error-budget results/error_budget.csv
    python -m evidence.error_budget

Parts of the measurement that were run apart, by pytest's choice of tests, are joined first: ``python -m
evidence.error_budget PART.csv...``.

Nothing on the page is typed by hand that one of them can say.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from correctness.problems.problem import Problem
from correctness.session.summary import TENSORS
from moe_impls.interface import DTYPES, Implementation, dtype_name
from reporting import provenance
from reporting.pages import markdown_table, with_block, write_atomically

CSV, PAGE = (
    provenance.ROOT / "results" / "error_budget.csv",
    provenance.ROOT / "docs" / "error-budget.md",
)
EXACT = "exact"  # in place of a tensor: all results of an exact problem, which allows no error
COLUMNS = (
    "implementation", "dtype", "tensor", "seeds", "comparisons", "false_alarms", "worst_fraction", "problem",
)  # fmt: skip


class Worst:
    """The largest error of each implementation, dtype and tensor, as a fraction of its budget, and where."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], dict] = {}

    def add(self, subject: Implementation, problem: Problem, fractions: dict[str, float]) -> None:
        """One call that was judged: the error of each tensor as a fraction of its budget, or of ``EXACT``."""
        for tensor, fraction in fractions.items():
            key = (subject.name, dtype_name(problem.dtype), tensor)
            row = self._rows.setdefault(
                key, {"seeds": set(), "comparisons": 0, "alarms": 0, "worst": (-1.0, "")}
            )
            row["seeds"].add(problem.seed)
            row["comparisons"] += 1
            row["alarms"] += not fraction <= 1
            row["worst"] = max(row["worst"], (fraction, problem.id))

    def write(self, path: str | Path) -> None:
        made, lines = provenance.columns(), []
        for key, row in self._rows.items():
            fraction, problem = row["worst"]
            counts = len(row["seeds"]), row["comparisons"], row["alarms"]
            lines.append((*made.values(), *key, *counts, f"{fraction:.3g}", problem))
        frame = pd.DataFrame(lines, columns=[*made, *COLUMNS])
        write_atomically(Path(path), frame.to_csv(index=False, lineterminator="\n").encode())


def read(path: str | Path = CSV) -> list[dict[str, str]]:
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict(orient="records")


def headline(rows: list[dict[str, str]]) -> str:
    """The figure in one sentence."""

    def total(column: str, among: list[dict[str, str]] = rows) -> int:
        return sum(int(row[column]) for row in among)

    seeds, count = {int(row["seeds"]) for row in rows}, len({row["implementation"] for row in rows})
    exact = [row for row in rows if row["tensor"] == EXACT]
    judged = total("comparisons") - total("comparisons", exact)
    worst = max(float(row["worst_fraction"]) for row in rows)
    return (
        f"{count} right implementations that look different, on up to {max(seeds)} seeds of each numeric "
        f"problem: {total('false_alarms')} false alarms in {judged:,} tensors held to a budget, of which the "
        f"worst took {worst:.2f}, and {total('comparisons', exact):,} calls that must be right to the bit"
    )


def tables(rows: list[dict[str, str]]) -> str:
    """Markdown: the worst fraction of each tensor over all implementations, and of each implementation."""
    lines = [f"{headline(rows)}.\n"]
    for column, names in (("tensor", TENSORS), ("implementation", [row["implementation"] for row in rows])):
        table = []
        for name in dict.fromkeys(names):
            of_name = [row for row in rows if row[column] == name]
            cells = {column: name}
            for dtype in map(dtype_name, DTYPES):
                found = [float(row["worst_fraction"]) for row in of_name if row["dtype"] == dtype]
                cells[dtype] = f"{max(found):.2f}" if found else ""
            table.append(cells)
        lines += [markdown_table(pd.DataFrame(table)), ""]
    return "\n".join(lines)


def page_with(text: str, rows: list[dict[str, str]]) -> str:
    """The page with its tables replaced by those of ``rows``."""
    return with_block(text, "python -m evidence.error_budget", tables(rows))


def join(parts: list[str]) -> None:
    """Write the rows of several files into one; each says by which commit it was made."""
    frames = [pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts]
    write_atomically(CSV, pd.concat(frames).to_csv(index=False, lineterminator="\n").encode())


if __name__ == "__main__":
    if sys.argv[1:]:
        join(sys.argv[1:])
    write_atomically(PAGE, page_with(PAGE.read_text(encoding="utf-8"), read()).encode())
