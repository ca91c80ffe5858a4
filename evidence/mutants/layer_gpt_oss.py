"""A right layer as gpt-oss': a softmax over the chosen logits, biases everywhere, clamped swiglu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec

D, H, E, K = 12, 10, 6, 2


class Layer(nn.Module):
    """[..., D] to [..., D]; gate and up alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w_in = nn.Parameter(torch.randn(E, D, 2 * H))
        self.b_in = nn.Parameter(torch.zeros(E, 2 * H))
        self.w_out = nn.Parameter(torch.randn(E, H, D))
        self.b_out = nn.Parameter(torch.zeros(E, D))

    def forward(self, x: Tensor) -> Tensor:
        """Add up the experts of each token."""
        rows = x.reshape(-1, D)
        weight, bias = self.router.weight.float(), self.router.bias.float()
        logits = F.linear(rows.float(), weight, bias)
        best, ids = logits.topk(K, dim=1)
        gates = best.softmax(dim=1)
        y = torch.zeros(rows.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for e in range(E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            h = rows[token] @ self.w_in[e] + self.b_in[e]
            gate, up = h[:, 0::2], h[:, 1::2]
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            a = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            f = a @ self.w_out[e] + self.b_out[e]
            y = y.index_add(0, token, (gates[token, slot, None] * f).to(y.dtype))
        return y.to(x.dtype).reshape(x.shape)


def read(layer: Layer) -> LayerWeights:
    """Say what the layer holds: first all gate rows, then all up rows."""
    w_in, b_in = layer.w_in.mT, layer.b_in
    experts = Experts(
        torch.cat([w_in[:, 0::2], w_in[:, 1::2]], dim=1),
        torch.cat([b_in[:, 0::2], b_in[:, 1::2]], dim=1),
        layer.w_out.mT,
        layer.b_out,
        "swiglu_clamped",
    )
    return LayerWeights(experts, RouterSpec(K, "topk_softmax"), layer.router.weight, layer.router.bias)
