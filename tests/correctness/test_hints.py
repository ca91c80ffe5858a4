"""A mistake that leaves a pattern gets the hint that names it; what has no pattern gets none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness.judging import calling, compare, hints
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls import sorted_dispatch
from moe_impls.interface import Clamp, Experts, Forward, Routing

REAL = Problem("hints", T=61, D=12, H=10, O=7, E=9, K=3, load="zipf", gates="unnormalised")
EXACT = replace(REAL, exact=True, activation="relu")
SIGNED = replace(REAL, gates="signed")
ZEROS = replace(REAL, gates="one_zero")
EXPERTS = replace(REAL, E=20)
HALF_EMPTY = replace(EXPERTS, load="half_empty")
CLAMP = replace(REAL, activation="swiglu_clamped", clamp=catalogue.NEAR)
SQUARE = replace(REAL, D=8, H=8, O=8, activation="silu")
ALL = slice(None)

right = sorted_dispatch.forward
Change = Callable[[Tensor, Tensor], Tensor]


def hint(forward: Forward, problem: Problem, name: str = "y") -> str:
    """The hint about the output, or about the gradient of the tensor of that name; empty if there is none."""
    inputs, output = make_inputs(problem), name == "y"
    wanted = None if output else [name]
    results = calling.run(forward, inputs, problem.combine, gradients=not output, wanted=wanted)
    with pytest.raises(CheckFailed) as failure:
        compare.require_right({name: results[name]}, problem)
    lines = str(failure.value).splitlines()
    return "".join(line.removeprefix("  hint: ") for line in lines if line.startswith("  hint: "))


def routed(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Forward:
    """An implementation that changes expert ids and gates [T, K] before it uses them."""

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        return right(x, Routing(*change(*routing)), experts, combine=combine)

    return forward


def gated(change: Callable[[Tensor], Tensor]) -> Forward:
    return routed(lambda ids, gates: (ids, change(gates)))


def without(slots: Callable[[Tensor], Tensor]) -> Forward:
    """An implementation that leaves out the slots that a mask, made from the expert ids, picks."""
    return routed(lambda ids, gates: (ids, gates.masked_fill(slots(ids), 0)))


def made_of(change: Callable[[Experts], Experts]) -> Forward:
    """An implementation that changes the experts before it uses them."""

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        return right(x, routing, change(experts), combine=combine)

    return forward


def combined(combine: str) -> Forward:
    return lambda x, routing, experts, **_: right(x, routing, experts, combine=combine)


def gates_on_inputs(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    ids, gates = routing
    parts = [
        right(
            gates[:, k, None] * x, Routing(ids[:, k, None], torch.ones(len(x), 1)), experts, combine=combine
        )
        for k in range(ids.shape[1])
    ]
    return torch.stack(parts).sum(dim=0)


def returning(change: Callable[[Tensor], Tensor]) -> Forward:
    """An implementation that changes y [T, O] before it returns it."""
    return lambda x, routing, experts, combine: change(right(x, routing, experts, combine=combine))


class _Changed(torch.autograd.Function):
    """Identity, with a change to the gradient that flows back."""

    @staticmethod
    def forward(ctx, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.change(grad.clone()), None


def gradient(name: str, change: Change) -> Forward:
    """An implementation that changes the gradient of one tensor, by the expert ids."""

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        tensors = {"x": x, "gates": routing.gates, **experts.tensors}
        tensors[name] = _Changed.apply(tensors[name], lambda grad: change(grad, routing.expert_ids))
        x, routing = tensors.pop("x"), routing._replace(gates=tensors.pop("gates"))
        return right(x, routing, replace(experts, **tensors), combine=combine)

    return forward


def backward(wrong: Forward) -> Forward:
    """An implementation whose output is right and whose gradients are those of a wrong one."""

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        other = wrong(x, routing, experts, combine=combine)
        return right(x, routing, experts, combine=combine).detach() + other - other.detach()

    return forward


def place(ids: Tensor) -> Tensor:
    """[T, K]: the number of the slot among the rows of its expert, in the order of tokens."""
    flat = ids.flatten()
    return torch.stack([(flat[:i] == e).sum() for i, e in enumerate(flat)]).view_as(ids)


def rank(ids: Tensor) -> Tensor:
    """[T, K]: the place of the slot among all, sorted by expert."""
    return ids.flatten().argsort(stable=True).argsort().view_as(ids)


def load(ids: Tensor) -> Tensor:
    """[T, K]: the number of rows of the slot's expert."""
    return ids.flatten().bincount()[ids]


