"""The experts of Hugging Face transformers, by each of its implementations: eager, batched_mm and grouped_mm.

Its functions read their weights as attributes of a module; here a namespace holds the tensors of an
``Experts`` in its place, so nothing is copied. ``eager`` is the loop of ``MixtralExperts``, which has no
biases; the other two also take those, activations without gates, and the clamped one of gpt-oss, whose
weights are laid out as Mixtral's here and not interleaved as in its checkpoints.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.integrations.moe import (  # pyright: ignore[reportMissingImports]
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.models.mixtral.modeling_mixtral import (  # pyright: ignore[reportMissingImports]
    MixtralExperts,
)

from moe_impls.functional import FUNCTIONS, OF_GATES, activate
from moe_impls.interface import GATED_ACTIVATIONS, Experts, Forward, Routing, Support


def _module(experts: Experts) -> SimpleNamespace:
    """Make what the library's functions read of a module."""
    gated = experts.activation in GATED_ACTIVATIONS
    b_in, b_out = experts.b_in, experts.b_out
    has_bias = b_in is not None or b_out is not None
    if has_bias:  # it has both or none
        b_in = experts.w_in.new_zeros(experts.w_in.shape[:2]) if b_in is None else b_in
        b_out = experts.w_out.new_zeros(experts.w_out.shape[:2]) if b_out is None else b_out
    return SimpleNamespace(
        num_experts=len(experts.w_in),
        gate_up_proj=experts.w_in,
        gate_up_proj_bias=b_in,
        up_proj=experts.w_in,
        up_proj_bias=b_in,
        down_proj=experts.w_out,
        down_proj_bias=b_out,
        act_fn=(OF_GATES if gated else FUNCTIONS).get(experts.activation),
        _apply_gate=lambda h: activate(h, experts.activation, experts.clamp),
        has_gate=gated,
        has_bias=has_bias,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
    )


def _forward(
    function: Forward, x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum"
) -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return function(_module(experts), x, routing.expert_ids, routing.gates)


_BATCHED = Support(combines=("sum",), output_activations=("none",), same_width=True)
_LOOP = replace(_BATCHED, activations=tuple(OF_GATES), biases=(False,))
# The product takes rows of multiples of 16 bytes and no float64.
_GROUPED = replace(_BATCHED, dtypes=(torch.float32, torch.bfloat16, torch.float16), multiple_of=8)
_loop = inspect.unwrap(MixtralExperts.forward)  # without the choice of an implementation by configuration
BACKENDS = {
    "eager": (functools.partial(_forward, _loop), _LOOP),
    "batched_mm": (functools.partial(_forward, batched_mm_experts_forward), _BATCHED),
    "grouped_mm": (functools.partial(_forward, grouped_mm_experts_forward), _GROUPED),
}
