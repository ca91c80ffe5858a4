"""The oracle of whole layers: the equations of ``oracle.experts`` and ``oracle.router`` and the chain rule.

    z = x router_weightᵀ + router_bias              expert_ids, gates = the choice by z, and its weights
    y = combine_k(gates, f_e(x)) + Σ_s c_s f_s(x)   c_s = sigmoid(x · shared_gate[s]), or 1

Gradients are written out by hand. It shares no code with any layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from correctness.oracle import router
from correctness.oracle.experts import evaluate
from moe_impls.interface import LayerWeights, RouterSpec, check_choice

LOSSES = ("load_balancing_loss", "z_loss", "auxiliary_loss")


class Terms(NamedTuple):
    """Results by name, and for each the size that its entries would have if the terms did not cancel.

    The names are y and, with gradients, x and those of `tensors`. The scales of y and x are [T, 1].
    """

    values: dict[str, Tensor]
    scale: dict[str, Tensor]


def tensors(weights: LayerWeights) -> dict[str, Tensor]:
    """Name the tensors that are present; those of the shared experts are shared.w_in and so on."""
    shared = {} if weights.shared is None else weights.shared.tensors
    named = {n: getattr(weights, n) for n in ("router_weight", "router_bias", "selection_bias")}
    named |= weights.experts.tensors | {f"shared.{name}": tensor for name, tensor in shared.items()}
    named["shared_gate"] = weights.shared_gate
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def map_tensors(weights: LayerWeights, function: Callable[[Tensor], Tensor]) -> LayerWeights:
    """Apply ``function`` to each tensor of the weights."""
    plain = ("router_weight", "router_bias", "selection_bias", "shared_gate")
    present = {name: getattr(weights, name) for name in plain if getattr(weights, name) is not None}
    return replace(
        weights,
        experts=weights.experts.map(function),
        shared=None if weights.shared is None else weights.shared.map(function),
        **{name: function(tensor) for name, tensor in present.items()},
    )


def logits(x: Tensor, weights: LayerWeights) -> Tensor:
    """Compute the logits [T, E], in the dtype of x."""
    z = x @ weights.router_weight.to(x.dtype).T
    return z if weights.router_bias is None else z + weights.router_bias.to(x.dtype)


def choose(x: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token [T, K], and say whether logits in float32 make that clear, [T].

    The rounding of a logit is relative to the terms of its sum, not to itself.
    """
    x = x.double()
    terms = (x.abs() @ weights.router_weight.double().abs().T).amax(dim=1)  # [T]
    eps = torch.finfo(torch.float32).eps * (1 + terms)
    rows = [
        router.select(z, weights.router, weights.selection_bias, e)
        for z, e in zip(logits(x, weights), eps.tolist(), strict=True)
    ]
    ids = torch.tensor([ids for ids, _ in rows]).reshape(-1, weights.router.top_k)
    return ids, torch.tensor([clear for _, clear in rows], dtype=torch.bool)


def gates(z: Tensor, ids: Tensor, spec: RouterSpec) -> Tensor:
    """Compute the gates [T, K] from logits [T, E]."""
    rows = [router.gates(row, i, spec) for row, i in zip(z, ids.tolist(), strict=True)]
    return torch.stack(rows) if rows else z.new_zeros(ids.shape)


