"""What is said of ours beside other libraries: figures and plots from the tables that `peers` measures."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.report.styles import AXES, COLOURS, GRID, LIMIT, MODE_TITLES, styles_of
from benchmarks.timing import ratio


def by_regime(cells: pd.DataFrame) -> pd.DataFrame:
    """Sum up in a line for each regime and dtype how many times as long the best peer takes.

    A peer is *ahead* where the whole interval of the ratio is below 1.
    """
    lines = []
    for (regime, dtype), rows in cells.groupby(["regime", "dtype"], sort=False):
        worst = rows.loc[rows["ratio"].idxmin()]
        lines.append(
            {
                "regime": regime,
                "dtype": dtype,
                "cells": len(rows),
                "best peer / ours, geometric mean": f"{ratio.geometric_mean(rows['ratio'].tolist()):.2f}",
                "least": f"{worst['ratio']:.2f} ({worst['low']:.2f} to {worst['high']:.2f})",
                "where": f"{worst['layer']}, T={worst['T']}: {worst['peer']}",
                "a peer ahead": int((rows["high"] < 1).sum()),
            }
        )
    return pd.DataFrame(lines)


def beside_limits(cells: pd.DataFrame) -> pd.DataFrame:
    """Sum up in a line for each regime and dtype how near ours are to limits, and `auto` to ours.

    `auto` is *surely slower* where the whole interval of its ratio is above 1.03: most often it takes the
    fastest, and the same function timed twice differs, too.
    """
    lines = []
    for (regime, dtype), rows in cells.groupby(["regime", "dtype"], sort=False):
        few = rows[rows["T"] <= 4]
        lines.append(
            {
                "regime": regime,
                "dtype": dtype,
                "fastest peer in most cells": rows["peer"].mode()[0],
                "of dense products, median": f"{rows['of_products'].median():.2f}",
                "of reading at T <= 4, median": f"{few['of_reading'].median():.2f}" if len(few) else "",
                "auto within 3 %": f"{(rows['auto_ratio'] <= 1.03).mean():.0%}",
                "auto surely slower": int((rows["auto_low"] > 1.03).sum()),
            }
        )
    return pd.DataFrame(lines)


def ratios_figure(cells: pd.DataFrame) -> Figure:
    """Plot the best peer's time over ours, a dot for each cell: one panel for each regime."""
    regimes = list(dict.fromkeys(cells["regime"]))
    columns = min(len(regimes), 3)
    lines = -(-len(regimes) // columns)
    drawn, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 4 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(regimes) :]:
        panel.remove()
    styles = {"float32": (COLOURS[0], "o"), "bfloat16": (COLOURS[3], "s")}
    for panel, regime in zip(axes.flat, regimes, strict=False):
        rows = cells[cells["regime"] == regime]
        tokens = sorted(rows["T"].unique())
        for side, (dtype, (colour, marker)) in zip((-0.12, 0.12), styles.items(), strict=True):
            of_dtype = rows[rows["dtype"] == dtype]
            x = [tokens.index(T) + side for T in of_dtype["T"]]
            panel.scatter(x, of_dtype["ratio"], color=colour, marker=marker, alpha=0.75, label=dtype)
        panel.axhline(1, **LIMIT)
        panel.set_xticks(range(len(tokens)), [str(T) for T in tokens])
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        panel.set_xlabel("tokens T")
        panel.set_title(regime)
        panel.grid(True, axis="y", **GRID)
    for panel in axes[:, 0]:
        panel.set_ylabel("time of the best peer / time of ours")
    axes[0, 0].legend(frameon=False)
    return drawn


def growth_figure(growth: pd.DataFrame) -> Figure:
    """Plot time against E and K on linear axes, where a quadratic term would bend the line."""
    drawn, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    styles = styles_of(growth["implementation"].unique())
    for row, mode in zip(axes, ("forward", "forward_backward"), strict=True):
        for panel, axis in zip(row, ("E", "K"), strict=True):
            rows = growth[(growth["axis"] == axis) & (growth["mode"] == mode)]
            for name, line in rows.groupby("implementation"):
                colour, marker = styles[str(name)]
                panel.plot(line["value"], line["median_ms"], color=colour, marker=marker, label=name)
            panel.set_xlabel(AXES[axis])
            panel.set_ylabel("median time, ms")
            panel.set_title(MODE_TITLES[mode])
            panel.set_ylim(bottom=0)
            panel.grid(True, **GRID)
            panel.legend(frameon=False, fontsize="small")
    return drawn


def quadratic_share(growth: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of the quadratic term of a fitted parabola at the largest value."""
    lines = []
    for (axis, mode, name), rows in growth.groupby(["axis", "mode", "implementation"], sort=False):
        square = np.polyfit(rows["value"], rows["median_ms"], 2, w=1 / rows["median_ms"])[0]
        largest = rows.loc[rows["value"].idxmax()]
        share = square * largest["value"] ** 2 / largest["median_ms"]
        lines.append({"against": axis, "mode": mode, "implementation": name, "share": f"{share:.0%}"})
    return pd.DataFrame(lines)