def counts(ids: Tensor) -> Tensor:
    """[E, 1, 1]: the number of tokens of each of EXPERTS.E experts."""
    return ids.flatten().bincount(minlength=EXPERTS.E)[:, None, None]


def zeroed(tensor: Tensor, *index: slice | list[int] | int) -> Tensor:
    tensor[index] = 0
    return tensor


def mixed(experts: Experts, order: Tensor) -> Experts:
    """The experts with the rows of their first layer in another order."""
    assert experts.b_in is not None
    return replace(experts, w_in=experts.w_in[:, order], b_in=experts.b_in[:, order])


EVERY = "every row is wrong; they "
CASES = (
    # gates
    (gated(torch.ones_like), REAL, "y", EVERY + "would be right with every gate 1"),
    (gated(torch.square), REAL, "y", EVERY + "would be right with each gate applied twice"),
    (gates_on_inputs, REAL, "y",
     EVERY + "would be right with each gate applied to the expert's input"),
    (gated(torch.abs), SIGNED, "y", "wrong: each token with a slot whose gate is negative, and no other"),
    (gated(lambda gates: gates / gates.sum(dim=1, keepdim=True)), REAL, "y",
     EVERY + "would be right with gates that sum to one"),
    (routed(lambda ids, gates: (ids.sort(dim=1).values, gates)), REAL, "y",
     "wrong: each token whose expert ids do not ascend, and no other; "
     "they would be right with sorted expert ids and unsorted gates"),
    (gated(lambda gates: zeroed(gates.clone(), ALL, [0, 2])), REAL, "y",
     EVERY + "would be right for choice 1 alone"),
    (gated(lambda gates: gates[:, :1].expand_as(gates)), REAL, "y",
     EVERY + "would be right with the gate of the first choice for all"),
    (routed(lambda ids, gates: (ids, gates.flatten()[rank(ids)])), REAL, "y",
     EVERY + "would be right with slots sorted by expert and unsorted gates"),
    (gradient("gates", lambda grad, ids: zeroed(grad, ALL, 1)), REAL, "gates",
     "wrong: each slot of choice 1, and no other; they are zero"),
    (gradient("gates", lambda grad, ids: grad.masked_fill(make_inputs(ZEROS).routing.gates == 0, 0)), ZEROS,
     "gates", "wrong: each slot whose gate is zero, and no other; they are zero"),
    (backward(gated(torch.ones_like)), REAL, "w_out", EVERY + "would be right with every gate 1"),
    (backward(gated(torch.square)), REAL, "x",
     EVERY + "would be right with each gate applied twice"),
    # combine
    (combined("sum"), replace(REAL, combine="logsumexp"), "y",
     EVERY + "would be right for combine 'sum'"),
    (combined("logsumexp"), REAL, "y", EVERY + "would be right for combine 'logsumexp'"),
    # dispatch
    (without(lambda ids: ids == 4), REAL, "y",
     "wrong: each token that visits expert 4, and no other; they would be right without expert 4"),
    (without(lambda ids: ids == 4), EXACT, "y",
     "wrong: each token that visits expert 4, and no other; they would be right without expert 4"),
    (without(lambda ids: ids >= 6), REAL, "y",
     "wrong: each token that visits an expert from 6 on, and no other"),
    (without(lambda ids: place(ids) >= 16), REAL, "y",
     "wrong: each token with a slot from row 16 of its expert on, and no other"),
    (without(lambda ids: load(ids) % 3 == 0), REAL, "y", ""),
    (backward(without(lambda ids: ids == 4)), EXACT, "x",
     "wrong: each token that visits expert 4, and no other; they would be right without expert 4"),
    (gradient("gates", lambda grad, ids: grad.where(place(ids) < 16, 0)), REAL, "gates",
     "wrong: each slot from row 16 of its expert on, and no other; they are zero"),
    # rows of tokens
    (returning(lambda y: zeroed(y, slice(40, None))), REAL, "y",
     "wrong: each token from 40 on, and no other; they are zero"),
    (returning(lambda y: zeroed(y, slice(40, None))), EXACT, "y",
     "wrong: each token from 40 on, and no other; they are zero"),
    # experts
    (made_of(lambda e: replace(e, b_in=None)), REAL, "y", EVERY + "would be right without b_in"),
    (made_of(lambda e: replace(e, b_out=None)), EXACT, "y", EVERY + "would be right without b_out"),
    (made_of(lambda e: replace(e, activation="geglu")), REAL, "y",
     EVERY + "would be right for activation 'geglu'"),
    (made_of(lambda e: replace(e, output_activation="none")), replace(REAL, output_activation="relu"), "y",
     EVERY + "would be right for output_activation 'none'"),
    (made_of(lambda e: replace(e, clamp=Clamp())), CLAMP, "y",
     EVERY + "would be right for a clamp with the numbers of gpt-oss"),
    (made_of(lambda e: replace(e, clamp=e.clamp._replace(limit=torch.inf))), CLAMP, "y",
     EVERY + "would be right for a clamp with no limit"),
    (made_of(lambda e: replace(e, clamp=e.clamp._replace(offset=0))), CLAMP, "y",
     EVERY + "would be right for a clamp with offset 0"),
    (made_of(lambda e: mixed(e, torch.arange(20).roll(10))), REAL, "y",
     EVERY + "would be right with gate and up rows exchanged"),
    (made_of(lambda e: mixed(e, torch.arange(20).view(10, 2).T.flatten())), REAL, "y",
     EVERY + "would be right with gate and up rows taken alternately"),
    (made_of(lambda e: replace(e, w_out=e.w_out.mT)), SQUARE, "y",
     EVERY + "would be right with w_out transposed"),
    (made_of(lambda e: replace(e, w_in=e.w_in.mT)), SQUARE, "y",
     EVERY + "would be right with w_in transposed"),
    (lambda x, routing, experts, combine: right(zeroed(x.clone(), ALL, slice(8, None)), routing, experts,
     combine=combine), REAL, "y", EVERY + "would be right without features of x from 8 on"),
    (made_of(lambda e: replace(e, w_out=zeroed(e.w_out.clone(), ALL, ALL, slice(8, None)))), REAL, "y",
     EVERY + "would be right without hidden features from 8 on"),
    # gradients of weights
    (gradient("w_in", lambda grad, ids: zeroed(grad, 3)), REAL, "w_in",
     "wrong: all rows of expert 3, and no other; they are zero"),
    (gradient("b_out", lambda grad, ids: zeroed(grad, [3, 5])), EXACT, "b_out",
     "wrong: all rows of experts 3, 5, and no other; they are zero"),
    (gradient("w_in", lambda grad, ids: grad + (counts(ids) == 0)), HALF_EMPTY, "w_in",
     "wrong: all rows of each expert without tokens, and no other; they should be zero"),
    # numbers
    (returning(lambda y: 2 * y), REAL, "y", EVERY + "are 2 times the right ones"),
    (returning(lambda y: -y), EXACT, "y", EVERY + "are -1 times the right ones"),
    (gradient("x", lambda grad, ids: grad / 3), REAL, "x", EVERY + "are 1/3 times the right ones"),
    (gradient("x", lambda grad, ids: 0.3719 * grad), REAL, "x",
     EVERY + "are 0.372 times the right ones"),
    (returning(lambda y: zeroed(y, ALL, slice(5, None))), REAL, "y",
     "every row is wrong; only in columns 5, 6; they are zero"),
    (returning(lambda y: zeroed(y, ALL, 2)), EXACT, "y", "only in column 2; they are zero"),
    (returning(lambda y: 0 * y), REAL, "y", EVERY + "are zero"),
    (returning(lambda y: y * torch.inf), REAL, "y", "every row is wrong; infinite: an overflow"),
    (returning(lambda y: y + torch.nan), REAL, "y",
     "every row is wrong; NaN: memory that was never written, an overflow, or a NaN in another row"),
    (returning(lambda y: y.bfloat16().float()), REAL, "y",
     EVERY + "are off by at most 0.004 of their scale: a lower precision or an approximation"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "problem", "name", "wanted"),
    CASES,
    ids=[f"{i}-{hint[:60]}" for i, (_, _, _, hint) in enumerate(CASES)],
)
def test_a_pattern_gets_its_hint(wrong: Forward, problem: Problem, name: str, wanted: str) -> None:
    assert hint(wrong, problem, name) == wanted