def logit_gradient(
    z: Tensor, ids: Tensor, spec: RouterSpec, dgates: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry the gradient ``dgates`` [T, K] of the gates to the logits, [T, E], with its scale.

    size: of the terms that were summed into dgates, [T, K].
    """

    def by_token(d: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = zip(z, ids.tolist(), d, strict=True)
        return [router.gate_gradient(*row[:2], spec, row[2]) for row in rows]

    values = torch.stack([d for d, _ in by_token(dgates)])
    return values, torch.stack([s for _, s in by_token(dgates.abs() + size)])


@torch.no_grad()
def evaluate_layer(
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    dy: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
    wide: torch.dtype = torch.float64,
) -> Terms:
    """Compute the output of tokens x [T, D] that visit ``ids`` [T, K] and, with dy [T, O], all gradients.

    ``dtype`` is the dtype in which intermediates are kept, ``wide`` the one in which sums accumulate and in
    which logits are computed.
    """

    def kept(t: Tensor) -> Tensor:
        return t.to(dtype).to(wide)

    x = x.to(wide)
    z = logits(x, weights)
    routed = evaluate(
        x,
        ids,
        kept(gates(z, ids, weights.router)),
        weights.experts,
        dy,
        weights.combine,
        dtype=dtype,
        wide=wide,
    )
    values = dict(routed.values)
    squares = {name: scale.square() for name, scale in routed.scale.items()}
    if dy is not None:
        dgates, size = values.pop("gates"), squares.pop("gates").sqrt()
        dz, dz_scale = logit_gradient(z, ids, weights.router, dgates, size)
        _add_linear(values, squares, "router_weight", x, weights.router_weight.to(wide), kept(dz), dz_scale)
        if weights.router_bias is not None:
            values["router_bias"], squares["router_bias"] = dz.sum(dim=0), dz_scale.square().sum(dim=0)
        if weights.selection_bias is not None:  # it has no gradient
            values["selection_bias"] = squares["selection_bias"] = torch.zeros_like(z[0])
    if weights.shared is not None:
        _add_shared(values, squares, x, weights, dy, dtype, wide)
    scale = {name: s.sqrt() for name, s in squares.items()}
    for name in scale.keys() & {"y", "x"}:
        scale[name] = scale[name].unsqueeze(1)
    return Terms({name: kept(value) for name, value in values.items()}, scale)


def _add_shared(
    values: dict[str, Tensor],
    squares: dict[str, Tensor],
    x: Tensor,
    weights: LayerWeights,
    dy: Tensor | None,
    dtype: torch.dtype,
    wide: torch.dtype,
) -> None:
    """Add the shared experts: experts that every token visits, with the gates c_s."""
    assert weights.shared is not None
    everyone = torch.arange(len(weights.shared.w_in)).expand(len(x), -1)  # [T, S]
    c = x.new_ones(everyone.shape)
    if weights.shared_gate is not None:
        c = 1 / (1 + torch.exp(-x @ weights.shared_gate.to(wide).T))
    gates = c.to(dtype).to(wide)
    shared = evaluate(x, everyone, gates, weights.shared, dy, "sum", dtype=dtype, wide=wide)
    for name in shared.values.keys() - {"gates"}:
        if name in ("y", "x"):
            values[name] = values[name] + shared.values[name]
            squares[name] = squares[name] + shared.scale[name].square()
        else:
            values[f"shared.{name}"] = shared.values[name]
            squares[f"shared.{name}"] = shared.scale[name].square()
    if dy is not None and weights.shared_gate is not None:
        slope = c * (1 - c)
        dc, dc_scale = shared.values["gates"] * slope, shared.scale["gates"] * slope
        _add_linear(values, squares, "shared_gate", x, weights.shared_gate.to(wide), dc, dc_scale)


def _add_linear(
    values: dict[str, Tensor],
    squares: dict[str, Tensor],
    name: str,
    x: Tensor,
    weight: Tensor,
    d: Tensor,
    d_scale: Tensor,
) -> None:
    """Add what x @ weight.T with the gradient ``d`` [T, N] gives weight [N, D] and x [T, D]."""
    values[name] = d.T @ x
    terms = d_scale.square().T @ x.square()
    squares[name] = terms + terms.mean(dim=1, keepdim=True)
    values["x"] = values["x"] + d @ weight
    squares["x"] = squares["x"] + d_scale.square() @ weight.square().mean(dim=1)


def loss(name: str, x: Tensor, ids: Tensor, weights: LayerWeights) -> Terms:
    """Compute one of LOSSES over tokens x [T, D], T > 0, visiting ``ids``: its value, "loss", and gradients.

    auxiliary_loss is cv²(importance) + cv²(load) with the load a count, without a coefficient.

    Raises:
        ValueError: the loss has no equation here.
    """
    check_choice("loss", name, LOSSES)
    z, spec = logits(x, weights), weights.router
    T, E = z.shape
    tokens = range(T)
    if name == "load_balancing_loss":
        value, size = router.load_balancing_loss(z, ids, tokens), 0.0
        f = ids.flatten().bincount(minlength=E).to(z) / ids.numel()
        p = z.softmax(dim=1)
        dz, dz_scale = (E / T * p * (f + sign * (f * p).sum(dim=1, keepdim=True)) for sign in (-1, 1))
    elif name == "z_loss":
        value, size = router.z_loss(z, tokens), 0.0
        dz = 2 / T * z.logsumexp(dim=1, keepdim=True) * z.softmax(dim=1)
        dz_scale = 2 / T * (1 + z.abs().amax(dim=1, keepdim=True)) * z.softmax(dim=1)
    else:
        g = gates(z, ids, spec)
        sums = router.importance(ids, g, E)
        load = ids.flatten().bincount(minlength=E).tolist()
        value = router.cv_squared(sums) + router.cv_squared(load)
        size = 1.0  # the squares of the mean, which cancel in a variance, over the square of the mean
        v = torch.tensor(sums, dtype=z.dtype)
        mean, variance = v.mean(), v.var() if E > 1 else v.new_zeros(())
        q, spread = mean.square() + 1e-10, max(1, E - 1)
        shift = variance * 2 * mean / E / q.square()
        d = 2 * (v - mean) / spread / q - shift
        d_scale = 2 * (v.abs() + mean.abs()) / spread / q + shift.abs()
        dz, dz_scale = logit_gradient(z, ids, spec, d[ids], d_scale[ids])
    values, squares = {"x": torch.zeros_like(x)}, {"x": x.new_zeros(T)}
    _add_linear(values, squares, "router_weight", x, weights.router_weight.to(x), dz, dz_scale)
    scale = {"router_weight": squares["router_weight"].sqrt()}
    values = {"router_weight": values["router_weight"]}
    if weights.router_bias is not None:
        values["router_bias"] = dz.sum(dim=0)
        scale["router_bias"] = dz_scale.square().sum(dim=0).sqrt()
    values["loss"] = z.new_tensor(value)
    scale["loss"] = values["loss"].abs().clamp(min=size)
    return Terms(values, scale)
