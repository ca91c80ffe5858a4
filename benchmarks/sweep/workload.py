"""The sweep's one loop: every implementation on one workload, checked, timed side by side, checked again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks.sweep.record import Environment, Row, now_utc, routing_checksum
from benchmarks.timing import clocks, measure, memory, roofline
from benchmarks.timing.measure import Call, CallTimeout, Running, Timing
from benchmarks.timing.roofline import Roofline
from benchmarks.workloads import flops
from correctness.judging import calling, compare
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem, unsupported
from moe_impls.interface import Implementation, dtype_name


@dataclass(frozen=True)
class Settings:
    """How long to measure, see ``measure.interleave``, and what it may take."""

    seconds: float = 0.25
    min_rounds: int = measure.MIN_ROUNDS
    max_rounds: int = measure.MAX_ROUNDS
    call_timeout_s: float = 300.0
    memory_bytes: float | None = None  # that may be taken beyond what is held; None: what is available


@dataclass
class _Cell:
    """What is known of one implementation on the workload so far; a status other than ok ends it."""

    status: str = "ok"
    reason: str = ""
    first_call_s: float = 0.0
    peak_memory_bytes: int = 0
    saved_for_backward_bytes: int = 0
    worst_error_fraction: float | None = None
    gpu_clock: tuple[int, str] | None = None

    def fail(self, error: BaseException, when: str) -> None:
        self.status = status_of(error)
        kind = "" if isinstance(error, CheckFailed | CallTimeout) else f"{type(error).__name__}: "
        self.reason = f"{when}: {kind}{' '.join(str(error).split())[:500]}"


def status_of(error: BaseException) -> str:
    """The status of a row whose measurement ended with this exception."""
    if isinstance(error, CallTimeout):
        return "timeout"
    if isinstance(error, CheckFailed):
        return "incorrect"
    if measure.is_out_of_memory(error):
        return "out_of_memory"
    return "error"


def measure_workload(
    problem: Problem,
    mode: str,
    implementations: Sequence[Implementation],
    environment: Environment,
    settings: Settings = Settings(),  # noqa: B008  # frozen
    running: Running = measure.nobody_watches,
) -> dict[str, Row]:
    """One row for each implementation, by name, whatever happens to it.

    Each is checked against the oracle before it is timed and, with new contents in the same memory, after.

    Args:
        running: is told whose code will run next, and for how many seconds it may; "" is nobody's.
    """
    available = memory.available_memory_bytes(problem.device)
    available = min(available, settings.memory_bytes or available)
    cells = _admitted(problem, mode, implementations, available)

    timings: dict[str, Timing] = {}
    checksum = limits = None
    if _live(cells):
        try:
            with memory.memory_limit(problem.device, available):
                live = [i for i in implementations if cells[i.name].status == "ok"]
                cold = environment.cache == "cold"
                timings, limits, checksum = _check_and_time(
                    problem, mode, live, cells, settings, cold, running
                )
        except Exception as error:  # making the inputs or the oracle's results failed, for all alike
            for cell in _live(cells):
                cell.fail(error, "before any measurement")
    return {
        name: _row(problem, mode, name, cell, timings.get(name), limits, checksum, environment)
        for name, cell in cells.items()
    }


def faults(
    problem: Problem, mode: str, implementations: Sequence[Implementation], *, timed: bool = False
) -> dict[str, str]:
    """Why those that cannot be timed on the workload cannot: by declaration, for memory, or being wrong.

    timed: they have been; what is right only at first, or remembers results by address, is found, too.
    """
    cells = _admitted(problem, mode, implementations, memory.available_memory_bytes(problem.device))
    if live := [i for i in implementations if cells[i.name].status == "ok"]:
        inputs = make_inputs(problem)
        when = "check after timing" if timed else "check"
        _check_all(problem, mode, inputs, live, cells, Settings(), when, measure.nobody_watches)
        if timed:
            _check_on_new_contents(problem, mode, inputs, cells, live, Settings(), measure.nobody_watches)
    return {name: f"{cell.status}, {cell.reason}" for name, cell in cells.items() if cell.status != "ok"}


def undeclared(implementation: Implementation, problem: Problem, mode: str) -> str | None:
    """What the workload needs and the implementation does not declare; None if nothing."""
    if mode == "forward_backward" and not implementation.support.gradients:
        return "gradients not declared"
    return unsupported(implementation.support, problem)


def _admitted(
    problem: Problem, mode: str, implementations: Sequence[Implementation], available_bytes: float
) -> dict[str, _Cell]:
    """A cell for each, with the reason where it cannot be attempted: not declared, or too little memory."""
    cells = {}
    for implementation in implementations:
        reason = undeclared(implementation, problem, mode)
        cells[implementation.name] = _Cell("unsupported", reason) if reason else _Cell()
    needed = memory.needed_memory_bytes(problem, mode)
    if needed > available_bytes:
        for cell in _live(cells):
            cell.status = "out_of_memory"
            cell.reason = (
                f"needs at least {needed / 2**30:.1f} GiB of memory, {available_bytes / 2**30:.1f} GiB are "
                "available; not attempted"
            )
    return cells


def _live(cells: dict[str, _Cell]) -> list[_Cell]:
    return [cell for cell in cells.values() if cell.status == "ok"]


def _check_and_time(
    problem: Problem,
    mode: str,
    implementations: Sequence[Implementation],
    cells: dict[str, _Cell],
    settings: Settings,
    cold: bool,
    running: Running,
) -> tuple[dict[str, Timing], Roofline | None, str]:
    inputs = make_inputs(problem)
    gradients = mode == "forward_backward"
    checksum = routing_checksum(inputs.routing)
    _check_all(problem, mode, inputs, implementations, cells, settings, "check before timing", running)

    calls: dict[str, Call] = {}
    for implementation in implementations:
        name = implementation.name
        if cells[name].status != "ok":
            continue
        try:
            with measure.limited(name, settings.call_timeout_s, running):
                if implementation.choose is not None:
                    cells[name].reason = f"took {taken(implementation, problem, inputs, mode)}"
                forward = implementation.ready(inputs.experts)
                calls[name] = measure.call_of(forward, problem, inputs, mode)
                cells[name].peak_memory_bytes = memory.peak_memory_bytes(calls[name], problem.device)
                if gradients:
                    graph = measure.graph_of(forward, problem, inputs)
                    saved = memory.saved_for_backward_bytes(graph, problem.device)
                    cells[name].saved_for_backward_bytes = saved
        except (Exception, CallTimeout) as error:
            cells[name].fail(error, "measuring memory")
    candidates = {name: call for name, call in calls.items() if cells[name].status == "ok"}
    if not candidates:
        return {}, None, checksum

    flush = measure.flusher(problem.device) if cold else None
    outcomes = measure.interleave(
        candidates,
        device=problem.device,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        call_timeout_s=settings.call_timeout_s,
        before=dict.fromkeys(candidates, flush) if flush else None,
        running=running,
    )
    gpu_clock = clocks.gpu_clock(problem.device)  # while the GPU is as warm as the timing made it
    limits = roofline.measure_roofline(problem, mode, inputs.routing, flush)
    timings = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Timing):
            timings[name] = outcome
            cells[name].gpu_clock = gpu_clock
        else:
            cells[name].fail(outcome, "timing")

    _check_on_new_contents(problem, mode, inputs, cells, implementations, settings, running)
    return timings, limits, checksum


def _check_on_new_contents(
    problem: Problem,
    mode: str,
    inputs: Inputs,
    cells: dict[str, _Cell],
    implementations: Sequence[Implementation],
    settings: Settings,
    running: Running,
) -> None:
    """Check with other contents at the same addresses, of which whatever was remembered is wrong."""
    again = replace(problem, seed=problem.seed + 1)
    inputs.overwrite(make_inputs(again))
    live = [i for i in implementations if cells[i.name].status == "ok"]
    _check_all(again, mode, inputs, live, cells, settings, "check on new inputs after timing", running)


def taken(implementation: Implementation, problem: Problem, inputs: Inputs, mode: str) -> str:
    """The name of the implementation that one which leaves the work to others takes for these inputs."""
    assert implementation.choose is not None
    _, x, routing, experts = measure.arguments(inputs, gradients=mode == "forward_backward")
    return implementation.choose(x, routing, experts, combine=problem.combine).name


def _check_all(
    problem: Problem,
    mode: str,
    inputs: Inputs,
    implementations: Sequence[Implementation],
    cells: dict[str, _Cell],
    settings: Settings,
    when: str,
    running: Running,
) -> None:
    """Compare each implementation with the oracle; the first call of all is this one, and is timed."""
    gradients = mode == "forward_backward"
    reference = compare.make_reference(problem, inputs, gradients)
    for implementation in implementations:
        cell = cells[implementation.name]
        try:
            with measure.limited(implementation.name, settings.call_timeout_s, running):
                begin = time.perf_counter()
                results = calling.run(implementation.forward, inputs, problem.combine, gradients=gradients)
                cell.first_call_s = cell.first_call_s or time.perf_counter() - begin
            found = compare.fractions(results, reference)
            cell.worst_error_fraction = max(cell.worst_error_fraction or 0.0, min(max(found.values()), 1e30))
            compare.require_within(results, reference)
        except (Exception, CallTimeout) as error:
            cell.fail(error, when)


def failed_row(
    problem: Problem, mode: str, name: str, status: str, reason: str, environment: Environment
) -> Row:
    """The row of an implementation that could not be measured to the end."""
    return _row(problem, mode, name, _Cell(status, reason), None, None, None, environment)


def _row(
    problem: Problem,
    mode: str,
    name: str,
    cell: _Cell,
    timing: Timing | None,
    limits: Roofline | None,
    checksum: str | None,
    environment: Environment,
) -> Row:
    p = problem
    row = Row(
        **asdict(environment),
        time_utc=now_utc(),
        implementation=name,
        workload=p.name,
        T=p.T,
        D=p.D,
        H=p.H,
        O=p.O,
        E=p.E,
        K=p.K,
        activation=p.activation,
        output_activation=p.output_activation,
        combine=p.combine,
        bias=p.bias,
        dtype=dtype_name(p.dtype),
        load=p.load,
        seed=p.seed,
        routing_checksum=checksum,
        mode=mode,
        status=cell.status,
        reason=cell.reason,
        flops=flops(p, mode),
        worst_error_fraction=cell.worst_error_fraction,
    )
    if cell.status != "ok" or timing is None or limits is None:
        return row
    samples_ms = tuple(round(s * 1e3, 6) for s in timing.samples_s)
    median_ms = statistics.median(samples_ms)
    ingredients = {
        name: value if isinstance(value, int) else float(f"{value:.6g}")
        for name, value in asdict(limits).items()
    }
    limit_ms = float(f"{limits.limit_ms:.6g}")
    gpu_clock_mhz, gpu_clock_limits = cell.gpu_clock or (None, None)
    p20_ms, p80_ms = (float(q) for q in np.quantile(samples_ms, (0.2, 0.8)))
    return replace(
        row,
        rounds=len(samples_ms),
        calls_per_sample=timing.calls_per_sample,
        median_ms=median_ms,
        min_ms=min(samples_ms),
        p20_ms=round(p20_ms, 6),
        p80_ms=round(p80_ms, 6),
        tokens_per_s=float(f"{p.T / median_ms * 1e3:.6g}"),
        tflop_per_s=float(f"{row.flops / median_ms / 1e9:.6g}"),
        **ingredients,
        gpu_clock_mhz=gpu_clock_mhz,
        gpu_clock_limits=gpu_clock_limits,
        limit_ms=limit_ms,
        efficiency=float(f"{limit_ms / median_ms:.6g}"),
        compile_ms=round(max(0.0, cell.first_call_s * 1e3 - median_ms), 3),
        peak_memory_bytes=cell.peak_memory_bytes,
        saved_for_backward_bytes=cell.saved_for_backward_bytes,
        samples_ms=samples_ms,
    )
