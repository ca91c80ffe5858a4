"""The grouped experts of torchtitan, between the dispatch and the combine of its token dispatcher.

They know one form of expert, SwiGLU without biases, and multiply in bfloat16 whatever dtype they are given;
only calls in bfloat16 are declared. Its functions read their weights as attributes of a module; here a
namespace holds views of those of an ``Experts`` in its place, so nothing is copied.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor
from torchtitan.models.common.moe import GroupedExperts  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.token_dispatcher import (  # pyright: ignore[reportMissingImports]
    LocalTokenDispatcher,
)

from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(
    dtypes=(torch.bfloat16,),
    activations=("swiglu",),
    output_activations=("none",),
    combines=("sum",),
    biases=(False,),
    same_width=True,
    multiple_of=8,  # of the product it calls, in which rows are whole multiples of 16 bytes
)


@functools.lru_cache(maxsize=64)
def _dispatcher(E: int, K: int) -> LocalTokenDispatcher:
    return LocalTokenDispatcher(LocalTokenDispatcher.Config(num_experts=E, top_k=K))


def grouped_mm(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    ids, gates = routing
    E, F, _ = experts.w_in.shape
    gate_rows, up_rows = experts.w_in.split(F // 2, dim=1)
    module = SimpleNamespace(w1_EFD=gate_rows, w3_EFD=up_rows, w2_EDF=experts.w_out)
    module._grouped_mm = functools.partial(GroupedExperts._grouped_mm, module)
    # Tokens of each expert are counted as its MoE layer does, by a map of who is routed where.
    routed = torch.zeros(len(x), E, dtype=torch.bool, device=x.device).scatter_(1, ids, True)
    dispatcher = _dispatcher(E, ids.shape[1])
    rows, counts, places = dispatcher.dispatch(x, gates, ids, routed.sum(0))
    return dispatcher.combine(GroupedExperts.forward(module, rows, counts), places, x)


BACKENDS = {"grouped_mm": (grouped_mm, SUPPORT)}
