"""The only timer, the memory probe, and the limit that every time is set against.

Times are compared only with times taken in the same minute: all candidates of one problem run in rounds,
one after the other, in alternating order, and every raw sample is kept.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from correctness import compare
from correctness.problems import Inputs, Problem
from moe_impls.interface import Forward

Call = Callable[[], object]

MIN_ROUNDS = 7  # samples that a median and two quantiles are taken from, at the least
MAX_ROUNDS = 101
WARM_UP_CALLS = 2
# A sample is at least this long, or several calls are taken together: the clocks resolve well under a
# thousandth of it (perf_counter some 0.1 µs, CUDA events 0.5 µs).
MIN_SAMPLE_S = {"cpu": 1e-4, "cuda": 1e-3}
MEMORY_RESERVE_BYTES = 512 * 2**20  # left to the rest of the machine


class CallTimeout(BaseException):
    """A call took longer than it may. No ``Exception``, so that a measured function does not swallow it."""


@dataclass(frozen=True)
class Timing:
    """The samples of one candidate in seconds a call, one each round, and how many calls a sample spans."""

    samples_s: tuple[float, ...]
    calls_per_sample: int


def time_calls(call: Call, calls: int, device: str) -> float:
    """Seconds a call, over ``calls`` calls; on CUDA between two events, with no synchronisation inside."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def interleave(
    candidates: dict[str, Call],
    *,
    device: str = "cpu",
    seconds: float = 0.4,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    call_timeout_s: float | None = None,
) -> dict[str, Timing | BaseException]:
    """Time all candidates in rounds; the order of a round is reversed in the next.

    Args:
        candidates: functions without arguments, by name.
        device: where they compute; chooses the clock.
        seconds: time to spend on each candidate on average; the numbers of rounds bound it.
        min_rounds, max_rounds: samples taken of each candidate, at least and at most.
        call_timeout_s: what one call may take.

    Returns:
        For each name its timing, or the exception that its call raised; the others go on without it.
    """
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds is {min_rounds}, max_rounds {max_rounds}; valid are 1 <= min <= max")
    failures: dict[str, BaseException] = {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str, calls: int) -> float:
        try:
            with time_limit(None if call_timeout_s is None else call_timeout_s * calls):
                return time_calls(candidates[name], calls, device)
        except (Exception, CallTimeout) as error:
            failures[name] = error
            return 0.0

    call_s = {name: min(sample(name, 1) for _ in range(WARM_UP_CALLS)) for name in candidates}
    min_sample_s = MIN_SAMPLE_S["cuda" if device.startswith("cuda") else "cpu"]
    calls = {name: max(1, round(min_sample_s / max(s, 1e-8) + 0.5)) for name, s in call_s.items()}
    calls = {name: 1 if call_s[name] >= min_sample_s else n for name, n in calls.items()}
    round_s = sum(call_s[name] * calls[name] for name in candidates if name not in failures)
    rounds = int(seconds * len(candidates) / max(round_s, 1e-9))
    rounds = min(max(rounds, min_rounds), max_rounds)

    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for name in list(candidates) if number % 2 == 0 else reversed(candidates):
                if name not in failures:
                    samples[name].append(sample(name, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: failures.get(name) or Timing(tuple(samples[name]), calls[name]) for name in candidates}


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CallTimeout in the block once ``seconds`` have passed, as soon as control is back in Python.

    Works in the main thread only, where the interpreter handles signals; None sets no limit.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit can only be set in the main thread")

    def stop(signum: int, frame: object) -> None:
        raise CallTimeout(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call_of(forward: Forward, problem: Problem, inputs: Inputs, mode: str) -> Call:
    """The call that is timed: y [T, O] alone, or y and the gradients of x, the gates and every weight."""
    gradients = mode == "forward_backward"
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in inputs.tensors.items()}
    x, routing, experts = compare.assemble(inputs, leaves)

    def forward_only() -> Tensor:
        with torch.no_grad():
            return forward(x, routing, experts, combine=problem.combine)

    def forward_backward() -> tuple[Tensor, ...]:
        y = forward(x, routing, experts, combine=problem.combine)
        return torch.autograd.grad(y, list(leaves.values()), inputs.dy)

    return forward_backward if gradients else forward_only


def dense_products(problem: Problem, mode: str) -> Call:
    """The limit: two dense matrix products on T * K rows, the same FLOPs and dtype, and one expert's weights.

    With the backward, each product is followed by those of its two gradients. Nothing is routed, activated
    or combined, and only one expert's weights are read: what remains is the arithmetic.
    """
    p = problem
    generator = torch.Generator(p.device).manual_seed(p.seed)

    def operands(inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (p.T * p.K, inner),
            (outer, inner),
            (p.T * p.K, outer),
        )  # rows, weight, gradient of the result
        a, w, dy = (torch.randn(s, generator=generator, device=p.device, dtype=torch.float32) for s in shapes)
        return a.to(p.dtype), w.to(p.dtype), dy.to(p.dtype)

    pairs = (operands(p.D, p.F), operands(p.H, p.O))

    def products() -> None:
        for a, w, dy in pairs:
            F.linear(a, w)
            if mode == "forward_backward":
                torch.mm(dy, w)
                torch.mm(dy.mT, a)

    return products


def peak_memory_bytes(call: Call, device: str) -> int:
    """The most memory that a call holds at once above what was held before it, its results included.

    Exact, by the record of the allocator that tensors come from: CUDA's caching allocator, or on the CPU the
    profiler's log of every allocation and release. Workspaces that a BLAS library takes by itself are not in
    it.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # of memory events
        peak = max(peak, held)
    return peak


def available_memory_bytes(device: str) -> int:
    """Memory that can still be taken: free on the GPU, or of the machine or its control group on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available - MEMORY_RESERVE_BYTES)


def needed_memory_bytes(problem: Problem, mode: str) -> int:
    """What checking and timing any implementation takes at the least.

    The inputs, a second set of them for the check after the timing (which replaces the first), and with the
    backward a gradient for each. What an implementation holds beyond that is not foreseen here.
    """
    p = problem
    weights = p.E * (p.F * p.D + p.O * p.H + (p.F + p.O if p.bias else 0))
    tokens = p.T * (p.D + 2 * p.O) + 3 * p.T * p.K
    widest = 4 * p.E * p.F * p.D if p.dtype.itemsize < 4 else 0  # drawn in float32, then rounded
    sets = 3 if mode == "forward_backward" else 2
    return p.dtype.itemsize * (weights + tokens) * sets + widest


@contextlib.contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """Let CPU allocations beyond the available memory fail in the block, where the kernel would kill.

    Limits the address space of the process; CUDA reports exhaustion by itself and reserves addresses freely.
    """
    if device.startswith("cuda"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    soft = psutil.Process().memory_info().vms + available_memory_bytes(device)
    if before[0] != resource.RLIM_INFINITY:
        soft = min(soft, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
