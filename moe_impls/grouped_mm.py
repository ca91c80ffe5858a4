"""Sort the slots by expert; one ``torch.nn.functional.grouped_mm`` computes a layer of all experts.

The host need not know how many tokens an expert has: the product takes the ends of the groups as a tensor.
Its operands must be aligned to 16 bytes; sizes that are not are padded with zeros, which copies the weights.
The backward is written out here, since that of ``grouped_mm`` leaves the weight gradients of experts without
tokens unwritten on some devices (pytorch/pytorch#172439).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Routing, Support

# Not declared: autocast, which does not know the product, and compilation, since the product's meta function
# in torch 2.13 refuses all dtypes but bfloat16; no_host_sync, since where torch has no kernel for a dtype or
# a GPU, the product loops over the groups on the host.
SUPPORT = Support(dtypes=(torch.float32, torch.bfloat16, torch.float16))


def _padded(t: Tensor) -> Tensor:
    """Pad rows of the last dimension to begin at multiples of 16 bytes, as the product needs them."""
    missing = -t.shape[-1] % (16 // t.element_size())
    t = F.pad(t, (0, missing)) if missing else t.contiguous()
    return t.view(-1).view(
        t.shape
    )  # of a dimension of size 1 the stride may be anything, but not to the kernel


def _products(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows [N, D] sorted by expert, weight [E, F, D], ends of the groups [E]: [N, F]."""
    if len(rows) == 0:
        return rows.new_zeros(0, weight.shape[1])
    return F.grouped_mm(_padded(rows), _padded(weight).mT, offs=ends)


class _GroupedLinear(torch.autograd.Function):
    """y[n] = weight[e] @ rows[n] + bias[e] for the rows n of each expert e."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, experts: Tensor) -> Tensor:
        y = _products(rows, weight, counts.cumsum(0, dtype=torch.int32))
        return y if bias is None else y + bias[experts]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        rows, weight, bias, counts, _ = inputs
        ctx.save_for_backward(rows, weight, counts)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, counts = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        ends = counts.cumsum(0, dtype=torch.int32)
        d_rows = d_weight = d_bias = None
        if wants_rows:
            d_rows = _products(dy, weight.mT, ends)
        if wants_weight:
            d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            if len(rows):
                E, F_, D = weight.shape
                # [F, N] and [N, D] in groups of N -> [E, F, D]
                product = F.grouped_mm(_padded(dy).mT, _padded(rows), offs=ends)[:, :F_, :D]
                d_weight = torch.where((counts > 0)[:, None, None], product, d_weight)
        if wants_bias:
            sums = torch.segment_reduce(dy.float(), "sum", lengths=counts, axis=0, unsafe=True)
            d_bias = sums.to(ctx.bias_dtype)
        return d_rows, d_weight, d_bias, None, None


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T, K = routing.expert_ids.shape
    E, O, _ = experts.w_out.shape
    order, counts = sort_by_expert(routing.expert_ids, E)  # [T * K], [E]
    sorted_ids = routing.expert_ids.flatten()[order]  # [T * K]

    # An expanded view, so that a token's K gradients are summed in one reduction that accumulates in float32.
    rows = x.unsqueeze(1).expand(T, K, -1)[order // K, order % K]  # [T * K, D]
    h = _GroupedLinear.apply(rows, experts.w_in, experts.b_in, counts, sorted_ids)
    a = activate(h, experts.activation, experts.clamp)
    out = _GroupedLinear.apply(a, experts.w_out, experts.b_out, counts, sorted_ids)  # [T * K, O]
    if experts.output_activation == "relu":
        out = F.relu(out)

    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return combine_slots(out[inverse].view(T, K, O), routing.gates, combine).to(x.dtype)
