"""Experts spread over the ranks of a mesh: every slot's row travels to its expert, and the output back.

An all-to-all with unequal splits brings rows there, any implementation computes them as tokens of one
choice with a gate of one, and another all-to-all brings what it made of them home, where the gates are. That
is three collectives with the message before them, and two more for the backward. The rows of an expert arrive
in the order of their tokens, so that an implementation that keeps it gives the bits that one process gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.exchange import Call, agree, facts, move
from moe_impls.functional import combine_slots
from moe_impls.interface import Experts, Implementation, Routing
from moe_impls.registry import resolve
from moe_impls.shards import check_call, check_mesh, compute, count_slots, for_each_rank, shared

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def around(inner: Implementation) -> Implementation:
    """Spread an implementation over the ranks of a mesh; it computes the rows that reach a rank.

    Raises:
        ValueError: the implementation is distributed itself.
    """
    support = shared(inner)

    def forward(
        x: Tensor,
        routing: Routing,
        experts: Experts,
        *,
        combine: str = "sum",
        mesh: DeviceMesh,
        num_experts: int,
    ) -> Tensor:
        """Compute this rank's x [T, D] -> y [T, O], collectively; see `moe_impls.interface.Support`.

        Raises:
            TypeError, ValueError, RuntimeError: bad arguments on any rank; the same on every rank.
        """
        check_mesh(mesh)
        ids, gates = routing

        def describe() -> Call:
            check_call(inner, x, routing, experts, combine, mesh, num_experts)
            slots = count_slots(ids, num_experts)
            return Call(
                facts(x, routing, experts, combine, num_experts), slots, for_each_rank(slots, mesh.size())
            )

        plan = agree(mesh, num_experts, describe)
        (T, K), O = ids.shape, experts.w_out.shape[1]
        order, _ = sort_by_expert(ids, num_experts)  # [T * K]

        # As in sorted_dispatch: the gradients of a token's K slots are summed at once.
        rows = x.unsqueeze(1).expand(T, K, -1)[order // K, order % K]  # [T * K, D]
        arrived = move(rows, plan.sent, plan.received, plan.group)  # [N, D]
        outputs = compute(inner, arrived, plan.counts, experts)  # [N, O]
        returned = move(outputs, plan.received, plan.sent, plan.group)  # [T * K, O]

        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
        return combine_slots(returned[inverse].view(T, K, O), gates, combine).to(x.dtype)

    return Implementation(f"expert_parallel({inner.name})", forward, support)


_DEFAULT = around(resolve("sorted_dispatch"))
forward, SUPPORT = _DEFAULT.forward, _DEFAULT.support
