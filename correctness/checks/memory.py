"""Checks of memory: what is read, written, shared and handed out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.utils.deterministic as torch_deterministic

from correctness.judging.calling import assemble, finish, run_both_ways, start
from correctness.judging.compare import require_right, require_right_calls
from correctness.judging.fences import Fences
from correctness.judging.finding import CheckFailed, what
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Implementation, Routing
from moe_impls.registry import one_line


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill new tensors with NaN until they are written to, as reused memory might be."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch_deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch_deterministic, "fill_uninitialized_memory", True)  # noqa: B010  # of a property
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operators without a deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(torch_deterministic, "fill_uninitialized_memory", fills)  # noqa: B010


def dirty_memory(subject: Implementation, problem: Problem) -> None:
    """Read no memory that nothing wrote to, nor leave it in a result, in the first call or the second."""
    with fresh_memory_is_nan():
        for _ in range(2):
            require_right_calls(subject, problem)


def recycled_memory(subject: Implementation, problem: Problem) -> None:
    """Be right where the allocator hands out blocks of the results' sizes that were full of NaN, or of 7."""
    inputs = make_inputs(problem)
    shapes = [inputs.dy.shape, *(t.shape for t in inputs.tensors.values())]
    for filling in (torch.nan, 7.0):
        blocks = [
            torch.full(s, filling, dtype=d, device=problem.device)
            for s in shapes
            for d in (problem.dtype, torch.float32)
        ]
        del blocks
        require_right_calls(subject, problem)


def within_bounds(subject: Implementation, problem: Problem) -> None:
    """Read and write no memory beyond inputs and beyond what is made in a call, with gradients or without."""
    inputs = make_inputs(problem)
    for beyond in (torch.nan, 3.0):
        fences = Fences(beyond)
        named = {name: fences.around(tensor, name) for name, tensor in inputs.tensors.items()}
        x, (ids, gates), experts = assemble(inputs, named)
        routing, dy = Routing(fences.around(ids, "expert_ids"), gates), fences.around(inputs.dy, "dy")
        with fences:
            found = list(run_both_ways(subject, problem, Inputs(x, routing, experts, dy)))
        fences.require_intact()
        for results in found:
            require_right(results, problem)


def inputs_unchanged(subject: Implementation, problem: Problem) -> None:
    """Write to no input, in forward or backward, and return no view of one."""
    inputs = make_inputs(problem)
    before = inputs.map(torch.clone)
    ids = inputs.routing.expert_ids.clone()
    named = {**inputs.tensors, "dy": inputs.dy, "expert_ids": inputs.routing.expert_ids}
    versions = {name: tensor._version for name, tensor in named.items()}
    kept = {**before.tensors, "dy": before.dy, "expert_ids": ids}
    for results in run_both_ways(subject, problem, inputs):
        for name, tensor in named.items():
            if not torch.equal(tensor, kept[name]):
                raise CheckFailed(f"{name} was written to")
            if tensor._version != versions[name]:
                raise CheckFailed(f"{name} was written to, and its contents restored")
            for result, value in results.items():
                if (
                    value.numel()
                    and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                ):
                    raise CheckFailed(f"{what(result)} shares its memory with the input {name}")


def shared_memory(subject: Implementation, problem: Problem) -> None:
    """Accept inputs of one shape that share their memory: w_in and w_out, b_in and b_out, x and dy."""
    inputs = make_inputs(problem)
    experts = inputs.experts
    if experts.w_in.shape == experts.w_out.shape:
        experts = replace(experts, w_out=experts.w_in, b_out=experts.b_in)
    require_right_calls(subject, problem, inputs._replace(experts=experts, dy=inputs.x))


def results_are_the_callers(subject: Implementation, problem: Problem) -> None:
    """Let callers write into y and gradients without silently corrupting gradients or later calls."""
    inputs = make_inputs(problem)
    if subject.support.gradients:
        graph = start(subject.forward, inputs, problem.combine)
        try:
            graph.y.add_(1)
            results = finish(graph, inputs.dy)
        except RuntimeError as error:  # autograd may refuse, as it does for its own sigmoid
            if "inplace" not in str(error):
                raise
        else:
            require_right({name: t for name, t in results.items() if name != "y"}, problem)
    x, (ids, gates), _, _ = inputs
    one_token = inputs._replace(
        x=x[:1].expand(x.shape), routing=Routing(*(t[:1].expand(t.shape) for t in (ids, gates)))
    )
    for given in (one_token, inputs):
        for results in run_both_ways(subject, problem, given):
            for name, t in results.items():
                if name == "y" or 0 not in t.stride():  # autograd itself makes gradients that repeat a row
                    try:
                        t.add_(torch.nan)
                    except RuntimeError as error:
                        raise CheckFailed(f"{what(name)} cannot be written to: {one_line(error)}") from error
    for results in run_both_ways(subject, problem, inputs):
        require_right(results, problem)
