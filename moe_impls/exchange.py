"""Rows that travel between the ranks of a mesh, and the message that goes before them.

Each call begins with one message of fixed size between every two ranks: what the sender's call is like, and
how many rows come for each of the receiver's experts. All ranks see what all others say of themselves, and so
either all go on or all raise the same error, before any row moves. (With gloo, a rank that waits for more
bytes than come returns without an error, and one that waits for fewer ends its process.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_impls.interface import COMBINES, DTYPES, Experts, Routing
from moe_impls.shards import chunk, chunk_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BLOCK = 64  # numbers of a message: so many, or a multiple, that a wrong num_experts does not change the size
ERRORS = (ValueError, TypeError, RuntimeError)  # that a rank may have found in its own arguments


# What must be the same on all ranks, as a message says it in numbers.
FACTS = (
    "D, the width of x,",
    "the dtype of x",
    "K",
    "num_experts",
    "F, the rows of w_in,",
    "O, the rows of w_out,",
    "combine",
    "the dtype of gates",
    "the number of the experts' weights and biases",
    "what requires a gradient",
)
_HEADER = 2 + len(FACTS)  # the kind of an error, the number of rows, and these
_WANTING = ("x", "gates", "w_in", "b_in", "w_out", "b_out")


def facts(x: Tensor, routing: Routing, experts: Experts, combine: str, num_experts: int) -> list[int]:
    """Number the FACTS of one rank's call."""
    tensors = {"x": x, "gates": routing.gates, **experts.tensors}
    wanting = [n for n, t in tensors.items() if torch.is_grad_enabled() and t.requires_grad]
    return [
        x.shape[1],
        DTYPES.index(x.dtype),
        routing.expert_ids.shape[1],
        num_experts,
        experts.w_in.shape[1],
        experts.w_out.shape[1],
        COMBINES.index(combine),
        DTYPES.index(routing.gates.dtype),
        len(experts.tensors),
        sum(1 << _WANTING.index(name) for name in wanting),
    ]


def _shown(fact: str, value: int) -> str:
    if "dtype" in fact:
        return str(DTYPES[value])
    if fact == "combine":
        return repr(COMBINES[value])
    if "gradient" in fact:
        return ", ".join(name for n, name in enumerate(_WANTING) if value >> n & 1) or "nothing"
    return str(value)


class Call(NamedTuple):
    """What one rank has to say of its call, all right as far as it can tell.

    facts: its FACTS. slots: [num_experts], of each expert. rows: [ranks], that it is going to send.
    """

    facts: list[int]
    slots: Tensor
    rows: Tensor


class Plan(NamedTuple):
    """What travels between this rank and each rank of the mesh.

    sent, received: rows. counts: [ranks, experts here], slots by source and expert, on the host.
    """

    sent: list[int]
    received: list[int]
    counts: Tensor
    group: dist.ProcessGroup


def agree(mesh: DeviceMesh, num_experts: int, describe: Callable[[], Call]) -> Plan:
    """Exchange the message of a call: the one collective that is always made.

    Args:
        describe: tells of this rank's call, or raises what is wrong with it.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks the same, if ``describe`` raises on one or the facts
            of two differ.
    """
    group, ranks = mesh.get_group(), mesh.size()
    call, fault = None, None
    try:
        call = describe()
    except ERRORS as error:
        fault = error
    size = chunk_size(num_experts, ranks) if call else 0
    device = torch.device(mesh.device_type)
    message = torch.zeros(ranks, -(-(_HEADER + size) // BLOCK) * BLOCK, dtype=torch.int64, device=device)
    if call:
        message[:, 1] = call.rows
        message[:, 2:_HEADER] = torch.tensor(call.facts, device=device)
        padded = torch.zeros(ranks * size, dtype=torch.int64, device=device)
        padded[:num_experts] = call.slots
        message[:, _HEADER : _HEADER + size] = padded.view(ranks, size)
    else:
        message[:, 0] = 1 + next(n for n, kind in enumerate(ERRORS) if isinstance(fault, kind))
    arrived = torch.empty_like(message)
    dist.all_to_all_single(arrived, message, group=group)
    table = arrived.cpu()
    _raise_together(table, fault, group)
    here = len(chunk(num_experts, ranks, mesh.get_local_rank()))
    return Plan(message[:, 1].tolist(), table[:, 1].tolist(), table[:, _HEADER : _HEADER + here], group)


def _raise_together(table: Tensor, fault: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise the same error on every rank if a rank has found a fault, or facts of two ranks differ."""
    kinds = table[:, 0].tolist()
    if any(kinds):
        told: list[str | None] = [None] * len(kinds)
        dist.all_gather_object(told, str(fault or ""), group=group)
        rank = next(n for n, kind in enumerate(kinds) if kind)
        raise ERRORS[kinds[rank] - 1](f"rank {rank} of the mesh: {told[rank]}") from fault
    for rank in range(1, len(kinds)):
        for fact, first, other in zip(FACTS, *table[[0, rank], 2:_HEADER].tolist(), strict=True):
            if first != other:
                raise ValueError(
                    f"{fact} is {_shown(fact, first)} on rank 0 of the mesh and {_shown(fact, other)} on "
                    f"rank {rank}; it must be the same on all"
                )


class _Move(torch.autograd.Function):
    """Rows to other ranks, and in the backward their gradients to where they came from."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any, sending: Any
    ) -> Tensor:
        ctx.way = received, sent, group, rows.dtype
        rows = rows.to(sending).contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, received, sent, group=group)
        return arrived.to(ctx.way[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Move.apply(grads[0], *ctx.way), None, None, None, None  # pyright: ignore[reportReturnType]


def move(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, *, sending: Any = None
) -> Tensor:
    """Send rows [sum(sent), N] to the ranks in their order; return those that arrive, [sum(received), N].

    A collective call; so is its backward, which every rank makes, with no rows, too.

    Args:
        sending: the dtype in which rows are sent, if not their own; gradients are sent in that of the rows.
    """
    moved: Any = _Move.apply(rows, sent, received, group, sending or rows.dtype)
    return moved