@pytest.mark.parametrize("problem", [REAL, EXACT], ids=["real", "exact"])
def test_what_has_no_pattern_gets_no_hint(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5, 8, 20) * 4:
        tokens = torch.randperm(problem.T, generator=generator)[:count]
        noise = torch.randint(1, 9, (count, problem.O), generator=generator).float()
        assert hint(returning(lambda y, t=tokens, n=noise: y.index_add(0, t, n)), problem) == ""


def test_a_single_token_shows_how_it_is_wrong_and_nothing_about_where() -> None:
    one = replace(REAL, T=1)
    assert hint(gated(torch.ones_like), one) == "they would be right with every gate 1"
    assert hint(routed(lambda ids, gates: (ids.sort(dim=1).values, gates)), replace(one, seed=1)) == (
        "they would be right with sorted expert ids and unsorted gates "
        "or with slots sorted by expert and unsorted gates"
    )


def test_no_other_computation_of_a_large_layer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Problem("large", T=3, D=2_048, H=2_048, O=2_048, E=2, K=1, activation="relu")
    inputs = make_inputs(large)
    y = right(inputs.x, inputs.routing, inputs.experts)
    compare.reference(large)
    monkeypatch.setattr(hints, "evaluate", None)
    with pytest.raises(CheckFailed, match="they are 2 times the right ones"):
        compare.require_right({"y": 2 * y}, large)
    with pytest.raises(CheckFailed, match="every row is wrong\n"):
        compare.require_right({"y": y.sin()}, large)


