"""Checks of gradients: what a graph keeps, who may ask for what, and in which order."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from correctness.judging import calling
from correctness.judging.calling import Graph, finish, run, start
from correctness.judging.compare import require_right, require_right_calls
from correctness.judging.finding import CheckFailed, during, what
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import (
    Problem,
    exact_activations,
    is_rounded,
    unsupported,
    with_activation,
)
from moe_impls.interface import GATED_ACTIVATIONS, Implementation, Support


def after_inference(subject: Implementation, problem: Problem) -> None:
    """Keep nothing from a first call under inference_mode that training cannot use, as tensors made there."""
    with torch.inference_mode():
        x, routing, experts, _ = make_inputs(problem)
        subject.forward(x, routing, experts, combine=problem.combine)
    require_right_calls(subject, problem)


def without_gradients(subject: Implementation, problem: Problem) -> None:
    """Return the right output, without a graph, under no_grad, inference_mode or without gradients."""
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            inputs = make_inputs(problem)
            y = subject.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
            calling.check_output(y, inputs)
            if y.requires_grad:
                raise CheckFailed("y requires a gradient, and no input does")
            require_right({"y": y}, problem)
    # In training, weights that require gradients and a call under no_grad (evaluation) are common.
    inputs = make_inputs(problem)
    x, routing, experts = calling.assemble(
        inputs, {n: t.requires_grad_(subject.support.gradients) for n, t in inputs.tensors.items()}
    )
    with torch.no_grad():
        y = subject.forward(x, routing, experts, combine=problem.combine)
    if y.requires_grad:
        raise CheckFailed("y requires a gradient under no_grad")
    require_right({"y": y}, problem)


def gradient_subsets(subject: Implementation, problem: Problem) -> None:
    """Give the right gradients whichever of the tensors require them: each set of them that there is."""
    inputs = make_inputs(problem)
    names = list(inputs.tensors)
    subsets = [
        list(wanted) for size in range(1, len(names)) for wanted in itertools.combinations(names, size)
    ]
    if subject.support.compiles_per_case:  # each subset is compiled anew
        subsets = [["x"], ["gates"], ["w_in", "w_out"]]
    for wanted in subsets:
        with during(f"a call in which {' and '.join(wanted)} alone require gradients"):
            require_right(run(subject.forward, inputs, problem.combine, wanted=wanted), problem)


def inside_a_graph(subject: Implementation, problem: Problem) -> None:
    """Pass gradients through to where inputs come from, be they results of operations or an nn.Parameter."""
    inputs = make_inputs(problem)
    for parameters in (False, True):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.tensors.items()}
        tensors = {n: leaf * 1 for n, leaf in leaves.items()}
        if parameters:
            weights = {n: torch.nn.Parameter(leaves[n].detach()) for n in inputs.experts.tensors}
            leaves, tensors = leaves | weights, tensors | weights
        x, routing, experts = calling.assemble(inputs, tensors)
        y = subject.forward(x, routing, experts, combine=problem.combine)
        calling.check_output(y, inputs)
        if not y.requires_grad:
            raise CheckFailed("y does not require a gradient where its inputs are results of operations")
        require_right(finish(Graph(y, leaves), inputs.dy), problem)
        if not subject.support.compiles_per_case:
            with torch.no_grad():
                require_right({"y": subject.forward(x, routing, experts, combine=problem.combine)}, problem)


def several_graphs(subject: Implementation, problem: Problem) -> None:
    """Keep several graphs apart whose backwards come in either order, with other calls between.

    The last of the graphs differ in their options, too.
    """
    support = subject.support
    graphs_of = [replace(problem, seed=problem.seed + i) for i in range(3)]
    if not support.compiles_per_case:
        graphs_of += _other_options(graphs_of[0], support)
    inputs = [make_inputs(p) for p in graphs_of]
    for step in (1, -1):
        graphs = [start(subject.forward, i, p.combine) for p, i in zip(graphs_of, inputs, strict=True)]
        evaluated = run(subject.forward, inputs[2], problem.combine, gradients=False)
        for p, i, graph in list(zip(graphs_of, inputs, graphs, strict=True))[::step]:
            require_right(finish(graph, i.dy), p)
        require_right(evaluated, graphs_of[2])


def _other_options(problem: Problem, support: Support) -> list[Problem]:
    """Replace one option of the problem at a time by another that is declared, of the same shapes."""
    p = problem
    gated = p.activation in GATED_ACTIVATIONS
    alike = exact_activations(support) if p.exact else support.activations
    same = (a for a in alike if a != p.activation and (a in GATED_ACTIVATIONS) == gated)
    others = [with_activation(p, a) for a in itertools.islice(same, 1)]
    for option, values in (
        ("output_activation", support.output_activations if p.bias else ()),
        ("combine", () if p.exact else support.combines),
    ):
        others += [replace(p, **{option: value}) for value in values if value != getattr(p, option)][:1]
    return [p for p in others if unsupported(support, p) is None and not is_rounded(p)]


def backward_twice(subject: Implementation, problem: Problem) -> None:
    """Give the right gradients in a second backward of a retained graph, and leave the first ones alone.

    In exact problems a dy times a power of two, or zero, gives the first gradients times that, to the bit.
    """
    inputs = make_inputs(problem)
    graph = start(subject.forward, inputs, problem.combine)
    first = finish(graph, inputs.dy, retain_graph=True)
    if problem.exact:
        power = 40 if torch.finfo(problem.dtype).max > 1e30 else 2
        for factor in (2.0**-power, 2.0**power, 0.0):
            scaled = finish(graph, inputs.dy * factor, retain_graph=True)
            for name in graph.leaves:
                if not torch.equal(scaled[name], first[name] * factor):
                    raise CheckFailed(f"dy times {factor:.3g} does not give {what(name)} times that")
    again = finish(graph, 2 * inputs.dy)
    require_right(first, problem)
    require_right({name: t if name == "y" else t / 2 for name, t in again.items()}, problem)


def gradients_accumulate(subject: Implementation, problem: Problem) -> None:
    """Add up the gradients of two backwards in .grad, without overwriting the first."""
    inputs = make_inputs(problem)
    y, leaves = start(subject.forward, inputs, problem.combine)
    x, routing, experts = calling.assemble(inputs, leaves)
    y.backward(inputs.dy)
    subject.forward(x, routing, experts, combine=problem.combine).backward(inputs.dy)
    sums = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if missing := leaves.keys() - sums.keys():
        raise CheckFailed(f"no gradient reached {', '.join(sorted(missing))}")
    require_right({name: grad / 2 for name, grad in sums.items()}, problem)
