"""How to read the blocks of transformers whose experts are not on its interface for experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_impls.interface import Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec


@dataclass(frozen=True)
class Beside:
    """A reading of a family's block, and the dtype that its router works in where x is of 16 bits."""

    read: Callable[[Any], LayerWeights]
    router_dtype: str


def _dbrx(block: Any) -> LayerWeights:
    """Experts below one another in three matrices; the gates are divided by their p-norm, here p = 1."""
    mlp, E = block.experts.mlp, block.experts.num_experts
    w1, v1, w2 = (w.unflatten(0, (E, -1)) for w in (mlp.w1, mlp.v1, mlp.w2))  # [E, H, D]
    experts = Experts(torch.cat([w1, v1], dim=1), None, w2.mT, None, "swiglu")
    assert block.moe_normalize_expert_weights in (None, 1), "a p-norm with another p is not in the contract"
    renormalise = block.moe_normalize_expert_weights == 1
    return LayerWeights(experts, RouterSpec(block.top_k, "softmax", renormalise), block.router.layer.weight)


def _jetmoe(block: Any) -> LayerWeights:
    """One bias for the sum over experts: as the bias of each expert, since the gates add up to one."""
    w_in, w_out = block.input_linear.weight, block.output_linear.weight
    experts = Experts(w_in, None, w_out, block.bias.expand(len(w_out), -1), "swiglu")
    return LayerWeights(experts, RouterSpec(block.router.top_k, "topk_softmax"), block.router.layer.weight)


def _llama4(shaped: Any) -> LayerWeights:
    """The gate, a sigmoid, multiplies the input of the expert."""
    block = shaped.block
    experts = Experts(
        block.experts.gate_up_proj.mT, None, block.experts.down_proj.mT, None, activation="swiglu"
    )
    s = block.shared_expert
    w_in = torch.cat([s.gate_proj.weight, s.up_proj.weight]).unsqueeze(0)
    shared = Experts(w_in, None, s.down_proj.weight.unsqueeze(0), None, "swiglu")
    spec = RouterSpec(block.top_k, "sigmoid")
    return LayerWeights(experts, spec, block.router.weight, shared=shared, gates_on="input")


def _longcat(block: Any) -> LayerWeights:
    """Identity experts after the others; the experts' first matrices have rows that nothing reads."""
    experts, router = block.experts, block.router
    E = experts.num_routed_experts
    return LayerWeights(
        Experts(experts.gate_up_proj[:E], None, experts.down_proj, None, "swiglu"),
        RouterSpec(router.top_k, "softmax", scale=router.routed_scaling_factor),
        router.classifier.weight,
        router_bias=router.classifier.bias,
        selection_bias=router.e_score_correction_bias,
        identity_experts=experts.zero_expert_num,
    )


def _switch(block: Any) -> LayerWeights:
    """The best expert, by its probability; with a capacity that no expert reaches."""
    experts = list(block.experts.values())
    w_in, w_out = (torch.stack([getattr(e, name).weight for e in experts]) for name in ("wi", "wo"))
    spec = RouterSpec(1, "softmax")
    return LayerWeights(Experts(w_in, None, w_out, None, "relu"), spec, block.router.classifier.weight)


def _nllb(block: Any) -> LayerWeights:
    """The two best experts; in evaluation what they return is multiplied by one minus moe_token_dropout."""
    experts = [block.experts[f"expert_{e}"] for e in range(block.num_experts)]
    w_in, b_in = (torch.stack([getattr(e.fc1, name) for e in experts]) for name in ("weight", "bias"))
    w_out, b_out = (torch.stack([getattr(e.fc2, name) for e in experts]) for name in ("weight", "bias"))
    spec = RouterSpec(2, "softmax", True, scale=1 - block.experts.moe_token_dropout)
    weight = block.router.classifier.weight
    return LayerWeights(Experts(w_in, b_in, w_out, b_out, "relu"), spec, weight)


READINGS = {
    "dbrx": Beside(_dbrx, "input"),
    "jetmoe": Beside(_jetmoe, "input"),
    "llama4": Beside(_llama4, "input"),
    "longcat_flash": Beside(_longcat, "float32"),
    "nllb_moe": Beside(_nllb, "float32"),
    "switch_transformers": Beside(_switch, "float32"),
}
REFUSED = {
    "doge": "its experts are rows of an embedding, which product keys choose",
    "vitpose_backbone": "it has no router: the caller says which expert each image visits",
}
