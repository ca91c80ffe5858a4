"""What a call takes of memory, and how much there is.

Exact, by the record of the allocator that tensors come from: CUDA's caching allocator, or on the CPU the
profiler's log of every allocation and release. Workspaces that a BLAS library takes by itself are not in it.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity

from benchmarks.timing.measure import Call, recording
from correctness.problems.problem import Problem
from moe_impls import kept_memory

Result = TypeVar("Result")

RESERVE_BYTES = 512 * 2**20  # left to the rest of the machine


def peak_memory_bytes(call: Call, device: str) -> int:
    """Measure the most that a call holds at once above what was held before it, its results included."""
    return _held(call, device)[0]


def saved_for_backward_bytes(forward: Callable[[], Tensor], device: str) -> int:
    """Measure what a forward leaves held, its result apart: activations that wait for the backward.

    Inputs and weights were there before and do not count; a storage that is saved twice counts once.
    """
    _, left, y = _held(forward, device)
    return max(0, left - y.untyped_storage().nbytes())


def _held(call: Callable[[], Result], device: str) -> tuple[int, int, Result]:
    """Run a call: the most bytes held at once above what was held before, those held after it, its result."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_stats(device)
        held = [after[f"requested_bytes.all.{which}"] - before for which in ("peak", "current")]
        return held[0], held[1], result
    kept_memory.release()  # or what an earlier call took would not be counted
    with recording(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = list(_allocations(record.profiler.kineto_results.experimental_event_tree()))
    taken: dict[int, int] = {}  # bytes by address
    held = peak = 0
    for _, address, n_bytes in sorted(events, key=lambda event: event[0]):
        if n_bytes > 0:
            taken[address] = n_bytes
            held += n_bytes
            peak = max(peak, held)
        else:  # of memory from before the record, of which the profiler may know from an earlier one: nothing
            held -= taken.pop(address, 0)
    return peak, held, result


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """The time in nanoseconds, address and bytes of each allocation, and of each release with bytes < 0."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def available_memory_bytes(device: str) -> int:
    """Find what can still be taken: free on the GPU, or in the machine or its control group on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available - RESERVE_BYTES)


def needed_memory_bytes(problem: Problem, mode: str) -> int:
    """Bytes that checking and timing any implementation takes at the least.

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
def memory_limit(device: str, more_bytes: float) -> Iterator[None]:
    """Let CPU allocations of more than ``more_bytes`` fail in the block, where the kernel would kill.

    Limits the address space of the process; CUDA reports exhaustion by itself and reserves addresses freely.
    """
    if device.startswith("cuda"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    soft = psutil.Process().memory_info().vms + int(more_bytes)
    if before[0] != resource.RLIM_INFINITY:
        soft = min(soft, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
