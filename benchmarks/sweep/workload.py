"""The sweep's one loop: every implementation on one workload, checked, timed side by side, checked again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.sweep.record import Environment, Row, Status, now_utc, routing_checksum
from benchmarks.timing import clocks, measure, memory, roofline
from benchmarks.timing.measure import Call, Timing, Watch
from benchmarks.timing.roofline import Roofline
from benchmarks.workloads import flops
from correctness.judging import calling, compare
from correctness.judging.finding import CheckFailed, Timeout
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
class Cell:
    """What is known of one implementation on the workload so far; a status other than ok ends it."""

    implementation: Implementation
    status: Status = "ok"
    reason: str = ""
    first_call_s: float = 0.0
    worst_error_fraction: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)  # columns that only a right result has

    def tuning_ms(self) -> float | None:
        """Milliseconds spent so far on trying forms of the kernels; None if there is nothing to try."""
        tuning_seconds = self.implementation.tuning_seconds
        return None if tuning_seconds is None else tuning_seconds() * 1e3

    def see(self, fractions: dict[str, float]) -> None:
        """Keep the worst of errors, as fractions of their budgets; none may have been measured."""
        if fractions:
            worst = min(max(fractions.values()), 1e30)
            self.worst_error_fraction = max(self.worst_error_fraction or 0.0, worst)

    def fail(self, error: BaseException, when: str) -> None:
        self.status = status_of(error)
        kind = "" if isinstance(error, CheckFailed | Timeout) else f"{type(error).__name__}: "
        self.reason = f"{when}: {kind}{' '.join(str(error).split())[:500]}"


def status_of(error: BaseException) -> Status:
    """The status of a row whose measurement ended with this exception."""
    if isinstance(error, Timeout):
        return "timeout"
    if isinstance(error, CheckFailed):
        return "incorrect"
    if measure.is_out_of_memory(error):
        return "out_of_memory"
    return "error"


@dataclass
class WorkloadRun:
    """One workload in one mode, with the implementations that are measured side by side on it.

    watch: is told whose code will run next, and for how many seconds it may; "" is nobody's.
    """

    problem: Problem
    mode: str
    implementations: Sequence[Implementation]
    settings: Settings = Settings()
    watch: Watch = measure.nobody_watches
    cells: dict[str, Cell] = field(init=False)
    checksum: str | None = field(init=False, default=None)  # of the routing, once there is one

    def __post_init__(self) -> None:
        self.cells = {implementation.name: Cell(implementation) for implementation in self.implementations}

    def rows(self, environment: Environment) -> dict[str, Row]:
        """Measure: one row for each implementation, by name, whatever happens to it.

        Each is checked against the oracle before it is timed and, with new contents in the same memory,
        after.
        """
        available = memory.available_memory_bytes(self.problem.device)
        available = min(available, self.settings.memory_bytes or available)
        self._admit(available)
        if self._live():
            try:
                with memory.memory_limit(self.problem.device, available):
                    self._check_and_time(cold=environment.cache == "cold")
            except Exception as error:  # making the inputs or the oracle's results failed, for all alike
                for cell in self._live():
                    cell.fail(error, "before any measurement")
        return {name: self.row_of(cell, environment) for name, cell in self.cells.items()}

    def faults(self, *, timed: bool = False) -> dict[str, str]:
        """Why implementations cannot be timed, by name: not declared, too little memory, or wrong.

        timed: they have been; what is right only at first, or remembers results by address, is found, too.
        """
        self._admit(memory.available_memory_bytes(self.problem.device))
        if self._live():
            inputs = make_inputs(self.problem)
            self._check(self.problem, inputs, "check after timing" if timed else "check")
            if timed:
                self._check_on_new_contents(inputs)
        return {n: f"{cell.status}, {cell.reason}" for n, cell in self.cells.items() if cell.status != "ok"}

    def row_of(self, cell: Cell, environment: Environment) -> Row:
        """The row of a cell, measured or not."""
        p = self.problem
        return Row(
            **asdict(environment),
            time_utc=now_utc(),
            implementation=cell.implementation.name,
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
            routing_checksum=self.checksum,
            mode=self.mode,
            status=cell.status,
            reason=cell.reason,
            flops=flops(p, self.mode),
            worst_error_fraction=cell.worst_error_fraction,
            **(cell.measured if cell.status == "ok" else {}),
        )

    @property
    def _gradients(self) -> bool:
        return self.mode == "forward_backward"

    def _live(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.status == "ok"]

    def _limited(self, cell: Cell) -> AbstractContextManager[None]:
        return measure.watched(cell.implementation.name, self.settings.call_timeout_s, self.watch)

    def _admit(self, available_bytes: float) -> None:
        """End the cells that cannot be attempted: not declared, or too little memory."""
        for cell in self._live():
            if reason := undeclared(cell.implementation, self.problem, self.mode):
                cell.status, cell.reason = "unsupported", reason
        needed_bytes = memory.needed_memory_bytes(self.problem, self.mode)
        if needed_bytes > available_bytes:
            needed, available = needed_bytes / 2**30, available_bytes / 2**30
            reason = (
                f"needs at least {needed:.1f} GiB of memory, {available:.1f} GiB are available; not attempted"
            )
            for cell in self._live():
                cell.status, cell.reason = "out_of_memory", reason

    def _check_and_time(self, *, cold: bool) -> None:
        inputs = make_inputs(self.problem)
        self.checksum = routing_checksum(inputs.routing)
        self._check(self.problem, inputs, "check before timing")
        if calls := self._calls(inputs):
            self._time(calls, inputs, cold=cold)
            self._check_on_new_contents(inputs)

    def _check(self, problem: Problem, inputs: Inputs, when: str) -> None:
        """Compare each implementation with the oracle; the first call of all is this one, and is timed."""
        reference = compare.make_reference(problem, inputs, self._gradients)
        for cell in self._live():
            forward = cell.implementation.forward
            try:
                with self._limited(cell):
                    begin, tuned_ms = time.perf_counter(), cell.tuning_ms()
                    results = calling.run(forward, inputs, problem.combine, gradients=self._gradients)
                    cell.first_call_s = cell.first_call_s or time.perf_counter() - begin
                if tuned_ms is not None and "tuning_ms" not in cell.measured:  # in the first call of all
                    cell.measured["tuning_ms"] = round((cell.tuning_ms() or 0.0) - tuned_ms, 3)
                cell.see(compare.require_within(results, reference))
            except (Exception, Timeout) as error:
                if isinstance(error, CheckFailed):
                    cell.see(error.fractions)
                cell.fail(error, when)

    def _check_on_new_contents(self, inputs: Inputs) -> None:
        """Check with other contents at the same addresses, of which whatever was remembered is wrong."""
        again = replace(self.problem, seed=self.problem.seed + 1)
        inputs.overwrite(make_inputs(again))
        self._check(again, inputs, "check on new inputs after timing")

    def _calls(self, inputs: Inputs) -> dict[str, Call]:
        """The calls to time, by name, of which the memory is known by now."""
        calls: dict[str, Call] = {}
        device = self.problem.device
        for cell in self._live():
            implementation = cell.implementation
            try:
                with self._limited(cell):
                    if implementation.choose is not None:
                        cell.reason = f"took {taken(implementation, self.problem, inputs, self.mode)}"
                    forward = implementation.ready(inputs.experts)
                    call = measure.call_of(forward, self.problem, inputs, self.mode)
                    cell.measured["peak_memory_bytes"] = memory.peak_memory_bytes(call, device)
                    saved = 0
                    if self._gradients:
                        graph = measure.graph_of(forward, self.problem, inputs)
                        saved = memory.saved_for_backward_bytes(graph, device)
                    cell.measured["saved_for_backward_bytes"] = saved
                calls[implementation.name] = call
            except (Exception, Timeout) as error:
                cell.fail(error, "measuring memory")
        return calls

    def _time(self, calls: dict[str, Call], inputs: Inputs, *, cold: bool) -> None:
        device, settings = self.problem.device, self.settings
        flush = measure.flusher(device) if cold else None
        outcomes = measure.interleave(
            calls,
            device=device,
            seconds=settings.seconds,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            call_timeout_s=settings.call_timeout_s,
            before=dict.fromkeys(calls, flush) if flush else None,
            watch=self.watch,
        )
        clock = clocks.gpu_clock(device)  # while the GPU is as warm as the timing made it
        limits = roofline.measure_roofline(self.problem, self.mode, inputs.routing, flush)
        for name, outcome in outcomes.items():
            cell = self.cells[name]
            if not isinstance(outcome, Timing):
                cell.fail(outcome, "timing")
                continue
            cell.measured |= self._figures(outcome, limits, cell.first_call_s)
            cell.measured["gpu_clock_mhz"], cell.measured["gpu_clock_limits"] = clock or (None, None)

    def _figures(self, timing: Timing, limits: Roofline, first_call_s: float) -> dict[str, Any]:
        """The columns that follow from the samples and from what the machine can do."""
        samples_ms = tuple(round(s * 1e3, 6) for s in timing.samples_s)
        median_ms = statistics.median(samples_ms)
        p20_ms, p80_ms = (round(float(q), 6) for q in np.quantile(samples_ms, (0.2, 0.8)))
        return {
            **{
                n: value if isinstance(value, int) else _rounded(value) for n, value in asdict(limits).items()
            },
            "rounds": len(samples_ms),
            "calls_per_sample": timing.calls_per_sample,
            "median_ms": median_ms,
            "min_ms": min(samples_ms),
            "p20_ms": p20_ms,
            "p80_ms": p80_ms,
            "tokens_per_s": _rounded(self.problem.T / median_ms * 1e3),
            "tflop_per_s": _rounded(flops(self.problem, self.mode) / median_ms / 1e9),
            "limit_ms": _rounded(limits.limit_ms),
            "efficiency": _rounded(limits.limit_ms / median_ms),
            "compile_ms": round(max(0.0, first_call_s * 1e3 - median_ms), 3),
            "samples_ms": samples_ms,
        }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def faults(
    problem: Problem, mode: str, implementations: Sequence[Implementation], *, timed: bool = False
) -> dict[str, str]:
    """Why implementations cannot be timed on a workload; see ``WorkloadRun.faults``."""
    return WorkloadRun(problem, mode, implementations).faults(timed=timed)


def undeclared(implementation: Implementation, problem: Problem, mode: str) -> str | None:
    """What the workload needs and the implementation does not declare; None if nothing."""
    if mode == "forward_backward" and not implementation.support.gradients:
        return "gradients not declared"
    return unsupported(implementation.support, problem)


def taken(implementation: Implementation, problem: Problem, inputs: Inputs, mode: str) -> str:
    """The name of the implementation that one which leaves the work to others takes for these inputs."""
    assert implementation.choose is not None
    _, x, routing, experts = measure.arguments(inputs, gradients=mode == "forward_backward")
    return implementation.choose(x, routing, experts, combine=problem.combine).name
