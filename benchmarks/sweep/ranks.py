"""What one rank measures of a distributed implementation on one problem, and what a row of it holds."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.timing.memory import peak_memory_bytes
from benchmarks.timing.traffic import Collective, recorded
from correctness.judging.calling import run
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs
from correctness.ranks.problems import Spread
from moe_impls.functional import accumulation_dtype
from moe_impls.interface import Routing
from moe_impls.registry import resolve
from moe_impls.shards import chunk_size

INNER = "sorted_dispatch"  # the local computation that steps are compared with
RECORDED = 3  # steps


@dataclass(frozen=True)
class Cell:
    """One implementation on one problem in one mode, of a number of ranks."""

    name: str
    spread: Spread
    mode: str  # forward | forward_backward
    seed: int = 0  # added to the problem's


class Measured(NamedTuple):
    """What a rank found. first, again: results before and after the timing, of another seed each."""

    first: dict[str, Tensor]
    again: dict[str, Tensor]
    collectives: list[Collective]  # of one step, with the mean time of RECORDED ones
    recorded_s: float  # of one step while it is recorded
    step_s: float
    local_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One rank's part of one cell: a line of the CSV."""

    time_utc: str
    git_commit: str
    torch_version: str
    device_name: str
    backend: str
    implementation: str
    ranks: int
    rank: int
    T: int
    tokens: int
    D: int
    H: int
    O: int
    E: int
    K: int
    activation: str
    dtype: str
    load: str
    mode: str
    status: str
    collectives: int | None = None
    row_bytes: int | None = None
    other_bytes: int | None = None
    minimum_bytes: int | None = None
    merged_minimum_bytes: int | None = None
    over_minimum: float | None = None
    over_merged_minimum: float | None = None
    step_s: float | None = None
    recorded_s: float | None = None
    collectives_s: float | None = None
    wait_s: float | None = None
    local_s: float | None = None
    over_local: float | None = None
    peak_bytes: int | None = None


def measure(cell: Cell, mesh: Any, seconds: float) -> Measured:
    """Check, time and record a cell, in step with the other ranks of the mesh."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    first, again = (_step(cell, mesh, seed) for seed in (0, 1))
    results = first()
    times = _timed(first, mesh, seconds)
    passes, lasted = [], []
    for _ in range(RECORDED):
        dist.barrier(group=mesh.get_group())
        begin = time.perf_counter()
        with recorded(rank, ranks) as found:
            first()
        lasted.append(time.perf_counter() - begin)
        passes.append(found)
    lasting = [statistics.fmean(c.seconds for c in same) for same in zip(*passes, strict=False)]
    collectives = [c._replace(seconds=s) for c, s in zip(passes[0], lasting, strict=False)]
    local = _timed(_local(cell, rank), mesh, seconds)
    peak = peak_memory_bytes(first, "cpu")
    return Measured(results, again(), collectives, statistics.fmean(lasted), times, local, peak)


def inputs_of(cell: Cell, seed: int) -> Inputs:
    """Make the inputs of all ranks."""
    return make_inputs(problem_of(cell, seed))


def problem_of(cell: Cell, seed: int) -> Any:
    """Return the problem of a cell with another seed."""
    return replace(cell.spread.problem, seed=cell.spread.problem.seed + seed)


def _step(cell: Cell, mesh: Any, seed: int) -> Callable[[], dict[str, Tensor]]:
    inputs = cell.spread.part(inputs_of(cell, seed), mesh.get_local_rank())
    forward = resolve(cell.name, distributed=True).forward
    forward = functools.partial(forward, mesh=mesh, num_experts=cell.spread.problem.E)
    combine, backward = cell.spread.problem.combine, cell.mode == "forward_backward"
    return lambda: run(forward, inputs, combine, gradients=backward)


def _local(cell: Cell, rank: int) -> Callable[[], dict[str, Tensor]]:
    """Compute the rows that reach a rank, as if they had been there."""
    spread, whole = cell.spread, inputs_of(cell, 0)
    ids = whole.routing.expert_ids
    held = chunk_size(spread.problem.E, spread.ranks)
    token, slot = (ids // held == rank).nonzero(as_tuple=True)
    gates = whole.routing.gates.new_ones(len(token), 1)
    own = Routing(ids[token, slot].unsqueeze(1) - rank * held, gates)
    experts = spread.part(whole, rank).experts
    rows = Inputs(whole.x[token], own, experts, whole.dy[token])
    if len(experts.w_in) == 0:
        return dict
    forward, backward = resolve(INNER).forward, cell.mode == "forward_backward"
    return lambda: run(forward, rows, "sum", gradients=backward)


def _timed(call: Callable[[], object], mesh: Any, seconds: float) -> float:
    """Return the median time of a call that all ranks begin together; all make as many."""
    samples: list[float] = []
    rounds = torch.tensor(3)
    while len(samples) < rounds:
        dist.barrier(group=mesh.get_group())
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
        if len(samples) == 1:
            rounds = torch.tensor(min(200, max(5, math.ceil(seconds / max(samples[0], 1e-5)))))
            dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=mesh.get_group())
    return statistics.median(samples[1:])


def minimum_bytes(cell: Cell, rank: int) -> tuple[int, int]:
    """Count the bytes of rows that a rank has to send: one for each slot, or one for each rank of a token.

    x out and y back, in the dtype of x; with a backward the gradients of both on the same ways. Rows for
    ranks are summed there, and so the gate of each slot goes out in at least float32, and its gradient back.
    """
    spread, p = cell.spread, cell.spread.problem
    ids = inputs_of(cell, 0).routing.expert_ids
    owner = ids // chunk_size(p.E, spread.ranks)  # [T, K]
    home = torch.repeat_interleave(torch.arange(spread.ranks), torch.tensor(spread.sizes)).unsqueeze(1)
    visits = torch.zeros(p.T, spread.ranks, dtype=torch.int64).scatter_add(1, owner, torch.ones_like(owner))

    def away(rows: Tensor) -> tuple[int, int]:  # [T, ranks]
        """Count what the rank sends to others, and what they send to it."""
        elsewhere = rows * (home != torch.arange(spread.ranks))
        return int(elsewhere[home[:, 0] == rank].sum()), int(elsewhere[:, rank].sum())

    def n_bytes(out: int, back: int) -> int:
        values = out * p.D + back * p.O
        if cell.mode == "forward_backward":
            values += out * p.O + back * p.D
        return values * p.dtype.itemsize

    slots, rows = away(visits), away((visits > 0).long())
    gates = slots[0] + (slots[1] if cell.mode == "forward_backward" else 0)
    return n_bytes(*slots), n_bytes(*rows) + gates * accumulation_dtype(p.dtype).itemsize
