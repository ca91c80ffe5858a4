"""The page of a report in markdown: ``report.md``, as text from its table of rows."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false
# pandas's types are wider than what indexing gives: a Series may be an array or a table to the checker.

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.report import page, tables
from benchmarks.report.styles import MODE_TITLES
from benchmarks.report.tables import CELL, number
from benchmarks.sweep import plan, record
from benchmarks.timing import roofline
from reporting.pages import markdown_table

NAME, TITLE = "report.md", "Mixture-of-experts layers: measured times"


def text(table: pd.DataFrame, files: list[Path], plots: list[str]) -> str:
    """Write the page; ``files`` are the CSVs that its rows come from, ``plots`` the names of PNG files."""
    ok, best = table[table["status"] == "ok"], tables.winners(table)
    parts = [f"# {TITLE}", _summary(table, best), *_incomplete(files)]
    if page.is_available():
        parts.append(
            f"[{page.NAME}]({page.NAME}) has the same rows with filters, every detail and more plots."
        )

    parts.append("## Environment")
    columns = ["run_id", "machine", "device_name", "device", "threads", "threads_wait", "torch_version",
               "git_commit"]  # fmt: skip
    environment = table[columns].drop_duplicates().astype(str)
    environment["git_commit"] = environment["git_commit"].str.replace(r"^(\w{12})\w*", r"\1", regex=True)
    parts.append(markdown_table(environment))

    parts.append("## Time against T, E and K")
    parts.append(
        "Top: median, with the range from the 20 % to the 80 % sample shaded. Bottom: relative to the "
        "fastest implementation at that point. Dashed: the limit."
    )
    parts += [_image(name) for name in plots if name.startswith("time-")] or ["No axis takes two values."]
    parts.append("## Efficiency")
    parts.append(
        "The limit is the larger of two. Compute: two dense matrix products with the same FLOPs, rows and "
        "dtype (six with the backward), on one expert's weights. Traffic: the bytes of tokens, results and "
        "of the experts that this routing touches, read and written once, at the measured bandwidth. "
        "Both are measured in the same minute. Efficiency is limit / time. FLOPs are "
        "2·T·K·(F·D + O·H), that is 6·T·K·D·H for gated experts and 4·T·K·D·H for others with O = D, three "
        "times that with the backward; router, activation and combine are not counted."
    )
    parts += [_image(name) for name in plots if name.startswith("efficiency-")]

    faults = ok[ok["efficiency"] > roofline.FAULT]
    if len(faults):
        shown = faults[["implementation", "workload", "T", "D", "H", "E", "K", "mode", "efficiency"]]
        parts.append(
            f"{len(faults)} times are shorter than their limit by more than a factor of {roofline.FAULT}: a "
            "fault of the limit's model or of its measurement, not a merit of the implementation."
        )
        parts.append(markdown_table(shown.map(number)))
    parts.append("## Fastest implementation of each cell")
    parts.append("≈ marks a tie: the ranges from the 20 % to the 80 % sample of the first two overlap.")
    for (workload, mode, dtype, device), rows in best.groupby(
        ["workload", "mode", "dtype", "device"], sort=False
    ):
        parts.append(f"### {workload}, {MODE_TITLES[mode]}, {dtype}, {device}")
        parts.append(tables.of_winners(rows))

    models = ok[ok["workload"] != "sweep"]
    if len(models):
        parts.append("## Layers of models")
        parts.append(tables.of_cells(models))
    if ok["load"].nunique() > 1:
        parts.append("## The same layer under different loads")
        shapes = ["T", "D", "H", "E", "K", "mode", "dtype", "device"]
        several = ok.groupby(["workload", *shapes])["load"].transform("nunique") > 1
        loads = ok[several].pivot_table(
            index=["workload", *shapes, "implementation"], columns="load", values="median_ms", sort=False
        )
        parts.append("Median time in ms.")
        parts.append(markdown_table(loads.reset_index().map(number)))
    first_calls = ok[ok["compile_ms"] > 1000][
        ["implementation", "workload", "T", "E", "K", "mode", "compile_ms"]
    ]
    if len(first_calls):
        parts.append("## First calls")
        parts.append("Cells whose first call took over a second longer than the median call: compilation.")
        first_calls = first_calls.assign(compile_s=first_calls["compile_ms"] / 1e3).drop(columns="compile_ms")
        parts.append(markdown_table(first_calls.map(number)))

    failed = table[table["status"] != "ok"]
    parts.append("## Cells without times")
    columns = ["implementation", "workload", "T", "D", "H", "E", "K", "mode", "status", "reason"]
    parts.append(
        markdown_table(failed[columns].astype(str))
        if len(failed)
        else "None: every cell was right and was timed."
    )
    parts.append("Made from " + ", ".join(f"[{f.name}]({f.name})" for f in files) + ".")
    return "\n\n".join(parts) + "\n"


def _incomplete(files: list[Path]) -> list[str]:
    """Write a line for each sweep that did not measure all that it was to, or did not write all of it."""
    states = {file: plan.progress(file) for file in files}
    cut = [f"The last line of {file.name} was not written to its end and is left out." for file in files
           if record.is_cut(file)]  # fmt: skip
    return cut + [
        f"{file.name} is of an interrupted sweep: it holds {state[0]} of {state[1]} rows "
        f"(`pytest benchmarks --resume {file.name}` measures the others)."
        for file, state in states.items()
        if state and state[0] < state[1]
    ]


def measured(table: pd.DataFrame) -> str:
    ok = table[table["status"] == "ok"]
    worst = number(ok["worst_error_fraction"].max())
    return (
        f"{len(ok)} of {len(table)} cells measured: {table['implementation'].nunique()} implementations, "
        f"{len(table[CELL].drop_duplicates())} workloads. Every time below is of a result that was checked "
        f"against a float64 oracle before and after; the worst error used {worst} of its budget."
    )


def _summary(table: pd.DataFrame, best: pd.DataFrame) -> str:
    lines = [measured(table)]
    if busy := tables.unsteady(table):
        lines[0] += f"\n\n**{busy}**"
    compared = best[best["next"].notna()]
    for mode, rows in compared.groupby("mode"):
        wins = rows["fastest"].value_counts()
        told = ", ".join(f"{name} in {count}" for name, count in wins.items())
        lines.append(
            f"- {MODE_TITLES[str(mode)]}: of {len(rows)} workloads the fastest is {told}; the slowest takes "
            f"{number(rows['slowest_ratio'].median())} times as long in the median workload and "
            f"{number(rows['slowest_ratio'].max())} times at worst."
        )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _image(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('-', ' ')}]({name})"
