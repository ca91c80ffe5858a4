"""``python -m benchmarks COMMAND``; the sweep is ``pytest benchmarks``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.commands import compare, cuda, history, measurement, peers, tune
from benchmarks.report import markdown, page
from benchmarks.sweep import record
from benchmarks.sweep.plan import SIZES
from benchmarks.timing import profile, versions
from benchmarks.workloads import MODELS, MODES, Workloads, chosen
from correctness.judging.finding import CheckFailed
from correctness.problems.loads import LOAD_NAMES
from correctness.problems.problem import Problem, check_device
from moe_impls import auto
from moe_impls.interface import DEVICES, DTYPES, Implementation, RouterSpec, check_choice, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, PREPARED, resolve
from reporting.provenance import RESULTS

HISTORY = RESULTS / "history"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 for bad input, with one line on standard error that says what is valid."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was written before is kept", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(
        required=True,
        metavar="report|profile|tune|compare|gate|peers|cuda|figures|history",
        parser_class=_Parser,
    )

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        told = f"{summary[0].upper()}{summary[1:]}. {details}"
        return commands.add_parser(name, help=summary, description=told.strip().replace("%", "%%"))

    made = command("report", "make report.md and its plots from CSV files")
    made.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=(
        "folders of CSV files; a report is written into each (default: every folder in results/)"
    ))  # fmt: skip
    made.set_defaults(run=_report)

    profiled = command("profile", "time by operator and stage of one implementation")
    profiled.add_argument("--impl", required=True, metavar="NAME", help=(
        "a name, package.module:function or path/file.py:function"
    ))  # fmt: skip
    profiled.add_argument("--model", metavar="NAME", help=f"the layer of a model: {', '.join(MODELS)}")
    profiled.add_argument("--mode", default="forward_backward", metavar="NAME", help=", ".join(MODES))
    profiled.add_argument("--device", default="cpu", metavar="NAME", help=", ".join(DEVICES))
    profiled.add_argument(
        "--dtype", default="float32", metavar="NAME", help=", ".join(map(dtype_name, DTYPES))
    )
    profiled.add_argument("--load", default="uniform", metavar="NAME", help=LOAD_NAMES)
    for size in SIZES:
        profiled.add_argument(f"--{size}", type=int, metavar="N", help="size; with --model only --T")
    profiled.add_argument("--out", type=Path, metavar="DIR", help="results/<machine>/profiles unless given")
    profiled.set_defaults(run=_profile)

    tuned = command("tune", "measure which implementation `auto` takes on this machine", (
        "Ten minutes, or with --quick a third of that. The table is kept for this processor, its number of "
        "threads and this version of torch, and is written once all is measured."
    ))  # fmt: skip
    tuned.add_argument("--quick", action="store_true", help="a third of the cells")
    tuned.add_argument("--out", type=Path, metavar="FILE", help=(
        "where auto looks, unless given: moe_impls/ in $XDG_CACHE_HOME or ~/.cache"
    ))  # fmt: skip
    tuned.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda")
    tuned.set_defaults(run=_tune)

    compared = command("compare", "two implementations, or two versions of one, in rounds")
    compared.add_argument("impl", nargs="*", metavar="NAME", help=(
        "two names as for --impl elsewhere (default: index_add sorted_dispatch), or with --base one"
    ))  # fmt: skip
    compared.add_argument("--model", action="append", default=[], metavar="NAME", help=(
        f"on the layer of this model (repeatable): {', '.join(MODELS)}"
    ))  # fmt: skip
    for size in SIZES:
        compared.add_argument(f"--{size}", action="append", type=int, metavar="N", help=(
            "on problems of this size (repeatable); with --model only --T"
        ))  # fmt: skip
    compared.add_argument("--load", action="append", default=[], metavar="NAME", help=(
        f"how tokens spread over experts (repeatable): {LOAD_NAMES}"
    ))  # fmt: skip
    compared.add_argument("--mode", action="append", metavar="NAME", help=f"only this: {', '.join(MODES)}")
    compared.add_argument("--device", default="cpu", metavar="NAME", help=", ".join(DEVICES))
    compared.add_argument("--dtype", default="float32", metavar="NAME", help=(
        ", ".join(map(dtype_name, DTYPES))
    ))  # fmt: skip
    gated = command("gate", "exit status 1 if an implementation is slower than at a commit")
    gated.add_argument("--impl", action="append", metavar="NAME", help=(
        "only this implementation (repeatable); all that both versions have, unless given"
    ))  # fmt: skip
    gated.add_argument("--threshold", type=float, default=0.1, metavar="X", help=(
        "what counts as slower: 0.1 is a tenth (the default)"
    ))  # fmt: skip
    for timed, needed in ((compared, False), (gated, True)):
        timed.add_argument("--base", metavar="REF", required=needed, help=(
            "a commit, or a folder with another version of moe_impls"
        ))  # fmt: skip
        timed.add_argument("--seconds", type=float, default=compare.SECONDS, metavar="S", help=(
            f"for the samples of each of the two on each problem (default: {compare.SECONDS:g})"
        ))  # fmt: skip
        timed.add_argument("--threads", type=int, metavar="N", help="threads that torch computes with")
        timed.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")
        timed.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    beside = command("peers", "ours beside other libraries': an hour, or --quick 8 minutes", (
        "Needs the packages of `pip install '.[suite,peers]'`. Writes peers.csv, peers.md and their plots; "
        f"what an interrupted run has measured is in {peers.PART}, and the same command goes on from there."
    ))  # fmt: skip
    beside.add_argument("--quick", action="store_true", help="a subset of every regime")
    beside.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=(
        "results/ unless given, over what it has of an earlier run"
    ))  # fmt: skip
    beside.set_defaults(run=_peers)

    gpu = command("cuda", "verify, measure and profile on a GPU, in the time given")
    gpu.add_argument("--minutes", type=float, default=10, metavar="M", help="for all of it (default: 10)")
    gpu.add_argument("--out", type=Path, metavar="DIR", help=(
        "results/<machine> unless given; one that was begun is continued"
    ))  # fmt: skip
    gpu.add_argument("--device", default="cuda", metavar="NAME", help=", ".join(DEVICES))
    gpu.add_argument("--smoke", action="store_true", help="a small part of it, to try the command itself")
    gpu.set_defaults(run=_cuda)

    made = command("figures", "measure what the measurement is worth: 20 minutes")
    made.add_argument("--quick", action="store_true", help="fewer trials: a minute")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the table and page")
    made.set_defaults(run=_figures)
    kept = command("history", "keep a summary of a run; plot them over commits")
    kept.add_argument("what", choices=("add", "plot"))
    kept.add_argument("csv", nargs="*", type=Path, metavar="CSV", help="of add: the files of sweeps")
    kept.add_argument("--folder", type=Path, default=HISTORY, metavar="DIR")
    kept.set_defaults(run=_history)
    compared.set_defaults(run=_compare)
    gated.set_defaults(run=_gate)
    return parser


def _peers(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    cells = peers.measure_all(options.out, options.quick)
    print(*peers.write(options.out, cells, peers.measure_growth(options.quick), options.quick), sep="\n")
    return 0


def _cuda(options: argparse.Namespace) -> int:
    check_device(options.device, "--device")
    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}; it must be above 0")
    if options.device == "cpu" and not options.smoke:
        raise ValueError("--device is cpu; valid with --smoke only: `pytest benchmarks` measures on a CPU")
    folder = options.out or RESULTS / record.environment(options.device, "cuda").machine
    return 0 if cuda.run(folder, options.device, options.minutes, smoke=options.smoke) else 1


def _figures(options: argparse.Namespace) -> int:
    found = measurement.all_figures(options.quick)
    for path in measurement.write(options.out, found, options.quick):
        print(path)
    return 0 if all(figure.reached for figure in found) else 1


def _history(options: argparse.Namespace) -> int:
    if (options.what == "add") != bool(options.csv):
        raise ValueError("history add needs the CSV of a sweep, history plot takes none")
    sweeps = [csv for csv in options.csv if csv.resolve().parent != HISTORY]  # summaries are there already
    added = [history.add(csv, options.folder) for csv in sweeps]
    for path in added if options.what == "add" else history.plot(options.folder):
        print(path)
    return 0


def _settle(options: argparse.Namespace) -> None:
    if not options.seconds > 0:
        raise ValueError(f"--seconds is {options.seconds}; it must be above 0")
    if options.threads is not None:
        check_choice("--threads", options.threads, tuple(range(1, (os.cpu_count() or 1) + 1)))
        torch.set_num_threads(options.threads)


def _compare(options: argparse.Namespace) -> int:
    _settle(options)
    names = options.impl or (["sorted_dispatch"] if options.base else ["index_add", "sorted_dispatch"])
    wanted = 1 if options.base else 2
    if len(names) != wanted:
        raise ValueError(f"{len(names)} implementations are given; it must be {wanted}")
    cells = _cells(options)
    if options.base:
        with versions.checked_out(options.base) as base:
            found = list(compare.base_and_here(base, resolve(names[0]), options.seconds, cells=cells))
        title = f"{names[0]} here, relative to {options.base}"
    else:
        first, second = map(resolve, names)
        found = compare.implementations(first, second, options.seconds, cells=cells)
        title = f"{second.name}, relative to {first.name}"
    _tell(options, found, title)
    return 0 if any(c.ratio for c in found) else 1


def _cells(options: argparse.Namespace) -> list[tuple[Problem, str]]:
    """What is compared: the default problem set, or what the options say."""
    check_device(options.device, "--device")
    check_choice("--dtype", options.dtype, tuple(map(dtype_name, DTYPES)))
    for mode in options.mode or ():
        check_choice("--mode", mode, MODES)
    sizes = {size: getattr(options, size) or () for size in SIZES}
    blocks = (Workloads(),) if options.load or any(sizes.values()) else compare.PROBLEMS
    found = [p for block in chosen(blocks, options.model, sizes, options.load) for p in block.problems()]
    found = [replace(p, device=options.device, dtype=getattr(torch, options.dtype)) for p in found]
    return [(problem, mode) for problem in found for mode in options.mode or MODES]


def _gate(options: argparse.Namespace) -> int:
    _settle(options)
    if not 0 < options.threshold < 10:
        raise ValueError(f"--threshold is {options.threshold}; it must be in (0, 10)")
    with versions.checked_out(options.base) as base:
        there = versions.names_in(base)
        usual = [name for name in IMPLEMENTATIONS if name in there and not name.endswith(PREPARED)]
        subjects = [resolve(name) for name in options.impl or usual]
        subjects = [s for s in subjects if options.impl or not s.support.compiles_per_case]
        found, slower = compare.gate(base, subjects, options.threshold, options.seconds)
    _tell(options, found, f"here, relative to {options.base}")
    if not slower:
        print(f"no implementation is slower than at {options.base} by more than {options.threshold:.0%}")
        return 0
    compare.show(slower, f"slower than at {options.base} by more than {options.threshold:.0%}, twice")
    return 1


def _tell(options: argparse.Namespace, found: list[compare.Compared], title: str) -> None:
    compare.show(found, title)
    for path, write in ((options.csv, compare.write_csv), (options.markdown, compare.write_markdown)):
        if path is not None:
            write(path, found)
            print(path)


def _tune(options: argparse.Namespace) -> int:
    check_device(options.device, "--device")
    path = options.out or auto.tuned_path(options.device.partition(":")[0])
    tune.tune(path, quick=options.quick, device=options.device)
    print(path)
    return 0


def _report(options: argparse.Namespace) -> int:
    made = {path.parent for path in RESULTS.glob("*/*.csv")} - {HISTORY}
    folders = options.folders or sorted(made)
    if not folders:
        raise ValueError(f"{RESULTS} holds no CSV file; `pytest benchmarks` makes them")
    for folder in folders:
        print(*markdown.write(folder), sep="\n")
    if not page.is_available():
        print(page.MISSING, file=sys.stderr)
    return 0


def _to_profile(options: argparse.Namespace) -> tuple[Implementation, Problem, RouterSpec]:
    check_device(options.device, "--device")
    check_choice("--dtype", options.dtype, tuple(map(dtype_name, DTYPES)))
    check_choice("--mode", options.mode, MODES)
    implementation = resolve(options.impl)
    sizes = {size: [n] for size in SIZES if (n := getattr(options, size)) is not None}
    (layer,) = chosen((Workloads(),), [options.model] if options.model else [], sizes, [options.load])
    (problem,) = layer.problems()
    problem = replace(problem, dtype=getattr(torch, options.dtype), device=options.device)
    return implementation, problem, layer.router or RouterSpec(top_k=problem.K)


def _profile(options: argparse.Namespace) -> int:
    implementation, problem, spec = _to_profile(options)
    folder = options.out or RESULTS / record.environment(options.device, "profile").machine / "profiles"
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
    if profiled.device is not None:
        print(profiled.device.to_string(index=False))
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no worktree and no process behind
    sys.exit(main())
