"""The oracle of whole layers: the equations of ``oracle.experts`` and ``oracle.router`` and the chain rule.

    n = x, or router_norm * x / sqrt(mean(x²) + epsilon)
    z = n router_weightᵀ + router_bias              expert_ids, gates = the choice by z, and its weights
    g = gates * expert_scale[expert_ids]            0 for a slot that is dropped
    y = combine_k(g, f_e(x)) + Σ_s c_s f_s(x)       c_s = sigmoid(x · shared_gate[s]), or 1

With gates on the input, f_e(g x) takes the place of g f_e(x); an identity expert is f_e(x) = x. Gradients are
written out by hand. It shares no code with any layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from correctness.oracle import router
from correctness.oracle.experts import evaluate, running_product
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import RouterSpec

PLAIN = ("router_weight", "router_bias", "selection_bias", "expert_scale", "router_norm", "shared_gate")
# How far a logit or a score in the dtype of x may be off, in distances between numbers of that dtype: four
# roundings, such as those of the logit, of its bias, and of the score.
ROUNDED = 2.0


class Terms(NamedTuple):
    """Results by name, and for each the size that its entries would have if the terms did not cancel.

    The names are y and, with gradients, x and those of `tensors`. The scales of y and x are [T, 1].
    """

    values: dict[str, Tensor]
    scale: dict[str, Tensor]


def tensors(weights: LayerWeights) -> dict[str, Tensor]:
    """Name the tensors that are present; those of the shared experts are shared.w_in and so on."""
    shared = {} if weights.shared is None else weights.shared.tensors
    named = {name: getattr(weights, name) for name in PLAIN}
    named |= weights.experts.tensors | {f"shared.{name}": tensor for name, tensor in shared.items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def map_tensors(weights: LayerWeights, function: Callable[[Tensor], Tensor]) -> LayerWeights:
    """Apply ``function`` to each tensor of the weights."""
    present = {name: getattr(weights, name) for name in PLAIN if getattr(weights, name) is not None}
    return replace(
        weights,
        experts=weights.experts.map(function),
        shared=None if weights.shared is None else weights.shared.map(function),
        **{name: function(tensor) for name, tensor in present.items()},
    )


def _normalised(x: Tensor, weights: LayerWeights) -> Tensor:
    """Divide each token by the root of its mean square: [T, D]."""
    return x / (x.square().mean(dim=1, keepdim=True) + weights.router_norm_epsilon).sqrt()


def router_input(x: Tensor, weights: LayerWeights) -> Tensor:
    """Compute what the router projects: tokens x [T, D], or their RMS norm."""
    if weights.router_norm is None:
        return x
    return _normalised(x, weights) * weights.router_norm.to(x.dtype)


def logits(x: Tensor, weights: LayerWeights, rounded: torch.dtype | None = None) -> Tensor:
    """Compute the logits [T, E + Z], in the dtype of x; each step is rounded to the dtype ``rounded``."""

    def kept(t: Tensor) -> Tensor:
        return t if rounded is None else t.to(rounded).to(t.dtype)

    z = kept(kept(router_input(x, weights)) @ weights.router_weight.to(x.dtype).T)
    return z if weights.router_bias is None else kept(z + weights.router_bias.to(x.dtype))


def choose(
    x: Tensor, weights: LayerWeights, logits_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token [T, K], and say whether logits in that dtype make that clear, [T].

    In float32 the rounding of a logit is relative to the terms of its sum, not to itself. In less, sums still
    accumulate in float32, and their result is rounded.
    """
    x = x.double()
    n = router_input(x, weights)
    terms = (n.abs() @ weights.router_weight.double().abs().T).amax(dim=1)  # [T]
    eps = torch.finfo(torch.float32).eps * (1 + terms)
    if (low := torch.finfo(logits_dtype).eps) > torch.finfo(torch.float32).eps:
        norm = 0 if weights.router_norm is None else terms  # whose result is rounded, too
        eps = eps + low * ROUNDED / router.SLACK * (1 + norm)
    rows = [
        router.select(z, weights.router, weights.selection_bias, e)
        for z, e in zip(logits(x, weights), eps.tolist(), strict=True)
    ]
    ids = torch.tensor([ids for ids, _ in rows], dtype=torch.int64).reshape(-1, weights.router.top_k)
    return ids, torch.tensor([clear for _, clear in rows], dtype=torch.bool)


def gates(z: Tensor, ids: Tensor, spec: RouterSpec) -> Tensor:
    """Compute the gates [T, K] from logits [T, E + Z]."""
    rows = [router.gates(row, i, spec) for row, i in zip(z, ids.tolist(), strict=True)]
    return torch.stack(rows) if rows else z.new_zeros(ids.shape)


