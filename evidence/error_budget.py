"""How much of the error budget right implementations use: ``python -m evidence lookalikes``.

Every problem with a rounding budget or exact numbers, on many seeds: of the smaller problems, which hold
every combination of options, by every lookalike; of the larger ones each seed goes to one lookalike in turn.
What comes of it is results/error_budget.csv and the tables of docs/error-budget.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from correctness.checks.table import CHECKS
from correctness.judging.calling import run_both_ways
from correctness.judging.compare import reference, require_right
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from correctness.session.summary import TENSORS
from evidence import lookalikes, tables
from evidence.lookalikes import LOOKALIKES
from evidence.mutants import dense, grouped
from moe_impls.interface import DTYPES, Implementation, dtype_name
from reporting import provenance
from reporting.pages import markdown_table, with_block, write_atomically

CSV = tables.RESULTS / "error_budget.csv"
PAGE = provenance.ROOT / "docs" / "error-budget.md"
COMMAND = "python -m evidence pages"  # names the part of a page that is written from tables
FIRST_SEED, SEEDS = 1000, 200
EXACT = "exact"  # in place of a tensor: all results of an exact problem, which allows no error
NUMERIC = {
    problem.id: problem for check in CHECKS if check.name in ("values", "exact") for problem in check.problems
}
FIGURES = ("seeds", "comparisons", "false_alarms", "worst_fraction", "problem")
LARGE = 2**9  # tokens and rows of weights, above which a seed of a problem goes to one lookalike


def run(seeds: int = SEEDS) -> int:
    """Judge the lookalikes on ``seeds`` seeds of every problem, in hours; 1 if any is a false alarm."""
    of, tasks = made_of(), [f"{seeds} seeds of {name}" for name in NUMERIC]
    rows = summed(tables.make(CSV, of, tasks, work))
    tables.write(CSV, rows, of)
    write_atomically(PAGE, page().encode())
    print(f"{headline(rows)}\n{CSV}\n{PAGE}")
    return int(any(row["false_alarms"] != "0" for row in rows))


def made_of() -> dict[str, str]:
    """List every lookalike and problem, and the files that they and the judgement are made of."""
    sources = (module.__file__ for module in (lookalikes, dense, grouped))
    return (
        {f"lookalike {subject.name}": tables.digest(subject.support) for subject in LOOKALIKES}
        | {f"problem {name}": tables.digest(problem) for name, problem in NUMERIC.items()}
        | tables.files(*(Path(source) for source in sources if source))
        | tables.judges()
    )


def takers(problem: Problem, seed: int) -> tuple[Implementation, ...]:
    """List the lookalikes that are held to a seed of a problem."""
    if problem.T + problem.E * (problem.F + problem.O) <= LARGE:
        return LOOKALIKES
    turn = seed % len(LOOKALIKES)
    return LOOKALIKES[turn : turn + 1]


def work(task: str) -> tables.Rows:
    """Make the lines of one problem; what rejects a lookalike is printed."""
    seeds, _, name = task.partition(" seeds of ")
    rows, alarms = judge(NUMERIC[name], int(seeds))
    for alarm in alarms:
        print(alarm, file=sys.stderr, flush=True)
    return rows


def judge(problem: Problem, seeds: int) -> tuple[tables.Rows, list[str]]:
    """Hold lookalikes to a problem on many seeds: a line for each of them and tensor, and false alarms."""
    lines, alarms = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        seeded = replace(problem, seed=seed)
        inputs = make_inputs(seeded)
        for subject in takers(problem, seed):
            try:
                fractions = require_right(next(run_both_ways(subject, seeded, inputs)), seeded)
            except CheckFailed as failure:
                alarms.append(f"{subject.name}: {failure}")
                fractions = failure.fractions or {"y": math.inf}
            assert problem.exact or all(math.isfinite(reference(seeded).budget[n]) for n in fractions)
            if problem.exact:
                fractions = {EXACT: max(fractions.values())}
            lines += [_line(subject, seeded, tensor, fraction) for tensor, fraction in fractions.items()]
    return [row | {"seeds": row["comparisons"]} for row in summed(lines)], alarms


def _line(subject: Implementation, problem: Problem, tensor: str, fraction: float) -> dict[str, str]:
    """Make the line of one tensor of one call: its error as a fraction of its budget, or of ``EXACT``."""
    return {
        "implementation": subject.name,
        "dtype": dtype_name(problem.dtype),
        "tensor": tensor,
        "seeds": "1",
        "comparisons": "1",
        "false_alarms": str(int(not fraction <= 1)),
        "worst_fraction": "inf" if math.isnan(fraction) else f"{fraction:.3g}",
        "problem": problem.id,
    }


def summed(rows: tables.Rows) -> tables.Rows:
    """Join the lines of each implementation, dtype and tensor (of a commit): their sums and the worst."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[column] for column in row if column not in FIGURES)
        if key not in found:
            found[key] = dict(row)
            continue
        kept = found[key]
        worst = max(kept, row, key=lambda r: float(r["worst_fraction"]))
        sums = {c: str(int(kept[c]) + int(row[c])) for c in ("comparisons", "false_alarms")}
        seeds = str(max(int(kept["seeds"]), int(row["seeds"])))  # every problem has the same ones
        kept.update(sums, seeds=seeds, worst_fraction=worst["worst_fraction"], problem=worst["problem"])
    return list(found.values())


def headline(rows: tables.Rows) -> str:
    """Say the figure in one sentence."""

    def total(column: str, among: tables.Rows = rows) -> int:
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


def worst_by(rows: tables.Rows, column: str, names: Iterable[str]) -> str:
    """Tabulate, in markdown, the worst fraction of each name in ``column`` and dtype."""
    lines = []
    for name in names:
        of_name = [row for row in rows if row[column] == name]
        cells = {column: name}
        for dtype in map(dtype_name, DTYPES):
            found = [float(row["worst_fraction"]) for row in of_name if row["dtype"] == dtype]
            cells[dtype] = f"{max(found):.2f}" if found else ""
        lines.append(cells)
    return markdown_table(pd.DataFrame(lines))


def page() -> str:
    """Return the page with its tables replaced by those of the committed table."""
    frame = tables.read(CSV)
    rows = tables.records(frame)
    content = f"""{headline(rows)}.

{worst_by(rows, "tensor", TENSORS)}

{worst_by(rows, "implementation", frame["implementation"].drop_duplicates())}

The table behind this was {tables.made_at(frame)}.
"""
    return with_block(PAGE.read_text(encoding="utf-8"), COMMAND, content)
