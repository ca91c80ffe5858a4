"""What the collectives of a rank send to others, and how long it is in them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch._C._distributed_c10d as c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that a rank sends of those it gives a collective, where every rank gives as many, by ranks W.
SHARES = {
    "allgather": lambda ranks: ranks - 1,
    "allreduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "alltoall": lambda ranks: (ranks - 1) / ranks,
}


class Collective(NamedTuple):
    """One collective as a rank sees it.

    sent: bytes to others, without those that stay. rows: whether they are floating, and not counts or ids.
    """

    name: str
    sent: float
    rows: bool
    seconds: float


class _Recorder(TorchDispatchMode):
    def __init__(self, found: list[Collective], rank: int, ranks: int) -> None:
        super().__init__()
        self.found, self.rank, self.ranks = found, rank, ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and not name.startswith(("barrier", "monitored_barrier")):
            given = _given(name, args)
            sent = self._sent(name, given, args)
            floating = any(t.is_floating_point() for t in given)
            self.found.append(Collective(name, sent, floating, time.perf_counter() - begin))
        return result

    def _sent(self, name: str, given: list[Tensor], args: Any) -> float:
        n_bytes = sum(t.numel() * t.element_size() for t in given)
        if name.startswith("alltoall_base") and args[4]:
            rows = sum(args[4])
            return n_bytes * (rows - args[4][self.rank]) / rows if rows else 0.0
        share = next((share for kind, share in SHARES.items() if kind in name), None)
        return math.nan if share is None else n_bytes * share(self.ranks)


def _given(name: str, args: Any) -> list[Tensor]:
    """Return what a collective sends: its input, the last tensor or list of tensors among its arguments."""
    groups = [a for a in args if isinstance(a, Tensor) or (isinstance(a, list) and a and _has_tensors(a))]
    last = groups[-1]
    return [last] if isinstance(last, Tensor) else _flat(last)


def _has_tensors(values: list[Any]) -> bool:
    return all(isinstance(t, Tensor) for t in _flat(values))


def _flat(values: list[Any]) -> list[Any]:
    return [t for value in values for t in (_flat(value) if isinstance(value, list) else [value])]


@contextlib.contextmanager
def recorded(rank: int, ranks: int) -> Iterator[list[Collective]]:
    """Record the collectives of the block, with the time that it waits for their ends."""
    found: list[Collective] = []
    wait = c10d.Work.wait

    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return wait(*arguments, **options)
        finally:
            if found:
                found[-1] = found[-1]._replace(seconds=found[-1].seconds + time.perf_counter() - begin)

    c10d.Work.wait = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _Recorder(found, rank, ranks):
            yield found
    finally:
        c10d.Work.wait = wait  # pyright: ignore[reportAttributeAccessIssue]


def waits(by_rank: list[list[Collective]]) -> list[float]:
    """Return the seconds that each rank waits for others in equal collectives: beyond the last to come."""
    if len({len(found) for found in by_rank}) > 1:
        return [math.nan] * len(by_rank)
    seconds = [[c.seconds for c in found] for found in by_rank]
    least = [min(of_ranks) for of_ranks in zip(*seconds, strict=True)]
    return [sum(c.seconds - first for c, first in zip(found, least, strict=True)) for found in by_rank]
