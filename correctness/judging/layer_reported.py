"""What is right in training for the routing that a layer reports: its output and all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from correctness.judging.budget import entry_budgets
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import (
    SIGNS,
    B,
    Bench,
    S,
    onto_parameters,
    trained,
    weights_of,
)
from correctness.judging.layer_steps import held, put_back, seeded, step
from correctness.judging.layer_tokens import kinked
from correctness.oracle import layer as oracle
from moe_impls.interface import Routing


def can_tell(bench: Bench) -> bool:
    """Tell whether the layer reports its routing."""
    return bench.subject.routing is not None


def require_as_reported(bench: Bench, seed: int = 0) -> None:
    """Raise CheckFailed unless a step from a seed is right for the routing reported from that seed."""
    layer, subject, dtype = bench.layer, bench.subject, bench.dtype
    before, x = held(layer), bench.x.requires_grad_()
    assert subject.routing
    with during("routing(layer, x)"), torch.enable_grad(), seeded(layer, seed):
        routing = subject.routing(layer, x)
    put_back(layer, before)
    twin = bench.twin()
    weights = weights_of(subject, twin)
    E, K = len(weights.router_weight), weights.router.top_k
    ids, gates = (t.cpu() for t in check_routing(routing, x, E, K))
    dropped = ids == E
    tokens, dy, ids = bench.expected.x, bench.expected.dy, ids.masked_fill(dropped, 0)
    dy = torch.where(kinked(tokens, ids, weights).unsqueeze(1), 0.0, dy)
    given = gates.detach()
    right, plain = (
        oracle.evaluate_layer(tokens, ids, weights, dy, dtype=kept, wide=wide, dropped=dropped, given=given)
        for kept, wide in ((torch.float64, torch.float64), (dtype, torch.float32))
    )
    want, allowed = right.values, entry_budgets(right, plain, dtype)
    with during("a step in training mode"), seeded(layer, seed):
        found = step(bench, x.detach().unflatten(0, (B, S)), dy)
    put_back(layer, before)
    bench.require("y", found.y.flatten(0, 1), want["y"], allowed["y"], _WHERE)
    if not gates.requires_grad:
        raise CheckFailed("the gates that routing(layer, x) returns in training mode require no gradient")
    leaves = {"x": x, **trained(layer)}

    def back(dgates: Tensor) -> dict[str, Tensor]:
        """Carry a gradient of the gates to x and the parameters, as the layer's routing does."""
        along = dgates.to(gates)
        found = torch.autograd.grad(gates, list(leaves.values()), along, retain_graph=True, allow_unused=True)
        return {n: d.double().cpu() for n, d in zip(leaves, found, strict=True) if d is not None}

    generator = torch.Generator().manual_seed(5)
    signs = [2 * torch.randint(2, gates.shape, generator=generator) - 1 for _ in range(SIGNS)]
    routed, errors = back(want["gates"]), [back(sign * allowed["gates"]) for sign in signs]
    parts = {n: (want[n], allowed[n]) for n in ("x",)} | onto_parameters(subject, twin, want, allowed)
    for name, got in found.grads.items():
        value, budget = parts.get(name, (torch.zeros(()), torch.zeros(())))
        if name in routed:
            value = value + routed[name]
            budget = budget + torch.stack([e[name] for e in errors]).square().mean(dim=0).sqrt()
        if got is None and bool(value.any()):
            raise CheckFailed(f"the gradient of {name} is missing{_WHERE}")
        if got is not None and (name in parts or name in routed):
            got = got.flatten(0, 1) if name == "x" else got
            bench.require(f"the gradient of {name}", got, value, budget.expand_as(value), _WHERE)


_WHERE = " in training mode, for the routing that routing(layer, x) reports"


def check_routing(routing: object, x: Tensor, E: int, K: int) -> Routing:
    """Raise CheckFailed unless ``routing`` is one of E experts for x, K for each token."""
    if not isinstance(routing, tuple) or len(routing) != 2:
        raise CheckFailed(f"routing(layer, x) returns a {type(routing).__name__}; it must be a Routing")
    ids, gates = routing
    for name, tensor in (("expert_ids", ids), ("gates", gates)):
        if not isinstance(tensor, Tensor) or tensor.shape != (len(x), K):
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckFailed(f"{name} of routing(layer, x) is {shape}; it must be [{len(x)}, {K}]")
    if len(x) and not (int(ids.min()) >= 0 and int(ids.max()) <= E):
        raise CheckFailed(f"expert_ids of routing(layer, x) are not all in [0, {E}), or {E} where dropped")
    return Routing(ids, gates)
