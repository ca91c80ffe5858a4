"""The share of the experts that a rank of a mesh holds: which they are, what is right, computing them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_impls.checking import check_ids, check_shapes
from moe_impls.functional import accumulation_dtype, needs_gradients
from moe_impls.interface import (
    COMBINES,
    Experts,
    Implementation,
    Routing,
    Support,
    check_positive,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def chunk_size(num_experts: int, ranks: int) -> int:
    """Return the number of experts of every rank but the last ones, which may have fewer or none."""
    return -(-num_experts // ranks)


def chunk(num_experts: int, ranks: int, rank: int) -> range:
    """Return the ids of a rank's experts, as DTensor's Shard(0) and torch.chunk cut E experts."""
    size = chunk_size(num_experts, ranks)
    return range(min(rank * size, num_experts), min((rank + 1) * size, num_experts))


def check_mesh(mesh: Any) -> None:
    """Raise TypeError or ValueError unless ``mesh`` is a one-dimensional DeviceMesh with this rank in it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"mesh is {mesh!r} and there is no process group; run under torchrun and make the mesh by "
            "torch.distributed.device_mesh.init_device_mesh"
        )
    if not all(hasattr(mesh, name) for name in ("get_group", "ndim", "device_type")):
        raise TypeError(f"mesh is {mesh!r}; it must be a torch.distributed.device_mesh.DeviceMesh")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has the dimensions {mesh.mesh_dim_names or mesh.ndim}; it must have one: take one by its "
            "name, as mesh['expert']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh is {mesh}; rank {dist.get_rank()}, which calls, is not in it")


def check_ranks(num_experts: int, ranks: int) -> None:
    """Raise TypeError or ValueError unless so many ranks can share the experts."""
    check_positive("num_experts", num_experts)
    if num_experts < ranks:
        raise ValueError(f"num_experts is {num_experts}; it must be at least the ranks of the mesh, {ranks}")


def as_if_all(experts: Experts, num_experts: int) -> Experts:
    """Make a rank's experts ones of the shapes of all, which hold no numbers."""
    return experts.map(lambda w: w.new_empty(()).expand(num_experts, *w.shape[1:]))


def check_call(
    inner: Implementation,
    x: Tensor,
    routing: Routing,
    experts: Experts,
    combine: str,
    mesh: DeviceMesh,
    num_experts: int,
) -> None:
    """Check what one rank can tell of its arguments, reading only the least and the largest expert id.

    Raises:
        TypeError, ValueError: as `check_inputs`; or the experts or the device do not fit the mesh.
        RuntimeError: gradients are needed, and ``inner`` has none.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    check_ranks(num_experts, ranks)
    check_shapes(x, routing, as_if_all(experts, num_experts), combine)
    wanted = len(chunk(num_experts, ranks, rank))
    for name, weight in experts.tensors.items():
        if len(weight) != wanted:
            raise ValueError(
                f"{name} holds {len(weight)} experts; it must hold the rank's {wanted} of {num_experts}"
            )
    backend = dist.get_backend(mesh.get_group())
    if x.device.type != mesh.device_type or (x.is_cuda and backend == "gloo"):
        raise ValueError(f"x is on {x.device}; the mesh is of {mesh.device_type} with backend {backend}")
    if len(routing.expert_ids):
        low, high = (int(v) for v in routing.expert_ids.aminmax())
        check_ids(low, high, num_experts)
    if not inner.support.gradients and needs_gradients(x, routing.gates, *experts.tensors.values()):
        raise RuntimeError(f"implementation {inner.name!r} has no gradients: call it under torch.no_grad()")


def shared(inner: Implementation) -> Support:
    """Declare what an implementation can do on a mesh, where the gates are applied at home.

    Raises:
        ValueError: the implementation is distributed itself, or cannot sum.
    """
    support = inner.support
    if support.distributed or "sum" not in support.combines:
        raise ValueError(
            f"implementation is {inner.name!r}; on a mesh it must be one that computes on one process, with "
            "combine 'sum'"
        )
    nothing = dict.fromkeys(("second_order", "autocast", "fullgraph", "exports", "no_host_sync"), False)
    return replace(support, distributed=True, combines=COMBINES, **nothing)


def count_slots(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Count the slots of each expert, [num_experts], of ids in range."""
    return expert_ids.flatten().bincount(minlength=num_experts)


def for_each_rank(slots: Tensor, ranks: int) -> Tensor:
    """Sum the slots of each rank's experts: [num_experts] -> [ranks]."""
    chunks = [chunk(len(slots), ranks, rank) for rank in range(ranks)]
    return torch.stack([slots[part.start : part.stop].sum() for part in chunks])


def compute(inner: Implementation, rows: Tensor, counts: Tensor, experts: Experts) -> Tensor:
    """Compute the experts of this rank on rows [N, D] that came by source and expert: [N, O].

    A rank without experts computes nothing, and has a part in the backward all the same.

    Args:
        counts: [ranks, experts here], rows by source and expert, on the host.
    """
    if len(experts.w_in) == 0:
        nothing = sum((weight.sum() for weight in experts.tensors.values()), rows.sum())
        return rows.new_zeros(0, experts.w_out.shape[1]) + nothing
    every = torch.arange(counts.shape[1], device=counts.device)
    ids = every.repeat(len(counts)).repeat_interleave(counts.flatten())
    gates = rows.new_ones(len(rows), 1, dtype=accumulation_dtype(rows.dtype))
    return inner.forward(rows, Routing(ids.to(rows.device).unsqueeze(1), gates), experts)
