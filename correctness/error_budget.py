"""How much of the error budget right implementations use: a CSV, and the tables of docs/error-budget.md.

The first command measures, the second writes the tables of that file into the page:

    pytest correctness/test_lookalikes.py --seeds 200 --error-budget results/error_budget.csv
    python -m correctness.error_budget

Nothing on the page is typed by hand that one of them can say.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd

from correctness.pages import markdown_table, write_atomically
from correctness.problems import Problem
from correctness.provenance import ROOT
from correctness.summary import TENSORS
from moe_impls.interface import DTYPES, Implementation, dtype_name

CSV, PAGE = ROOT / "results" / "error_budget.csv", ROOT / "docs" / "error-budget.md"
BEGIN, END = "<!-- begin: python -m correctness.error_budget -->\n", "<!-- end -->\n"
COLUMNS = ("implementation", "dtype", "tensor", "seeds", "comparisons", "worst_fraction", "problem")


class Worst:
    """The largest error of each implementation, dtype and tensor, as a fraction of its budget, and where."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], dict] = {}

    def add(self, subject: Implementation, problem: Problem, fractions: dict[str, float]) -> None:
        if problem.exact:  # no error is allowed
            return
        for tensor, fraction in fractions.items():
            key = (subject.name, dtype_name(problem.dtype), tensor)
            row = self._rows.setdefault(key, {"seeds": set(), "comparisons": 0, "worst": (-1.0, "")})
            row["seeds"].add(problem.seed)
            row["comparisons"] += 1
            row["worst"] = max(row["worst"], (fraction, problem.id))

    def write(self, path: str | Path) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, row in self._rows.items():
            fraction, problem = row["worst"]
            writer.writerow([*key, len(row["seeds"]), row["comparisons"], f"{fraction:.3g}", problem])
        write_atomically(Path(path), text.getvalue().encode())


def read(path: str | Path = CSV) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(rows: list[dict[str, str]]) -> str:
    """Markdown: the worst fraction of each tensor over all implementations, and of each implementation."""
    seeds, comparisons = {int(row["seeds"]) for row in rows}, sum(int(row["comparisons"]) for row in rows)
    count = len({row["implementation"] for row in rows})
    lines = [
        f"{count} implementations, {comparisons:,} tensors compared on {max(seeds)} seeds of each problem.\n"
    ]
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
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}"


if __name__ == "__main__":
    write_atomically(PAGE, page_with(PAGE.read_text(encoding="utf-8"), read()).encode())
