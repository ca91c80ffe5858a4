"""Where the time of one call goes: torch.profiler on one implementation and problem, by operator and stage.

The stages are ``record_function`` ranges that are put around torch's functions while they are called, so the
implementations know nothing of them:

    route         ``moe_impls.route`` on random logits, once a call
    expert_gemms  matrix products
    activation    ``functional.activate``, and activation functions called outside of it
    combine       ``functional.combine_slots``, sums into rows (index_add, scatter_add), and everything that
                  follows the last matrix product
    dispatch      everything else: sorting, gathering, masking
    other         operators outside of every range, such as the fused kernels of compiled code
    host          the rest of the call: Python, launching, allocation; on CUDA not counted

An operator of the backward counts for the stage of the forward operator that it differentiates, which the
profiler's sequence numbers tell. Compiled code is opaque: its matrix products are known by their operators'
names, the rest is ``other``. ``operators.csv`` names the stage of every operator.

On CUDA ``device.csv`` says how busy the device was kept: its kernels and copies, the gaps between them, and
how often the host waited for it.
"""

# pyright: reportArgumentType=false
# pandas's types are wider than what indexing gives: a Series may be an array or a table to the checker.

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, record_function

from benchmarks.timing import measure
from correctness.judging import calling, compare
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem, unsupported
from moe_impls import functional
from moe_impls.interface import Implementation, dtype_name
from moe_impls.registry import one_line
from moe_impls.router import route
from moe_impls.router_interface import RouterSpec
from reporting.pages import slug, write_atomically

STAGES = ("route", "dispatch", "expert_gemms", "activation", "combine", "other", "host")
GEMMS = {"linear", "mm", "bmm", "addmm", "baddbmm", "addbmm", "matmul", "__matmul__", "einsum", "grouped_mm",
         "_grouped_mm"}  # fmt: skip
ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "glu", "softplus"}
SUMS_INTO_ROWS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce",
                  "scatter_reduce_", "index_reduce", "index_reduce_"}  # fmt: skip
# Functions of the CUDA and HIP runtimes in which the host waits for the device.
WAITS = tuple(
    f"{runtime}{name}"
    for runtime in ("cuda", "hip")
    for name in ("DeviceSynchronize", "StreamSynchronize", "EventSynchronize", "Memcpy", "Memcpy2D")
)
RANGE, CALL, BACKWARD = "moe::", "moe::call", "autograd::engine::evaluate_function"
REPEATS = 5


class _Ranges(TorchFunctionMode):
    """Put the range of its stage around each outermost torch function of a forward."""

    def __init__(self, gemms_in_total: int) -> None:
        super().__init__()
        self.gemms_in_total, self.gemms, self.inside = gemms_in_total, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in GEMMS:
            self.gemms += 1
        if self.inside or name == "__get__":  # reading an attribute computes nothing
            return func(*args, **(kwargs or {}))
        if name in GEMMS:
            stage = "expert_gemms"
        elif name in ACTIVATIONS:
            stage = "activation"
        elif name in SUMS_INTO_ROWS or self.gemms >= self.gemms_in_total:
            stage = "combine"
        else:
            stage = "dispatch"
        with self.stage(stage):
            return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.inside, before = True, self.inside
        try:
            with record_function(RANGE + name):
                yield
        finally:
            self.inside = before


