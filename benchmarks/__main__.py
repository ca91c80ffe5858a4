"""``python -m benchmarks report|profile``; the sweep is ``pytest benchmarks``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import profile, record, report
from benchmarks.workloads import MODELS, MODES, Workloads
from correctness.problems import LOADS
from correctness.provenance import ROOT
from moe_impls.interface import DEVICES, DTYPES, RouterSpec, check_choice, dtype_name
from moe_impls.registry import resolve

SIZES = ("T", "D", "H", "E", "K")
RESULTS = ROOT / "results"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 for bad input, with one line on standard error that says what is valid."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="report|profile", parser_class=_Parser)

    made = commands.add_parser("report", help="make report.md and its plots from CSV files")
    made.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=(
        "folders of CSV files; a report is written into each (default: every folder in results/)"
    ))  # fmt: skip
    made.set_defaults(run=_report)

    profiled = commands.add_parser("profile", help="time by operator and stage of one implementation")
    profiled.add_argument("--impl", required=True, metavar="NAME", help=(
        "a name, package.module:function or path/file.py:function"
    ))  # fmt: skip
    profiled.add_argument("--model", metavar="NAME", help=f"the layer of a model: {', '.join(MODELS)}")
    profiled.add_argument("--mode", default="forward_backward", metavar="NAME", help=", ".join(MODES))
    profiled.add_argument("--device", default="cpu", metavar="NAME", help=", ".join(DEVICES))
    profiled.add_argument(
        "--dtype", default="float32", metavar="NAME", help=", ".join(map(dtype_name, DTYPES))
    )
    profiled.add_argument("--load", default="uniform", metavar="NAME", help=", ".join(LOADS))
    for size in SIZES:
        profiled.add_argument(f"--{size}", type=int, metavar="N", help="size; with --model only --T")
    profiled.add_argument("--out", type=Path, metavar="DIR", help="results/<machine>/profiles unless given")
    profiled.set_defaults(run=_profile)
    return parser


def _report(options: argparse.Namespace) -> int:
    folders = options.folders or sorted({path.parent for path in RESULTS.glob("*/*.csv")})
    if not folders:
        raise ValueError(f"{RESULTS} holds no CSV file; `pytest benchmarks` makes them")
    for folder in folders:
        print(report.write(folder))
    return 0


def _profile(options: argparse.Namespace) -> int:
    check_choice("--device", options.device.partition(":")[0], DEVICES)
    check_choice("--dtype", options.dtype, tuple(map(dtype_name, DTYPES)))
    check_choice("--mode", options.mode, MODES)
    check_choice("--load", options.load, tuple(LOADS))
    if options.model is not None:
        check_choice("--model", options.model, tuple(MODELS))
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here")
    implementation = resolve(options.impl)

    sizes = {size: getattr(options, size) for size in SIZES if getattr(options, size) is not None}
    for size, value in sizes.items():
        if value < 1:
            raise ValueError(f"--{size} is {value}; it must be at least 1")
    fixed = [f"--{size}" for size in sizes if size != "T"]
    if options.model and fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be given with --model, whose layer is fixed; valid is --T"
        )
    layer = MODELS[options.model] if options.model else Workloads()
    layer = replace(layer, load=(options.load,), **{size: (value,) for size, value in sizes.items()})
    if layer.K[0] > layer.E[0]:
        raise ValueError(f"--K is {layer.K[0]}; it must not exceed E, here {layer.E[0]}")
    (problem,) = layer.problems()
    problem = replace(problem, dtype=getattr(torch, options.dtype), device=options.device)

    folder = options.out or RESULTS / record.environment(options.device, "profile").machine / "profiles"
    spec = layer.router or RouterSpec(top_k=problem.K)
    profiled = profile.profile_call(implementation, problem, options.mode, spec)
    paths = profile.write(profiled, folder, implementation, problem, options.mode)

    title = ", ".join(
        [implementation.name, problem.id, *(f"{n}={getattr(problem, n)}" for n in SIZES), options.mode]
    )
    table = Table(title=f"{title}: self time of one call")
    for column in ("stage", "forward, ms", "backward, ms", "%", "operators counted"):
        table.add_column(column, justify="left" if column in ("stage", "operators counted") else "right")
    for stage, forward_ms, backward_ms, percent, operators in profiled.stages.itertuples(index=False):
        shown = " ".join(name.removeprefix("aten::") for name in operators.split()[:8])
        table.add_row(stage, f"{forward_ms:.3f}", f"{backward_ms:.3f}", f"{percent:.1f}", shown)
    Console().print(table)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
