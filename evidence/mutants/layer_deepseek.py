"""A right layer as DeepSeek-V3's: sigmoid scores, groups, a bias that selects, a scale, shared experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec

D, H, E, K, GROUPS, KEPT, SCALE = 12, 10, 8, 2, 4, 2, 2.5
HIDDEN = 6  # features of each of two shared experts


class Layer(nn.Module):
    """[..., D] to [..., D]."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(E, D))
        self.register_buffer("bias", torch.zeros(E))
        self.w_in = nn.Parameter(torch.randn(E, 2 * H, D))
        self.w_out = nn.Parameter(torch.randn(E, D, H))
        self.shared_in = nn.Parameter(torch.randn(2, 2 * HIDDEN, D))
        self.shared_out = nn.Parameter(torch.randn(2, D, HIDDEN))
        self.shared_gate = nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor) -> Tensor:
        """Route each token, add up its experts and the shared ones."""
        rows = x.reshape(-1, D)
        ids, gates = self.route(rows)
        y = self.routed(rows, ids, gates)
        for w_in, w_out, gate in zip(self.shared_in, self.shared_out, self.shared_gate, strict=True):
            weight = torch.sigmoid(rows.float() @ gate.float())
            y = y + weight.unsqueeze(1) * mlp(rows, w_in, w_out)
        return y.to(x.dtype).reshape(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts [T, K] and their gates for tokens x [T, D]."""
        logits = F.linear(x.float(), self.router.float())
        scores = logits.sigmoid()
        biased = scores.detach() + self.bias.float()
        members = biased.unflatten(1, (GROUPS, -1))  # [T, groups, E / groups]
        best = members.topk(2, dim=2).values.sum(dim=2)
        kept = best.topk(KEPT, dim=1).indices
        allowed = torch.zeros_like(best).scatter(1, kept, 1.0).bool()
        masked = members.masked_fill(~allowed.unsqueeze(2), -torch.inf)
        ids = masked.flatten(1).topk(K, dim=1).indices
        gates = scores.gather(1, ids)
        gates = gates / gates.sum(dim=1, keepdim=True)
        return ids, gates * SCALE

    def routed(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """Add up the experts of each token, in at least float32."""
        y = torch.zeros(x.shape, dtype=gates.dtype if x.dtype != torch.float64 else x.dtype)
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            f = mlp(x[token], self.w_in[e], self.w_out[e])
            y = y.index_add(0, token, (gates[token, slot, None] * f).to(y.dtype))
        return y


def mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Compute w_out (silu(gate) * up), with gate and up from w_in."""
    gate, up = F.linear(x, w_in).chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, w_out)


def read(layer: Layer) -> LayerWeights:
    """Say what the layer holds."""
    return LayerWeights(
        Experts(layer.w_in, None, layer.w_out, None, "swiglu"),
        RouterSpec(
            K,
            "sigmoid",
            renormalise=True,
            scale=SCALE,
            groups=GROUPS,
            keep_groups=KEPT,
            group_score="top2_sum",
        ),
        router_weight=layer.router,
        selection_bias=layer.bias,
        shared=Experts(layer.shared_in, None, layer.shared_out, None, "swiglu"),
        shared_gate=layer.shared_gate,
    )
