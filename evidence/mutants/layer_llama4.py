"""A right layer as Llama 4's: one expert, whose input the gate multiplies; [B, S, D] only, logits as x is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_impls.interface import Experts
from moe_impls.layer_interface import LayerSupport, LayerWeights
from moe_impls.router_interface import RouterSpec

D, H, E, K = 12, 12, 6, 1  # square, so that a transposed weight has the right shape

SUPPORT = LayerSupport(leading="batch_sequence", router_dtype="input")


class Layer(nn.Module):
    """[B, S, D] to [B, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(E, D))
        self.gate_up = nn.Parameter(torch.randn(E, D, 2 * H))
        self.down = nn.Parameter(torch.randn(E, H, D))
        self.shared_in = nn.Parameter(torch.randn(2 * H, D))
        self.shared_out = nn.Parameter(torch.randn(D, H))

    def forward(self, x: Tensor) -> Tensor:
        """Add up the one expert of each token and the shared one."""
        batch, sequence, width = x.shape
        rows = x.reshape(batch * sequence, width)
        logits = F.linear(rows, self.router)
        best, ids = logits.topk(K, dim=1)
        gates = best.float().sigmoid().to(x.dtype)  # [T, 1]
        y = torch.zeros_like(rows)
        for e in range(E):
            token = (ids[:, 0] == e).nonzero().flatten()
            inputs = gates[token] * rows[token]
            gate, up = (inputs @ self.gate_up[e]).chunk(2, dim=1)
            y = y.index_add(0, token, (F.silu(gate) * up) @ self.down[e])
        gate, up = F.linear(rows, self.shared_in).chunk(2, dim=1)
        y = y + F.linear(F.silu(gate) * up, self.shared_out)
        return y.reshape(batch, sequence, width)


def read(layer: Layer) -> LayerWeights:
    """Say what the layer holds."""
    return LayerWeights(
        Experts(layer.gate_up.mT, None, layer.down.mT, None, "swiglu"),
        RouterSpec(K, "sigmoid"),
        router_weight=layer.router,
        shared=Experts(layer.shared_in[None], None, layer.shared_out[None], None, "swiglu"),
        gates_on="input",
    )