def slot_scale(ids: Tensor, weights: LayerWeights, like: Tensor) -> Tensor:
    """Look up what multiplies the gate of each slot, [T, K]: 1 for an identity expert."""
    if weights.expert_scale is None:
        return like.new_ones(ids.shape)
    ones = like.new_ones(weights.identity_experts)
    return torch.cat([weights.expert_scale.to(like), ones])[ids]


def logit_gradient(
    z: Tensor, ids: Tensor, spec: RouterSpec, dgates: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry the gradient ``dgates`` [T, K] of the gates to the logits, [T, E + Z], with its scale.

    size: of the terms that were summed into dgates, [T, K].
    """

    def by_token(d: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = zip(z, ids.tolist(), d, strict=True)
        return [router.gate_gradient(*row[:2], spec, row[2]) for row in rows]

    values = torch.stack([d for d, _ in by_token(dgates)])
    return values, torch.stack([s for _, s in by_token(dgates.abs() + size)])


class Sums:
    """Values and squared scales by name, while terms are added to them; and how they are rounded."""

    def __init__(self, dtype: torch.dtype, wide: torch.dtype) -> None:
        self.dtype, self.wide = dtype, wide
        self.values: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def kept(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).to(self.wide)

    def add(self, name: str, value: Tensor, squares: Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares

    def terms(self) -> Terms:
        scale = {name: s.sqrt() for name, s in self.squares.items()}
        for name in scale.keys() & {"y", "x"}:
            scale[name] = scale[name].unsqueeze(1)
        return Terms({name: self.kept(value) for name, value in self.values.items()}, scale)


@torch.no_grad()
def evaluate_layer(
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    dy: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
    wide: torch.dtype = torch.float64,
    rounded: torch.dtype | None = None,
    dropped: Tensor | None = None,
    given: Tensor | None = None,
) -> Terms:
    """Compute the output of tokens x [T, D] that visit ``ids`` [T, K] and, with dy [T, O], all gradients.

    ``dtype`` is the dtype in which intermediates are kept, ``wide`` the one in which sums accumulate and in
    which logits are computed; they are then rounded to ``rounded``. ``dropped``, bool [T, K], are slots that
    add nothing. ``given`` [T, K] are gates in place of all that the router makes them; their gradient,
    "gates", then takes the place of the router's.
    """
    sums = Sums(dtype, wide)
    x, dy = x.to(wide), None if dy is None else dy.to(wide)
    counts = torch.ones_like(ids, dtype=torch.bool) if dropped is None else ~dropped
    if given is None:
        z, scale = logits(x, weights, rounded), slot_scale(ids, weights, x)
        own = gates(z, ids, weights.router)
        g = sums.kept(own * scale) * counts
    else:
        g = given.to(wide) * counts
    is_expert = counts & (ids < len(weights.experts.w_in))
    (_gates_on_output if weights.gates_on == "output" else _gates_on_input)(
        sums, x, ids.where(is_expert, 0), g * is_expert, weights, dy, is_expert
    )
    if weights.identity_experts:
        _add_identity(sums, x, g, counts & ~is_expert, dy)
    if dy is not None and given is None:
        dg, size = sums.values.pop("gates"), sums.squares.pop("gates").sqrt()
        if weights.expert_scale is not None:
            add_up = torch.zeros_like(weights.expert_scale, dtype=wide)
            to = (ids[is_expert],)
            value = add_up.index_put(to, (dg * own)[is_expert], accumulate=True)
            squares = add_up.index_put(to, (size * own).square()[is_expert], accumulate=True)
            sums.add("expert_scale", value, squares)
        dz, dz_scale = logit_gradient(z, ids, weights.router, dg * scale, size * scale.abs())
        add_router(sums, x, weights, dz, dz_scale, dz if rounded is None else sums.kept(dz))
        if weights.selection_bias is not None:  # it has no gradient
            sums.add("selection_bias", torch.zeros_like(z[0]), torch.zeros_like(z[0]))
    if weights.shared is not None:
        _add_shared(sums, x, weights, dy)
    return sums.terms()


def _gates_on_output(
    sums: Sums, x: Tensor, ids: Tensor, g: Tensor, weights: LayerWeights, dy: Tensor | None, real: Tensor
) -> None:
    """Add the routed experts where a slot counts g times; ``real``: the slots that do count."""
    found = evaluate(x, ids, g, weights.experts, dy, weights.combine, dtype=sums.dtype, wide=sums.wide)
    for name, value in found.values.items():
        counted = real if name == "gates" else 1
        sums.add(name, value * counted, found.scale[name].square() * counted)


def _gates_on_input(
    sums: Sums, x: Tensor, ids: Tensor, g: Tensor, weights: LayerWeights, dy: Tensor | None, real: Tensor
) -> None:
    """Add the routed experts of g * x: each slot is a token of its own."""
    T, K = ids.shape
    u = sums.kept(g.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)  # [T * K, D]
    rows = None if dy is None else dy.repeat_interleave(K, dim=0)
    one = real.to(x.dtype).reshape(-1, 1)
    arguments = (u, ids.reshape(-1, 1), one, weights.experts, rows, "sum")
    found = evaluate(*arguments, dtype=sums.dtype, wide=sums.wide)
    values, squares = found.values, {name: scale.square() for name, scale in found.scale.items()}
    sums.add("y", values["y"].unflatten(0, (T, K)).sum(dim=1), squares["y"].view(T, K).sum(dim=1))
    if dy is None:
        return
    du, du_squares = values["x"].unflatten(0, (T, K)), squares["x"].view(T, K)
    sums.add("x", (g.unsqueeze(2) * du).sum(dim=1), (g.square() * du_squares).sum(dim=1))
    sizes = du_squares * x.square().sum(dim=1, keepdim=True)
    sums.add("gates", (du * x.unsqueeze(1)).sum(dim=2) * real, sizes * real)
    for name in weights.experts.tensors:
        sums.add(name, values[name], squares[name])


def _add_identity(sums: Sums, x: Tensor, g: Tensor, real: Tensor, dy: Tensor | None) -> None:
    """Add experts that return x, in the slots ``real``: g x."""
    g = g * real
    total, squares = g.sum(dim=1, keepdim=True), g.square().sum(dim=1)
    sums.add("y", total * x, squares * x.square().mean(dim=1))
    if dy is not None:
        terms = (dy * x).unsqueeze(1) * real.unsqueeze(2)  # [T, K, D]
        sums.add("gates", terms.sum(dim=2), terms.square().sum(dim=2))
        sums.add("x", total * dy, squares * dy.square().mean(dim=1))


def add_router(
    sums: Sums, x: Tensor, weights: LayerWeights, dz: Tensor, dz_scale: Tensor, dz_of_bias: Tensor
) -> None:
    """Add what the gradient ``dz`` [T, E + Z] of the logits gives the router's tensors and x."""
    if weights.router_bias is not None:
        sums.add("router_bias", dz_of_bias.sum(dim=0), dz_scale.square().sum(dim=0))
    n, weight = router_input(x, weights), weights.router_weight.to(x.dtype)
    if weights.router_norm is None:
        _add_linear(sums, "router_weight", n, weight, sums.kept(dz), dz_scale)
        return
    squares = dz_scale.square().T @ n.square()
    sums.add("router_weight", running_product(sums.kept(dz), n), squares + squares.mean(dim=1, keepdim=True))
    dn, dn_squares = sums.kept(dz) @ weight, dz_scale.square() @ weight.square()  # [T, D]
    unit, norm = _normalised(x, weights), weights.router_norm.to(x.dtype)
    squares = (dn_squares * unit.square()).sum(dim=0)
    sums.add("router_norm", (dn * unit).sum(dim=0), squares + squares.mean())
    dn, dn_squares = dn * norm, dn_squares * norm.square()
    along = (dn * unit).mean(dim=1, keepdim=True)
    along_squares = (dn_squares * unit.square()).sum(dim=1, keepdim=True) / x.shape[1] ** 2
    r_squares = 1 / (x.square().mean(dim=1, keepdim=True) + weights.router_norm_epsilon)
    squares = r_squares * (dn_squares + unit.square() * along_squares)
    sums.add("x", r_squares.sqrt() * (dn - unit * along), squares.mean(dim=1))


def _add_shared(sums: Sums, x: Tensor, weights: LayerWeights, dy: Tensor | None) -> None:
    """Add the shared experts: experts that every token visits, with the gates c_s."""
    assert weights.shared is not None
    everyone = torch.arange(len(weights.shared.w_in)).expand(len(x), -1)  # [T, S]
    c = x.new_ones(everyone.shape)
    if weights.shared_gate is not None:
        c = 1 / (1 + torch.exp(-x @ weights.shared_gate.to(x.dtype).T))
    arguments = (x, everyone, sums.kept(c), weights.shared, dy, "sum")
    shared = evaluate(*arguments, dtype=sums.dtype, wide=sums.wide)
    for name in shared.values.keys() - {"gates"}:
        under = name if name in ("y", "x") else f"shared.{name}"
        sums.add(under, shared.values[name], shared.scale[name].square())
    if dy is not None and weights.shared_gate is not None:
        slope = c * (1 - c)
        dc, dc_scale = shared.values["gates"] * slope, shared.scale["gates"] * slope
        _add_linear(sums, "shared_gate", x, weights.shared_gate.to(x.dtype), dc, dc_scale)


def _add_linear(sums: Sums, name: str, x: Tensor, weight: Tensor, d: Tensor, d_scale: Tensor) -> None:
    """Add what x @ weight.T with the gradient ``d`` [T, N] gives weight [N, D] and x [T, D]."""
    terms = d_scale.square().T @ x.square()
    sums.add(name, running_product(d, x), terms + terms.mean(dim=1, keepdim=True))
    sums.add("x", d @ weight, d_scale.square() @ weight.square().mean(dim=1))
