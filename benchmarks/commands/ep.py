"""``python -m benchmarks ep``: what a distributed implementation sends, waits and computes, by rank.

By itself it starts ranks on this machine; under torchrun it measures the ranks that there are::

    torchrun --nproc-per-node 4 -m benchmarks ep --K 4 --E 32
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.options import RESULTS
from benchmarks.sweep.ranks import INNER, Cell, Measured, Row, measure, minimum_bytes, problem_of
from benchmarks.timing.traffic import waits
from benchmarks.workloads import MODES
from correctness.judging.compare import require_right
from correctness.judging.finding import CheckFailed
from correctness.problems.loads import load_named
from correctness.problems.problem import Problem
from correctness.ranks import rank as in_rank
from correctness.ranks.checks import joined
from correctness.ranks.pool import SIZE, shared
from correctness.ranks.problems import TOKENS, Spread
from moe_impls.interface import DTYPES, check_choice, dtype_name
from moe_impls.registry import DISTRIBUTED, resolve
from reporting import provenance
from reporting.pages import check_writable, markdown_table, write_atomically

DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--impl", action="append", metavar="NAME", help=f"repeatable; {', '.join(DISTRIBUTED)} by default")
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help=f"up to {SIZE}; of torchrun its own",
    )
    for name, default in (("T", 1024), ("D", 128), ("H", 64), ("E", 32), ("K", 4)):
        of_all = "; of all ranks together" if name in ("T", "E") else ""
        add(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}{of_all}")
    add("--dtype", default="float32", metavar="NAME", help=f"{', '.join(DTYPE_NAMES)}")
    add(
        "--load",
        nargs="+",
        default=["uniform", "zipf"],
        metavar="NAME",
        help="how tokens spread over experts",
    )
    add("--tokens", default="equal", metavar="NAME", help=f"of each rank: {', '.join(TOKENS)}")
    add("--mode", nargs="+", default=list(MODES), metavar="NAME", help=", ".join(MODES))
    add("--seconds", type=float, default=0.5, help="of timed steps of a cell")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of ep.csv and ep.md")


def run(options: argparse.Namespace) -> int:
    cells = list(chosen(options))
    for suffix in ("csv", "md"):
        check_writable("--out", options.out / f"ep.{suffix}")
    if under_torchrun():
        return _run_as_rank(options, cells)
    rows: list[Row] = []
    for cell in cells:
        ranks = cell.spread.ranks
        try:
            given = dict.fromkeys(range(ranks), (cell, options.seconds))
            found = shared().call(measured, given, world=ranks)
            rows += judged(cell, [found[number] for number in range(ranks)])
        except CheckFailed as failure:
            print(f"{cell.name} on {ranks} ranks: {failure}", file=sys.stderr)
            rows += [row(cell, number, "error") for number in range(ranks)]
        write(options.out, rows)
    print(*(options.out / name for name in ("ep.csv", "ep.md")), sep="\n")
    return int(any(row.status != "ok" for row in rows))


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def _run_as_rank(options: argparse.Namespace, cells: list[Cell]) -> int:
    """Measure as one rank of torchrun's; the first one judges and writes."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",))
    rows: list[Row] = []
    for cell in cells:
        of_ranks: list[Any] = [None] * ranks
        dist.all_gather_object(of_ranks, measure(cell, mesh, options.seconds))
        if dist.get_rank() == 0:
            rows += judged(cell, of_ranks)
            write(options.out, rows)
    dist.destroy_process_group()
    if rows:
        print(*(options.out / name for name in ("ep.csv", "ep.md")), sep="\n")
    return int(any(row.status != "ok" for row in rows))


def measured(cell: Cell, seconds: float) -> Measured:
    """Measure in a rank of the pool."""
    return measure(cell, in_rank.mesh_of(cell.spread.ranks), seconds)


def chosen(options: argparse.Namespace) -> Iterator[Cell]:
    """Make the cells of the options; all are looked at before the first is measured.

    Raises:
        ValueError: an option is not valid.
    """
    check_choice("--dtype", options.dtype, tuple(DTYPE_NAMES))
    check_choice("--tokens", options.tokens, tuple(TOKENS))
    for mode in options.mode:
        check_choice("--mode", mode, MODES)
    for load in options.load:
        load_named(load, "--load")
    for name in "TDHEK":
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.K > options.E:
        raise ValueError(f"--K is {options.K}; it must not exceed E, here {options.E}")
    of_ranks = [int(os.environ["WORLD_SIZE"])] if under_torchrun() else options.ranks
    for ranks in of_ranks:
        if not under_torchrun() and ranks not in (1, 2, 3, SIZE):
            raise ValueError(f"--ranks is {ranks}; it must be from 1 to {SIZE}, or run under torchrun")
        if ranks > options.E:
            raise ValueError(f"--ranks is {ranks}; it must not exceed E, here {options.E}")
    names = options.impl or DISTRIBUTED
    for name in names:
        if not resolve(name, distributed=True).support.distributed:
            raise ValueError(f"--impl is {name!r}; it must be distributed, as {', '.join(DISTRIBUTED)}")
    for ranks in of_ranks:
        for load, mode in itertools.product(options.load, options.mode):
            p = Problem(
                "ep", options.T, options.D, options.H, options.D, options.E, options.K,
                bias=False, dtype=DTYPE_NAMES[options.dtype], load=load,
            )  # fmt: skip
            spread = Spread(p, ranks, "equal" if ranks == 1 else options.tokens)
            yield from (Cell(name, spread, mode) for name in names)


