"""From CSV files to ``report.md``, its plots, and ``report.html``. It reads nothing but CSVs.

Times are compared only within one run, where they were taken side by side: of each workload and mode the
newest run that measured it is shown, alone.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false
# pandas's types are wider than what indexing gives: a Series may be an array or a table to the checker.

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report import page
from benchmarks.report.plots import png
from benchmarks.sweep import plan, record
from benchmarks.sweep.record import RecordError
from benchmarks.timing import profile, roofline
from reporting.pages import markdown_table, slug, write_atomically

# What two rows must share to be times of the same thing.
LAYER = ["device", "device_name", "threads", "threads_wait", "cache", "torch_version", "workload", "D", "H",
         "O", "activation", "output_activation", "combine", "bias", "dtype", "seed"]  # fmt: skip
CELL = [*LAYER, "load", "T", "E", "K", "mode"]
UNSTEADY = 2.0  # the 80 % sample over the 20 % sample: 1.1 to 1.4 where nothing else runs
AXES = {"T": "tokens T", "E": "experts E", "K": "experts per token K"}
TITLE, PAGE = "Mixture-of-experts layers: measured times", "report.html"
MODE_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}

# Okabe and Ito's palette, told apart by colour-blind readers, with grey for its yellow, which is faint on
# white; markers repeat the distinction.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vPX*"


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each implementation; 64 pairs before one comes again."""
    rounds = len(COLOURS)
    return {
        name: (COLOURS[i % rounds], MARKERS[(i + i // rounds) % len(MARKERS)])
        for i, name in enumerate(sorted(names))
    }


def csv_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.csv"))


def write(folder: Path) -> list[Path]:
    """Make ``report.md``, its PNG files and ``report.html`` from the CSV files in ``folder``.

    ``report.html`` is left out where ``page.is_available()`` is false.

    Returns:
        The paths of the reports.

    Raises:
        RecordError: the folder is missing or holds no CSV, a file is not valid, or no row is ok.
    """
    files = csv_files(folder) if folder.is_dir() else []
    if not files:
        raise RecordError(f"{folder} holds no CSV file" if folder.is_dir() else f"{folder} is no folder")
    table = newest(table_of(row for file in files for row in record.read(file)))
    if not (table["status"] == "ok").any():
        raise RecordError(f"{folder} holds no row with status ok: there is nothing to compare")
    styles = styles_of(table["implementation"].unique())
    figures = {**axis_figures(table, styles), **efficiency_figures(table, styles)}
    made = {name: png(figure) for name, figure in figures.items()}
    if page.is_available():
        made[PAGE] = page.html(
            table,
            CELL,
            styles,
            title=TITLE,
            summary=" ".join(filter(None, (_measured(table), unsteady(table)))),
            files=[file.name for file in files],
            profiles=folder / "profiles",
            stage_names=profile.STAGES,
        ).encode()
    made["report.md"] = _markdown(table, files, figures).encode()
    stale = {file.name for file in (*folder.glob("*.png"), *folder.glob(PAGE))} - made.keys()
    for name, content in made.items():
        write_atomically(folder / name, content)
    for name in stale:
        (folder / name).unlink()  # of an earlier report
    return [folder / name for name in ("report.md", PAGE) if name in made]


def table_of(rows: Iterable[record.Row]) -> pd.DataFrame:
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(record.COLUMNS))


def unsteady(table: pd.DataFrame) -> str:
    """A sentence if many samples took much longer than others of the same call; empty if not."""
    ok = table[table["status"] == "ok"]
    count = int((ok["p80_ms"] > UNSTEADY * ok["p20_ms"]).sum())
    if not count:
        return ""
    return (
        f"Something else kept this machine busy: in {count} of {len(ok)} cells the 80 % sample took more "
        f"than {UNSTEADY:g} times as long as the 20 % sample. Measure those again before you trust them."
    )


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """Of each cell the rows of the newest run only; a run that repeats a cell counts with its last rows."""
    started = table.groupby("run_id")["time_utc"].transform("min")
    table = table.assign(order=list(zip(started, table["run_id"], strict=True)))
    latest = table.groupby(CELL)["order"].transform("max")
    chosen = table[table["order"] == latest].drop(columns="order")
    return chosen.drop_duplicates([*CELL, "implementation"], keep="last").reset_index(drop=True)


def axis_figures(table: pd.DataFrame, styles: dict) -> dict[str, Figure]:
    """Time, and time relative to the fastest, against each of T, E and K that takes several values.

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
        top.plot(limit.index, limit, color="0.4", linestyle="--", label="limit: dense products, or traffic")
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
    """Efficiency against the mean number of rows that an expert gets, T·K/E: one panel for each mode."""
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
            axes.axhline(100, color="0.4", linestyle="--", linewidth=1)
            axes.set_title(MODE_TITLES[mode])
            axes.set_xlabel("mean rows of an expert, T·K/E")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.grid(True, color="0.9")
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
    axes.grid(True, color="0.9")


def _plain_number(value: float, _: object) -> str:
    return f"{value:g}"


def _middle(values: pd.Series) -> int:
    distinct = sorted(values.unique())
    return distinct[len(distinct) // 2]


def winners(table: pd.DataFrame) -> pd.DataFrame:
    """The fastest implementation of each cell, and the next: one line a cell.

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


def _markdown(table: pd.DataFrame, files: list[Path], figures: dict[str, Figure]) -> str:
    ok, best = table[table["status"] == "ok"], winners(table)
    parts = [f"# {TITLE}", _summary(table, best), *_incomplete(files)]
    if page.is_available():
        parts.append(f"[{PAGE}]({PAGE}) has the same rows with filters, every detail and more plots.")

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
    parts += [_image(name) for name in figures if name.startswith("time-")] or ["No axis takes two values."]
    parts.append("## Efficiency")
    parts.append(
        "The limit is the larger of two. Compute: two dense matrix products with the same FLOPs, rows and "
        "dtype (six with the backward), on one expert's weights. Traffic: the bytes of tokens, results and "
        "of the experts that this routing touches, read and written once, at the measured bandwidth. "
        "Both are measured in the same minute. Efficiency is limit / time. FLOPs are "
        "2·T·K·(F·D + O·H), that is 6·T·K·D·H for gated experts and 4·T·K·D·H for others with O = D, three "
        "times that with the backward; router, activation and combine are not counted."
    )
    parts += [_image(name) for name in figures if name.startswith("efficiency-")]

    faults = ok[ok["efficiency"] > roofline.FAULT]
    if len(faults):
        shown = faults[["implementation", "workload", "T", "D", "H", "E", "K", "mode", "efficiency"]]
        parts.append(
            f"{len(faults)} times are shorter than their limit by more than a factor of {roofline.FAULT}: a "
            "fault of the limit's model or of its measurement, not a merit of the implementation."
        )
        parts.append(markdown_table(shown.map(_number)))
    parts.append("## Fastest implementation of each cell")
    parts.append("≈ marks a tie: the ranges from the 20 % to the 80 % sample of the first two overlap.")
    for (workload, mode, dtype, device), rows in best.groupby(
        ["workload", "mode", "dtype", "device"], sort=False
    ):
        parts.append(f"### {workload}, {MODE_TITLES[mode]}, {dtype}, {device}")
        parts.append(_winner_table(rows))

    models = ok[ok["workload"] != "sweep"]
    if len(models):
        parts.append("## Layers of models")
        parts.append(_cells_table(models))
    if ok["load"].nunique() > 1:
        parts.append("## The same layer under different loads")
        shapes = ["T", "D", "H", "E", "K", "mode", "dtype", "device"]
        several = ok.groupby(["workload", *shapes])["load"].transform("nunique") > 1
        loads = ok[several].pivot_table(
            index=["workload", *shapes, "implementation"], columns="load", values="median_ms", sort=False
        )
        parts.append("Median time in ms.")
        parts.append(markdown_table(loads.reset_index().map(_number)))
    first_calls = ok[ok["compile_ms"] > 1000][
        ["implementation", "workload", "T", "E", "K", "mode", "compile_ms"]
    ]
    if len(first_calls):
        parts.append("## First calls")
        parts.append("Cells whose first call took over a second longer than the median call: compilation.")
        first_calls = first_calls.assign(compile_s=first_calls["compile_ms"] / 1e3).drop(columns="compile_ms")
        parts.append(markdown_table(first_calls.map(_number)))

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
    """A line for each sweep that did not measure all that it was to, or did not write all of it."""
    states = {file: plan.progress(file) for file in files}
    cut = [f"The last line of {file.name} was not written to its end and is left out." for file in files
           if record.is_cut(file)]  # fmt: skip
    return cut + [
        f"{file.name} is of an interrupted sweep: it holds {state[0]} of {state[1]} rows "
        f"(`pytest benchmarks --resume {file.name}` measures the others)."
        for file, state in states.items()
        if state and state[0] < state[1]
    ]


def _measured(table: pd.DataFrame) -> str:
    ok = table[table["status"] == "ok"]
    worst = _number(ok["worst_error_fraction"].max())
    return (
        f"{len(ok)} of {len(table)} cells measured: {table['implementation'].nunique()} implementations, "
        f"{len(table[CELL].drop_duplicates())} workloads. Every time below is of a result that was checked "
        f"against a float64 oracle before and after; the worst error used {worst} of its budget."
    )


def _summary(table: pd.DataFrame, best: pd.DataFrame) -> str:
    lines = [_measured(table)]
    if busy := unsteady(table):
        lines[0] += f"\n\n**{busy}**"
    compared = best[best["next"].notna()]
    for mode, rows in compared.groupby("mode"):
        wins = rows["fastest"].value_counts()
        told = ", ".join(f"{name} in {count}" for name, count in wins.items())
        lines.append(
            f"- {MODE_TITLES[str(mode)]}: of {len(rows)} workloads the fastest is {told}; the slowest takes "
            f"{_number(rows['slowest_ratio'].median())} times as long in the median workload and "
            f"{_number(rows['slowest_ratio'].max())} times at worst."
        )
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _winner_table(rows: pd.DataFrame) -> str:
    next_best = [
        "" if pd.isna(n) else f"{'≈ ' if tied else ''}{n} ({_number(ratio)}x)"
        for n, ratio, tied in zip(rows["next"], rows["next_ratio"], rows["tied"], strict=True)
    ]
    shown = rows[["T", "D", "H", "E", "K", "load", "fastest"]].assign(
        median_ms=rows["median_ms"].map(_number),
        efficiency=(100 * rows["efficiency"]).map(lambda v: f"{v:.0f} %"),
        next=next_best,
        slowest=["" if pd.isna(r) else f"{_number(r)}x" for r in rows["slowest_ratio"]],
    )
    return markdown_table(shown)


def _cells_table(rows: pd.DataFrame) -> str:
    shown = rows[["workload", "T", "D", "H", "E", "K", "load", "mode", "dtype", "implementation"]].assign(
        median_ms=rows["median_ms"].map(_number),
        limit_ms=rows["limit_ms"].map(_number),
        tokens_per_s=rows["tokens_per_s"].map(_number),
        gflop_per_s=(1e3 * rows["tflop_per_s"]).map(_number),
        peak_memory_mib=(rows["peak_memory_bytes"] / 2**20).map(_number),
        saved_mib=(rows["saved_for_backward_bytes"] / 2**20).map(_number),
    )
    return markdown_table(shown)


def _number(value: object) -> object:
    """Three significant figures, without an exponent up to a million; other values as they are."""
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return ""
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return value


def _image(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('-', ' ')}]({name})"
