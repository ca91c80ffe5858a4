"""Sort the slots by expert, give each expert one contiguous slice, and put the results back.

The idea of the SparseDispatcher of tensor2tensor's ``expert_utils``: T * K rows are computed, none twice.
The sizes of the slices are read by the host, once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import combine_slots, expert_mlp
from moe_impls.interface import Experts, Routing, Support
from moe_impls.operators import operator

SUPPORT = Support(second_order=True, autocast=True, fullgraph=True, exports=True)


@operator(SUPPORT)
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T, K = routing.expert_ids.shape
    E, O, _ = experts.w_out.shape
    order, counts = sort_by_expert(routing.expert_ids, E)  # [T * K], [E]

    # Each slot reads its own row of an expanded view, so that the backward sums a token's K gradients in
    # one reduction, which accumulates in float32, and not one by one in the dtype of x.
    rows = x.unsqueeze(1).expand(T, K, -1)[order // K, order % K]  # [T * K, D]

    outputs, options = [], (experts.activation, experts.output_activation, experts.clamp)
    for part, weights in zip(rows.split(counts.tolist()), experts.unbind(), strict=True):
        if len(part) or T == 0:  # without tokens every expert runs on no rows, so that gradients are zeros
            outputs.append(expert_mlp(part, *weights, *options))
    sorted_outputs = torch.cat(outputs)  # [T * K, O]

    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return combine_slots(sorted_outputs[inverse].view(T, K, O), routing.gates, combine).to(x.dtype)
