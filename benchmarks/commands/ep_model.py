"""``python -m benchmarks ep-model``: experts over many ranks on paper, for the layers of released models.

Predicts a step and the best number of ranks from rates, and says how far such predictions are from what is
published of DeepEP's kernels, and from this machine's own rows of ``python -m benchmarks ep``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.options import RESULTS
from benchmarks.sweep.predicted import (
    H800,
    PUBLISHED_RANKS,
    Cluster,
    Links,
    against_deepep,
    busiest_slots,
    fit,
    predict,
    rates,
)
from benchmarks.workloads import flops
from correctness.problems.problem import Problem
from moe_impls.interface import check_choice
from moe_impls.models import MODELS
from reporting import provenance
from reporting.pages import check_writable, markdown_table, write_atomically

MOST_RANKS = 1024
SHOWN = ("mixtral-8x7b", "gpt-oss-120b", "qwen3-235b-a22b", "qwen3-next-80b-a3b", "deepseek-v3", "kimi-k2")


@dataclass(frozen=True)
class Compared:
    """A measured cell of this machine beside what is predicted of it from fewer ranks."""

    ranks: int
    load: str
    mode: str
    measured_s: float
    predicted_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=list(SHOWN),
        metavar="NAME",
        help="of released models; all means every one",
    )
    add("--tokens", type=int, default=128, metavar="N", help="of each rank, default 128")
    add("--load", default="zipf_0.3", metavar="NAME", help="uniform, or zipf_<exponent>, default zipf_0.3")
    add("--node", type=int, default=H800.node, metavar="N", help="ranks in a node")
    add("--dispatch", type=float, nargs=3, default=_shown(H800.dispatch), metavar=("US", "IN", "OUT"), help=(
        "latency, and GB/s of a rank inside its node and out of it; by default fitted to DeepEP on H800"
    ))  # fmt: skip
    add(
        "--combine",
        type=float,
        nargs=3,
        default=_shown(H800.combine),
        metavar=("US", "IN", "OUT"),
        help="likewise",
    )
    add("--bytes", type=float, nargs=2, default=[H800.bytes_out, H800.bytes_back], metavar=("OUT", "BACK"),
        help="of a value on its way out and back")  # fmt: skip
    add("--tflops", type=float, default=989.0, help="of products, unless --local is given")
    add("--memory", type=float, default=H800.memory / 1e9, metavar="GB/S", help="at which weights are read")
    add("--weight-bytes", type=float, default=H800.width, metavar="N", help="of one weight")
    add("--sync", type=float, default=0.0, metavar="US", help="of counts that the host waits for")
    add(
        "--local",
        type=Path,
        metavar="CSV",
        help="of `pytest benchmarks`: rates by rows of an expert",
    )
    add("--own", type=Path, default=RESULTS / "ep.csv", metavar="CSV", help="of `python -m benchmarks ep`")
    add("--merged", action="store_true", help="one row for each rank that a token visits")
    add("--backward", action="store_true", help="a training step")
    add("--overlap", action="store_true", help="half of the batch is computed while the other travels")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of ep-model.csv, .md and .png")


def _shown(links: Links) -> list[float]:
    return [links.latency_s * 1e6, links.inside / 1e9, links.outside / 1e9]


def run(options: argparse.Namespace) -> int:
    names = list(MODELS) if options.model == ["all"] else options.model
    for name in names:
        check_choice("--model", name, tuple(MODELS))
    for name in ("tokens", "node"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    busiest_slots(8, 2, 2, 1, options.load)  # raises if there is no such load
    for suffix in ("csv", "md", "png"):
        check_writable("--out", options.out / f"ep-model.{suffix}")
    frame = table(names, options)
    write_atomically(options.out / "ep-model.csv", frame.to_csv(index=False).encode())
    plot(frame, options.out / "ep-model.png")
    write_atomically(options.out / "ep-model.md", page(frame, options).encode())
    print(*(options.out / f"ep-model.{suffix}" for suffix in ("csv", "md", "png")), sep="\n")
    return 0


def cluster(options: argparse.Namespace) -> Cluster:
    """Make the cluster of the options."""

    def links(given: list[float]) -> Links:
        return Links(given[0] * 1e-6, given[1] * 1e9, given[2] * 1e9)

    out, back = options.bytes
    rate = rates(measured_rates(options.local)) if options.local else lambda rows: options.tflops * 1e12
    return Cluster(
        "given", options.node, links(options.dispatch), links(options.combine), out, back, rate,
        options.memory * 1e9, options.weight_bytes, options.sync * 1e-6,
    )  # fmt: skip


def measured_rates(path: Path) -> list[tuple[float, float]]:
    """Read rates of products by rows of an expert from the right rows of a sweep's CSV, the best of each.

    Raises:
        ValueError: the CSV has no such rows.
    """
    best: dict[float, float] = {}
    for row in pd.read_csv(path).to_dict("records"):
        wanted = {"status": "ok", "mode": "forward", "load": "uniform"}
        if "median_ms" in row and all(row.get(column) == value for column, value in wanted.items()):
            p = Problem("local", *(int(row[n]) for n in "TDHOEK"), activation=str(row["activation"]))
            rows = p.T * p.K / p.E
            best[rows] = max(best.get(rows, 0.0), flops(p, "forward") / (float(row["median_ms"]) * 1e-3))
    if not best:
        raise ValueError(f"--local: {path} has no right rows of forward calls with a uniform load")
    return list(best.items())


def table(names: list[str], options: argparse.Namespace) -> pd.DataFrame:
    """Predict each model at each power of two of ranks up to its experts."""
    found, of = [], cluster(options)
    chosen = {"load": options.load, "merged": options.merged}
    for name in names:
        model = MODELS[name]
        for ranks in (2**n for n in range(11) if 2**n <= min(model.E, MOST_RANKS)):
            how = {**chosen, "backward": options.backward, "overlap": options.overlap}
            predicted = predict(model, ranks, options.tokens, of, **how)
            extrapolated = ranks > PUBLISHED_RANKS
            found.append({
                "model": name, "E": model.E, "K": model.K, "D": model.D, "H": model.H, "ranks": ranks,
                "tokens": options.tokens, **chosen, "backward": options.backward, "overlap": options.overlap,
                **predicted._asdict(), "extrapolated": extrapolated,
            })  # fmt: skip
    return pd.DataFrame(found)


def compared(path: Path) -> list[Compared]:
    """Predict this machine's cells of 4 ranks from those of 1 and 2, and those themselves.

    The busiest rank's local time is what was measured; of its links what fits the cells of fewer ranks.
    """
    cells: dict[tuple[int, str, str], dict[str, Any]] = {}
    for row in pd.read_csv(path).to_dict("records"):
        if row["implementation"] == "expert_parallel" and row["status"] == "ok":
            key = int(row["ranks"]), str(row["load"]), str(row["mode"])
            cell = cells.setdefault(key, {"n": 0, "bytes": 0.0, "step": 0.0, "local": 0.0})
            cell["n"] = int(row["collectives"])
            for name, column in (("bytes", "row_bytes"), ("step", "step_s"), ("local", "local_s")):
                cell[name] = max(cell[name], float(row[column]))
    few = [(c["n"], c["bytes"], c["step"] - c["local"]) for (ranks, *_), c in cells.items() if ranks <= 2]
    if not few:
        return []
    links = fit(few)
    return [
        Compared(
            *key, cell["step"], cell["local"] + cell["n"] * links.latency_s + cell["bytes"] / links.bandwidth
        )
        for key, cell in cells.items()
    ]


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Plot the time of a step against ranks, a line for each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, rows in frame.groupby("model", sort=False):
        axes.plot(rows["ranks"], rows["step_s"] * 1e6, marker="o", markersize=4, label=str(name))
    axes.axvline(PUBLISHED_RANKS, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="predicted step, µs")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def page(frame: pd.DataFrame, options: argparse.Namespace) -> str:
    """Say what is predicted, and how far predictions have been."""
    lines = []
    for name, rows in frame.groupby("model", sort=False):
        of_model: list[dict[str, Any]] = rows.to_dict("records")  # pyright: ignore[reportAssignmentType]
        best = min(of_model, key=lambda row: row["step_s"])
        lines.append({
            "model": name, "best ranks": best["ranks"], "step µs": f"{best['step_s'] * 1e6:.0f}",
            "local": f"{best['local_s'] * 1e6:.0f}", "dispatch": f"{best['dispatch_s'] * 1e6:.0f}",
            "combine": f"{best['combine_s'] * 1e6:.0f}", "busiest": f"{best['busiest']:.2f}",
            "MB of a rank": f"{best['memory_bytes'] / 1e6:.0f}",
            "on 1 rank": f"{of_model[0]['step_s'] * 1e6:.0f}",
        })  # fmt: skip
    published = against_deepep(MODELS["deepseek-v3"])
    errors = [predicted / known - 1 for known, predicted in published.values()]
    deepep = [
        {"direction": way, "ranks": ranks, "published µs": f"{known * 1e6:.0f}",
         "predicted": f"{predicted * 1e6:.0f}", "error": f"{predicted / known - 1:+.1%}"}
        for (way, ranks), (known, predicted) in published.items()
    ]  # fmt: skip
    own = compared(options.own) if options.own.is_file() else []
    here = markdown_table(pd.DataFrame([
        {"ranks": c.ranks, "load": c.load, "mode": c.mode, "measured ms": f"{c.measured_s * 1e3:.1f}",
         "predicted": f"{c.predicted_s * 1e3:.1f}", "error": f"{c.predicted_s / c.measured_s - 1:+.0%}"}
        for c in own
    ])) if own else "No rows: `python -m benchmarks ep` makes them."  # fmt: skip
    rate = f"rates of {options.local.name}" if options.local else f"{options.tflops:g} TFLOP/s"
    return f"""# Expert parallel on paper

