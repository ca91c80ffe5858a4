from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from correctness.judging import calling
from correctness.judging.calling import Graph, finish, run, start
from correctness.judging.compare import hold, hold_calls
from correctness.judging.finding import CheckFailed, what
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import EXACT_ACTIVATIONS, Problem, unsupported
from moe_impls.interface import ACTIVATIONS, GATED_ACTIVATIONS, Implementation, Support


def after_inference(subject: Implementation, problem: Problem) -> None:
    """A first call under inference_mode keeps nothing that training cannot use, as tensors made there are."""
    with torch.inference_mode():
        x, routing, experts, _ = make_inputs(problem)
        subject.forward(x, routing, experts, combine=problem.combine)
    hold_calls(subject, problem)


def without_gradients(subject: Implementation, problem: Problem) -> None:
    """Under no_grad and inference_mode, and where nothing requires a gradient, the numbers are right."""
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            inputs = make_inputs(problem)
            y = subject.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
            calling.check_output(y, inputs)
            if y.requires_grad:
                raise CheckFailed("y requires a gradient, and no input does")
            hold({"y": y}, problem)
    # In training, weights that require gradients and a call under no_grad (evaluation) are common.
    inputs = make_inputs(problem)
    x, routing, experts = calling.assemble(
        inputs, {n: t.requires_grad_(subject.support.gradients) for n, t in inputs.tensors.items()}
    )
    with torch.no_grad():
        y = subject.forward(x, routing, experts, combine=problem.combine)
    if y.requires_grad:
        raise CheckFailed("y requires a gradient under no_grad")
    hold({"y": y}, problem)


def gradient_subsets(subject: Implementation, problem: Problem) -> None:
    """Any part of the tensors may require gradients: each set of them that there is."""
    inputs = make_inputs(problem)
    names = list(inputs.tensors)
    subsets = [
        list(wanted) for size in range(1, len(names)) for wanted in itertools.combinations(names, size)
    ]
    if subject.support.compiles_per_case:  # each subset is compiled anew
        subsets = [["x"], ["gates"], ["w_in", "w_out"]]
    for wanted in subsets:
        hold(run(subject.forward, inputs, problem.combine, wanted=wanted), problem)


def inside_a_graph(subject: Implementation, problem: Problem) -> None:
    """Inputs may be results of other operations, and weights may be nn.Parameter: gradients pass through."""
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
        hold(finish(Graph(y, leaves), inputs.dy), problem)
        if not subject.support.compiles_per_case:
            with torch.no_grad():
                hold({"y": subject.forward(x, routing, experts, combine=problem.combine)}, problem)


def several_graphs(subject: Implementation, problem: Problem) -> None:
    """Forwards, one without gradients, and their backwards in either order: each keeps what is its own.

    The last of them differ in their options, too.
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
            hold(finish(graph, i.dy), p)
        hold(evaluated, graphs_of[2])


def _other_options(problem: Problem, support: Support) -> list[Problem]:
    """The problem with one option at a time replaced by another that is declared, of the same shapes."""
    p = problem
    alike = [
        a
        for a in (EXACT_ACTIVATIONS if p.exact else ACTIVATIONS)
        if (a in GATED_ACTIVATIONS) == (p.activation in GATED_ACTIVATIONS)
    ]
    others = []
    for option, values in (
        ("activation", alike),
        ("output_activation", support.output_activations if p.bias else ()),
        ("combine", () if p.exact else support.combines),
    ):
        others += [replace(p, **{option: value}) for value in values if value != getattr(p, option)][:1]
    return [p for p in others if unsupported(support, p) is None]


def backward_twice(subject: Implementation, problem: Problem) -> None:
    """With retain_graph=True a second backward of a graph, of another dy, is right; the first stays.

    In exact problems it gives to the bit what the first gave, times the same power of two or zero.
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
    hold(first, problem)
    hold({name: t if name == "y" else t / 2 for name, t in again.items()}, problem)


def gradients_accumulate(subject: Implementation, problem: Problem) -> None:
    """Two backwards into the same .grad give the sum, and the first gradient is not overwritten."""
    inputs = make_inputs(problem)
    y, leaves = start(subject.forward, inputs, problem.combine)
    x, routing, experts = calling.assemble(inputs, leaves)
    y.backward(inputs.dy)
    subject.forward(x, routing, experts, combine=problem.combine).backward(inputs.dy)
    sums = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if missing := leaves.keys() - sums.keys():
        raise CheckFailed(f"no gradient reached {', '.join(sorted(missing))}")
    hold({name: grad / 2 for name, grad in sums.items()}, problem)
