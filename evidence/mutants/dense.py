"""Every expert on every token, in one graph without a branch on the routing, to be made wrong in a line.

Where the router did not choose stand zeros; the combine is an einsum. It passes the whole suite as it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.functional import activate
from moe_impls.interface import Experts, Routing, Support

# No shape depends on the routing.
SUPPORT = Support(autocast=True, second_order=True, fullgraph=True, exports=True, no_host_sync=True)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ids, E = routing.expert_ids, len(experts.w_in)
    chosen = F.one_hot(ids, E).any(dim=1)  # [T, E]
    gates = torch.zeros_like(chosen, dtype=wide).scatter(1, ids, routing.gates.to(wide))
    weights = experts.map(lambda w: w.to(wide))
    rows = torch.where(chosen.unsqueeze(2), x.to(wide).unsqueeze(1), 0)  # [T, E, D]
    h = torch.einsum("ted,efd->tef", rows, weights.w_in)  # [T, E, F]
    h = h if weights.b_in is None else h + weights.b_in
    out = torch.einsum(
        "teh,eoh->teo", activate(h, experts.activation, experts.clamp), weights.w_out
    )  # [T, E, O]
    out = out if weights.b_out is None else out + weights.b_out
    f = F.relu(out) if experts.output_activation == "relu" else out
    if combine == "sum":
        return torch.einsum("te,teo->to", gates, f).to(x.dtype)
    largest = f.detach().masked_fill((gates == 0).unsqueeze(2), -torch.inf).amax(dim=1)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    powers = (f - largest.unsqueeze(1)).clamp(max=80.0).exp()
    return (torch.einsum("te,teo->to", gates, powers).log() + largest).to(x.dtype)
