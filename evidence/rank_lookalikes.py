"""Right distributed implementations that look different: none of them may be rejected by any check.

They differ in what is theirs to choose: which collectives they make, how often, in which order slots travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evidence.mutants.ranks import computed, travel
from moe_impls.functional import accumulation_dtype, combine_slots, expert_mlp
from moe_impls.interface import Experts, Routing, Support
from moe_impls.shards import chunk

SUPPORT = Support(distributed=True)


def last_slots_first(
    x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum", mesh: Any, num_experts: int
) -> Tensor:
    """Send slots by rank, but the last token first, with the number of the expert beside each row."""
    (ids, gates), ranks, group, wide = routing, mesh.size(), mesh.get_group(), accumulation_dtype(x.dtype)
    (T, K), held = ids.shape, -(-num_experts // ranks)
    backwards = torch.arange(T * K - 1, -1, -1)
    owner = ids.flatten()[backwards] // held
    order = backwards[owner.argsort(stable=True)]
    counts = owner.bincount(minlength=ranks)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = counts.tolist(), arriving.tolist()
    arrived_ids = travel(ids.flatten()[order].unsqueeze(1), sent, received, group)  # [N, 1]
    expert = arrived_ids.squeeze(1) - held * mesh.get_local_rank()
    arrived = travel(x.to(wide)[order // K].to(x.dtype), sent, received, group)
    back = travel(computed(arrived, expert, experts), received, sent, group)
    slots = torch.zeros_like(back).index_copy(0, order, back)
    return combine_slots(slots.view(T, K, back.shape[1]), gates, combine).to(x.dtype)


def an_exchange_for_each_expert(
    x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum", mesh: Any, num_experts: int
) -> Tensor:
    """Bring the rows of one expert after the other to its rank."""
    (ids, gates), ranks, group, wide = routing, mesh.size(), mesh.get_group(), accumulation_dtype(x.dtype)
    (T, K), O, rank = ids.shape, experts.w_out.shape[1], mesh.get_local_rank()
    options = experts.activation, experts.output_activation, experts.clamp
    rows_of_slots, slots = x.to(wide).repeat_interleave(K, dim=0).to(x.dtype), x.new_zeros(T * K, O)
    for owner in range(ranks):
        for e, expert in enumerate(chunk(num_experts, ranks, owner)):
            own = (ids.flatten() == expert).nonzero()[:, 0]
            counts = torch.zeros(ranks, dtype=torch.int64)
            counts[owner] = len(own)
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=group)
            rows = travel(rows_of_slots[own], counts.tolist(), arriving.tolist(), group)
            if rank == owner:
                out = expert_mlp(rows, *experts.unbind()[e], *options)
            else:
                out = rows.new_zeros(0, O) + sum(t[:0].sum() for t in (rows, *experts.tensors.values()))
            slots = slots.index_copy(0, own, travel(out, arriving.tolist(), counts.tolist(), group))
    return combine_slots(slots.view(T, K, O), gates, combine).to(x.dtype)


class _Gathered(torch.autograd.Function):
    """All ranks' rows, of which each may have another number; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Any, rank: int) -> Tensor:
        ctx.rest = sizes, group, rank
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sizes, group, rank = ctx.rest
        summed = grads[0].to(accumulation_dtype(grads[0].dtype)).contiguous()
        dist.all_reduce(summed, group=group)
        return summed.split(sizes)[rank].to(grads[0].dtype), None, None, None


class _Scattered(torch.autograd.Function):
    """The sum over ranks of this rank's rows; all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Any, rank: int) -> Tensor:
        ctx.rest = sizes, group, rank
        summed = rows.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed.split(sizes)[rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None, None]:
        return _Gathered.apply(grads[0], *ctx.rest), None, None, None


def gathered(
    x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum", mesh: Any, num_experts: int
) -> Tensor:
    """Gather all tokens on every rank, compute the own experts' share of each, and scatter the sums."""
    (ids, gates), ranks, group, rank = routing, mesh.size(), mesh.get_group(), mesh.get_local_rank()
    wide, (T, K), O = accumulation_dtype(x.dtype), ids.shape, experts.w_out.shape[1]
    counted = torch.zeros(ranks, dtype=torch.int64)
    dist.all_gather_into_tensor(counted, torch.tensor([T]), group=group)
    rest = counted.tolist(), group, rank
    everyone: Any = _Gathered.apply(x.to(wide), *rest)
    all_ids: Any = _Gathered.apply(ids, *rest)
    own = chunk(num_experts, ranks, rank)
    here = ((all_ids >= own.start) & (all_ids < own.stop)).flatten().nonzero()[:, 0]
    rows = everyone[here // K].to(x.dtype)
    outputs = computed(rows, all_ids.flatten()[here] - own.start, experts).to(wide)
    slots = outputs.new_zeros(all_ids.numel(), O).index_copy(0, here, outputs)
    home: Any = _Scattered.apply(slots, [K * size for size in rest[0]], group, rank)
    return combine_slots(home.view(T, K, O), gates, combine).to(x.dtype)
