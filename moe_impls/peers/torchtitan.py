"""The grouped experts of torchtitan, and its dispatcher of tokens to the ranks of a mesh.

The experts lie between the dispatch and the combine of its token dispatcher. They know one form of expert,
SwiGLU without biases, and multiply in bfloat16 whatever dtype they are given; only calls in bfloat16 are
declared. Its functions read their weights as attributes of a module; here a namespace holds views of those of
an ``Experts`` in its place, so nothing is copied.

The dispatcher of `all_to_all` moves rows to their experts' ranks, and `sorted_dispatch` computes them there.
It cuts the experts into as many for every rank, and weighs in float32 and sums in the dtype of x.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchtitan.distributed.utils import set_spmd_backend  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.moe import GroupedExperts  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.token_dispatcher import (  # pyright: ignore[reportMissingImports]
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
)

from moe_impls import sorted_dispatch
from moe_impls.interface import Experts, Routing, Support

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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


set_spmd_backend("partial_dtensor")  # in which the dispatcher takes plain tensors and the mesh it is given

ON_RANKS = Support(
    dtypes=(torch.float32, torch.bfloat16),
    combines=("sum",),
    same_width=True,
    distributed=True,
    even_experts=True,
)


def all_to_all(
    x: Tensor,
    routing: Routing,
    experts: Experts,
    *,
    combine: str = "sum",
    mesh: DeviceMesh,
    num_experts: int,
) -> Tensor:
    """Compute this rank's x [T, D] -> y [T, O], collectively; see ``moe_impls.interface.Support``."""
    ids, gates = routing
    config = AllToAllTokenDispatcher.Config(num_experts=num_experts, top_k=ids.shape[1])
    dispatcher = AllToAllTokenDispatcher(config)
    dispatcher.wire_meshes(ep_mesh=mesh)
    sent = ids.flatten().bincount(minlength=num_experts)
    rows, counts, places = dispatcher.dispatch(x, gates, ids, sent)
    its_expert = torch.arange(len(counts)).repeat_interleave(counts).unsqueeze(1)
    there = Routing(its_expert, rows.new_ones(len(rows), 1))
    return dispatcher.combine(sorted_dispatch.forward(rows, there, experts), places, x)


BACKENDS = {"grouped_mm": (grouped_mm, SUPPORT), "all_to_all": (all_to_all, ON_RANKS)}
