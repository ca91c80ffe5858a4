"""mixture-of-experts: MoE, the two best experts as in GShard, with a capacity."""

import importlib
from typing import Any

import torch

from moe_impls import Experts, LayerSupport, LayerWeights, RouterSpec

SUPPORT = LayerSupport(
    dtypes=(torch.float64, torch.float32), leading="batch_sequence", router_dtype="input", no_tokens=False
)


def defaults() -> torch.nn.Module:
    """Make the layer as it comes: the second expert is left out at random, in evaluation, too."""
    return _make()


def every_second_expert() -> torch.nn.Module:
    """Make the layer with the second expert always there."""
    return _make(second_policy_train="all", second_policy_eval="all")


def _make(**policies: str) -> torch.nn.Module:
    """Make a layer with a capacity that no expert reaches."""
    room = {"capacity_factor_train": 8.0, "capacity_factor_eval": 8.0}
    module = importlib.import_module("mixture_of_experts")
    return module.MoE(dim=16, num_experts=8, hidden_dim=24, **policies, **room)


def read(layer: Any) -> LayerWeights:
    """Read its weights, which lie [in, out]."""
    experts = Experts(layer.experts.w1.mT, None, layer.experts.w2.mT, None, "relu")
    return LayerWeights(experts, RouterSpec(2, renormalise=True, epsilon=1e-9), layer.gate.w_gating.T)
