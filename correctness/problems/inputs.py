"""The inputs that are made from a problem."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from correctness.oracle.experts import FORMS, hidden_and_output
from correctness.problems.exact import _exact_numbers
from correctness.problems.gates import GATES
from correctness.problems.loads import load_named
from correctness.problems.problem import MOST_DRAWS, Inputs, Problem
from moe_impls.interface import Experts, Routing


@functools.singledispatch
def make_inputs(problem: Problem) -> Inputs:
    """Make the inputs of a problem: the same on every machine, none requiring gradients.

    x is of unit scale, weights are scaled by the square root of what they are summed over, biases are of
    scale 0.5 and dy is random: nothing is small enough to hide below a tolerance.
    """
    made = _made(problem)
    ids, gates = made.routing
    return made.map(torch.clone)._replace(routing=Routing(ids.clone(), gates.clone()))


@functools.lru_cache(maxsize=4)
def _made(p: Problem) -> Inputs:
    """Make the inputs, and keep them for the next implementation that meets the problem."""
    generator = torch.Generator().manual_seed(p.seed)
    routing = Routing(load_named(p.load)(p, generator), GATES[p.gates](p, generator))
    make = _exact_numbers if p.exact else _real_numbers
    inputs = make(p, routing, generator)
    low, high = sorted((p.dtype, torch.float32), key=lambda dtype: torch.finfo(dtype).bits)
    gate_dtype = low if p.low_gates else high
    gates = inputs.routing.gates.to(gate_dtype)
    cast = inputs.map(lambda t: t.to(p.dtype))._replace(routing=Routing(routing.expert_ids, gates))
    ids = cast.routing.expert_ids.to(p.device)
    cast = cast.map(lambda t: t.to(p.device))
    return cast._replace(routing=Routing(ids, cast.routing.gates))


def _real_numbers(p: Problem, routing: Routing, generator: torch.Generator) -> Inputs:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        # Rounded to the problem's dtype at once, so that the kinks are looked for in what will be computed.
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        return (torch.randn(*shape, generator=generator, dtype=wide) * scale).to(p.dtype)

    experts = Experts(
        w_in=normal(p.E, p.F, p.D, scale=p.D**-0.5),
        b_in=normal(p.E, p.F, scale=0.5) if p.bias else None,
        w_out=normal(p.E, p.O, p.H, scale=p.H**-0.5),
        b_out=normal(p.E, p.O, scale=0.5) if p.bias else None,
        activation=p.activation,
        output_activation=p.output_activation,
        clamp=p.clamp,
    )
    x, dy = normal(p.T, p.D, scale=p.x_scale), normal(p.T, p.O)
    inputs = Inputs(x, routing, experts, dy)
    if p.has_kinks and p.avoids_kinks:
        redrawn = torch.arange(p.T)
        for _ in range(MOST_DRAWS):
            if not len(redrawn := redrawn[near_kink(p, inputs, redrawn)]):
                break
            x[redrawn] = normal(len(redrawn), p.D, scale=p.x_scale)
        else:
            raise ValueError(f"after {MOST_DRAWS} draws tokens are still near a kink in {p.code()}")
    return inputs


def near_kink(p: Problem, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Tell which of the tokens [N] have a selected expert within the margin of a kink: bool [N]."""
    near = torch.zeros(len(tokens), dtype=torch.bool)
    ids = inputs.routing.expert_ids[tokens]
    for expert in ids.unique().tolist():
        rows = (ids == expert).any(dim=1).nonzero().squeeze(1)
        h, f = hidden_and_output(inputs.x[tokens[rows]].double(), inputs.experts, expert)
        gate_kinks, value_kinks = FORMS[p.activation].kinks(p.clamp)
        distances = [(h[:, : p.H] - kink).abs() for kink in gate_kinks]
        distances += [(h[:, p.H :] - kink).abs() for kink in value_kinks]
        if p.output_activation == "relu":
            distances.append(f.abs())
        near[rows] |= (torch.cat(distances, dim=1) < p.kink_margin).any(dim=1)
    return near
