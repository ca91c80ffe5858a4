"""What one rank does for a check: calls of the subject on its part of a problem, and all that they return."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from correctness.judging.calling import assemble, finish, run, start
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from correctness.ranks.problems import Spread
from correctness.ranks.rank import mesh_of
from correctness.ranks.share import Share, share
from moe_impls.interface import Forward, Implementation, Routing
from moe_impls.registry import resolve

Results = dict[str, Tensor]
Work = Callable[["Part"], list[Results]]


class Source(NamedTuple):
    """How a rank finds a subject: a function that returns an Implementation, and its arguments."""

    function: Callable[..., Implementation]
    arguments: tuple[Any, ...]


class Part(NamedTuple):
    """One rank's part of one or more problems of the same combine: what it calls and with what."""

    subject: Implementation
    shares: list[Share]
    inputs: list[Inputs]
    combine: str

    @property
    def forward(self) -> Forward:
        return self.subject.forward


def by_name(name: str) -> Implementation:
    """Find the implementation that a name on the command line means, distributed or not."""
    return resolve(name, distributed=True)


@functools.cache
def load(source: Source) -> Implementation:
    """Find a subject, once in each rank."""
    return source.function(*source.arguments)


def do(
    work: Work, source: Source, spreads: list[Spread], rank: int, members: tuple[int, ...]
) -> list[Results]:
    """Do this rank's part of the work; ``rank`` is its number in the mesh of those members of the world.

    Raises:
        CheckFailed: a result is of the wrong form, a gradient is missing, or an argument was changed.
    """
    first = spreads[0]
    found = load(source)
    forward = functools.partial(found.forward, mesh=mesh_of(members), num_experts=first.problem.E)
    subject = replace(found, forward=forward)
    inputs = [spread.part(make_inputs(spread.problem), rank) for spread in spreads]
    shares = [share(spread, rank) for spread in spreads]
    found = work(Part(subject, shares, inputs, first.problem.combine))
    for spread, given in zip(spreads, inputs, strict=True):
        made = spread.part(make_inputs(spread.problem), rank)
        changed = [n for n, t in given.tensors.items() if not torch.equal(t, made.tensors[n])]
        if changed or not torch.equal(given.routing.expert_ids, made.routing.expert_ids):
            raise CheckFailed(f"it writes to its argument {(*changed, 'expert_ids')[0]}")
    return [{name: t.detach().clone() for name, t in results.items()} for results in found]


def both_ways(part: Part) -> list[Results]:
    """With gradients and without."""
    (inputs,) = part.inputs
    return [
        run(part.forward, inputs, part.combine),
        run(part.forward, inputs, part.combine, gradients=False),
    ]


def output(part: Part) -> list[Results]:
    """Without gradients."""
    (inputs,) = part.inputs
    return [run(part.forward, inputs, part.combine, gradients=False)]


def of_one_process(check: Callable[[Implementation, Problem], object], part: Part) -> list[Results]:
    """What a check of one process does with the rank's own share, in step with the other ranks."""
    check(part.subject, part.shares[0])
    return []


def several_graphs(part: Part) -> list[Results]:
    """All forwards before all backwards, in the same order and in the other; of inputs by turns."""
    found = []
    for step in (1, -1):
        graphs = [start(part.forward, inputs, part.combine) for inputs in part.inputs]
        pairs = list(zip(graphs, part.inputs, strict=True))[::step]
        found += [finish(graph, inputs.dy) for graph, inputs in pairs][::step]
    return found


def twice(part: Part) -> list[Results]:
    """Two backwards of one retained graph."""
    (inputs,) = part.inputs
    graph = start(part.forward, inputs, part.combine)
    return [finish(graph, inputs.dy, retain_graph=True), finish(graph, inputs.dy)]


def accumulated(part: Part) -> list[Results]:
    """Half of what two forwards and backwards leave in .grad."""
    (inputs,) = part.inputs
    y, leaves = start(part.forward, inputs, part.combine)
    y.backward(inputs.dy)
    x, routing, experts = assemble(inputs, leaves)
    part.forward(x, routing, experts, combine=part.combine).backward(inputs.dy)
    if missing := [name for name, leaf in leaves.items() if leaf.grad is None]:
        raise CheckFailed(f"no gradient reached {', '.join(missing)}")
    return [{name: leaf.grad / 2 for name, leaf in leaves.items() if leaf.grad is not None}]


def recomputed(part: Part) -> list[Results]:
    """Under activation checkpointing, where a backward calls it again."""
    (inputs,) = part.inputs

    def forward(x: Tensor, routing: Routing, experts: Any, *, combine: str) -> Any:
        names = list(experts.tensors)

        def again(x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
            named = {"x": x, "gates": gates, **dict(zip(names, weights, strict=True))}
            return part.forward(*assemble(inputs, named), combine=combine)

        return checkpoint(again, x, routing.gates, *experts.tensors.values(), use_reentrant=False)

    return [run(forward, inputs, part.combine)]


def subsets(part: Part) -> list[Results]:
    """Gradients of some inputs alone: of a first layer, of a frozen router, of frozen experts."""
    (inputs,) = part.inputs
    weights = list(inputs.experts.tensors)
    wanted = (["x"], ["gates"], weights, ["x", "gates"], ["gates", *weights], ["x", "w_out"], weights[-1:])
    return [run(part.forward, inputs, part.combine, wanted=names) for names in wanted]
