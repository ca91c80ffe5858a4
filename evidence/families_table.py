"""What the suite says of each family of transformers: ``python -m evidence families``.

One line for each block: the router that was found by running it, the activation, what the block was found to
take, and the verdict of every check that applies. results/families.csv and its page.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter

import pandas as pd

from correctness.families import tiny
from correctness.session.families import FAMILIES, family_layer
from evidence import tables, verdicts
from moe_impls.registry import ResolveError
from reporting import provenance
from reporting.pages import markdown_table, write_atomically

CSV = tables.RESULTS / "families.csv"
PAGE = CSV.with_suffix(".md")
SHOWN = 160  # characters of a finding on the page
# What the findings of a block come from, where that is known.
CAUSES = {
    "axk2": "experts of other groups have the score 0, not minus infinity: negative biases choose them "
    "([script](../evidence/layers/reproductions/groups_masked_with_zero.py))",
    "nllb_moe": "the mask [T, E] of the best experts is taken for expert ids: only experts 0 and 1 are used",
    "switch_transformers": "the choice is made among probabilities rounded to 16 bits; noise, on by default, "
    "is written into the caller's x in training",
}


def run(workers: int | None = None) -> int:
    """Judge every block of every family; 1 if the suite finds fault with one. Ten minutes on two CPUs."""
    of = made_of()
    frame = tables.write(CSV, tables.make(CSV, of, tiny.blocks("all"), work, workers), of)
    write_atomically(PAGE, page().encode())
    print(f"{headline(frame)}\n{CSV}\n{PAGE}")
    return int(any(frame["verdict"] == verdicts.FAILED))


def work(block: str) -> tables.Rows:
    """Make the line of one block."""
    head = {
        "transformers_version": importlib.metadata.version("transformers"),
        "family": block,
        "on_interface": "no" if block in tiny.BESIDE else "yes",
    }
    name = FAMILIES + block
    try:
        return [head | verdicts.verdict(name, family_layer(name))]
    except ResolveError as error:
        reason = str(error).removeprefix(f"{name} is refused: ")
        return [head | verdicts.refused(reason)]


def made_of() -> dict[str, str]:
    """List the blocks, the version of transformers and the files that read and judge them."""
    rooms = (provenance.ROOT / "correctness" / "families").glob("*.py")
    version = importlib.metadata.version("transformers")
    return (
        {f"block {block}": version for block in tiny.blocks("all")}
        | tables.files(*rooms)
        | tables.files(provenance.ROOT / "evidence" / "verdicts.py")
        | tables.judges()
    )


def headline(frame: pd.DataFrame) -> str:
    """Say the figures in two sentences."""
    rows, sentences = tables.records(frame), []
    for on, what in (("yes", "classes of experts on its interface"), ("no", "blocks beside it")):
        counts = Counter(row["verdict"] for row in rows if row["on_interface"] == on)
        kinds = (verdicts.PASSED, verdicts.FAILED, verdicts.REFUSED)
        told = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
        sentences.append(f"Of the {counts.total()} {what}: {told}.")
    return " ".join(sentences)


def page() -> str:
    """Write out the page of the committed table."""
    frame = tables.read(CSV)
    rows = tables.records(frame)
    ready = pd.DataFrame([row for row in rows if row["verdict"] != verdicts.REFUSED])
    columns = ["family", "router", "activation", "declared", "verdict", "passed", "worst_fraction"]
    return f"""# Families of transformers

{headline(frame)} transformers {rows[0]["transformers_version"]}.

The table was {tables.made_at(frame)}, by `python -m evidence families`. All of it: [{CSV.name}]({CSV.name}).

A block is made small, with random weights. Its router is the simplest `RouterSpec` that explains what its
experts are called with for 400 tokens; *declared* is what the block was found to take, where that is not the
default of `LayerSupport`; *passed* counts checks; *worst_fraction* is the largest error of y by its budget.
`pytest correctness --layer transformers:FAMILY` says the same of one family.

## Found fault with

{_told(rows, verdicts.FAILED)}

## Not in the contract

{_told(rows, verdicts.REFUSED)}

## Read and judged

{markdown_table(ready.reindex(columns=columns))}
"""


def _told(rows: tables.Rows, kind: str) -> str:
    """Write a table of the blocks with that verdict, and what was found."""
    told = [
        {
            "block": row["family"],
            "failing": row["failing"],
            "finding": _short(row["findings"]),
            "cause": CAUSES.get(row["family"], ""),
        }
        for row in rows
        if row["verdict"] == kind
    ]
    return markdown_table(pd.DataFrame(told)) if told else "None."


def _short(finding: str) -> str:
    return finding if len(finding) <= SHOWN else f"{finding[:SHOWN]} ..."
