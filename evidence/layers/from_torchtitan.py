"""torchtitan: the MoE of its models, whose experts work in bfloat16 whatever x is."""

import importlib
from typing import Any

import torch

from moe_impls import Experts, LayerSupport, LayerWeights, RouterSpec

SUPPORT = LayerSupport(
    dtypes=(torch.bfloat16,), leading="batch_sequence", router_dtype="input", no_tokens=False
)
D, H, E, K = 16, 24, 8, 2


def deepseek_v3() -> torch.nn.Module:
    """Make the layer with sigmoid scores, groups, a selection bias and a shared expert."""
    moe = importlib.import_module("torchtitan.models.common.moe")
    dispatch = importlib.import_module("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher
    feed_forward = importlib.import_module("torchtitan.models.common.feed_forward").FeedForward
    linear = importlib.import_module("torchtitan.models.common.linear").Linear.Config
    inward, outward = linear(in_features=D, out_features=H), linear(in_features=H, out_features=D)
    routed = moe.RoutedExperts.Config(
        inner_experts=moe.GroupedExperts.Config(dim=D, hidden_dim=H, num_experts=E),
        token_dispatcher=dispatch.Config(num_experts=E, top_k=K),
    )
    router = moe.TokenChoiceTopKRouter.Config(
        num_experts=E,
        gate=linear(in_features=D, out_features=E),
        num_expert_groups=4,
        num_limited_groups=2,
        top_k=K,
        route_norm=True,
        route_scale=2.5,
    )
    shared = feed_forward.Config(w1=inward, w2=outward, w3=inward)
    return moe.MoE.Config(num_experts=E, routed_experts=routed, router=router, shared_experts=shared).build()


def read(layer: Any) -> LayerWeights:
    """Read its weights, of which w1 is the gate."""
    experts, shared = layer.routed_experts.inner_experts, layer.shared_experts
    router = layer.router
    spec = RouterSpec(
        router.top_k,
        router.score_func,
        router.route_norm,
        router.route_scale,
        router.num_expert_groups,
        router.num_limited_groups,
        "top2_sum",
        epsilon=1e-20,
    )
    w_in = torch.cat([shared.w1.weight, shared.w3.weight]).unsqueeze(0)
    return LayerWeights(
        Experts(torch.cat([experts.w1_EFD, experts.w3_EFD], dim=1), None, experts.w2_EDF, None, "swiglu"),
        spec,
        router.gate.weight,
        selection_bias=layer.expert_bias_E,
        shared=Experts(w_in, None, shared.w2.weight.unsqueeze(0), None, "swiglu"),
    )
