from __future__ import annotations

import torch
from torch import Tensor

from correctness.judging import calling
from correctness.judging.calling import calls
from correctness.judging.compare import hold, hold_calls
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Implementation, Routing


def _filled(shape: list[int], like: Tensor) -> Tensor:
    return torch.full(
        shape, torch.nan if like.is_floating_point() else -1, dtype=like.dtype, device=like.device
    )


def _scattered(t: Tensor) -> Tensor:
    """The same numbers as every second entry of a larger tensor of NaN, the last dimension outermost."""
    padded = _filled([2 * s + 1 for s in reversed(t.shape)], t)
    return padded.permute(*reversed(range(t.dim())))[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """The same numbers, dense, with the last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _padded(t: Tensor) -> Tensor:
    """The same numbers as the leading columns of wider rows."""
    return _filled([*t.shape[:-1], t.shape[-1] + 3], t)[..., :-3].copy_(t)


def _sliced(t: Tensor) -> Tensor:
    """The same numbers as the first rows of each matrix of a taller tensor, as w_in of a fused one."""
    return _filled([*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]], t)[..., :-3, :].copy_(t)


LAYOUTS = (_scattered, _transposed, _padded, _sliced)


def strides(subject: Implementation, problem: Problem) -> None:
    """Inputs, and the gradient that flows in, need not be contiguous: the numbers alone decide."""
    plain = make_inputs(problem)
    for layout in LAYOUTS:
        inputs = plain.map(layout)
        ids = layout(plain.routing.expert_ids)
        inputs = inputs._replace(routing=inputs.routing._replace(expert_ids=ids))
        for results in calls(subject, problem, inputs):
            hold(results, problem)


def one_strided(subject: Implementation, problem: Problem) -> None:
    """One input at a time that is not contiguous, among others that are."""
    plain = make_inputs(problem)
    for name, tensor in plain.tensors.items():
        arguments = calling.assemble(plain, plain.tensors | {name: _scattered(tensor)})
        for results in calls(subject, problem, Inputs(*arguments, plain.dy)):
            hold(results, problem)


def offsets(subject: Implementation, problem: Problem) -> None:
    """Inputs may be contiguous pieces out of the middle of a larger tensor."""

    def piece(t: Tensor) -> Tensor:
        return _filled([t.numel() + 7], t)[3 : 3 + t.numel()].view(t.shape).copy_(t)

    inputs = make_inputs(problem).map(piece)
    inputs = inputs._replace(routing=Routing(piece(inputs.routing.expert_ids), inputs.routing.gates))
    for results in calls(subject, problem, inputs):
        hold(results, problem)


def expanded(subject: Implementation, problem: Problem) -> None:
    """Inputs may repeat one row by a stride of zero: tokens, gates, weights, or dy as y.sum() gives it.

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
        hold_calls(subject, problem, inputs)
