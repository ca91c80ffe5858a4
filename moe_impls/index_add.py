"""For each expert: gather its tokens, run it, and add the weighted result to their rows with ``index_add_``.

The loop that most model code starts from (the ``eager`` experts of transformers are of this kind). It keeps
no permutation, adds in float32, and asks the host once per expert which tokens visit it. The backward of each
gather is a full [T, D] tensor, so its traffic grows with E * T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_impls.functional import accumulation_dtype, expert_mlp
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(second_order=True, autocast=True)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T = x.shape[0]
    O = experts.w_out.shape[1]
    dtype = accumulation_dtype(x.dtype)
    gates = routing.gates.to(dtype)
    wide = x.to(dtype)  # gathered from, so that the gradients of a token's K visits meet in float32

    visits: list[tuple[Tensor, Tensor, Tensor]] = []  # per expert: tokens [N], gates [N, 1], outputs [N, O]
    for expert, weights in enumerate(experts.unbind()):
        tokens, slots = torch.where(routing.expert_ids == expert)
        if len(tokens) == 0 and T > 0:  # without tokens every expert runs on no rows: gradients are zeros
            continue
        rows = wide[tokens].to(x.dtype)
        out = expert_mlp(rows, *weights, experts.activation, experts.output_activation, experts.clamp)
        visits.append((tokens, gates[tokens, slots].unsqueeze(-1), out.to(dtype)))

    y = torch.zeros(T, O, dtype=dtype, device=x.device)
    if combine == "sum":
        for tokens, gate, out in visits:
            y.index_add_(0, tokens, gate * out)
        return y.to(x.dtype)

    # log Σ g exp(f) = m + log Σ g exp(f - m), m the largest output of the token's experts with a gate > 0
    largest = torch.full_like(y, -torch.inf)
    for tokens, gate, out in visits:
        largest[tokens] = largest[tokens].maximum(out.detach().masked_fill(gate == 0, -torch.inf))
    largest = largest.masked_fill(largest == -torch.inf, 0)
    for tokens, gate, out in visits:
        # Only an expert with gate zero can exceed `largest`; the clamp keeps its exp finite.
        y.index_add_(0, tokens, gate * (out - largest[tokens]).clamp(max=80.0).exp())
    return (largest + y.log()).to(x.dtype)
