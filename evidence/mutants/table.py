"""Which check rejects which mutant: the table, its summary, and the files that hold both."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from correctness.checks import balance, routers
from correctness.checks.table import CHECKS as EXPERT_CHECKS
from evidence.mutants import MUTANTS
from evidence.mutants.mutant import KILLED, Mutant, verdict
from reporting import provenance
from reporting.pages import markdown_table, write_atomically

CSV = provenance.ROOT / "results" / "mutants.csv"
SUMMARY = CSV.with_suffix(".md")
KINDS = {"experts": "expert computations", "router": "routers", "loss": "losses and loads"}
# The checks of each kind, in the order of the suite.
CHECKS = {
    kind: list(dict.fromkeys(check.name for check in checks if not check.drawn))
    for kind, checks in (("experts", EXPERT_CHECKS), ("router", routers.CHECKS), ("loss", balance.CHECKS))
}
COLUMNS = [f"{kind}:{check}" for kind, names in CHECKS.items() for check in names]


def row(mutant: Mutant, verdicts: dict[str, str | None]) -> dict[str, str]:
    """One line of the table, from what each check that applies to the mutant finds in it."""
    finding = verdicts[mutant.killed_by]
    outcomes = {
        f"{mutant.kind}:{check}": "passed" if found is None else "killed" for check, found in verdicts.items()
    }
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
        **{column: outcomes.get(column, "") for column in COLUMNS},
    }


def table(rows: list[dict[str, str]]) -> pd.DataFrame:
    """All rows, with where and with what they were made in the first columns."""
    made = provenance.columns()
    return pd.DataFrame([made | row for row in rows])


def write(frame: pd.DataFrame) -> None:
    """The table and its summary."""
    write_atomically(CSV, frame.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(SUMMARY, summary(frame).encode())


def read(path: Path = CSV) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def by_family(frame: pd.DataFrame) -> pd.DataFrame:
    """How many mutants of each family there are, and how many are killed for the reason stated."""
    counted = frame.assign(mutants=1, killed=(frame["verdict"] == KILLED).astype(int))
    return pd.DataFrame(
        counted.groupby(["kind", "family"], sort=False)[["mutants", "killed"]].sum()
    ).reset_index()


def by_check(frame: pd.DataFrame) -> pd.DataFrame:
    """For each check: the mutants it is meant for, those it kills, and those that no other check kills."""
    kills = frame[COLUMNS] == "killed"
    meant = (frame["kind"] + ":" + frame["meant_check"]).value_counts()
    counts = pd.DataFrame(
        {
            "meant": meant.reindex(COLUMNS, fill_value=0),
            "kills": kills.sum(),
            "alone": kills[kills.sum(axis=1) == 1].sum(),
        }
    )
    names = pd.DataFrame([column.split(":") for column in COLUMNS], columns=["kind", "check"], index=COLUMNS)
    return names.join(counts)


def headline(frame: pd.DataFrame) -> str:
    """The figure in one sentence."""
    counts = frame["kind"].value_counts()
    kinds = ", ".join(f"{counts.get(kind, 0)} {name}" for kind, name in KINDS.items())
    killed = frame["verdict"].tolist().count(KILLED)
    return f"{killed} of {len(frame)} mutants ({kinds}) are killed by the check meant for them"


def summary(frame: pd.DataFrame) -> str:
    """The table as a page: figures, families, checks, and every mutant with the check that kills it."""
    made = frame.iloc[0]
    others = (frame[COLUMNS] == "killed").sum(axis=1) - (frame["verdict"] == KILLED).astype(int)
    mutants = frame[["kind", "mutant", "meant_check"]].assign(others=others, source=frame["source"])
    return f"""# Mutants

{headline(frame)}. Written by `pytest correctness --mutants` at commit {made["git_commit"][:12]} with torch
{made["torch_version"]} on {made["device_name"]}. The whole table, mutant by check, with each finding:
[{CSV.name}]({CSV.name}).

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


def report(terminal: pytest.TerminalReporter) -> None:
    """The kill table, on the terminal and, if every mutant was judged, in the files of results/."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for told in (r for found in terminal.stats.values() for r in found if isinstance(r, pytest.TestReport)):
        for name, value in told.user_properties:
            if name == "mutant" and isinstance(value, dict):
                rows[value["kind"], value["mutant"]] = value
    judged = [rows[m.kind, m.name] for m in MUTANTS if (m.kind, m.name) in rows]
    if not judged:
        return
    frame = table(judged)
    terminal.section("mutants and the checks that kill them")
    for found in judged:
        kills = [column for column in COLUMNS if found[column] == "killed"]
        others = f" and {len(kills) - 1} others" if len(kills) > 1 else ""
        name = f"{found['kind']:7} {found['mutant']:52}"
        terminal.write_line(f"{found['verdict']} {name} {found['meant_check']}{others}")
    terminal.write_line(headline(frame))
    if len(judged) == len(MUTANTS):
        write(frame)
        terminal.write_line(f"{CSV}\n{SUMMARY}")
    else:
        terminal.write_line(f"{len(judged)} of {len(MUTANTS)} mutants judged: results/ is left as it is")
