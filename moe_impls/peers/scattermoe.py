"""The parallel linear layers of ScatterMoE (Tan et al. 2024, arXiv:2403.08245), joined as its MLP does.

The first scatters tokens to the rows of experts, the second takes them back to their slots and sums those by
their gates; the activation between them is the caller's. A GPU multiplies float32 as TF32 there, so it is not
declared. ScatterMoE is not on PyPI: ``pip install git+https://github.com/shawntan/scattermoe``.

With TRITON_INTERPRET=1 it runs on the CPU, slowly: in float32, too, and not in bfloat16, since the
interpreter would multiply the bits of such numbers.
"""

from __future__ import annotations

import os

import torch
from scattermoe.parallel_experts import (  # pyright: ignore[reportMissingImports]
    flatten_sort_count,
    parallel_linear,
)
from torch import Tensor

from moe_impls.functional import activate
from moe_impls.interface import Experts, Routing, Support

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SUPPORT = Support(
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=(torch.float16, torch.float32 if INTERPRETED else torch.bfloat16),
    output_activations=("none",),
    combines=("sum",),
)


def parallel_experts(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    ids, gates = routing
    places = flatten_sort_count(ids, num_experts=len(experts.w_in))
    h = parallel_linear(
        x, experts.w_in.mT, ids.shape[1], *places, expert_biases=experts.b_in, grouped_out=True
    )
    a = activate(h, experts.activation, experts.clamp)
    return parallel_linear(
        a, experts.w_out.mT, 1, *places,
        expert_biases=experts.b_out, gates=gates.to(x.dtype), grouped_in=True,
    )  # fmt: skip


BACKENDS = {"parallel_experts": (parallel_experts, SUPPORT)}
