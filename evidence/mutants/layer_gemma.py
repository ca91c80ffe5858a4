"""A right layer with a normed router and scaled experts (Gemma 4), and experts that return x (LongCat)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec

D, H, E, Z, K = 12, 10, 6, 2, 3
EPSILON = 1e-2  # large, so that it shows


class Layer(nn.Module):
    """[..., D] to [..., D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(D))
        self.router = nn.Parameter(torch.randn(E + Z, D))
        self.router_bias = nn.Parameter(torch.zeros(E + Z))
        self.scale = nn.Parameter(torch.ones(E))
        self.w_in = nn.Parameter(torch.randn(E, H, D))
        self.w_out = nn.Parameter(torch.randn(E, D, H))

    def forward(self, x: Tensor) -> Tensor:
        """Route each token by its norm, scale the gates, add up its experts."""
        rows = x.reshape(-1, D)
        wide = rows.float()
        root = (wide.square().mean(dim=1, keepdim=True) + EPSILON).sqrt()
        normed = wide / root * self.norm.float()
        logits = normed @ self.router.float().mT + self.router_bias.float()
        scores = logits.softmax(dim=1)
        gates, ids = scores.topk(K, dim=1)
        gates = gates / gates.sum(dim=1, keepdim=True)
        scale = torch.cat([self.scale.float(), torch.ones(Z)])
        gates = gates * scale[ids]
        y = torch.zeros(rows.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            f = F.linear(F.gelu(F.linear(rows[token], self.w_in[e])), self.w_out[e])
            y = y.index_add(0, token, (gates[token, slot, None] * f).to(y.dtype))
        identity = (gates * (ids >= E)).sum(dim=1, keepdim=True)
        y = y + identity * rows
        return y.to(x.dtype).reshape(x.shape)


def read(layer: Layer) -> LayerWeights:
    """Say what the layer holds."""
    return LayerWeights(
        Experts(layer.w_in, None, layer.w_out, None, "gelu"),
        RouterSpec(K, renormalise=True),
        router_weight=layer.router,
        router_bias=layer.router_bias,
        expert_scale=layer.scale,
        router_norm=layer.norm,
        router_norm_epsilon=EPSILON,
        identity_experts=Z,
    )
