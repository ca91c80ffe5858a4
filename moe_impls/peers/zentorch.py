"""The fused experts of AMD's zentorch on a CPU: one operator that sorts, multiplies by ZenDNN and sums.

It knows gated experts by SiLU and GELU, and writes to a result that it is given. Weights are laid out in the
first call and kept by their address, until all that is kept is thrown away: ``prepare`` does that first. Its
package belongs to one version of torch, as its number says. On a CPU without instructions for bfloat16 its
products in bfloat16 (`dlp_gemm_rowvar_f32_fallback` of zentorch 2.13) write past their memory, which ends the
process or hangs it, from a few dozen tokens on: only a CPU that has them is given bfloat16.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from moe_impls.interface import Experts, Prepared, Routing, Support
from moe_impls.processor import multiplies

importlib.import_module("zentorch")  # registers torch.ops.zentorch
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}
SUPPORT = Support(
    devices=("cpu",),
    dtypes=tuple(dtype for dtype in (torch.float32, torch.bfloat16) if multiplies(dtype)),
    activations=tuple(ACTIVATIONS),
    output_activations=("none",),
    combines=("sum",),
    gradients=False,
    same_width=True,
)


def fused_moe(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    w_in, b_in, w_out, b_out = (
        None if t is None else t.contiguous()
        for t in (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    )
    y = x.new_zeros(len(x), experts.w_out.shape[1])
    gates, ids = routing.gates.to(torch.float32).contiguous(), routing.expert_ids.to(torch.int32).contiguous()
    if len(x):
        torch.ops.zentorch.zentorch_fused_moe(
            y, x.contiguous(), w_in, w_out, b_in, b_out, gates, ids, False, ACTIVATIONS[experts.activation]
        )
    return y


def prepare(experts: Experts) -> Prepared:
    """Throw away what was kept of other weights; return ``f(x, routing, *, combine="sum") -> y``."""
    torch.ops.zentorch.zentorch_flush_moe_weight_cache()

    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        return fused_moe(x, routing, experts, combine=combine)

    return f


BACKENDS = {"fused_moe": (fused_moe, SUPPORT, prepare)}
