"""A right distributed implementation with everything written out, so that one changed line makes it wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_impls.functional import combine_slots, expert_mlp
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(distributed=True)


def exchanged(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Send rows [sum(sent), N] to the ranks of a group, and return what comes from them."""
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.way = received, sent, group
        return exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return exchanged(grad, *ctx.way), None, None, None


def travel(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    moved: Any = Travel.apply(rows, sent, received, group)
    return moved


def computed(rows: Tensor, expert: Tensor, experts: Experts) -> Tensor:
    """Compute rows [N, D], each of the expert [N] of this rank's: [N, O]."""
    nothing = sum(t[:0].sum() for t in (rows, *experts.tensors.values()))  # keeps all in the graph
    outputs = rows.new_zeros(len(rows), experts.w_out.shape[1]) + nothing
    options = experts.activation, experts.output_activation, experts.clamp
    for e, weights in enumerate(experts.unbind()):
        own = (expert == e).nonzero()[:, 0]
        outputs = outputs.index_copy(0, own, expert_mlp(rows[own], *weights, *options))
    return outputs


def forward(
    x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum", mesh: Any, num_experts: int
) -> Tensor:
    """Compute this rank's x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    ids, gates = routing
    (T, K), ranks, group = ids.shape, mesh.size(), mesh.get_group()
    wide = torch.promote_types(x.dtype, torch.float32)
    held = -(-num_experts // ranks)  # experts of each rank but the last ones
    flat = ids.flatten()  # [T * K]
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=ranks * held).view(ranks, held)
    arriving = torch.empty_like(counts)  # by source and expert
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = counts.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()

    rows = x.to(wide)[order // K].to(x.dtype)  # [T * K, D]
    arrived = travel(rows, sent, received, group)  # [N, D]
    expert = torch.arange(held).repeat(ranks).repeat_interleave(arriving.flatten())  # [N]
    outputs = computed(arrived, expert, experts)  # [N, O]
    back = travel(outputs, received, sent, group)  # [T * K, O]
    slots = torch.zeros_like(back).index_copy(0, order, back).view(T, K, back.shape[1])
    return combine_slots(slots, gates, combine).to(x.dtype)
