"""The limit that every time is set against: what the machine could do at best, measured in the same minute.

Two limits of one call, of which the larger counts:

    compute  two dense matrix products of the call's T·K rows with one expert's weights, in the same dtype,
             or in float32 on a CPU without instructions for that, each with the products of its two gradients
             if there is a backward: the same FLOPs and shapes, nothing routed, activated or combined
    traffic  every byte that this routing needs, once: tokens, ids, gates and the weights of the experts that
             received a token are read; results are written, with a backward the gradients of all experts

A rate is that of the fastest sample, so that the limit is what the machine can do and not what else it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing.measure import Call, all_timed, interleave
from benchmarks.workloads import flops
from correctness.problems.problem import Problem
from moe_impls.interface import Routing
from moe_impls.processor import multiplies

# An efficiency above this is a fault of the model: something is counted that need not be done.
FAULT = 1.05
SQUARE = {"cpu": 1024, "cuda": 8192}  # side of the large square product
BUFFER_BYTES = (4 * 2**20, 256 * 2**20)  # least and most that the bandwidths are measured on
SECONDS, ROUNDS = 0.05, 7  # for each rate; how many samples at the least
SAME_MINUTE_S = 60.0
GIGA, TERA = 1e9, 1e12

_squares: dict[tuple[object, ...], tuple[float, float]] = {}  # when measured, and the rate


@dataclass(frozen=True)
class Roofline:
    """Rates of the machine, what a call needs, and the limits in ms that follow."""

    gemm_square_tflop_per_s: float
    gemm_experts_tflop_per_s: float
    read_gb_per_s: float
    copy_gb_per_s: float
    touched_experts: int
    read_bytes: int
    written_bytes: int
    compute_limit_ms: float
    traffic_limit_ms: float

    @property
    def limit_ms(self) -> float:
        return max(self.compute_limit_ms, self.traffic_limit_ms)


def touched_experts(routing: Routing) -> int:
    """Count the experts that receive a token."""
    return int(routing.expert_ids.unique().numel())


def traffic_bytes(problem: Problem, mode: str, touched: int) -> tuple[int, int]:
    """Bytes that one call has to read and to write at the least."""
    p, size = problem, problem.dtype.itemsize
    expert = (p.F * p.D + p.O * p.H + (p.F + p.O if p.bias else 0)) * size
    gates = p.T * p.K * (size if p.low_gates else max(size, 4))
    read = p.T * p.D * size + p.T * p.K * 8 + gates + touched * expert
    written = p.T * p.O * size
    if mode == "forward_backward":
        read += p.T * p.O * size
        written += p.T * p.D * size + gates + p.E * expert
    return read, written


def measure_roofline(
    problem: Problem, mode: str, routing: Routing, flush: Callable[[], object] | None = None
) -> Roofline:
    """Measure the rates that hold for this problem and work out its limits.

    ``flush`` empties the caches before each sample of a bandwidth; without it they are warm.
    """
    touched = touched_experts(routing)
    read, written = traffic_bytes(problem, mode, touched)
    buffer_bytes = min(max(read, BUFFER_BYTES[0]), BUFFER_BYTES[1])
    probes = {"products": dense_products(problem, mode), **bandwidth_probes(problem.device, buffer_bytes)}
    before: dict[str, Call] = dict.fromkeys(["read", "copy"], flush) if flush else {}
    best_s = _fastest(probes, problem.device, before)
    operations = flops(problem, mode)
    read_rate, copy_rate = (buffer_bytes / best_s[name] for name in ("read", "copy"))
    return Roofline(
        gemm_square_tflop_per_s=square_rate(multiplied_in(problem), problem.device) / TERA,
        gemm_experts_tflop_per_s=operations / best_s["products"] / TERA,
        read_gb_per_s=read_rate / GIGA,
        copy_gb_per_s=copy_rate / GIGA,
        touched_experts=touched,
        read_bytes=read,
        written_bytes=written,
        compute_limit_ms=best_s["products"] * 1e3,
        traffic_limit_ms=(read / read_rate + written / copy_rate) * 1e3,
    )


def multiplied_in(problem: Problem) -> torch.dtype:
    """Name the dtype of the fastest products of this problem's numbers: wider ones convert what they read."""
    is_slow = torch.device(problem.device).type == "cpu" and not multiplies(problem.dtype)
    return torch.float32 if is_slow else problem.dtype


def dense_products(problem: Problem, mode: str) -> Call:
    """The products of the compute limit: ``flops(problem, mode)`` operations."""
    p, dtype = problem, multiplied_in(problem)
    generator = torch.Generator(p.device).manual_seed(p.seed)

    def operands(inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (p.T * p.K, inner),
            (outer, inner),
            (p.T * p.K, outer),
        )  # rows, weight, gradient of the result
        a, w, dy = (torch.randn(s, generator=generator, device=p.device, dtype=torch.float32) for s in shapes)
        return a.to(dtype), w.to(dtype), dy.to(dtype)

    pairs = (operands(p.D, p.F), operands(p.H, p.O))

    def products() -> None:
        for a, w, dy in pairs:
            F.linear(a, w)
            if mode == "forward_backward":
                torch.mm(dy, w)
                torch.mm(dy.mT, a)

    return products


def bandwidth_probes(device: str, buffer_bytes: int) -> dict[str, Call]:
    """Calls that move ``buffer_bytes``: read all of them, or read one half and write it to the other."""
    source = torch.ones(buffer_bytes // 4, device=device)
    half, target = source[: len(source) // 2], source[len(source) // 2 : len(source) // 2 * 2]
    return {"read": lambda: source.sum(), "copy": lambda: target.copy_(half)}


def bandwidths(device: str, buffer_bytes: int) -> dict[str, float]:
    """Bytes a second of the bandwidth probes."""
    best_s = _fastest(bandwidth_probes(device, buffer_bytes), device, {})
    return {name: buffer_bytes / seconds for name, seconds in best_s.items()}


def square_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large square product, from at most a minute ago."""
    key = (dtype, device, torch.get_num_threads())
    measured, rate = _squares.get(key, (-SAME_MINUTE_S, 0.0))
    if time.monotonic() - measured >= SAME_MINUTE_S:
        side = SQUARE["cuda" if device.startswith("cuda") else "cpu"]
        a = torch.randn(side, side, device=device).to(dtype)  # a GPU multiplies constants faster
        rate = 2 * side**3 / _fastest({"square": lambda: a @ a}, device, {})["square"]
        _squares[key] = time.monotonic(), rate
    return rate


def _fastest(probes: dict[str, Call], device: str, before: dict[str, Call]) -> dict[str, float]:
    outcomes = interleave(probes, device=device, seconds=SECONDS, min_rounds=ROUNDS, before=before)
    return {name: min(timing.samples_s) for name, timing in all_timed(outcomes).items()}
