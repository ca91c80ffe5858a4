"""The comparison rejects what is wrong, however little of it is wrong, and its problems are what they say."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness import problems
from correctness.checks import CHECKS, Case, Check, cases
from correctness.compare import CheckFailed, exact_reference, fractions, reference, verify
from correctness.generated import first_rounded
from correctness.problems import LOW_PRECISION, Inputs, Problem, make_inputs
from correctness.reference import hidden_and_output
from moe_impls import sorted_dispatch
from moe_impls.interface import Experts, Implementation, Routing, Support


def zeros(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return 0 * sorted_dispatch.forward(x, routing, experts, combine=combine)


def no_gate(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    ones = torch.ones_like(routing.gates) + 0 * routing.gates
    return sorted_dispatch.forward(x, routing._replace(gates=ones), experts, combine=combine)


def dead_expert(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """The least visited of the visited experts returns nothing: w_out and b_out of zero."""
    counts = routing.expert_ids.flatten().bincount(minlength=len(experts.w_out))
    rarest = counts.masked_fill(counts == 0, counts.max() + 1).argmin()
    alive = (torch.arange(len(counts)) != rarest).to(x.dtype)
    dead = replace(experts, w_out=experts.w_out * alive[:, None, None])
    if dead.b_out is not None:
        dead = replace(dead, b_out=dead.b_out * alive[:, None])
    return sorted_dispatch.forward(x, routing, dead, combine=combine)


def dropped_token(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (torch.arange(len(x)) != len(x) - 1).to(y.dtype).unsqueeze(1)


NULL_IMPLEMENTATIONS = (zeros, no_gate, dead_expert, dropped_token)


def is_trivial_for(wrong: Callable, problem: Problem) -> bool:
    """Whether this mistake does not change the problem's answer, so that nothing can notice it."""
    if problem.T == 0:
        return True
    # softmax over one choice is a gate of one
    return wrong is no_gate and problem.K == 1 and problem.gates == "softmax"


@pytest.mark.parametrize("problem", problems.OPTIONS + problems.SIZES, ids=lambda p: p.id)
def test_every_value_problem_rejects_the_null_implementations(problem: Problem) -> None:
    for wrong in NULL_IMPLEMENTATIONS:
        if is_trivial_for(wrong, problem):
            assert problem.name in ("no_tokens", "all_ones")
        else:
            assert verify(wrong, problem, gradients=False)["y"] > 1, wrong.__name__


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_every_check_rejects_what_it_is_there_for(check: Check) -> None:
    """Checks that compare reject all null implementations; the others the one mistake that they look for."""
    for wrong in BUGS.get(check.name, NULL_IMPLEMENTATIONS):
        subject = Implementation(wrong.__name__, wrong, Support(second_order=True))
        with pytest.raises(CheckFailed):
            for case in cases([subject], [check]):
                case.run()


class _Doubled(torch.autograd.Function):
    """Identity whose derivative is 2: a gradient off by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class _WrongSecond(torch.autograd.Function):
    """Identity with the right derivative, whose own derivative is lost."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.detach() + 0 * grad


