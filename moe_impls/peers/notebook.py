"""The experts of the notebook that this project started from, with its dispatcher and its combine.

Fixed only where it cannot run: the expert loop takes stacked weights in place of one module each. What
else was wrong stays (``docs/notebook.md``): an expert whose gate is 0 is not visited, sums are taken in
log space without a shift, a token without experts is the log of a float64 epsilon, and everything is
summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_impls.functional import expert_mlp
from moe_impls.interface import Experts, Routing, Support


def log_space(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "logsumexp") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    gates = torch.zeros(len(x), len(experts.w_in), dtype=routing.gates.dtype, device=x.device)
    gates = gates.scatter(1, routing.expert_ids, routing.gates)
    expert, token = gates.t().nonzero(as_tuple=True)
    sizes = (gates > 0).sum(0).tolist()
    parts = x[token].split(sizes)
    outputs = [
        expert_mlp(part, *weights, experts.activation, experts.output_activation, experts.clamp)
        for part, weights in zip(parts, experts.unbind(), strict=True)
    ]
    rows = torch.cat(outputs).exp() * gates[token, expert].unsqueeze(1)
    total = torch.zeros(len(x), rows.shape[1], device=x.device).index_add(0, token, rows.float())
    total[total == 0] = torch.finfo(torch.float64).eps
    return total.log()


BACKENDS = {"log_space": (log_space, Support(combines=("logsumexp",)))}
