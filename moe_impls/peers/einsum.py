"""One-hot dispatch and combine tensors and einsums, as in Mesh TensorFlow's layers and their PyTorch ports.

The formulation of GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1): a tensor [T, E, C] says
which token is which row of which expert, C the rows that an expert has room for. Here C is the load of
the busiest expert, so that no token is dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.functional import activate
from moe_impls.interface import Experts, Routing, Support


def capacity(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    chosen = F.one_hot(routing.expert_ids, len(experts.w_in)).sum(1)  # [T, E], of 0 and 1
    place = chosen.cumsum(0) * chosen - 1  # [T, E], the row at its expert; -1 for the others
    C = int(place.max()) + 1 if len(x) else 0
    dispatch = F.one_hot(place.clamp(min=0), max(C, 1))[..., :C] * chosen.unsqueeze(-1)  # [T, E, C]
    gates = torch.zeros(chosen.shape, dtype=routing.gates.dtype, device=x.device)
    gates = gates.scatter(1, routing.expert_ids, routing.gates)
    dispatch = dispatch.to(x.dtype)

    rows = torch.einsum("tec,td->ecd", dispatch, x)
    h = torch.einsum("ecd,efd->ecf", rows, experts.w_in)
    if experts.b_in is not None:
        h = h + experts.b_in.unsqueeze(1)
    out = torch.einsum("ech,eoh->eco", activate(h, experts.activation, experts.clamp), experts.w_out)
    if experts.b_out is not None:
        out = out + experts.b_out.unsqueeze(1)
    if experts.output_activation == "relu":
        out = F.relu(out)
    return torch.einsum("tec,eco->to", dispatch * gates.to(x.dtype).unsqueeze(-1), out)


BACKENDS = {"capacity": (capacity, Support(combines=("sum",)))}
