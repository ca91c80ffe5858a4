"""Whether what a file says that its layer holds fits together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_impls.checking import check_inputs
from moe_impls.interface import Experts, Routing
from moe_impls.layer_interface import BiasRule, LayerWeights
from moe_impls.router import check_logits
from moe_impls.router_interface import RouterSpec


def check_weights(weights: object, layer: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``weights`` is a LayerWeights whose parts fit together."""
    if not isinstance(weights, LayerWeights):
        raise TypeError(f"the result is a {type(weights).__name__}; it must be a moe_impls.LayerWeights")
    for name, valid in (
        ("experts", Experts),
        ("router", RouterSpec),
        ("router_weight", Tensor),
        ("router_bias", Tensor | None),
        ("selection_bias", Tensor | None),
        ("shared", Experts | None),
        ("shared_gate", Tensor | None),
        ("expert_scale", Tensor | None),
        ("router_norm", Tensor | None),
        ("bias_rule", BiasRule | None),
    ):
        value = getattr(weights, name)
        if not isinstance(value, valid):
            what = getattr(valid, "__name__", str(valid))
            raise TypeError(f"{name} is a {type(value).__name__}; it must be {what}")
    experts, router_weight = weights.experts, weights.router_weight
    if not isinstance(experts.w_in, Tensor) or experts.w_in.ndim != 3:
        raise ValueError("w_in must be a tensor [E, F, D]")
    E, _, D = experts.w_in.shape
    x = experts.w_in.new_empty(0, D)
    for part, combine in ((experts, weights.combine), (weights.shared, "sum")):
        if part is not None:
            ids = torch.zeros(0, 1, dtype=torch.int64, device=x.device)
            check_inputs(x, Routing(ids, x.new_zeros(0, 1)), part, combine)
    O, Z = experts.w_out.shape[1], weights.identity_experts
    wanted: dict[str, tuple[int, ...]] = {
        "router_weight": (E + Z, D),
        "router_bias": (E + Z,),
        "expert_scale": (E,),
        "router_norm": (D,),
    }
    if weights.gates_on == "input" and weights.combine != "sum":
        raise ValueError(f"combine is {weights.combine!r}; with gates on the input it must be 'sum'")
    if Z and (weights.combine != "sum" or O != D):
        raise ValueError(
            f"identity_experts is {Z}, combine is {weights.combine!r} and w_out has {O} rows; with identity "
            f"experts combine must be 'sum' and w_out must have D = {D} rows"
        )
    if weights.shared is not None:
        wanted["shared_gate"] = (len(weights.shared.w_in), D)
        if weights.shared.w_out.shape[1] != O:
            raise ValueError(f"shared.w_out has {weights.shared.w_out.shape[1]} rows; experts.w_out has {O}")
    elif weights.shared_gate is not None:
        raise ValueError("shared_gate is given; without shared experts it must be None")
    for name, shape in wanted.items():
        tensor = getattr(weights, name)
        if tensor is not None and tensor.shape != shape:
            width = f", E + Z with {Z} identity experts" if Z and shape[0] == E + Z else ""
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}{width}")
    check_logits(router_weight.new_empty(0, E + Z), weights.router, weights.selection_bias)
    if weights.bias_rule and weights.selection_bias is None:
        raise ValueError("bias_rule is given; without selection_bias it must be None")
    names = dict(layer.named_parameters())
    for name in weights.training_only:
        if name not in names:
            raise ValueError(f"training_only holds {name!r}; the parameters are {', '.join(names)}")
