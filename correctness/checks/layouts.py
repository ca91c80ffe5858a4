"""Checks of how inputs lie in memory: strided, sliced, expanded, one tensor among contiguous ones."""

from __future__ import annotations

import torch
from torch import Tensor

from correctness.judging import calling
from correctness.judging.calling import run_both_ways
from correctness.judging.compare import require_right, require_right_calls
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Implementation, Routing


def _filled(shape: list[int], like: Tensor) -> Tensor:
    return torch.full(
        shape, torch.nan if like.is_floating_point() else -1, dtype=like.dtype, device=like.device
    )


def _scattered(t: Tensor) -> Tensor:
    """Copy into every second entry of a larger tensor of NaN, the last dimension outermost."""
    padded = _filled([2 * s + 1 for s in reversed(t.shape)], t)
    return padded.permute(*reversed(range(t.dim())))[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """Copy into a dense tensor with the last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _padded(t: Tensor) -> Tensor:
    """Copy into the leading columns of wider rows."""
    return _filled([*t.shape[:-1], t.shape[-1] + 3], t)[..., :-3].copy_(t)


def _sliced(t: Tensor) -> Tensor:
    """Copy into the first rows of each matrix of a taller tensor, as w_in lies in a fused one."""
    return _filled([*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]], t)[..., :-3, :].copy_(t)


LAYOUTS = (_scattered, _transposed, _padded, _sliced)


def strides(subject: Implementation, problem: Problem) -> None:
    """Accept inputs, and a gradient that flows in, that are not contiguous: the numbers alone decide."""
    plain = make_inputs(problem)
    for layout in LAYOUTS:
        inputs = plain.map(layout)
        ids = layout(plain.routing.expert_ids)
        inputs = inputs._replace(routing=inputs.routing._replace(expert_ids=ids))
        for results in run_both_ways(subject, problem, inputs):
            require_right(results, problem)


def one_strided(subject: Implementation, problem: Problem) -> None:
    """Accept one input at a time that is not contiguous among others that are."""
    plain = make_inputs(problem)
    for name, tensor in plain.tensors.items():
        arguments = calling.assemble(plain, plain.tensors | {name: _scattered(tensor)})
        for results in run_both_ways(subject, problem, Inputs(*arguments, plain.dy)):
            require_right(results, problem)


def offsets(subject: Implementation, problem: Problem) -> None:
    """Accept inputs that are contiguous pieces out of the middle of a larger tensor."""

    def piece(t: Tensor) -> Tensor:
        return _filled([t.numel() + 7], t)[3 : 3 + t.numel()].view(t.shape).copy_(t)

    inputs = make_inputs(problem).map(piece)
    inputs = inputs._replace(routing=Routing(piece(inputs.routing.expert_ids), inputs.routing.gates))
    for results in run_both_ways(subject, problem, inputs):
        require_right(results, problem)


def expanded(subject: Implementation, problem: Problem) -> None:
    """Accept inputs that repeat one row by a stride of zero: tokens, gates, weights, dy as of y.sum().

    Rows of x may also overlap, as windows of a signal do, or be all zeros, as padding is.
    """
    plain = make_inputs(problem)
    x, (ids, gates), experts, dy = plain
    T, D = x.shape
    for inputs in (
        plain._replace(x=x.flatten()[: T + D - 1].unfold(0, D, 1)),
        plain._replace(x=x * (torch.arange(T, device=x.device) % 3 > 0).unsqueeze(1)),
        plain._replace(x=x[:1].expand(x.shape)),
        plain._replace(routing=Routing(ids, gates[:1].expand(gates.shape))),
        plain._replace(routing=Routing(ids[:1].expand(ids.shape), gates)),
        plain._replace(experts=experts.map(lambda w: w[:1].expand(w.shape))),
        plain._replace(dy=dy.flatten()[:1].expand(dy.shape)),
    ):
        require_right_calls(subject, problem, inputs)
