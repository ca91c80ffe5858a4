"""The comparison finds what is wrong, however little of it is wrong, and says what, where and how much."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness.checks.case import Case, Check
from correctness.checks.table import implementation
from correctness.checks.values import values
from correctness.judging.calling import run
from correctness.judging.compare import fractions, reference
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import LOW_PRECISION, Problem
from moe_impls import index_add, sorted_dispatch
from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Implementation, Routing
from tests.correctness.wrong import dropped_token


def errors(forward: Callable[..., Tensor], problem: Problem, *, gradients: bool = True) -> dict[str, float]:
    """Return the worst error of each tensor as a fraction of its budget; at most 1 is right."""
    results = run(forward, make_inputs(problem), problem.combine, gradients=gradients)
    return fractions(results, reference(problem))


@pytest.mark.parametrize(
    "name, size",
    [("integers_cancelling", 1), ("integers_cancelling_pairs", 1), ("integers_cancelling_pairs", 2)],
)
def test_bfloat16_sum_over_k_shows_in_exact_mode(name: str, size: int) -> None:
    """256 + 1 - 256 is 1 in float32 and 0 in bfloat16, where single terms or the sums of pairs are added."""

    def low_precision_sum(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        y = torch.zeros(len(x), experts.w_out.shape[1], dtype=x.dtype)
        for ids, gates in zip(*(t.split(size, dim=1) for t in routing), strict=True):
            y = y + sorted_dispatch.forward(x, Routing(ids, gates), experts, combine=combine)
        return y

    problem = next(p for p in catalogue.EXACT if p.name == name and p.dtype == torch.bfloat16)
    assert errors(sorted_dispatch.forward, problem)["y"] == 0
    assert errors(low_precision_sum, problem)["y"] > 1


def test_low_precision_gates_do_not_make_sums_of_low_precision() -> None:
    """Of the gradient of x, too: dx summed in the dtype of the gates is right where nothing cancels."""

    def as_the_gates(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        return index_add.forward(x.to(routing.gates.dtype), routing, experts, combine=combine)

    def sums_gradients(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        parts = zip(*(t.split(1, dim=1) for t in routing), strict=True)  # each adds to x.grad in its dtype
        wide = experts.map(Tensor.float)
        y = sum(
            index_add.forward(x.clone().float(), Routing(i, g.float()), wide, combine=combine)
            for i, g in parts
        )
        return torch.as_tensor(y).to(x.dtype)

    low = [p for p in catalogue.EXACT if p.low_gates and p.gates == "cancelling"]
    assert {p.dtype for p in low} == set(LOW_PRECISION)
    for problem in low:
        assert max(errors(as_the_gates, problem).values()) == 0
    found = [errors(sums_gradients, problem) for problem in low if problem.dtype == torch.bfloat16]
    assert all(f["y"] == 0 for f in found) and max(f["x"] for f in found) > 1


def test_a_weight_gradient_that_adds_one_slot_after_the_other_is_far_within_its_budget() -> None:
    """Whatever order the matrix products of this processor add in."""

    def gathered(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        own = experts.map(lambda w: w[routing.expert_ids])  # whose gradient adds each slot's in turn
        assert own.b_in is not None and own.b_out is not None
        h = (own.w_in @ x[:, None, :, None]).squeeze(-1) + own.b_in
        outputs = (own.w_out @ activate(h, experts.activation).unsqueeze(-1)).squeeze(-1) + own.b_out
        return combine_slots(outputs, routing.gates, combine)

    problem = next(p for p in catalogue.SIZES if p.name == "prefill" and p.activation == "gelu")
    found = errors(gathered, problem)
    assert max(found["w_in"], found["w_out"]) < 0.25


@pytest.mark.parametrize("size", ["D", "H"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_sums_in_parts_show_in_exact_mode(size: str, dtype: torch.dtype) -> None:
    """2201 in one half and -2200 in the other are 1 in float32, and not where halves are kept in 16 bits."""

    def in_halves(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        y = torch.zeros(len(x), problem.O, dtype=dtype)
        assert experts.b_in is not None and experts.b_out is not None
        for (ids, gates), e in itertools.product(zip(*(t.T for t in routing), strict=True), range(problem.E)):
            here = ids == e
            parts = zip(x[here].tensor_split(2, dim=1), experts.w_in[e].tensor_split(2, dim=1), strict=True)
            hidden = (sum(a @ w.mT for a, w in parts) + experts.b_in[e]).relu()
            parts = zip(hidden.tensor_split(2, dim=1), experts.w_out[e].tensor_split(2, dim=1), strict=True)
            outputs = sum(a @ w.mT for a, w in parts) + experts.b_out[e]
            y[here] += outputs * gates[here, None].to(dtype)
        return y

    name = f"integers_opposed_{size}"
    problem = next(p for p in catalogue.EXACT if p.name == name and p.dtype == dtype)
    assert errors(sorted_dispatch.forward, problem)["y"] == 0
    assert errors(in_halves, problem, gradients=False)["y"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x", "gates", "w_in", "b_in", "w_out", "b_out"])
def test_each_gradient_is_judged_apart(name: str, dtype: torch.dtype) -> None:
    """One wrong row of one gradient is found, and only there."""
    problem = replace(catalogue.SMALL, dtype=dtype)
    ref = reference(problem)
    results = {n: v.clone() for n, v in ref.oracle.values.items()}
    row = (-1,) * (results[name].dim() - 1) if results[name].dim() > 1 else (-1,)
    results[name][row] *= 1.5
    found = fractions(results, ref)
    assert found[name] > 1
    assert all(fraction == 0 for other, fraction in found.items() if other != name)


def test_gradient_of_an_expert_without_tokens_must_be_exactly_zero() -> None:
    problem = Problem("empty", T=6, D=5, H=4, O=3, E=8, K=1, load="same_experts", gates="unnormalised")
    ref = reference(problem)
    results = {n: v.clone() for n, v in ref.oracle.values.items()}
    empty = next(e for e in range(8) if e not in make_inputs(problem).routing.expert_ids)
    results["w_in"][empty, 0, 0] = 1e-30
    assert fractions(results, ref)["w_in"] == torch.inf


def test_nan_is_never_within_budget() -> None:
    ref = reference(catalogue.SMALL)
    results = {n: v.clone() for n, v in ref.oracle.values.items()}
    results["y"][3, 2] = torch.nan
    assert fractions(results, ref)["y"] == torch.inf


def test_a_failure_names_tensor_row_error_budget_and_reproduction() -> None:
    subject = Implementation("dropped_token", dropped_token)
    with pytest.raises(CheckFailed) as failure:
        Case(implementation(subject), Check(values), catalogue.SMALL).run()
    message = str(failure.value)
    for part in ("dropped_token", "y is wrong at token 36", "budget", "reproduce: Problem(name='small'"):
        assert part in message
    code = message[message.index("Problem(") :]
    assert eval(code, {"Problem": Problem, "torch": torch}) == catalogue.SMALL
