"""Each slot gathers its expert's weights, in one compiled graph that never stores what it gathers.

``torch.compile`` fuses the gather into the sums over features, so that the weights of a slot's expert are
read once and nothing else is. For few tokens on many experts that is all that has to be read; experts that
several tokens share are read for each of them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moe_impls.compiling import run_compiled
from moe_impls.functional import accumulation_dtype, activate, combine_slots
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(gradients=False, compiles_per_case=True)


def _graph(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    ids, dtype = routing.expert_ids, accumulation_dtype(x.dtype)

    def layer(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply rows [T, 1 or K, D] with weight [E, F, D]: [T, K, F]."""
        out = (weight[ids].to(dtype) * rows.unsqueeze(2)).sum(-1)
        return out if bias is None else out + bias[ids]

    a = activate(
        layer(x.to(dtype).unsqueeze(1), experts.w_in, experts.b_in), experts.activation, experts.clamp
    )
    outputs = layer(a, experts.w_out, experts.b_out)  # [T, K, O]
    if experts.output_activation == "relu":
        outputs = F.relu(outputs)
    return combine_slots(outputs, routing.gates, combine).to(x.dtype)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return run_compiled(_graph, x, routing, experts, combine=combine)
