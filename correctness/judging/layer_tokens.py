"""Tokens for a layer on the bench: each has a clear choice of experts, and none is near a kink."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from correctness.judging.finding import CannotTell
from correctness.oracle import layer as oracle
from correctness.problems.inputs import near_kink
from correctness.problems.problem import LOW_PRECISION, Inputs, Problem
from moe_impls.interface import Experts, Routing
from moe_impls.layer_interface import LayerWeights
from moe_impls.router import route

B, S = 4, 8  # leading dimensions of the input: T = B * S tokens
T = B * S
ROUNDS = 50  # of drawing tokens until enough of them have a clear choice


def comparable(weights: LayerWeights, dtype: torch.dtype) -> bool:
    """Tell whether tokens can be away from all kinks, so that gradients can be compared."""
    parts = ((weights.experts, weights.router.top_k), (weights.shared, None))
    problems = [_problem(experts, K, dtype) for experts, K in parts if experts is not None]
    return all(p.avoids_kinks or not p.has_kinks for p in problems)


def _problem(experts: Experts, K: int | None, dtype: torch.dtype) -> Problem:
    """Describe a layer's experts, of which a token visits K, or all, as a Problem."""
    E, O, H = experts.w_out.shape
    D = experts.w_in.shape[2]
    options = (experts.activation, experts.output_activation)
    return Problem(
        "layer", T, D, H, O, E, E if K is None else min(K, E), *options, dtype=dtype, clamp=experts.clamp
    )


def draw_tokens(
    weights: LayerWeights,
    dtype: torch.dtype,
    logits_dtype: torch.dtype = torch.float32,
    tokens: int = T,
    like: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Draw ``tokens`` tokens [T, D], and choose their experts [T, K].

    The choice of each is clear with logits in ``logits_dtype`` and, where gradients are compared, none is
    near a kink. In low precision with logits in float32, up to half of them are such that logits rounded to
    that precision lead to other experts.

    Args:
        like: makes them of normal ones [N, D].

    Raises:
        CannotTell: too few random tokens are such.
    """
    generator = torch.Generator().manual_seed(1)
    swayed_wanted = dtype in LOW_PRECISION and logits_dtype == torch.float32
    D, found = weights.router_weight.shape[1], 0
    xs, ids = [], []
    for _ in range(ROUNDS):
        x = like(torch.randn(128 * tokens if swayed_wanted else 2 * tokens, D, generator=generator)).to(dtype)
        if swayed_wanted:
            x = torch.cat([x[is_swayed(x, weights)][: tokens // 2], x[:tokens]])
        chosen, good = oracle.choose(x, weights, logits_dtype)
        if comparable(weights, dtype):
            good &= ~kinked(x, chosen, weights)
        xs.append(x[good])
        ids.append(chosen[good])
        found += int(good.sum())
        if found >= tokens:
            return torch.cat(xs)[:tokens], torch.cat(ids)[:tokens]
    raise CannotTell(
        f"only {found} of {2 * tokens * ROUNDS} random tokens have a clear choice of experts: "
        "read(layer).router_weight may be zero or equal for several experts"
    )


def is_swayed(x: Tensor, weights: LayerWeights) -> Tensor:
    """Tell which tokens go to other experts where logits are rounded to the dtype of x: bool [T]."""
    z = oracle.logits(x.double(), weights)
    exact, rounded = (
        route(v, weights.router, selection_bias=weights.selection_bias).expert_ids.sort().values
        for v in (z, z.to(x.dtype))
    )
    return (exact != rounded).any(dim=1)


def kinked(x: Tensor, ids: Tensor, weights: LayerWeights) -> Tensor:
    """Tell which tokens are so near a jump of a derivative that rounding decides their gradient: bool [T]."""
    near = torch.zeros(len(x), dtype=torch.bool)
    for experts in (weights.experts, weights.shared):
        if experts is None:
            continue
        E, O, _ = experts.w_out.shape
        is_routed = experts is weights.experts
        visited = ids if is_routed else torch.arange(E).expand(len(x), E)
        problem = _problem(experts, visited.shape[1], x.dtype)
        if not problem.has_kinks:
            continue
        inputs = x.unsqueeze(1).expand(-1, visited.shape[1], -1)  # [T, K, D]
        if is_routed and weights.gates_on == "input":
            wide = x.double()
            g = oracle.gates(oracle.logits(wide, weights), ids, weights.router)
            inputs = inputs * (g * oracle.slot_scale(ids, weights, wide)).unsqueeze(2)
        token, slot = (visited < E).nonzero(as_tuple=True)  # an identity expert has no kink
        u, one = inputs[token, slot].to(x.dtype), visited[token, slot].unsqueeze(1)
        slots = Inputs(u, Routing(one, u.new_ones(one.shape)), experts, u.new_zeros(len(u), O))
        near[token[near_kink(problem, slots, torch.arange(len(u)))]] = True
    return near
