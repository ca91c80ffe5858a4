"""``pytest benchmarks``: the options of the sweep, its cells, and where its results go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import markdown, page
from benchmarks.sweep import plan, record
from benchmarks.sweep.isolated import Child
from benchmarks.sweep.plan import SIZES
from benchmarks.sweep.progress import SweepProgress
from benchmarks.sweep.workload import Settings, measure_workload
from benchmarks.timing.measure import CACHES
from benchmarks.workloads import GRIDS, MODELS, MODES, SECONDS, Workloads, chosen
from correctness.problems.loads import LOAD_NAMES
from correctness.problems.problem import Problem, check_device
from correctness.session import isolation
from moe_impls.interface import DEVICES, DTYPES, Implementation, check_choice, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, ResolveError, resolve
from reporting.pages import slug
from reporting.provenance import RESULTS


@dataclass
class Sweep:
    """What the command line asks for: cells by their ids, and where their rows go."""

    cells: dict[str, tuple[Problem, str]]
    implementations: dict[str, Implementation]
    environment: record.Environment
    settings: Settings
    out: Path
    child: Child | None  # that measures; None: this process does
    csv: Path | None = None  # of a sweep that is continued, or once it begins
    rows: dict[str, dict[str, record.Row]] = field(default_factory=dict)  # that are in the file already
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    finished: int = 0  # workloads whose rows are written
    progress: SweepProgress | None = None
    closing_lines: list[str] = field(default_factory=list)


SWEEP = pytest.StashKey[Sweep]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sweep", "MoE benchmark sweep")
    group.addoption("--grid", metavar="NAME", help=f"what to measure: {', '.join(GRIDS)} (default: default)")
    group.addoption("--impl", action="append", metavar="NAME", help=(
        "measure only this implementation (repeatable): a name, package.module:function or file.py:function"
    ))  # fmt: skip
    group.addoption("--model", action="append", metavar="NAME", help=(
        f"instead of the grid, the layer of this model (repeatable): {', '.join(MODELS)}"
    ))  # fmt: skip
    group.addoption("--mode", action="append", metavar="NAME", help=f"only this mode: {', '.join(MODES)}")
    group.addoption("--device", default="cpu", metavar="NAME", help=f"{', '.join(DEVICES)}")
    group.addoption("--dtype", default="float32", metavar="NAME", help=", ".join(map(dtype_name, DTYPES)))
    group.addoption("--load", action="append", metavar="NAME", help=(
        f"how tokens spread over experts (repeatable): {LOAD_NAMES}"
    ))  # fmt: skip
    for size in SIZES:
        group.addoption(f"--{size}", dest=size, action="append", type=int, metavar="N", help=(
            f"measure this {size} (repeatable) in place of the grid's; with --model only --T"
        ))  # fmt: skip
    group.addoption("--cache", default="warm", metavar="NAME", help=(
        f"{', '.join(CACHES)}: what the caches hold before each call (default: warm)"
    ))  # fmt: skip
    group.addoption("--threads", type=int, metavar="N", help="threads that torch computes with on the CPU")
    group.addoption("--seed", default=0, type=int, metavar="N", help="seed of inputs and routing")
    group.addoption("--seconds", type=float, metavar="S", help=(
        f"time for the samples of each cell, at the least 7 rounds; by grid: {SECONDS}"
    ))  # fmt: skip
    group.addoption("--cell-timeout", default=Settings.call_timeout_s, type=float, metavar="S", help=(
        "what any one call of an implementation may take, the first with its compilation included"
    ))  # fmt: skip
    group.addoption("--cell-memory", type=float, metavar="GIB", help=(
        "memory that a workload may take on the CPU, its inputs included (default: what is available)"
    ))  # fmt: skip
    group.addoption("--isolate", action="store_true", help=(
        "measure in a child process: what kills it, or goes on after --cell-timeout, becomes a row"
    ))  # fmt: skip
    group.addoption("--resume", metavar="CSV", help=(
        "continue an interrupted sweep, with its options; what its file holds is not measured again"
    ))  # fmt: skip
    group.addoption("--out", metavar="DIR", help="folder of the CSV and the report (results/<machine>)")


def pytest_configure(config: pytest.Config) -> None:
    try:
        if config.option.resume:
            _take_options_of(Path(config.option.resume), config)
        config.stash[SWEEP] = _sweep(config)
    except (ValueError, ResolveError) as error:
        raise pytest.UsageError(str(error)) from error


# What a sweep that is continued takes from its plan, with the defaults.
PLANNED = {"grid": None, "impl": None, "model": None, "mode": None, "device": "cpu", "dtype": "float32",
           "load": None, "cache": "warm", "threads": None, "seed": 0, "seconds": None,
           "cell_timeout": Settings.call_timeout_s, "cell_memory": None, "isolate": False,
           **dict.fromkeys(SIZES), "keyword": ""}  # fmt: skip


def _given(config: pytest.Config) -> dict[str, object]:
    """The options of the sweep that are not their defaults."""
    values = {name: getattr(config.option, name) for name in PLANNED}
    return {name: value for name, value in values.items() if value != PLANNED[name]}


def _take_options_of(csv: Path, config: pytest.Config) -> None:
    if given := _given(config):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} cannot be given with --resume, which takes the options of {csv}")
    if config.option.out:
        raise ValueError("--out cannot be given with --resume, whose file lies where it is")
    if not csv.is_file():
        raise ValueError(f"--resume: {csv} does not exist or is no file")
    for name, value in plan.read(csv).options.items():
        setattr(config.option, name, value)


def _sweep(config: pytest.Config) -> Sweep:
    option = config.option
    device, dtype = option.device, option.dtype
    check_device(device, "--device")
    check_choice("--dtype", dtype, tuple(map(dtype_name, DTYPES)))
    for mode in option.mode or ():
        check_choice("--mode", mode, MODES)
    check_choice("--cache", option.cache, CACHES)
    if option.threads is not None:
        cpus = os.cpu_count() or 1
        check_choice("--threads", option.threads, tuple(range(1, cpus + 1)))
        torch.set_num_threads(option.threads)
    if option.cell_memory is not None and device != "cpu":
        raise ValueError(f"--cell-memory is given and --device is {device}; it limits memory of the CPU")
    for name in ("seconds", "cell_timeout", "cell_memory"):
        if getattr(option, name) is not None and not getattr(option, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(option, name)}; it must be above 0")
    names: list[str] = list(dict.fromkeys(option.impl or IMPLEMENTATIONS))
    if option.isolate:
        isolation.try_in_child(f"importing {', '.join(names)}", _resolve_all, names)
    implementations = _resolve_all(names)

    cells: dict[str, tuple[Problem, str]] = {}
    grid = option.grid or "default"
    for block in _blocks(config, grid):
        for problem in block.problems():
            made = replace(problem, device=device, dtype=getattr(torch, dtype), seed=option.seed)
            for mode in option.mode or block.modes:
                cells[plan.cell_id(made, mode)] = (made, mode)
    name = "-".join(option.model or [grid])
    environment = record.environment(device, slug(name), option.cache)
    csv = Path(option.resume) if option.resume else None
    if csv is not None and (before := record.read(csv)):
        environment = _continued(csv, before[0], environment)
    return Sweep(
        cells,
        {implementation.name: implementation for implementation in implementations},
        environment,
        Settings(
            option.seconds or SECONDS[grid],
            call_timeout_s=option.cell_timeout,
            memory_bytes=None if option.cell_memory is None else option.cell_memory * 2**30,
        ),
        csv.parent if csv else Path(option.out or RESULTS / environment.machine),
        Child() if option.isolate else None,
        csv,
    )


def _resolve_all(names: list[str]) -> list[Implementation]:
    return [resolve(name) for name in names]


def _continued(csv: Path, first: record.Row, now: record.Environment) -> record.Environment:
    """The environment of a sweep that goes on: the run is the same, so all else must be."""
    for name in ("machine", "device_name", "torch_version", "threads", "threads_wait", "git_commit"):
        before, value = getattr(first, name), getattr(now, name)
        if before != value:
            raise ValueError(f"--resume: {csv} was measured with {name} {before}, this is {value}")
    return replace(now, run_id=first.run_id)


def _blocks(config: pytest.Config, grid: str) -> list[Workloads]:
    """The grid or the models, with the sizes and loads of the command line in place of their own."""
    option = config.option
    check_choice("--grid", grid, tuple(GRIDS))
    models = option.model or []
    if models and option.grid:
        raise ValueError(
            f"--grid {option.grid} cannot be given with --model, which is measured instead of it"
        )
    sizes = {size: getattr(option, size) or () for size in SIZES}
    loads = option.load or ()
    # Given sizes or loads replace the axes of the grid's first block: its other blocks hold single cases.
    of_grid = GRIDS[grid][:1] if loads or any(sizes.values()) else GRIDS[grid]
    return chosen(of_grid, models, sizes, loads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames:
        sweep = metafunc.config.stash[SWEEP]
        metafunc.parametrize("rows", list(sweep.cells), indirect=True, scope="module")
        metafunc.parametrize("implementation", list(sweep.implementations))


def _selected(items: list[pytest.Item]) -> dict[str, list[str]]:
    """The implementations to measure for each workload, from the tests that are left to run."""
    chosen: dict[str, list[str]] = {}
    for item in items:
        if (callspec := getattr(item, "callspec", None)) and "rows" in callspec.params:
            chosen.setdefault(callspec.params["rows"], []).append(callspec.params["implementation"])
    return chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    chosen = _selected(session.items)
    if not chosen or config.option.collectonly:
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "-n cannot be given: workloads that are timed side by side disturb each other"
        )
    sweep = config.stash[SWEEP]
    path = sweep.csv or sweep.out / f"{sweep.environment.run_id}.csv"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep.lock.enter_context(record.locked(path))
        if sweep.csv is None:
            plan.write(path, _given(config), chosen)
            record.create(path)
        elif record.repair(path):
            sweep.closing_lines.append("the last line of the file was not whole; its row was measured again")
        sweep.rows = plan.done(path)
    except record.RecordError as error:
        raise pytest.UsageError(str(error)) from error
    except OSError as error:
        raise pytest.UsageError(f"--out: {path} cannot be written: {error.strerror or error}") from error
    sweep.csv = path
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    stream = terminal._tw._file
    bar = stream.isatty() and config.get_verbosity() == 0
    if not bar:
        terminal.ensure_newline()
    sweep.progress = SweepProgress(len(chosen), stream, bar=bar)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, record.Row]:
    """The rows of one workload: all selected implementations, measured side by side, and written."""
    sweep = request.config.stash[SWEEP]
    problem, mode = sweep.cells[request.param]
    names = _selected(request.session.items)[request.param]
    assert sweep.csv is not None and sweep.progress is not None
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")  # lets progress be seen
    with capture.global_and_fixture_disabled():
        sweep.progress.begin(request.param)
    measured = dict(sweep.rows.get(request.param, {}))
    chosen = [sweep.implementations[name] for name in names if name not in measured]
    if chosen:
        measure = sweep.child.measure if sweep.child else measure_workload
        new = measure(problem, mode, chosen, sweep.environment, sweep.settings)
        for row in new.values():
            record.append(sweep.csv, row)
        measured |= new
    sweep.finished += 1
    with capture.global_and_fixture_disabled():
        sweep.progress.finish(request.param, list(measured.values()))
    return measured


@pytest.fixture
def row(rows: dict[str, record.Row], implementation: str, request: pytest.FixtureRequest) -> record.Row:
    """The row of one cell. Its samples become what pytest-benchmark's timer reads when it is set up next."""
    measured = rows[implementation]
    group = request.node.callspec.params["rows"]
    timer = replay(measured.samples_ms or ())
    request.node.add_marker(pytest.mark.benchmark(group=group, timer=timer))
    return measured


