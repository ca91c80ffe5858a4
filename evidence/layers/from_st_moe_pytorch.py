"""st-moe-pytorch: MoE, the two best experts of ST-MoE, with a capacity."""

import importlib
from typing import Any

import torch

from moe_impls import Experts, LayerSupport, LayerWeights, RouterSpec

SUPPORT = LayerSupport(
    dtypes=(torch.float64, torch.float32), leading="batch_sequence", router_dtype="input", no_tokens=False
)
EVERY = {"threshold_train": 0.0, "threshold_eval": 0.0}  # from this share on a second expert is always there


def defaults() -> torch.nn.Module:
    """Make the layer as it comes: the second expert is left out at random, in evaluation, too."""
    return _make()


def straight_through() -> torch.nn.Module:
    """Make the layer with the second expert always there; gradients flow through the dispatch, too."""
    return _make(**EVERY)


def every_second_expert() -> torch.nn.Module:
    """Make the layer with the second expert always there, and gradients as the equations have them."""
    return _make(**EVERY, straight_through_dispatch_tensor=False)


def _make(**options: Any) -> torch.nn.Module:
    """Make a layer with a capacity that no expert reaches."""
    room = {"capacity_factor_train": 8.0, "capacity_factor_eval": 8.0}
    return importlib.import_module("st_moe_pytorch").MoE(dim=16, num_experts=8, **options, **room)


def read(layer: Any) -> LayerWeights:
    """Read its experts: ups before gates; mult_bias multiplies the hidden features."""
    nets = [expert.net for expert in layer.experts.experts]
    inner, activation, outer = ([net[i] for net in nets] for i in (0, 1, 2))
    w_in = torch.stack([_gates_first(linear.weight) for linear in inner])
    b_in = torch.stack([_gates_first(linear.bias) for linear in inner])
    w_out = torch.stack([o.weight * a.mult_bias for o, a in zip(outer, activation, strict=True)])
    b_out = torch.stack([linear.bias for linear in outer])
    experts = Experts(w_in, b_in, w_out, b_out, "geglu")
    return LayerWeights(experts, RouterSpec(2, renormalise=True), layer.gate.to_gates.weight)


def _gates_first(rows: torch.Tensor) -> torch.Tensor:
    up, gate = rows.chunk(2)
    return torch.cat([gate, up])
