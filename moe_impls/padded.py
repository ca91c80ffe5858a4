"""Each expert's rows padded to those of the busiest one, and one batched matrix product for all experts.

E * C rows are computed, C the rows of the busiest expert: little more than T * K while the load is even, and
up to E times as many when one expert gets everything. The weights of all experts are read, with tokens or
without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(second_order=True, autocast=True)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T, K = routing.expert_ids.shape
    E, O, _ = experts.w_out.shape
    order, counts = sort_by_expert(routing.expert_ids, E)  # [T * K], [E]
    C = int(counts.max())
    rank = torch.arange(T * K, device=x.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    sorted_places = routing.expert_ids.flatten()[order] * C + rank  # [T * K], in [0, E * C)
    places = torch.empty_like(order).scatter_(0, order, sorted_places)  # of each slot

    # A token's K rows are a view of it, so that their gradients meet in one sum, in float32.
    rows = x.unsqueeze(1).expand(T, K, -1).flatten(0, 1)
    padded = rows.new_zeros(E * C, rows.shape[1]).index_copy(0, places, rows).unflatten(0, (E, C))
    h = torch.bmm(padded, experts.w_in.mT)  # [E, C, F]
    if experts.b_in is not None:
        h = h + experts.b_in.unsqueeze(1)
    outputs = torch.bmm(activate(h, experts.activation, experts.clamp), experts.w_out.mT)  # [E, C, O]
    if experts.b_out is not None:
        outputs = outputs + experts.b_out.unsqueeze(1)
    if experts.output_activation == "relu":
        outputs = F.relu(outputs)
    slots = outputs.flatten(0, 1)[places].view(T, K, O)
    return combine_slots(slots, routing.gates, combine).to(x.dtype)