def judged(cell: Cell, found: list[Measured]) -> list[Row]:
    """Make the rows of a cell; without figures unless the results of all ranks are right."""
    try:
        for seed, results in enumerate(([m.first for m in found], [m.again for m in found])):
            require_right(joined(results), problem_of(cell, seed))
    except CheckFailed as failure:
        print(f"{cell.name} on {cell.spread.ranks} ranks: {failure}", file=sys.stderr)
        return [row(cell, rank, "incorrect") for rank in range(len(found))]
    waiting = waits([m.collectives for m in found])
    return [
        replace(row(cell, rank, "ok"), **figures(cell, rank, m), wait_s=waiting[rank])
        for rank, m in enumerate(found)
    ]


def figures(cell: Cell, rank: int, m: Measured) -> dict[str, Any]:
    """Name what a rank found but for its wait."""
    of_rows = round(sum(c.sent for c in m.collectives if c.rows))
    least, merged = minimum_bytes(cell, rank)
    return {
        "collectives": len(m.collectives),
        "row_bytes": of_rows,
        "other_bytes": round(sum(c.sent for c in m.collectives if not c.rows)),
        "minimum_bytes": least,
        "merged_minimum_bytes": merged,
        "over_minimum": of_rows / least if least else None,
        "over_merged_minimum": of_rows / merged if merged else None,
        "step_s": m.step_s,
        "recorded_s": m.recorded_s,
        "collectives_s": sum(c.seconds for c in m.collectives),
        "local_s": m.local_s,
        "over_local": m.step_s / m.local_s,
        "peak_bytes": m.peak_bytes,
    }


def row(cell: Cell, rank: int, status: str) -> Row:
    """Make a row without figures."""
    p = cell.spread.problem
    made = {"time_utc": datetime.now(UTC).isoformat(timespec="seconds"), **provenance.columns()}
    sizes = {name: getattr(p, name) for name in ("T", "D", "H", "O", "E", "K", "activation", "load")}
    return Row(
        **made, **sizes, backend="gloo", implementation=cell.name, ranks=cell.spread.ranks, rank=rank,
        tokens=cell.spread.sizes[rank], dtype=dtype_name(p.dtype), mode=cell.mode, status=status,
    )  # fmt: skip


def write(folder: Path, rows: list[Row]) -> None:
    """Write the CSV and its page, each whole."""
    frame = pd.DataFrame([asdict(row) for row in rows])
    write_atomically(folder / "ep.csv", frame.to_csv(index=False).encode())
    write_atomically(folder / "ep.md", page(rows).encode())


def page(rows: list[Row]) -> str:
    """Say what a table holds: a line for each cell."""
    cells: dict[tuple[str, int, str, str], list[Row]] = {}
    for r in rows:
        cells.setdefault((r.implementation, r.ranks, r.load, r.mode), []).append(r)
    lines = [_line(of_ranks) for of_ranks in cells.values()]
    first = rows[0]
    return f"""# Expert parallel

Made by `python -m benchmarks ep` on {first.device_name}, torch {first.torch_version}, commit
{first.git_commit}: T = {first.T} tokens of all ranks, D = {first.D}, H = {first.H}, E = {first.E},
K = {first.K}, {first.dtype}, backend {first.backend}. Each rank's figures: [ep.csv](ep.csv).

{markdown_table(pd.DataFrame(lines).fillna("-"))}

- *MB of rows*: sent to other ranks in one step by all of them; *kB of others*: counts and other integers.
- *over slots*: the bytes of rows over those of a row for each slot whose expert is elsewhere, x out and y
  back in the dtype of x, and with a backward their gradients; *over merged*: over those of a row for each
  rank that a token visits, and of a gate for each slot, by which the rows are summed there.
- *longest wait*: of a rank for those that come to a collective after it, as a share of the step.
- *step over local*: the slowest rank's step over the slowest rank's {INNER} on the rows that reach it.

Where ranks outnumber the cores, as 4 do on 2, times are no figure; bytes, counts and ratios of bytes are.
"""


def _line(of_ranks: list[Row]) -> dict[str, Any]:
    """Make a cell's line of the page."""
    r = of_ranks[0]
    named = {"implementation": r.implementation, "ranks": r.ranks, "load": r.load, "mode": r.mode}
    if r.status != "ok":
        return {**named, "status": r.status}

    def total(column: str) -> float:
        return sum(getattr(row, column) for row in of_ranks)

    def most(column: str) -> float:
        return max(getattr(row, column) for row in of_ranks)

    sent, slots, merged = map(total, ("row_bytes", "minimum_bytes", "merged_minimum_bytes"))
    return {
        **named,
        "status": r.status,
        "collectives": most("collectives"),
        "MB of rows": f"{sent / 1e6:.3g}",
        "kB of others": f"{total('other_bytes') / 1e3:.3g}",
        "over slots": f"{sent / slots:.3f}" if slots else "-",
        "over merged": f"{sent / merged:.3f}" if merged else "-",
        "longest wait": f"{most('wait_s') / most('recorded_s'):.0%}",
        "step over local": f"{most('step_s') / most('local_s'):.2f}",
        "peak MB of a rank": f"{most('peak_bytes') / 1e6:.3g}",
    }