By `python -m benchmarks ep-model`, commit {provenance.git_commit()}:
{options.tokens} tokens on each rank, load {options.load}, {rate}, weights of {options.weight_bytes:g} bytes
read at {options.memory:g} GB/s, nodes of {options.node} ranks, dispatch {options.dispatch[0]:g} µs and
{options.dispatch[2]:g} GB/s between nodes, combine {options.combine[0]:g} µs and {options.combine[2]:g} GB/s.
One layer, no ranks beyond its experts.

{markdown_table(pd.DataFrame(lines))}

![Predicted step against ranks](ep-model.png)

*busiest*: rows of the busiest rank over the mean. *best ranks*: the least time for the same tokens on each
rank, up to {MOST_RANKS} ranks. Beyond {PUBLISHED_RANKS}, the dotted line, no link is published: extrapolated.
All numbers: [ep-model.csv](ep-model.csv).

## What is published of DeepEP

Low-latency kernels on H800, 128 tokens of 7168 features, 8 experts each, FP8 out and bfloat16 back
([table](https://github.com/deepseek-ai/DeepEP/blob/main/docs/legacy.md)). The largest error is
{max(map(abs, errors)):.1%}.

{markdown_table(pd.DataFrame(deepep))}

## This machine

Latency and bandwidth fitted to 1 and 2 ranks of [ep.csv](ep.csv), local times as measured. Where 4 ranks
share fewer cores, they compute in turns, and the error says so.

{here}
"""
