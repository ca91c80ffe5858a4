"""``pytest benchmarks``: options and tests of the sweep that ``benchmarks/sweep`` makes.

pytest chooses the cells, asks ``SweepRun`` for the rows of a workload when the first of its tests comes, and
replays their samples into pytest-benchmark.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks.options import add_threads, add_workload
from benchmarks.report import page, tables
from benchmarks.report.folder import write_report
from benchmarks.sweep import record, run
from benchmarks.sweep.progress import SweepProgress
from benchmarks.sweep.request import Options, Request, requested
from benchmarks.sweep.run import SweepRun
from benchmarks.timing.measure import CACHES
from benchmarks.workloads import GRIDS, SECONDS
from moe_impls.registry import ResolveError
from reporting.provenance import RESULTS

REQUEST = pytest.StashKey[Request]()
RUN = pytest.StashKey[SweepRun]()
PROGRESS = pytest.StashKey[SweepProgress]()
OPEN = pytest.StashKey[contextlib.ExitStack]()
CLOSING_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sweep", "MoE benchmark sweep")
    group.addoption("--grid", metavar="NAME", help=f"what to measure: {', '.join(GRIDS)} (default: default)")
    group.addoption("--impl", action="append", metavar="NAME", help=(
        "measure only this implementation (repeatable): a name, package.module:function or file.py:function"
    ))  # fmt: skip
    add_workload(group.addoption, repeatable=True)  # in place of the grid or of its axes
    group.addoption("--cache", default=Options.cache, metavar="NAME", help=(
        f"{', '.join(CACHES)}: what the caches hold before each call (default: warm)"
    ))  # fmt: skip
    add_threads(group.addoption)
    group.addoption("--seed", default=Options.seed, type=int, metavar="N", help="seed of inputs and routing")
    group.addoption("--seconds", type=float, metavar="S", help=(
        f"time for the samples of each cell, at the least 7 rounds; by grid: {SECONDS}"
    ))  # fmt: skip
    group.addoption("--cell-timeout", default=Options.cell_timeout, type=float, metavar="S", help=(
        "processor time that any one call of an implementation may take, or four times that on the clock"
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
    group.addoption("--out", metavar="DIR", help=(
        f"folder of the CSV and the report ({RESULTS.name}/<machine>)"
    ))  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    options = Options(**{field.name: getattr(option, field.name) for field in fields(Options)})
    out, resume = (Path(given) if given else None for given in (option.out, option.resume))
    try:
        request = requested(options, out=out, resume=resume)
    except (ValueError, ResolveError) as error:
        raise pytest.UsageError(str(error)) from error
    option.keyword = request.options.keyword
    config.stash[REQUEST], config.stash[CLOSING_LINES] = request, []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames:
        request = metafunc.config.stash[REQUEST]
        metafunc.parametrize("rows", list(request.workloads), indirect=True, scope="module")
        metafunc.parametrize("implementation", list(request.implementations))


def _selected(items: list[pytest.Item]) -> dict[str, list[str]]:
    """The implementations to measure by workload, from the tests that are left to run."""
    chosen: dict[str, list[str]] = {}
    for item in items:
        if (callspec := getattr(item, "callspec", None)) and "rows" in callspec.params:
            chosen.setdefault(callspec.params["rows"], []).append(callspec.params["implementation"])
    return chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    planned = _selected(session.items)
    if not planned or config.option.collectonly:
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "-n cannot be given: workloads that are timed side by side disturb each other"
        )
    request, stack = config.stash[REQUEST], contextlib.ExitStack()
    try:
        config.stash[RUN] = stack.enter_context(run.begun(request, planned))
    except record.RecordError as error:
        raise pytest.UsageError(str(error)) from error
    except OSError as error:
        raise pytest.UsageError(
            f"--out: {request.csv} cannot be written: {error.strerror or error}"
        ) from error
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    stream, is_quiet = terminal._tw._file, config.get_verbosity() == 0
    if not (stream.isatty() and is_quiet):
        terminal.ensure_newline()
    config.stash[PROGRESS] = stack.enter_context(SweepProgress.on(stream, len(planned), bar=is_quiet))
    config.stash[OPEN] = stack


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, record.Row]:
    """The rows of one workload: all selected implementations, measured side by side, and written."""
    stash = request.config.stash
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")  # lets progress be seen
    with capture.global_and_fixture_disabled():
        stash[PROGRESS].begin(request.param)
    measured = stash[RUN].rows(request.param)
    with capture.global_and_fixture_disabled():
        stash[PROGRESS].finish(request.param, list(measured.values()))
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
    if PROGRESS not in config.stash or config.get_verbosity() > 0:
        return None
    if report.passed:
        return ("passed" if report.when == "call" else "", "", "")
    if report.skipped:
        return "skipped", "", ""
    return "failed" if report.when == "call" else "error", "", ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash = session.config.stash
    if OPEN not in stash:
        return
    stash[OPEN].close()
    csv, lines = stash[REQUEST].csv, stash[CLOSING_LINES]
    lines += stash[RUN].remarks()
    with contextlib.suppress(record.RecordError, OSError):  # which the report tells
        lines += filter(None, [tables.unsteady(tables.table_of(record.read(csv)))])
    lines.append(f"CSV:    {_shown(csv)}")
    try:
        lines += [f"report: {_shown(path)}" for path in write_report(csv.parent)]
        lines += [] if page.is_available() else [page.MISSING]
    except (record.RecordError, OSError) as error:
        lines.append(f"report: not written, {error}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last lines: where the results are."""
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        for line in config.stash.get(CLOSING_LINES, []):
            terminal.write_line(line)


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
