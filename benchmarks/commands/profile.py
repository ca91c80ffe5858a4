"""``python -m benchmarks profile``: time by operator and stage of one implementation on one problem."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.options import RESULTS, add_workload, cells
from benchmarks.sweep import record
from benchmarks.sweep.plan import SIZES
from benchmarks.timing import profile
from benchmarks.workloads import MODELS, Workloads
from correctness.problems.problem import Problem
from moe_impls.interface import Implementation
from moe_impls.registry import resolve
from moe_impls.router_interface import RouterSpec

MODE = "forward_backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", required=True, metavar="NAME", help=(
        "a name, package.module:function or path/file.py:function"
    ))  # fmt: skip
    add_workload(parser.add_argument, repeatable=False)
    parser.set_defaults(mode=MODE)
    parser.add_argument("--out", type=Path, metavar="DIR", help=(
        f"{RESULTS.name}/<machine>/profiles unless given"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    implementation, problem, spec = subject(options)
    folder = options.out or RESULTS / record.environment(options.device, "profile").machine / "profiles"
    profiled = profile.profile_call(implementation, problem, options.mode, spec)
    paths = profile.write(profiled, folder, implementation, problem, options.mode)

    sizes = [f"{n}={getattr(problem, n)}" for n in SIZES]
    title = ", ".join([implementation.name, problem.id, *sizes, options.mode])
    table = Table(title=f"{title}: self time of one call")
    for column in ("stage", "forward, ms", "backward, ms", "%", "operators counted"):
        table.add_column(column, justify="left" if column in ("stage", "operators counted") else "right")
    for stage, forward_ms, backward_ms, percent, operators in profiled.stages.itertuples(index=False):
        shown = " ".join(name.removeprefix("aten::") for name in operators.split()[:8])
        table.add_row(stage, f"{forward_ms:.3f}", f"{backward_ms:.3f}", f"{percent:.1f}", shown)
    Console().print(table)
    if profiled.device is not None:
        print(profiled.device.to_string(index=False))
    print(*paths, sep="\n")
    return 0


def subject(options: argparse.Namespace) -> tuple[Implementation, Problem, RouterSpec]:
    """Choose what is profiled: an implementation, a problem and the router that is timed beside them."""
    ((problem, _),) = cells(options, (Workloads(),))
    router = MODELS[options.model].router if options.model else None
    return resolve(options.impl), problem, router or RouterSpec(top_k=problem.K)
