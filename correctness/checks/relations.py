"""Relations between two calls that hold whatever the right result is: no oracle is needed, nor believed.

Each compares an implementation with itself, on exact problems, where equal means bit-equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from correctness.judging.calling import run_both_ways
from correctness.judging.finding import CheckFailed, what
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Experts, Implementation, Routing

Results = dict[str, Tensor]
PER_TOKEN = ("y", "x", "gates")


def call(subject: Implementation, problem: Problem, inputs: Inputs) -> Results:
    """Return the results of one call, with gradients if the subject has any."""
    return next(run_both_ways(subject, problem, inputs))


def _equal(relation: str, got: Results, want: Results) -> None:
    for name, value in want.items():
        if not torch.equal(got[name], value):
            different = (got[name] != value).flatten(1).any(dim=1).nonzero().flatten().tolist()
            raise CheckFailed(f"{relation}, but {what(name)} differs in rows {different[:8]}")


def _order(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device)


def tokens_permuted(subject: Implementation, problem: Problem) -> None:
    """Give tokens in another order the same rows in that order, and the weights the same gradients."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    order = _order(problem.T, inputs.x.device)
    x, (ids, gates), experts, dy = inputs
    moved = Inputs(x[order], Routing(ids[order], gates[order]), experts, dy[order])
    want = {n: t[order] if n in PER_TOKEN else t for n, t in plain.items()}
    _equal("only the order of tokens changed", call(subject, problem, moved), want)


def experts_relabelled(subject: Implementation, problem: Problem) -> None:
    """Give experts under other numbers the same result, and their gradients under the new numbers."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    new = _order(problem.E, inputs.x.device)  # expert e becomes new[e]
    old = new.argsort()
    ids, gates = inputs.routing
    moved = inputs._replace(routing=Routing(new[ids], gates), experts=inputs.experts.map(lambda w: w[old]))
    want = {n: t if n in PER_TOKEN else t[old] for n, t in plain.items()}
    _equal("only the numbers of experts changed", call(subject, problem, moved), want)


def choices_reordered(subject: Implementation, problem: Problem) -> None:
    """Accept the K choices of a token, each with its gate, in any order."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    ids, gates = inputs.routing
    for order in (torch.arange(problem.K).flip(0), ids.sort(dim=1).indices.cpu()):
        order = order.expand(problem.T, problem.K).to(ids.device)
        moved = inputs._replace(routing=Routing(ids.gather(1, order), gates.gather(1, order)))
        want = {n: t.gather(1, order) if n == "gates" else t for n, t in plain.items()}
        _equal("only the order of each token's choices changed", call(subject, problem, moved), want)


def batch_split(subject: Implementation, problem: Problem) -> None:
    """Give a batch in parts the rows of the whole, and gradients of weights that add up to its own."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    cuts = [0, 1, problem.T // 3, problem.T - 1, problem.T]
    parts = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        x, (ids, gates), experts, dy = inputs
        rows = slice(begin, end)
        parts.append(
            call(subject, problem, Inputs(x[rows], Routing(ids[rows], gates[rows]), experts, dy[rows]))
        )
    got = {
        n: torch.cat([p[n] for p in parts])
        if n in PER_TOKEN
        else torch.stack([p[n] for p in parts]).sum(dim=0)
        for n in plain
    }
    _equal("the batch came in parts", got, plain)


def gates_doubled(subject: Implementation, problem: Problem) -> None:
    """Double the result and gradients when all gates double, and leave the gradient of the gates as it is."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    ids, gates = inputs.routing
    got = call(subject, problem, inputs._replace(routing=Routing(ids, 2 * gates)))
    want = {n: t if n == "gates" else 2 * t for n, t in plain.items()}
    _equal("only the gates doubled", got, want)


def identical_experts(subject: Implementation, problem: Problem) -> None:
    """Make of K equal experts one dense layer with the sum of the gates."""
    inputs = make_inputs(problem)
    ids, gates = inputs.routing
    same = inputs.experts.map(lambda w: w[:1].repeat(len(w), *[1] * (w.dim() - 1)))
    got = call(subject, problem, inputs._replace(experts=same))
    total = Routing(torch.zeros_like(ids[:, :1]), gates.sum(dim=1, keepdim=True))
    dense = inputs._replace(routing=total, experts=inputs.experts.map(lambda w: w[:1].clone()))
    want = call(subject, replace(problem, E=1, K=1), dense)
    got = {n: t if n in ("y", "x") else t.sum(dim=0, keepdim=True) for n, t in got.items() if n != "gates"}
    _equal("all experts are equal", got, {n: t for n, t in want.items() if n != "gates"})


def output_weights_zero(subject: Implementation, problem: Problem) -> None:
    """Return b_out alone, weighted by the gates, where w_out is zero, and pass nothing back to x."""
    inputs = make_inputs(problem)
    ids, gates = inputs.routing
    experts = replace(inputs.experts, w_out=torch.zeros_like(inputs.experts.w_out))
    got = call(subject, problem, inputs._replace(experts=experts))
    bias = torch.zeros_like(experts.w_out[:, :, 0]) if experts.b_out is None else experts.b_out
    if experts.output_activation == "relu":
        bias = bias.relu()
    y = (gates.unsqueeze(-1) * bias[ids].to(gates.dtype)).sum(dim=1).to(inputs.x.dtype)
    zeros = {n: torch.zeros_like(t) for n, t in got.items() if n in ("x", "w_in", "b_in")}
    _equal("w_out is zero", got, {"y": y, **zeros})


def one_expert_doubled(subject: Implementation, problem: Problem) -> None:
    """Change the rows of an expert's tokens and of no others when its w_out changes."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    ids = inputs.routing.expert_ids
    for expert in {int(ids.flatten().mode().values), int(ids[-1, -1]), int(ids.max()), int(ids.min())}:
        w_out = inputs.experts.w_out.clone()
        w_out[expert] *= 2
        got = call(subject, problem, inputs._replace(experts=replace(inputs.experts, w_out=w_out)))
        others = (ids != expert).all(dim=1)
        _equal(
            f"only w_out of expert {expert} doubled",
            {"y": got["y"][others]}, {"y": plain["y"][others]},
        )  # fmt: skip


def slot_split(subject: Implementation, problem: Problem) -> None:
    """Give the same result where a choice is split in halves between its expert and a copy of it."""
    inputs = make_inputs(problem)
    plain = call(subject, problem, inputs)
    x, (ids, gates), experts, dy = inputs
    twin = ids[:, :1] + problem.E  # a copy of each expert stands E places further on
    halves = torch.cat([gates[:, :1] / 2, gates[:, 1:], gates[:, :1] / 2], dim=1)
    doubled: Experts = experts.map(lambda w: torch.cat([w, w]))
    split = Inputs(x, Routing(torch.cat([ids, twin], dim=1), halves), doubled, dy)
    got = call(subject, replace(problem, E=2 * problem.E, K=problem.K + 1), split)
    got = {
        n: t if n in ("y", "x") else t[:, :-1] if n == "gates" else t[: problem.E] + t[problem.E :]
        for n, t in got.items()
    }
    _equal("one choice was split in two", got, plain)


RELATIONS = (
    tokens_permuted,
    experts_relabelled,
    choices_reordered,
    batch_split,
    gates_doubled,
    identical_experts,
    output_weights_zero,
    one_expert_doubled,
    slot_split,
)
