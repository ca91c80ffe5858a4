"""Which check rejects which mutant: ``python -m evidence mutants``, results/mutants.csv and its page."""

from __future__ import annotations

import inspect
from importlib import import_module

import pandas as pd

from evidence import tables
from evidence.mutants import MUTANTS
from evidence.mutants.judge import KILLED, check_names, trials, verdict, verdicts
from evidence.mutants.mutant import KINDS, Mutant
from reporting.pages import markdown_table, write_atomically

CSV = tables.RESULTS / "mutants.csv"
PAGE = CSV.with_suffix(".md")
NAMES = {
    "experts": "expert computations",
    "router": "routers",
    "layer": "whole layers",
    "loss": "losses and loads",
    "ranks": "distributed computations",
}
BY_NAME = {f"{mutant.kind} {mutant.name}": mutant for mutant in MUTANTS}


def run() -> int:
    """Judge every mutant by every check that applies to it; 1 if one survives. Half an hour on two CPUs."""
    of = made_of()
    frame = tables.write(CSV, tables.make(CSV, of, list(BY_NAME), work), of)
    write_atomically(PAGE, page().encode())
    for _, survivor in frame[frame["verdict"] != KILLED].iterrows():
        print(f"{survivor['kind']} {survivor['mutant']}: {survivor['verdict']}: {survivor['finding']}")
    print(f"{headline(frame)}\n{CSV}\n{PAGE}")
    return int(any(frame["verdict"] != KILLED))


def page() -> str:
    """Write out the page of the committed table."""
    return summary(tables.read(CSV))


def made_of() -> dict[str, str]:
    """List mutants with their bases, checks with their problems, and the files that decide what is right."""
    bases = {m.base: tables.code_of(inspect.getsource(import_module(m.base))) for m in MUTANTS}
    problems: dict[str, set[str]] = {}
    for kind, base in {(m.kind, m.base) for m in MUTANTS}:
        for trial in trials(kind, "base", import_module(base)):
            problems.setdefault(f"check {kind}:{trial.check}", set()).add(trial.problem)
    return (
        {f"mutant {name}": tables.digest(m, bases[m.base]) for name, m in BY_NAME.items()}
        | {check: tables.digest(sorted(found)) for check, found in problems.items()}
        | tables.judges()
    )


def work(name: str) -> tables.Rows:
    """Make the line of one mutant."""
    mutant = BY_NAME[name]
    return [row(mutant, verdicts(mutant))]


def row(mutant: Mutant, verdicts: dict[str, str | None]) -> dict[str, str]:
    """Make one line of the table, from what each check that applies to the mutant finds in it."""
    finding = verdicts[mutant.killed_by]
    return {
        "kind": mutant.kind,
        "family": mutant.family,
        "mutant": mutant.name,
        "base": mutant.base,
        "source": mutant.source,
        "meant_check": mutant.killed_by,
        "meant_on": mutant.on,
        "verdict": verdict(mutant, finding),
        "finding": "" if finding is None else finding.splitlines()[0],
        **{f"{kind}:{check}": "" for kind in KINDS for check in check_names(kind)},
        **{f"{mutant.kind}:{c}": "passed" if found is None else "killed" for c, found in verdicts.items()},
    }


def check_columns(frame: pd.DataFrame) -> list[str]:
    """List the columns that say what each check made of a mutant: those of the table's own commit."""
    return [column for column in frame.columns if ":" in column]


def by_family(frame: pd.DataFrame) -> pd.DataFrame:
    """Count the mutants of each family, and those that are killed for the reason stated."""
    counted = frame.assign(mutants=1, killed=(frame["verdict"] == KILLED).astype(int))
    return pd.DataFrame(
        counted.groupby(["kind", "family"], sort=False)[["mutants", "killed"]].sum()
    ).reset_index()


def by_check(frame: pd.DataFrame) -> pd.DataFrame:
    """Count for each check the mutants it is meant for, those it kills, and those that it alone kills."""
    columns = check_columns(frame)
    kills = frame[columns] == "killed"
    meant = (frame["kind"] + ":" + frame["meant_check"]).value_counts()
    counts = pd.DataFrame(
        {
            "meant": meant.reindex(columns, fill_value=0),
            "kills": kills.sum(),
            "alone": kills[kills.sum(axis=1) == 1].sum(),
        }
    )
    names = pd.DataFrame([column.split(":") for column in columns], columns=["kind", "check"], index=columns)
    return names.join(counts)


def headline(frame: pd.DataFrame) -> str:
    """Say the figure in one sentence."""
    counts = frame["kind"].value_counts()
    kinds = ", ".join(f"{counts.get(kind, 0)} {name}" for kind, name in NAMES.items())
    killed = frame["verdict"].tolist().count(KILLED)
    return f"{killed} of {len(frame)} mutants ({kinds}) are killed by the check meant for them"


def summary(frame: pd.DataFrame) -> str:
    """Write a table out as a page: figures, families, checks, and every mutant with its check."""
    others = (frame[check_columns(frame)] == "killed").sum(axis=1) - (frame["verdict"] == KILLED).astype(int)
    mutants = frame[["kind", "mutant", "meant_check"]].assign(others=others, source=frame["source"])
    return f"""# Mutants

{headline(frame)}.

The table was {tables.made_at(frame)}, by
`python -m evidence mutants`. All of it, mutant by check, with each finding: [{CSV.name}]({CSV.name}).

A mutant is a right module changed in a line or two; `evidence/mutants/` holds the edits.

## Families

{markdown_table(by_family(frame))}

## Checks

*meant*: mutants that the check must kill; *kills*: all that it kills; *alone*: those that only it kills.

{markdown_table(by_check(frame))}

## Mutants

*others*: how many other checks kill it, too; *source*: a public report of the same mistake.

{markdown_table(mutants)}
"""
