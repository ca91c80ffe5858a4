"""The page of a report in HTML: filters, plots and every row, in a file that needs no network.

Vega-Lite draws the plots in the browser; its library is part of the file. ``page.js`` chooses what they show.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.report import styles
from benchmarks.report.tables import CELL

NAME = "report.html"
FOLDER = Path(__file__).parent
MISSING = f"{NAME} is not made: it needs vl-convert-python, pip install 'moe-impls[suite]'"
# The filters of the page, each a column of its rows, and what they are called.
FILTERS = {
    "setting": "Device and run",
    "dtype": "Dtype",
    "mode": "Mode",
    "layer": "Layer",
    "load": "Routing",
}
_LEFT_OUT = ("samples_ms", "schema_version", "machine", "calls_per_sample", "seed")


def is_available() -> bool:
    """Whether the library that draws the plots can be had."""
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        return False
    return True


def rows(table: pd.DataFrame) -> list[dict]:
    """Make what the page knows of each row: its columns but the samples, and what is derived from them."""
    fastest = table.groupby(CELL)["median_ms"].transform("min")
    derived = table.assign(
        relative=table["median_ms"] / fastest,
        efficiency_percent=100 * table["efficiency"],
        peak_mib=table["peak_memory_bytes"] / 2**20,
        saved_mib=table["saved_for_backward_bytes"] / 2**20,
        setting=[
            f"{r.device_name} ({r.device}), {r.threads} threads (wait: {r.threads_wait}), "
            f"{r.cache} cache, torch {r.torch_version}"
            for r in table.itertuples()
        ],
        layer=[_layer(r) for r in table.itertuples()],
    ).drop(columns=list(_LEFT_OUT))
    return derived.astype(object).where(derived.notna(), None).to_dict(orient="records")


def _layer(r) -> str:
    width = f"D={r.D} H={r.H}" if r.O == r.D else f"D={r.D} H={r.H} O={r.O}"
    options = [r.activation, *([f"then {r.output_activation}"] if r.output_activation != "none" else [])]
    options += [r.combine] if r.combine != "sum" else []
    return f"{r.workload} {width} {' '.join(options)}{' with biases' if r.bias else ''}"


def stages(folder: Path) -> list[dict]:
    """Read the stages of every profile in a folder: call, pass, stage and milliseconds."""
    found = []
    for file in sorted(folder.glob("*/stages.csv")):
        for row in pd.read_csv(file).to_dict(orient="records"):
            for which in ("forward", "backward"):
                ms = row[f"{which}_ms"]
                if pd.notna(ms) and ms > 0:
                    found.append({"call": file.parent.name, "pass": which, "stage": row["stage"], "ms": ms})
    return found


def html(
    table: pd.DataFrame,
    of_implementations: Mapping[str, tuple[str, str]],
    *,
    title: str,
    summary: str,
    files: Sequence[str],
    profiles: Path,
    stage_names: Sequence[str],
) -> str:
    """Make the page.

    Args:
        table: the rows to show, as of `record.Row`.
        of_implementations: colour and matplotlib marker of each.
        files: the names of the files that the rows come from.
        profiles: a folder of profiles, that need not exist.
    """
    import vl_convert

    data = {
        "rows": rows(table),
        "filters": list(FILTERS),
        "titles": styles.AXES,
        "colours": styles.COLOURS,
        "white_on": styles.WHITE_ON,
        "stages": stages(profiles),
        "stage_names": list(stage_names),
        "styles": [
            {"name": name, "colour": colour, "shape": styles.SHAPES[marker]}
            for name, (colour, marker) in of_implementations.items()
        ],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=title,
        summary=summary,
        filters=FILTERS,
        files=files,
        data=data,
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
            "</script", "<\\/script"
        ),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )
