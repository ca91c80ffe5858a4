"""The fused experts of Liger-Kernel: Triton kernels over tiles of one expert's rows.

They know one form of expert, SwiGLU without biases, and outputs as wide as inputs. The number of tiles is
read on the host. With TRITON_INTERPRET=1 they run on the CPU, slowly: set LIGER_FUSED_MOE_AUTOTUNE=0 beside
it, or each kernel is tried in every configuration.
"""

from __future__ import annotations

import os

import torch
from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(
    devices=("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    activations=("swiglu",),
    output_activations=("none",),
    combines=("sum",),
    biases=(False,),
    deterministic=False,  # the gradient of the gates is summed by atomic additions
    same_width=True,
)


def fused_moe(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    ids, gates = routing
    return LigerFusedMoEFunction.apply(  # pyright: ignore[reportReturnType]
        x, experts.w_in, experts.w_out, ids.int(), gates
    )


BACKENDS = {"fused_moe": (fused_moe, SUPPORT)}
