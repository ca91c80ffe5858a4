"""What a sweep is asked to measure: its options, checked, and the cells that follow from them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.sweep import plan, record
from benchmarks.sweep.plan import SIZES
from benchmarks.sweep.record import Environment, Row
from benchmarks.sweep.workload import Settings
from benchmarks.timing.measure import CACHES
from benchmarks.workloads import GRIDS, MODES, SECONDS, Workloads, chosen
from correctness.problems.problem import Problem, check_device
from correctness.session import isolation
from moe_impls.interface import DTYPES, Implementation, check_choice, dtype_name
from moe_impls.registry import IMPLEMENTATIONS, resolve
from reporting.pages import slug
from reporting.provenance import RESULTS


@dataclass(frozen=True)
class Options:
    """The options of a sweep, by their names on the command line; ``pytest benchmarks --help`` tells more."""

    grid: str | None = None
    impl: list[str] | None = None
    model: list[str] | None = None
    mode: list[str] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    load: list[str] | None = None
    T: list[int] | None = None
    D: list[int] | None = None
    H: list[int] | None = None
    E: list[int] | None = None
    K: list[int] | None = None
    cache: str = "warm"
    threads: int | None = None
    seed: int = 0
    seconds: float | None = None
    cell_timeout: float = Settings.call_timeout_s
    cell_memory: float | None = None
    isolate: bool = False
    keyword: str = ""  # pytest's -k

    def given(self) -> dict[str, object]:
        """The options that differ from their defaults: what a plan holds."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Options(), name)}


@dataclass(frozen=True)
class Request:
    """A sweep to make: workloads by their ids, implementations by name, and where the rows go."""

    options: Options
    workloads: dict[str, tuple[Problem, str]]  # with their modes
    implementations: dict[str, Implementation]
    environment: Environment
    settings: Settings
    csv: Path
    resumes: bool  # csv holds rows already


def requested(options: Options, *, out: Path | None = None, resume: Path | None = None) -> Request:
    """Check options and work out what they ask for. Sets the number of threads, if that is among them.

    Args:
        out: folder of a new sweep's CSV; ``results/<machine>`` unless given.
        resume: the CSV of an interrupted sweep, whose options are taken; then no others may be given.

    Raises:
        ValueError: an option that is not valid, or a sweep that cannot be continued; the message names it.
        ResolveError: a name that leads to no implementation.
    """
    if resume is not None:
        options = _continued_options(options, out, resume)
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    grid = options.grid or "default"
    blocks = _blocks(options, grid)
    names: list[str] = list(dict.fromkeys(options.impl or IMPLEMENTATIONS))
    if options.isolate:
        isolation.try_in_child(f"importing {', '.join(names)}", _resolve_all, names)
    implementations = _resolve_all(names)
    workloads = {}
    for block in blocks:
        for problem in block.problems():
            dtype = getattr(torch, options.dtype)
            made = replace(problem, device=options.device, dtype=dtype, seed=options.seed)
            for mode in options.mode or block.modes:
                workloads[plan.cell_id(made, mode)] = made, mode
    name = "-".join(options.model or [grid])
    environment = record.environment(options.device, slug(name), options.cache)
    if resume is not None and (before := record.read(resume)):
        environment = _continued(resume, before[0], environment)
    return Request(
        options=options,
        workloads=workloads,
        implementations={implementation.name: implementation for implementation in implementations},
        environment=environment,
        settings=Settings(
            options.seconds or SECONDS[grid],
            call_timeout_s=options.cell_timeout,
            memory_bytes=None if options.cell_memory is None else options.cell_memory * 2**30,
        ),
        csv=resume or (out or RESULTS / environment.machine) / f"{environment.run_id}.csv",
        resumes=resume is not None,
    )


def _check(options: Options) -> None:
    check_device(options.device, "--device")
    check_choice("--dtype", options.dtype, tuple(map(dtype_name, DTYPES)))
    for mode in options.mode or ():
        check_choice("--mode", mode, MODES)
    check_choice("--cache", options.cache, CACHES)
    if options.threads is not None:
        check_choice("--threads", options.threads, tuple(range(1, 1 + (os.cpu_count() or 1))))
    if options.cell_memory is not None and options.device != "cpu":
        raise ValueError(
            f"--cell-memory is given and --device is {options.device}; it limits memory of the CPU"
        )
    for name in ("seconds", "cell_timeout", "cell_memory"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{_flag(name)} is {value}; it must be above 0")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _resolve_all(names: list[str]) -> list[Implementation]:
    return [resolve(name) for name in names]


def _blocks(options: Options, grid: str) -> list[Workloads]:
    """The grid or the models, with the sizes and loads that are given in place of their own."""
    check_choice("--grid", grid, tuple(GRIDS))
    models = options.model or []
    if models and options.grid:
        raise ValueError(
            f"--grid {options.grid} cannot be given with --model, which is measured instead of it"
        )
    sizes = {size: getattr(options, size) or () for size in SIZES}
    loads = options.load or ()
    # Given sizes or loads replace the axes of the grid's first block: its other blocks hold single cases.
    of_grid = GRIDS[grid][:1] if loads or any(sizes.values()) else GRIDS[grid]
    return chosen(of_grid, models, sizes, loads)


def _continued_options(options: Options, out: Path | None, csv: Path) -> Options:
    """The options of the sweep that is continued, where no others are given."""
    if given := options.given():
        names = ", ".join(map(_flag, given))
        raise ValueError(f"{names} cannot be given with --resume, which takes the options of {csv}")
    if out is not None:
        raise ValueError("--out cannot be given with --resume, whose file lies where it is")
    if not csv.is_file():
        raise ValueError(f"--resume: {csv} does not exist or is no file")
    planned = plan.read(csv).options
    if unknown := planned.keys() - {field.name for field in fields(Options)}:
        raise ValueError(f"--resume: {csv} was made with options of another version: {', '.join(unknown)}")
    return Options(**planned)


def _continued(csv: Path, first: Row, now: Environment) -> Environment:
    """The environment of a sweep that goes on: the run is the same, so all else must be."""
    for name in ("machine", "device_name", "torch_version", "threads", "threads_wait", "git_commit"):
        before, value = getattr(first, name), getattr(now, name)
        if before != value:
            raise ValueError(f"--resume: {csv} was measured with {name} {before}, this is {value}")
    return replace(now, run_id=first.run_id)