@contextlib.contextmanager
def stage_ranges(gemms_in_total: int) -> Iterator[_Ranges]:
    """Set the ranges in the block, also around ``activate`` and ``combine_slots`` wherever imported."""
    ranges = _Ranges(gemms_in_total)

    def within(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with ranges.stage(stage):
                return function(*args, **kwargs)

        return ranged

    wrapped = {
        "activate": (functional.activate, within("activation", functional.activate)),
        "combine_slots": (functional.combine_slots, within("combine", functional.combine_slots)),
    }
    patched = []
    for module in list(sys.modules.values()):
        for name, (original, ranged) in wrapped.items():
            if getattr(module, "__dict__", {}).get(name) is original:
                patched.append((module, name, original))
                setattr(module, name, ranged)
    try:
        with ranges:
            yield ranges
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


@dataclass(frozen=True)
class Profile:
    """Times of one call, the mean of REPEATS, in ms.

    operators: a line for each (operator, stage, pass): calls, self_ms, total_ms.
    stages: forward_ms and backward_ms of each of STAGES, percent of the call, and its operators.
    device: one line, see ``device_use``; None on a CPU.
    """

    operators: pd.DataFrame
    stages: pd.DataFrame
    trace: bytes
    device: pd.DataFrame | None = None


def profile_call(
    implementation: Implementation, problem: Problem, mode: str, spec: RouterSpec | None = None
) -> Profile:
    """Profile one implementation on one problem, after a check of its result and warm-up.

    Raises:
        ValueError: the implementation does not declare what the problem or mode needs, raises, or is wrong.
    """
    gradients = mode == "forward_backward"
    reason = unsupported(implementation.support, problem)
    if gradients and not implementation.support.gradients:
        reason = "gradients not declared"
    if reason:
        raise ValueError(f"{implementation.name} does not support {problem.id}: {reason}")
    spec = spec or RouterSpec(top_k=problem.K)
    inputs = make_inputs(problem)
    try:
        results = calling.run(implementation.forward, inputs, problem.combine, gradients=gradients)
        compare.require_within(results, compare.make_reference(problem, inputs, gradients))
    except Exception as error:  # whatever a stranger's function raises is the answer to give
        raise ValueError(f"{implementation.name} is not profiled: {one_line(error)}") from error
    logits = torch.randn(problem.T, problem.E, device=problem.device)
    opaque = implementation.support.compiles_per_case

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        with contextlib.nullcontext() if opaque else stage_ranges(gemms):
            return implementation.forward(*args, **kwargs)

    def once() -> None:
        with record_function(CALL):
            with record_function(RANGE + "route"), torch.no_grad():
                route(logits, spec)
            call()

    gemms = 0
    if not opaque:
        with stage_ranges(gemms_in_total=sys.maxsize) as counting, torch.no_grad():
            implementation.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
        gemms = counting.gemms
    call = measure.call_of(forward, problem, inputs, mode)
    for _ in range(measure.WARM_UP_CALLS):
        once()
    cuda = problem.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with measure.recording(activities=activities) as recorded:
        for _ in range(REPEATS):
            once()
        if cuda:
            torch.cuda.synchronize(problem.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        trace = path.read_bytes()
    events = list(recorded.events() or ())
    operators, call_ms = _operators(events, cuda)
    return Profile(operators, _stages(operators, call_ms), trace, device_use(events) if cuda else None)


def device_use(events: Sequence[FunctionEvent]) -> pd.DataFrame:
    """Tell how a device was used by the calls of a record, as means of one call.

    launches: kernels, copies and fills. busy_ms: time in which any of them ran. gaps_ms: the rest of the time
    from the first to the last, in which the device waited for the host. host_waits: how often the host waited
    for the device, by ``WAITS``, while a call was made.
    """
    calls = [e.time_range for e in events if e.name == CALL and e.device_type == DeviceType.CPU]
    on_device = [e for e in events if e.device_type != DeviceType.CPU and not e.name.startswith(RANGE)]
    busy_us, end = 0.0, -math.inf
    for time in sorted((e.time_range for e in on_device), key=lambda time: time.start):
        busy_us += max(0.0, time.end - max(time.start, end))
        end = max(end, time.end)
    whole_us = end - min(e.time_range.start for e in on_device) if on_device else 0.0
    waits = [
        e for e in events
        if e.name in WAITS and any(call.start <= e.time_range.start <= call.end for call in calls)
    ]  # fmt: skip
    return pd.DataFrame(
        {
            "launches": [len(on_device) / len(calls)],
            "busy_ms": [busy_us / 1e3 / len(calls)],
            "gaps_ms": [(whole_us - busy_us) / 1e3 / len(calls)],
            "host_waits": [len(waits) / len(calls)],
        }
    )


def _operators(events: list[FunctionEvent], cuda: bool) -> tuple[pd.DataFrame, float]:
    """Sum self and total times a call by (operator, stage, pass), and the time of the whole call."""

    def ranges_above(event: FunctionEvent) -> Iterator[FunctionEvent]:
        above = event.cpu_parent
        while above is not None:
            yield above
            above = above.cpu_parent

    def stage_of_range(event: FunctionEvent) -> str | None:
        names = (e.name for e in ranges_above(event) if e.name.startswith(RANGE) and e.name != CALL)
        return next((name.removeprefix(RANGE) for name in names), None)

    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    on_host.sort(key=lambda e: e.time_range.start)
    # The operator that made a backward node is the last to carry its sequence number.
    made_by = {e.sequence_nr: stage for e in on_host if e.sequence_nr >= 0 and (stage := stage_of_range(e))}

    lines = []
    for event in on_host:
        if event.name.startswith(RANGE):
            continue
        node = next((e for e in (event, *ranges_above(event)) if e.name.startswith(BACKWARD)), None)
        if node is not None:
            stage, way = made_by.get(node.sequence_nr, "other"), "backward"
        else:
            stage, way = stage_of_range(event) or "other", "forward"
        if stage == "other" and event.name.removeprefix("aten::") in GEMMS:
            stage = "expert_gemms"
        own, total = (
            (event.self_device_time_total, event.device_time_total)
            if cuda
            else (event.self_cpu_time_total, event.cpu_time_total)
        )
        lines.append((event.name, stage, way, own / 1e3 / REPEATS, total / 1e3 / REPEATS))
    table = pd.DataFrame(lines, columns=["operator", "stage", "pass", "self_ms", "total_ms"])
    grouped = table.groupby(["operator", "stage", "pass"])
    table = grouped.agg(calls=("self_ms", "size"), self_ms=("self_ms", "sum"), total_ms=("total_ms", "sum"))
    table = table.assign(calls=table["calls"] / REPEATS).reset_index()
    table = table.sort_values("self_ms", ascending=False, ignore_index=True)
    call_ms = sum(e.cpu_time_total for e in on_host if e.name == CALL) / 1e3 / REPEATS
    return table, float(table["self_ms"].sum() if cuda else call_ms)


def _stages(operators: pd.DataFrame, call_ms: float) -> pd.DataFrame:
    lines = []
    for stage in STAGES:
        rows = operators[operators["stage"] == stage]
        spent = {
            way: float(rows.loc[rows["pass"] == way, "self_ms"].sum()) for way in ("forward", "backward")
        }
        names = rows.loc[rows["self_ms"] > 0, "operator"].drop_duplicates()
        lines.append(
            [stage, spent["forward"], spent["backward"], " ".join(n for n in names if "::engine" not in n)]
        )
    table = pd.DataFrame(lines, columns=["stage", "forward_ms", "backward_ms", "operators"])
    # What no operator accounts for; it is not split into forward and backward.
    table.loc[table["stage"] == "host", "forward_ms"] = max(0.0, call_ms - float(operators["self_ms"].sum()))
    percent = 100 * (table["forward_ms"] + table["backward_ms"]) / call_ms
    table.insert(3, "percent", percent)
    return table


def write(
    profiled: Profile, folder: Path, implementation: Implementation, problem: Problem, mode: str
) -> list[Path]:
    """Write stages.csv, operators.csv, trace.json and on CUDA device.csv into a folder named after the cell.

    Returns them.
    """
    p = problem
    sizes = f"T{p.T}-D{p.D}-H{p.H}-E{p.E}-K{p.K}-{p.load}-{dtype_name(p.dtype)}-{p.device}"
    place = folder / f"{slug(implementation.name)}-{p.name}-{slug(sizes)}-{slug(mode)}"
    tables = {
        "stages.csv": profiled.stages,
        "operators.csv": profiled.operators,
        "device.csv": profiled.device,
    }
    contents = {
        name: table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
        for name, table in tables.items()
        if table is not None
    }
    contents["trace.json"] = profiled.trace
    for name, content in contents.items():
        write_atomically(place / name, content)
    return [place / name for name in contents]
