"""Inputs of exact problems: numbers that no order of summation rounds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from correctness.problems.problem import (
    EXACT_CLAMP,
    NARROW,
    Inputs,
    Problem,
    gate_scale,
)
from moe_impls.interface import CLAMPED, Experts, Routing


def _exact_numbers(p: Problem, routing: Routing, generator: torch.Generator) -> Inputs:
    """Draw integers (biases: half-integers) so small that no right computation rounds any intermediate.

    Hidden pre-activations are never zero: with biases they are half-integers; without, they are odd, since
    one feature of x and its weights are odd and all other weights even. So no derivative is taken at a kink.
    Smooth activations get gates so large that they and their derivatives are those of relu to the last bit;
    a clamped one an alpha so large.
    """
    if p.combine != "sum":
        raise ValueError(f"exact problems need combine 'sum', not {p.combine!r}")
    if p.activation == CLAMPED and p.clamp != EXACT_CLAMP:
        raise ValueError(f"exact problems of {CLAMPED} need clamp {EXACT_CLAMP}, not {p.clamp}")
    if p.output_activation == "relu" and not p.bias:
        raise ValueError("exact problems with an output relu need biases, which keep outputs off its kink")
    wide = p
    if p.opposed:
        p = replace(p, D=min(p.D, NARROW), H=min(p.H, NARROW))

    def sparse(*shape: int, nonzeros: int, values: tuple[float, ...]) -> Tensor:
        """Give about ``nonzeros`` random entries of the last dimension one of ``values``."""
        pick = torch.rand(*shape, generator=generator) < nonzeros / shape[-1]
        drawn = torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
        return torch.where(pick, drawn, 0.0).double()

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).double() * 2 - 1

    halves = (-1.5, -0.5, 0.5, 1.5)
    x = sparse(p.T, p.D, nonzeros=4, values=(-1, 1))
    x[:, 0] = signs(p.T)
    if p.x_scale > 1:
        x[:, 0] *= 2 * torch.randint(int(p.x_scale + 1) // 2, (p.T,), generator=generator) + 1
    w_in = sparse(p.E, p.F, p.D, nonzeros=3, values=(-2, 2))
    w_in[..., 0] = signs(p.E, p.F)
    b_in = sparse(p.E, p.F, nonzeros=p.F, values=halves)
    b_out = sparse(p.E, p.O, nonzeros=p.O, values=(-0.125, 0.125))
    w_in[:, : p.H] *= gate_scale(p)
    b_in[:, : p.H] *= gate_scale(p)
    b_out *= gate_scale(p)
    experts = Experts(
        w_in=w_in,
        b_in=b_in if p.bias else None,
        w_out=sparse(p.E, p.O, p.H, nonzeros=3, values=(-1, 1)),
        b_out=b_out if p.bias else None,
        activation=p.activation,
        output_activation=p.output_activation,
        clamp=p.clamp,
    )
    powers = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    gates = powers[torch.randint(3, (p.T, p.K), generator=generator)] * signs(p.T, p.K)
    if p.gates == "cancelling":
        gates = routing.gates
    elif p.gates == "one_zero":
        gates = torch.where(routing.gates == 0, 0, gates)
    dy = sparse(p.T, p.O, nonzeros=3, values=(-1, 1))
    if wide.opposed:
        x, experts = _opposed(wide, x, experts)
    return Inputs(x, Routing(routing.expert_ids, gates), experts, dy)


def _opposed(p: Problem, x: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """Add features and units, up to D and H, the second half of which takes back the first.

    More features are the first one again, in w_in twice as large; more units see the first feature alone.
    """
    more_features, more_units = (torch.ones(max(0, size - NARROW)) for size in (p.D, p.H))
    for more in (more_features, more_units):
        more[len(more) // 2 :] = -1
        more[len(more) // 2 * 2 :] = 0  # one that has no opposite
    x = torch.cat([x, x[:, :1] * more_features], dim=1)
    w_in = torch.cat([experts.w_in, 2 * experts.w_in[..., :1] * more_features.abs()], dim=2)
    row = torch.zeros(p.E, len(more_units), w_in.shape[2])
    row[..., 0] = 1
    scales = (gate_scale(p), 1)[: p.F // p.H]  # of gate rows and up rows

    def longer(t: Tensor, more: Tensor) -> Tensor:
        parts = zip(t.chunk(len(scales), dim=1), scales, strict=True)
        return torch.cat([piece for part, scale in parts for piece in (part, scale * more)], dim=1)

    return x, replace(
        experts,
        w_in=longer(w_in, row),
        b_in=None if experts.b_in is None else longer(experts.b_in, 1.5 * row[..., 0]),  # 0.5 or 2.5 in all
        w_out=torch.cat([experts.w_out, 2 * more_units.expand(p.E, p.O, -1)], dim=2),
    )
