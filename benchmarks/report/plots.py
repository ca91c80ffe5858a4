"""Plots of a report: times and efficiencies of implementations, from the table of its rows."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false
# pandas's types are wider than what indexing gives: a Series may be an array or a table to the checker.

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report.styles import AXES, GRID, LIMIT, MODE_TITLES
from benchmarks.report.tables import LAYER
from reporting.pages import slug


def axis_figures(table: pd.DataFrame, styles: dict) -> dict[str, Figure]:
    """Plot time, and time relative to the fastest, against each of T, E and K that takes several values.

    One panel for each value of a second axis, at the middle value of the third.
    """
    figures = {}
    ok = table[table["status"] == "ok"]
    for layer, rows in ok.groupby([*LAYER, "load", "mode"]):
        names = dict(zip([*LAYER, "load", "mode"], layer, strict=True))
        for axis, (panels, fixed) in {"T": ("E", "K"), "E": ("T", "K"), "K": ("E", "T")}.items():
            middle = _middle(rows[fixed])
            shown = rows[rows[fixed] == middle]
            if shown[axis].nunique() < 2:
                continue
            title = (
                f"{MODE_TITLES[names['mode']]}, {names['workload']} D={names['D']} H={names['H']} "
                f"{names['activation']}, {fixed}={middle}, {names['load']} load, {names['dtype']}, "
                f"{names['device_name']}"
            )
            parts = [names[n] for n in ("workload", "mode", "dtype", "device", "load", "D", "H")]
            name = f"time-against-{axis}-{slug('-'.join(map(str, parts)))}.png"
            while name in figures:  # layers that differ in what the name leaves out
                name = name.replace(".png", "-2.png")
            figures[name] = _axis_figure(shown, axis, panels, title, styles)
    return figures


def _axis_figure(rows: pd.DataFrame, axis: str, panels: str, title: str, styles: dict) -> Figure:
    values = sorted(rows[panels].unique())
    figure, grid = plt.subplots(
        2, len(values), figsize=(1.2 + 3.1 * len(values), 6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    fastest = rows.groupby([axis, panels])["median_ms"].transform("min")
    rows = rows.assign(relative=rows["median_ms"] / fastest)
    for column, value in enumerate(values):
        top, bottom = grid[0, column], grid[1, column]
        for name, (colour, marker) in styles.items():
            line = rows[(rows[panels] == value) & (rows["implementation"] == name)].sort_values(axis)
            style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
            top.plot(line[axis], line["median_ms"], label=name, **style)
            top.fill_between(line[axis], line["p20_ms"], line["p80_ms"], color=colour, alpha=0.2, linewidth=0)
            bottom.plot(line[axis], line["relative"], **style)
        limit = rows[rows[panels] == value].groupby(axis)["limit_ms"].median()
        top.plot(limit.index, limit, **LIMIT, label="limit: dense products, or traffic")
        top.set_title(f"{panels} = {value}")
        bottom.set_xlabel(AXES[axis])
        for axes in (top, bottom):
            _log_axes(axes, sorted(rows[axis].unique()))
    grid[0, 0].set_ylabel("median time, ms")
    grid[1, 0].set_ylabel("time / time of the fastest")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(1 + len(values), len(labels)), frameon=False
    )
    figure.suptitle(title, fontsize="medium")
    return figure


def efficiency_figures(table: pd.DataFrame, styles: dict) -> dict[str, Figure]:
    """Plot efficiency against the mean number of rows that an expert gets, T·K/E: one panel for each mode."""
    figures = {}
    ok = table[table["status"] == "ok"]
    for (device, device_name, dtype), rows in ok.groupby(["device", "device_name", "dtype"]):
        modes = [mode for mode in MODE_TITLES if mode in set(rows["mode"])]
        figure, grid = plt.subplots(
            1,
            len(modes),
            figsize=(1.2 + 4.2 * len(modes), 4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, mode in zip(grid[0], modes, strict=True):
            for name, (colour, marker) in styles.items():
                points = rows[(rows["mode"] == mode) & (rows["implementation"] == name)]
                x = points["T"] * points["K"] / points["E"]
                axes.scatter(
                    x, 100 * points["efficiency"], color=colour, marker=marker, s=28, alpha=0.75, label=name
                )
            axes.axhline(100, **LIMIT)
            axes.set_title(MODE_TITLES[mode])
            axes.set_xlabel("mean rows of an expert, T·K/E")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.grid(True, **GRID)
        grid[0, 0].set_ylabel("efficiency, % of the limit")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
        figure.suptitle(f"{dtype}, {device_name}", fontsize="medium")
        name = f"efficiency-{slug(f'{dtype}-{device}')}.png"
        figures[
            name if name not in figures else f"efficiency-{slug(f'{dtype}-{device}-{device_name}')}.png"
        ] = figure
    return figures


def _log_axes(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.grid(True, **GRID)


def _plain_number(value: float, _: object) -> str:
    return f"{value:g}"


def _middle(values: pd.Series) -> int:
    distinct = sorted(values.unique())
    return distinct[len(distinct) // 2]