def replay(samples_ms: tuple[float, ...]):
    """A clock whose readings, taken in pairs, are apart by the samples: 0, first, 0, second in seconds."""

    def readings() -> Iterator[float]:
        for sample in samples_ms:
            yield 0.0
            yield sample / 1e3

    iterator = readings()

    def recorded_samples() -> float:
        return next(iterator)

    return recorded_samples


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config):
    """While the bar is shown, nothing else writes to its line; failures are told by the bar."""
    sweep = config.stash.get(SWEEP, None)
    if sweep is None or sweep.progress is None or config.get_verbosity() > 0:
        return None
    if report.passed:
        return ("passed" if report.when == "call" else "", "", "")
    if report.skipped:
        return "skipped", "", ""
    return "failed" if report.when == "call" else "error", "", ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    sweep = session.config.stash.get(SWEEP, None)
    if sweep is None or sweep.csv is None or not sweep.csv.exists():
        return
    sweep.lock.close()
    if sweep.child:
        sweep.child.close()
    if sweep.progress is not None:
        sweep.progress.close()
    planned = len(_selected(session.items))
    if sweep.finished < planned:
        sweep.closing_lines.append(f"incomplete: {sweep.finished} of {planned} workloads were measured")
    with contextlib.suppress(record.RecordError, OSError):  # which the report tells
        sweep.closing_lines += filter(None, [markdown.unsteady(markdown.table_of(record.read(sweep.csv)))])
    sweep.closing_lines.append(f"CSV:    {_shown(sweep.csv)}")
    try:
        sweep.closing_lines += [f"report: {_shown(path)}" for path in markdown.write(sweep.out)]
        sweep.closing_lines += [] if page.is_available() else [page.MISSING]
    except (record.RecordError, OSError) as error:
        sweep.closing_lines.append(f"report: not written, {error}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last lines: where the results are."""
    sweep = config.stash.get(SWEEP, None)
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if sweep is not None and terminal is not None:
        for line in sweep.closing_lines:
            terminal.write_line(line)


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