def test_hints_are_about_the_inputs_that_the_result_was_computed_from() -> None:
    inputs, other = make_inputs(REAL), make_inputs(replace(REAL, seed=1))
    y = without(lambda ids: ids == 4)(other.x, other.routing, other.experts, combine="sum")
    with pytest.raises(CheckFailed, match="each token that visits expert 4, and no other"):
        compare.require_right({"y": y}, REAL, other)
    assert not torch.equal(inputs.routing.expert_ids, other.routing.expert_ids)


def ranks(ids: Tensor) -> Tensor:
    """Place of each slot when slots are sorted by expert: [T, K]."""
    order = ids.flatten().argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(ids)


def beyond_tiles_of_an_expert(ids: Tensor) -> Tensor:
    load = ids.flatten().bincount(minlength=REAL.E)
    position = ranks(ids) - (load.cumsum(0) - load)[ids]
    return position >= (load - load % 16)[ids]


@pytest.mark.parametrize(
    ("lost", "whose"),
    [
        (beyond_tiles_of_an_expert, "rows of each expert"),
        (lambda ids: ranks(ids) >= ids.numel() - ids.numel() % 32, "slots in the order of experts"),
    ],
)
def test_a_lost_tail_is_named_with_its_tile(lost: Callable[[Tensor], Tensor], whose: str) -> None:
    assert "without the last, incomplete tile of " in (found := hint(without(lost), REAL))
    assert whose in found
