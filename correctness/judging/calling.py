"""Calls of an implementation, and what they return by name: y and the gradients that flow back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from correctness.judging.finding import CheckFailed
from correctness.problems.catalogue import is_plain
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Experts, Forward, Implementation, Routing


def run(
    forward: Forward,
    inputs: Inputs,
    combine: str,
    *,
    gradients: bool = True,
    wanted: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Call an implementation: return its y and, with gradients, what flows back from dy, by name.

    The implementation gets leaves of its own. ``wanted`` names those that require a gradient (all by
    default). A gradient that is missing is a failure, since the contract promises each.
    """
    if not gradients:
        x, routing, experts = assemble(inputs, {n: t.detach() for n, t in inputs.tensors.items()})
        with torch.no_grad():
            y = forward(x, routing, experts, combine=combine)
        check_output(y, inputs)
        return {"y": y.detach()}
    return finish(start(forward, inputs, combine, wanted), inputs.dy)


def run_both_ways(
    subject: Implementation, problem: Problem, inputs: Inputs | None = None
) -> Iterator[dict[str, Tensor]]:
    """Call a subject on ``inputs`` or on the problem's own: with gradients, if it has any, and without.

    Kernels for inference take paths of their own. A subject that compiles anew for each kind of call is
    called without gradients on plain problems only.
    """
    inputs = make_inputs(problem) if inputs is None else inputs
    support = subject.support
    if support.gradients:
        yield run(subject.forward, inputs, problem.combine)
    if not support.gradients or not support.compiles_per_case or is_plain(problem, support):
        yield run(subject.forward, inputs, problem.combine, gradients=False)


class Graph(NamedTuple):
    """The output of a call that waits for its backward, and the leaves that want a gradient, by name."""

    y: Tensor
    leaves: dict[str, Tensor]


def start(forward: Forward, inputs: Inputs, combine: str, wanted: Sequence[str] | None = None) -> Graph:
    """Do the forward half of ``run`` with gradients."""
    names = list(inputs.tensors) if wanted is None else list(wanted)
    tensors = {n: t.detach().requires_grad_(n in names) for n, t in inputs.tensors.items()}
    x, routing, experts = assemble(inputs, tensors)
    with torch.enable_grad():
        y = forward(x, routing, experts, combine=combine)
    check_output(y, inputs)
    if not y.requires_grad:
        raise CheckFailed(f"y does not require a gradient though {', '.join(names)} do: the graph is cut")
    return Graph(y, {n: tensors[n] for n in names})


def finish(graph: Graph, dy: Tensor, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """Do the backward half, outside of autocast as in training: return y and the gradients, by name."""
    y, leaves = graph
    results = {"y": y.detach()}
    wanted = list(leaves.values())
    with torch.autocast(y.device.type, enabled=False):
        grads = torch.autograd.grad(y, wanted, dy, retain_graph=retain_graph, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if grad is None:
            raise CheckFailed(f"the gradient of {name} is missing: y does not depend on it")
        if grad.dtype != leaf.dtype or grad.shape != leaf.shape:
            raise CheckFailed(
                f"the gradient of {name} is {grad.dtype} {list(grad.shape)}; "
                f"it must be {leaf.dtype} {list(leaf.shape)}"
            )
        results[name] = grad
    return results


def assemble(inputs: Inputs, tensors: dict[str, Tensor]) -> tuple[Tensor, Routing, Experts]:
    """Return the arguments x, routing, experts of ``inputs``, made of ``tensors`` by name."""
    experts = inputs.experts
    named = Experts(
        tensors["w_in"],
        tensors.get("b_in"),
        tensors["w_out"],
        tensors.get("b_out"),
        experts.activation,
        experts.output_activation,
        experts.clamp,
    )
    return tensors["x"], Routing(inputs.routing.expert_ids, tensors["gates"]), named


def check_output(y: object, inputs: Inputs) -> None:
    """Raise CheckFailed unless y is a tensor [T, O] with the dtype and the device of x."""
    if not isinstance(y, Tensor) or type(y) is not Tensor:
        raise CheckFailed(f"the result is a {type(y).__name__}; it must be a plain tensor")
    x, shape = inputs.x, tuple(inputs.dy.shape)
    for what, got, want in (
        ("shape", tuple(y.shape), shape),
        ("dtype", y.dtype, x.dtype),
        ("device", y.device, x.device),
    ):
        if got != want:
            raise CheckFailed(f"the result has {what} {got}; it must have {want}")
