"""litgpt: LLaMAMoE, with the routers of Mixtral and of DeepSeek-V3."""

import importlib
from typing import Any

import torch

from moe_impls import Experts, LayerSupport, LayerWeights, RouterSpec

SUPPORT = LayerSupport(leading="batch_sequence", router_dtype="input")
SIZES = {
    "n_embd": 16,
    "n_head": 2,
    "n_expert": 8,
    "n_expert_per_token": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "bias": False,
    "mlp_class_name": "LLaMAMoE",
}


def mixtral() -> torch.nn.Module:
    """Make the layer with a softmax over the two chosen."""
    return _make()


def deepseek_v3() -> torch.nn.Module:
    """Make the layer with sigmoid scores, groups, a selection bias and a shared expert."""
    groups = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
    return _make(norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_expert=1, **groups)


def _make(**options: Any) -> torch.nn.Module:
    config = importlib.import_module("litgpt.config").Config(**SIZES, **options)
    return importlib.import_module("litgpt.model").LLaMAMoE(config)


def read(layer: Any) -> LayerWeights:
    """Read its experts, of which fc_1 is the gate, and its router by its config."""
    config, gate = layer.config, layer.gate
    shared = [layer.shared_experts] if config.n_shared_expert else []
    scale = config.routed_scaling_factor
    if not config.n_expert_groups:
        spec = RouterSpec(config.n_expert_per_token, "topk_softmax", scale=scale)
        return LayerWeights(_stacked(layer.experts), spec, gate.weight)
    spec = RouterSpec(
        config.n_expert_per_token,
        "sigmoid",
        config.norm_topk_prob,
        scale,
        config.n_expert_groups,
        config.n_topk_groups,
        "top2_sum",
        epsilon=1e-20,
    )
    return LayerWeights(
        _stacked(layer.experts),
        spec,
        gate.weight,
        selection_bias=gate.e_score_correction_bias,
        shared=_stacked(shared) if shared else None,
    )


def _stacked(experts: Any) -> Experts:
    w_in = torch.stack([torch.cat([e.fc_1.weight, e.fc_2.weight]) for e in experts])
    return Experts(w_in, None, torch.stack([e.proj.weight for e in experts]), None, "swiglu")
