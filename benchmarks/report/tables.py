"""Tables of a report: which rows count, which implementation is fastest, and numbers as text.

Times are compared only within one run, where they were taken side by side: of each workload and mode the
newest run that measured it is shown, alone.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false
# pandas's types are wider than what indexing gives: a Series may be an array or a table to the checker.

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pandas as pd

from benchmarks.sweep import record
from reporting.pages import markdown_table

# What two rows must share to be times of the same thing.
LAYER = ["device", "device_name", "threads", "threads_wait", "cache", "torch_version", "workload", "D", "H",
         "O", "activation", "output_activation", "combine", "bias", "dtype", "seed"]  # fmt: skip
CELL = [*LAYER, "load", "T", "E", "K", "mode"]
UNSTEADY = 2.0  # the 80 % sample over the 20 % sample: 1.1 to 1.4 where nothing else runs


def table_of(rows: Iterable[record.Row]) -> pd.DataFrame:
    """Make the table of rows, a column for each of `record.COLUMNS`."""
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(record.COLUMNS))


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of each cell from its newest run; of a cell that the run repeated, the last."""
    started = table.groupby("run_id")["time_utc"].transform("min")
    table = table.assign(order=list(zip(started, table["run_id"], strict=True)))
    latest = table.groupby(CELL)["order"].transform("max")
    chosen = table[table["order"] == latest].drop(columns="order")
    return chosen.drop_duplicates([*CELL, "implementation"], keep="last").reset_index(drop=True)


def unsteady(table: pd.DataFrame) -> str:
    """Say in a sentence that many samples of a call took much longer than others; empty if they did not."""
    ok = table[table["status"] == "ok"]
    count = int((ok["p80_ms"] > UNSTEADY * ok["p20_ms"]).sum())
    if not count:
        return ""
    return (
        f"Something else kept this machine busy: in {count} of {len(ok)} cells the 80 % sample took more "
        f"than {UNSTEADY:g} times as long as the 20 % sample. Measure those again before you trust them."
    )


def winners(table: pd.DataFrame) -> pd.DataFrame:
    """Name the fastest implementation of each cell, and the next: one line a cell.

    ``tied`` is true where the 20 % to 80 % ranges of the two overlap.
    """
    lines = []
    for key, rows in table[table["status"] == "ok"].groupby(CELL):
        first, *others = rows.sort_values("median_ms").to_dict("records")
        line = dict(zip(CELL, key, strict=True))
        line |= {"fastest": first["implementation"], "median_ms": first["median_ms"]}
        line |= {"efficiency": first["efficiency"], "limit_ms": first["limit_ms"]}
        if others:
            line |= {
                "next": others[0]["implementation"],
                "next_ratio": others[0]["median_ms"] / first["median_ms"],
            }
            line |= {"slowest_ratio": others[-1]["median_ms"] / first["median_ms"]}
            line |= {"tied": others[0]["p20_ms"] <= first["p80_ms"]}
        lines.append(line)
    return pd.DataFrame(lines, columns=[*CELL, "fastest", "median_ms", "efficiency", "limit_ms", "next",
                                        "next_ratio", "slowest_ratio", "tied"])  # fmt: skip


def of_winners(rows: pd.DataFrame) -> str:
    """Write lines of `winners` as a table in markdown; ≈ marks a tie."""
    next_best = [
        "" if pd.isna(n) else f"{'≈ ' if tied else ''}{n} ({number(ratio)}x)"
        for n, ratio, tied in zip(rows["next"], rows["next_ratio"], rows["tied"], strict=True)
    ]
    shown = rows[["T", "D", "H", "E", "K", "load", "fastest"]].assign(
        median_ms=rows["median_ms"].map(number),
        efficiency=(100 * rows["efficiency"]).map(lambda v: f"{v:.0f} %"),
        next=next_best,
        slowest=["" if pd.isna(r) else f"{number(r)}x" for r in rows["slowest_ratio"]],
    )
    return markdown_table(shown)


def of_cells(rows: pd.DataFrame) -> str:
    """Write every row with its time, limit, throughput and memory as a table in markdown."""
    shown = rows[["workload", "T", "D", "H", "E", "K", "load", "mode", "dtype", "implementation"]].assign(
        median_ms=rows["median_ms"].map(number),
        limit_ms=rows["limit_ms"].map(number),
        tokens_per_s=rows["tokens_per_s"].map(number),
        gflop_per_s=(1e3 * rows["tflop_per_s"]).map(number),
        peak_memory_mib=(rows["peak_memory_bytes"] / 2**20).map(number),
        saved_mib=(rows["saved_for_backward_bytes"] / 2**20).map(number),
    )
    return markdown_table(shown)


def number(value: object) -> object:
    """Write three significant figures, without an exponent up to a million; other values as they are."""
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return ""
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return value
