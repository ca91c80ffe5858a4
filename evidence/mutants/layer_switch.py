"""A right layer whose experts take so many tokens and drop the others (Switch, GShard); it reports which."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Experts, Routing
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec

D, H, E, K, CAPACITY_FACTOR = 12, 10, 6, 2, 1.0


class Layer(nn.Module):
    """[..., D] to [..., D]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(E, D))
        self.w_in = nn.Parameter(torch.randn(E, H, D))
        self.b_in = nn.Parameter(torch.zeros(E, H))
        self.w_out = nn.Parameter(torch.randn(E, D, H))
        self.b_out = nn.Parameter(torch.zeros(E, D))

    def forward(self, x: Tensor) -> Tensor:
        """Add up the experts of each token that have room for it."""
        rows = x.reshape(-1, D)
        ids, gates = self.route(rows)
        y = torch.zeros(rows.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            h = F.silu(F.linear(rows[token], self.w_in[e], self.b_in[e]))
            f = F.linear(h, self.w_out[e], self.b_out[e])
            y = y.index_add(0, token, (gates[token, slot, None] * f).to(y.dtype))
        return y.to(x.dtype).reshape(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts [T, K], E where one is full, and gates, for tokens x [T, D]."""
        logits = F.linear(x.float(), self.router.float())
        gates, ids = logits.softmax(dim=1).topk(K, dim=1)
        capacity = math.ceil(CAPACITY_FACTOR * len(x) * K / E)
        visits = F.one_hot(ids.mT.flatten(), E)  # [K * T, E]; first choices come first
        place = (visits.cumsum(dim=0) * visits).sum(dim=1).view(K, -1).mT  # [T, K], from 1
        ids = ids.where(place <= capacity, E)
        return ids, gates


def routing(layer: Layer, x: Tensor) -> Routing:
    """Report which tokens x [T, D] visit which experts; E where one is full."""
    return Routing(*layer.route(x))


def read(layer: Layer) -> LayerWeights:
    """Say what the layer holds."""
    return LayerWeights(
        Experts(layer.w_in, layer.b_in, layer.w_out, layer.b_out, "silu"),
        RouterSpec(K),
        router_weight=layer.router,
    )
