"""``python -m benchmarks history add|plot``: how efficient each implementation was, run by run.

Times of different runs are not compared. What is kept of a run is how near each implementation came to
the limit that was measured with it, as a geometric mean over the cells of a mode and dtype; steps in that
are marked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.options import HISTORY
from benchmarks.report.styles import GRID, png, styles_of
from benchmarks.sweep import record
from benchmarks.sweep.record import RecordError
from benchmarks.timing import ratio
from reporting.pages import markdown_table, write_atomically

OF_RUN = ("run_id", "git_commit", "time_utc", "machine", "torch_version", "threads", "threads_wait", "cache")
SUMMARY = (*OF_RUN, "implementation", "mode", "dtype", "cells", "efficiency")
LEAST_RUNS = 6  # fewer have no step that could be told from chance
PENALTY = 8.0  # for one more step, in units of log(runs) times the spread between neighbouring runs
COLUMNS_OF_PLOT = 2
PANEL = ("machine", "threads", "threads_wait", "cache", "mode", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("add", "plot"))
    parser.add_argument("csv", nargs="*", type=Path, metavar="CSV", help="of add: the files of sweeps")
    parser.add_argument("--folder", type=Path, default=HISTORY, metavar="DIR")


def run(options: argparse.Namespace) -> int:
    if (options.what == "add") != bool(options.csv):
        raise ValueError("history add needs the CSV of a sweep, history plot takes none")
    sweeps = [csv for csv in options.csv if csv.resolve().parent != HISTORY]  # summaries are there already
    added = [add(csv, options.folder) for csv in sweeps]
    print(*(added if options.what == "add" else plot(options.folder)), sep="\n")
    return 0


def add(csv: Path, folder: Path) -> Path:
    """Summarise a run into ``folder/<run_id>.csv``.

    Raises:
        RecordError: the file is not valid or holds no row that is ok.
    """
    rows = [row for row in record.read(csv) if row.status == "ok"]
    if not rows:
        raise RecordError(f"{csv} holds no row with status ok: there is nothing to keep")
    groups: dict[tuple[str, str, str], list[record.Row]] = {}
    for row in rows:
        groups.setdefault((row.implementation, row.mode, row.dtype), []).append(row)
    lines = []
    for (name, mode, dtype), own in groups.items():
        first = own[0]
        efficiency = ratio.geometric_mean([row.efficiency for row in own if row.efficiency])
        lines.append(
            (*(getattr(first, column) for column in OF_RUN), name, mode, dtype, len(own), efficiency)
        )
    path = folder / f"{rows[0].run_id}.csv"
    table = pd.DataFrame(lines, columns=list(SUMMARY)).round({"efficiency": 5})
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
    return path


def read(folder: Path) -> pd.DataFrame:
    """Read all summaries, the earliest first.

    Raises:
        RecordError: there are none, or a file has other columns.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise RecordError(f"{folder} holds no summary; `python -m benchmarks history add` makes them")
    tables = []
    for file in files:
        table = pd.read_csv(file, dtype={"run_id": str, "git_commit": str})
        if tuple(table.columns) != SUMMARY:
            raise RecordError(
                f"{file} has columns {', '.join(table.columns)}; valid are {', '.join(SUMMARY)}"
            )
        tables.append(table)
    return pd.concat(tables).sort_values("time_utc").reset_index(drop=True)


def steps(efficiency: np.ndarray) -> list[int]:
    """Find the runs that begin another level of a series (PELT, Killick et al. 2012, arXiv:1101.1438).

    Levels are of the logarithm; the penalty follows from how much neighbouring runs differ.
    """
    import ruptures  # the one part of the suite that may be missing on a machine with a GPU

    if len(efficiency) < LEAST_RUNS:
        return []
    logs = np.log(efficiency)
    spread = np.median(np.abs(np.diff(logs))) / 0.6745 / np.sqrt(2)
    penalty = PENALTY * np.log(len(logs)) * max(float(spread), 1e-3) ** 2
    found = ruptures.Pelt(model="l2", min_size=2, jump=1).fit(logs.reshape(-1, 1)).predict(pen=penalty)
    return [int(index) for index in found[:-1]]


def plot(folder: Path) -> list[Path]:
    """Write history.png, with each step marked, and history.md, which lists them."""
    table = read(folder)
    runs = list(table["run_id"].drop_duplicates())
    panels = list(table.groupby([*PANEL]))
    rows = -(-len(panels) // COLUMNS_OF_PLOT)
    figure, grid = plt.subplots(
        rows, COLUMNS_OF_PLOT, figsize=(12, 1 + 3.2 * rows), squeeze=False, layout="constrained"
    )
    styles, lines = styles_of(table["implementation"].unique()), []
    for axes, (key, panel) in zip(grid.flat, panels, strict=False):
        for name, series in panel.groupby("implementation"):
            places = [runs.index(run) for run in series["run_id"]]
            values = series["efficiency"].to_numpy(dtype=float)
            colour, marker = styles[str(name)]
            axes.plot(places, 100 * values, color=colour, marker=marker, label=str(name))
            for step in steps(values):
                axes.axvline(places[step], color="0.5", linestyle=":")
                before, after = (ratio.geometric_mean(list(part)) for part in (values[:step], values[step:]))
                at = series.iloc[step]
                lines.append({"implementation": name, "mode": at["mode"], "dtype": at["dtype"],
                              "run": at["run_id"], "commit": str(at["git_commit"])[:12],
                              "before": f"{before:.1%}", "after": f"{after:.1%}"})  # fmt: skip
        axes.set_title(", ".join(str(part) for part in tuple(key)[3:]), fontsize="medium")  # pyright: ignore
        axes.set_xticks(range(len(runs)), [run[:8] for run in runs], rotation=60, fontsize="small")
        axes.set_ylabel("efficiency, % of the limit")
        axes.set_yscale("log")
        axes.grid(True, **GRID)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    grid[0, 0].legend(fontsize="small", frameon=False)
    text = f"# History\n\n{len(runs)} runs. ![efficiency of each implementation, run by run](history.png)\n\n"
    text += "Steps, dotted in the plot:\n\n" + markdown_table(pd.DataFrame(lines)) if lines else "No steps."
    paths = [folder / "history.png", folder / "history.md"]
    write_atomically(paths[0], png(figure))
    write_atomically(paths[1], f"{text}\n".encode())
    return paths
