"""What `MoE` on a mesh has as on one process: parameters, noise and losses.

- The experts' parameters are DTensors, Shard(0): a rank holds its own, and their gradients are the sums over
  all ranks' tokens. Those of the router are plain and the same on all ranks; their gradients are of the
  rank's own tokens, to be summed over the ranks as those of any other replicated parameter.
- Where all ranks' generators have one seed, initial parameters (on a CPU) and noise are those of one process
  that is given all tokens in the order of the ranks.
- Losses are those of all tokens, the same on each rank. Each rank gets the gradient through its own tokens:
  summed over the ranks, that of the loss once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_impls.shards import chunk

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def empty(mesh: DeviceMesh, *shape: int, device: Any, dtype: torch.dtype | None) -> Tensor:
    """Make a DTensor of a shape [E, ...] of which this rank holds its chunk."""
    from torch.distributed.tensor import DTensor, Shard

    own = torch.empty(len(_chunk(mesh, shape[0])), *shape[1:], device=device, dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def _chunk(mesh: DeviceMesh, num_experts: int) -> range:
    return chunk(num_experts, mesh.size(), mesh.get_local_rank())


def local(weight: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, through which gradients flow."""
    to_local: Any = getattr(weight, "to_local", lambda: weight)
    return to_local()


def uniform_(weight: Any, bound: float) -> None:
    """Draw a DTensor [E, ...] from ± bound, expert by expert: all are drawn and the rank's own kept."""
    own = _chunk(weight.device_mesh, len(weight))
    kept = local(weight.detach())
    for expert in range(len(weight)):
        drawn = nn.init.uniform_(kept.new_empty(kept.shape[1:]), -bound, bound)
        if expert in own:
            kept[expert - own.start] = drawn


def replicate_(mesh: DeviceMesh, *parameters: Tensor) -> None:
    """Give all ranks the values of the first."""
    for parameter in parameters:
        if not parameter.is_meta:
            dist.broadcast(parameter.detach(), group=mesh.get_group(), group_src=0)


def own_noise(mesh: DeviceMesh, clean: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw the noise of all ranks' tokens, and keep that of clean [T, E] here: a collective call."""
    sizes = clean.new_zeros(mesh.size(), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(clean)]), group=mesh.get_group())
    tokens, rank = sizes.tolist(), mesh.get_local_rank()
    drawn = torch.randn(
        sum(tokens), clean.shape[1], generator=generator, device=clean.device, dtype=clean.dtype
    )
    return drawn.split(tokens)[rank]


class _Total(torch.autograd.Function):
    """A sum over ranks, each of which goes on with the gradient of its own share of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        summed = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def total(mesh: DeviceMesh, importance: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the importance and the load [E] of all ranks' tokens: a collective call."""
    stacked = torch.stack([importance.double(), load.double()])  # which holds counts, too
    summed: Any = _Total.apply(stacked, mesh.get_group())
    return summed[0].to(importance.dtype), summed[1].to(load.dtype)


def own_part(name: str, given: Any, parameter: Any) -> Any:
    """Make what a state dict holds of a DTensor parameter one that it can be loaded from.

    Raises:
        ValueError: a plain tensor that does not hold all experts. One rank's part, saved by
            torch.distributed.checkpoint or torch.save, is no checkpoint of the layer.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(given, DTensor) or not isinstance(given, Tensor):
        return given
    E = len(parameter)
    if len(given) != E:
        raise ValueError(
            f"{name} is a plain tensor of {len(given)} experts; a layer on a mesh is loaded from DTensors, "
            f"as its state_dict() has them, or from plain tensors of all {E} experts"
        )
    own = _chunk(parameter.device_mesh, E)
    part = given[own.start : own.stop].to(parameter.device, parameter.dtype)
    options = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **options)
