"""Every expert on every token; the choice of experts is a mask on the result.

T * E expert rows are computed where T * K are needed, in two large matrix products without any indexing:
one GEMM against the hidden layers of all experts side by side, and one batched GEMM for their outputs.
Nothing depends on the values of the routing, so it compiles to one graph, and it is the fastest way where
K is close to E or where T is so small that all experts' weights are read anyway.

Memory: the hidden layer of all experts, [T, E, F]. Known from Shazeer et al. 2017 (arXiv:1701.06538) as
the computation that sparsity is meant to save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(second_order=True, autocast=True, fullgraph=True, exports=True, no_host_sync=True)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T, _ = x.shape
    E, O, _ = experts.w_out.shape

    visits = torch.zeros(T, E, dtype=torch.bool, device=x.device)
    visits = visits.scatter(1, routing.expert_ids, True)  # [T, E]

    # One product with the experts side by side: the gradient of x then sums over experts inside the GEMM.
    bias = None if experts.b_in is None else experts.b_in.flatten()
    h = F.linear(x, experts.w_in.flatten(0, 1), bias).unflatten(1, (E, -1))  # [T, E, F]
    # Pairs that the router did not choose must not overflow, or 0 * inf would reach their gradients.
    h = torch.where(visits.unsqueeze(-1), h, 0)
    a = activate(h, experts.activation, experts.clamp).transpose(0, 1)  # [E, T, H]
    outputs = torch.bmm(a, experts.w_out.mT)  # [E, T, O]
    if experts.b_out is not None:
        outputs = outputs + experts.b_out.unsqueeze(1)
    if experts.output_activation == "relu":
        outputs = F.relu(outputs)

    slots = routing.expert_ids.unsqueeze(-1).expand(-1, -1, O)  # [T, K, O]
    return combine_slots(outputs.transpose(0, 1).gather(1, slots), routing.gates, combine).to(x.dtype)