def doubled_gate_gradient(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return sorted_dispatch.forward(
        x, routing._replace(gates=_Doubled.apply(routing.gates)), experts, combine=combine
    )


def lost_second_derivative(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return sorted_dispatch.forward(_WrongSecond.apply(x), routing, experts, combine=combine)


def writes_to_x(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    x.data.mul_(1.5)
    return y


def noisy(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """Rounding that differs between calls, far inside any budget."""
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (1 + torch.randint(2, (), dtype=y.dtype) * 2 * torch.finfo(y.dtype).eps)


def draws_random_numbers(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return sorted_dispatch.forward(x, routing, experts, combine=combine) + 0 * torch.rand(())


def position_matters(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y * (1 + (torch.arange(len(x)) == 3).to(y.dtype).unsqueeze(1))


def batch_size_matters(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return 2 * y if len(x) > 100 else y


def every_expert_matters(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    return sorted_dispatch.forward(x, routing, experts, combine=combine) + experts.w_out.abs().sum()


def with_gates(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An implementation that changes the gates [T, K], by the expert ids [T, K], before it uses them."""

    def changed_gates(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        ids, gates = routing
        return sorted_dispatch.forward(x, Routing(ids, change(ids, gates)), experts, combine=combine)

    return changed_gates


def requires_a_gradient(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
    """A result in a graph though no input is: a training step would keep it alive."""
    y = sorted_dispatch.forward(x, routing, experts, combine=combine)
    return y + torch.zeros((), dtype=y.dtype, requires_grad=True)


BUGS = {
    "without_gradients": (*NULL_IMPLEMENTATIONS, requires_a_gradient),
    "global_state": (draws_random_numbers,),
    "exports": (sorted_dispatch.forward,),  # reads its part sizes from the host
    "fullgraph": (sorted_dispatch.forward,),
    "tokens_permuted": (position_matters,),
    "experts_relabelled": (with_gates(lambda ids, gates: torch.where(ids < 8, 0, gates)),),
    "choices_reordered": (with_gates(lambda ids, gates: torch.cat([2 * gates[:, :1], gates[:, 1:]], dim=1)),),
    "batch_split": (batch_size_matters,),
    "gates_doubled": (with_gates(lambda ids, gates: gates.clamp(max=1)),),
    "identical_experts": (with_gates(lambda ids, gates: gates.abs()),),
    "one_expert_doubled": (every_expert_matters,),
    "slot_split": (with_gates(lambda ids, gates: gates.square()),),
    "gradcheck": (doubled_gate_gradient,),
    "second_order": (lost_second_derivative,),
    "inputs_unchanged": (writes_to_x,),
    "deterministic": (noisy,),
}


@pytest.mark.parametrize("problem", problems.EXACT, ids=lambda p: p.id)
def test_exact_problems_round_nothing(problem: Problem) -> None:
    """Every intermediate that an implementation may store is representable in the problem's dtype."""
    assert first_rounded(problem) == ""


@pytest.mark.parametrize("problem", problems.EXACT, ids=lambda p: p.id)
def test_no_hidden_unit_of_an_exact_problem_lies_on_its_kink(problem: Problem) -> None:
    x, (ids, _), experts, _ = make_inputs(problem).map(torch.Tensor.double)
    for expert in range(problem.E):
        h, _ = hidden_and_output(x[(ids == expert).any(dim=1)], experts, expert)
        assert not bool((h == 0).any())


@pytest.mark.parametrize("problem", problems.EXACT, ids=lambda p: p.id)
def test_exact_problems_have_something_to_compare(problem: Problem) -> None:
    for name, want in exact_reference(problem).items():
        assert want.isfinite().all()
        assert want.count_nonzero() > 0, name


def test_bfloat16_sum_over_k_shows_in_exact_mode() -> None:
    """256 + 1 - 256 is 1 in float32 and 0 in bfloat16."""

    def low_precision_sum(x: Tensor, routing: Routing, experts: Experts, *, combine: str) -> Tensor:
        y = torch.zeros(len(x), experts.w_out.shape[1], dtype=x.dtype)
        for k in range(routing.gates.shape[1]):
            one = Routing(routing.expert_ids[:, k : k + 1], routing.gates[:, k : k + 1])
            y = y + sorted_dispatch.forward(x, one, experts, combine=combine)
        return y

    problem = next(p for p in problems.EXACT if p.name == "integers_cancelling" and p.dtype == torch.bfloat16)
    assert verify(sorted_dispatch.forward, problem)["y"] == 0
    assert verify(low_precision_sum, problem)["y"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x", "gates", "w_in", "b_in", "w_out", "b_out"])
def test_each_gradient_is_judged_apart(name: str, dtype: torch.dtype) -> None:
    """One wrong row of one gradient is found, and only there."""
    problem = replace(problems.SMALL, dtype=dtype)
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
    ref = reference(problems.SMALL)
    results = {n: v.clone() for n, v in ref.oracle.values.items()}
    results["y"][3, 2] = torch.nan
    assert fractions(results, ref)["y"] == torch.inf


def test_a_failure_names_tensor_row_error_budget_and_reproduction() -> None:
    subject = Implementation("dropped_token", dropped_token)
    with pytest.raises(CheckFailed) as failure:
        Case(subject, CHECKS[0], problems.SMALL).run()
    message = str(failure.value)
    for part in ("dropped_token", "y is wrong at token 36", "budget", "reproduce: Problem(name='small'"):
        assert part in message
    code = message[message.index("Problem(") :]
    assert eval(code, {"Problem": Problem, "torch": torch}) == problems.SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_lies_near_a_kink(dtype: torch.dtype) -> None:
    problem = replace(problems.SMALL, T=2000, activation="relu", output_activation="relu", dtype=dtype)
    inputs = make_inputs(problem)
    assert not problems.near_kink(problem, inputs, torch.arange(problem.T)).any()
    assert dtype not in LOW_PRECISION


def test_same_problem_makes_the_same_inputs_and_another_seed_others() -> None:
    def numbers(inputs: Inputs) -> list[Tensor]:
        return [*inputs.tensors.values(), inputs.routing.expert_ids, inputs.dy]

    first, again, other = (make_inputs(replace(problems.SMALL, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(numbers(first), numbers(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(numbers(first), numbers(other), strict=True))


@pytest.mark.parametrize("load", problems.LOADS)
@pytest.mark.parametrize("E, K", [(1, 1), (7, 1), (7, 3), (7, 7)])
def test_loads_give_distinct_valid_experts(load: str, E: int, K: int) -> None:
    ids = make_inputs(replace(problems.SMALL, T=50, E=E, K=K, load=load)).routing.expert_ids
    assert ids.shape == (50, K) and ids.min() >= 0 and ids.max() < E
    assert all(len(set(row)) == K for row in ids.tolist())


def test_loads_differ_in_how_they_spread() -> None:
    counts = {
        load: make_inputs(replace(problems.SMALL, T=4000, E=16, K=2, load=load)).routing.expert_ids.flatten()
        for load in problems.LOADS
    }
    counts = {load: ids.bincount(minlength=16) for load, ids in counts.items()}
    assert counts["uniform"].min() > 0.8 * 4000 * 2 / 16
    assert counts["one_hot_expert"].max() == 4000
    assert (counts["same_experts"] > 0).sum() == 2
    assert (counts["half_empty"] > 0).sum() == 8
    assert counts["zipf"].max() > 4 * counts["zipf"].median()
