"""Problems are what they say: exact ones round nothing, kinks are far, loads spread as named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from correctness.judging.compare import reference
from correctness.oracle.experts import hidden_and_output
from correctness.problems import catalogue, loads
from correctness.problems.generated import first_rounded
from correctness.problems.inputs import make_inputs, near_kink
from correctness.problems.problem import (
    KINKED_ACTIVATIONS,
    LOW_PRECISION,
    Inputs,
    Problem,
    fit,
    unsupported,
)
from moe_impls.interface import ACTIVATIONS, CLAMPED, Clamp, Support


@pytest.mark.parametrize("problem", catalogue.EXACT, ids=lambda p: p.id)
def test_exact_problems_round_nothing(problem: Problem) -> None:
    """Every intermediate that an implementation may store is representable in the problem's dtype."""
    assert first_rounded(problem) == ""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_problems_round_nothing_with_the_options_of_a_subject(activation: str, bias: bool) -> None:
    support = Support(activations=(activation,), biases=(bias,))
    small = [p for p in catalogue.EXACT if p.T * p.E < 2_000 and max(p.D, p.H, p.O) < 100]
    fitted = [fit(p, support) for p in small]
    taken = [p for p in fitted if unsupported(support, p) is None]
    assert len(taken) > len(fitted) / 2
    assert [p.id for p in taken if first_rounded(p)] == []


@pytest.mark.parametrize("activation", KINKED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_inputs_away_from_kinks_are_found_at_every_size(activation: str, dtype: torch.dtype) -> None:
    support = Support(activations=(activation,), output_activations=("relu",), dtypes=(dtype,))
    for problem in {fit(p, support) for p in catalogue.SIZES if p.T * p.E < 10_000}:
        inputs = make_inputs(problem)
        if problem.avoids_kinks:
            assert not near_kink(problem, inputs, torch.arange(problem.T)).any()


@pytest.mark.parametrize("problem", catalogue.EXACT, ids=lambda p: p.id)
def test_no_hidden_unit_of_an_exact_problem_lies_on_its_kink(problem: Problem) -> None:
    x, (ids, _), experts, _ = make_inputs(problem).map(torch.Tensor.double)
    for expert in range(problem.E):
        h, _ = hidden_and_output(x[(ids == expert).any(dim=1)], experts, expert)
        assert not bool((h == 0).any())
        if problem.activation == CLAMPED:
            assert not bool((h.abs() == problem.clamp.limit).any())


CLAMPS = [p for p in (*catalogue.OPTIONS, *catalogue.LARGE, *catalogue.EXACT) if p.activation == CLAMPED]


@pytest.mark.parametrize("problem", CLAMPS, ids=lambda p: p.id)
def test_a_problem_with_a_clamp_reaches_every_side_of_it(problem: Problem) -> None:
    x, (ids, _), experts, _ = make_inputs(problem).map(torch.Tensor.double)
    tokens = [(x[(ids == e).any(dim=1)], experts, e) for e in range(problem.E)]
    h = torch.cat([hidden_and_output(*arguments)[0] for arguments in tokens])
    limit, H = problem.clamp.limit, problem.H
    for side in (h[:, :H] > limit, h[:, :H] < -limit, h[:, H:] > limit, h[:, H:] < -limit):
        assert 0.01 < side.double().mean() < 0.5


def test_no_problem_is_satisfied_by_the_numbers_of_one_model_alone() -> None:
    assert len({p.clamp for p in CLAMPS}) >= 4
    numbers = [{p.clamp[i] for p in CLAMPS} for i in range(3)]
    assert all(len(values) >= 3 for values in numbers)


def test_numbers_that_a_subject_does_not_declare_are_replaced_or_left_out() -> None:
    support = Support(clamps=(Clamp(),))
    for problem in CLAMPS:
        fitted = fit(problem, support)
        assert fitted.clamp == Clamp() or fitted.activation != CLAMPED
        assert unsupported(support, fitted) is None
        if problem.clamp != Clamp():
            assert unsupported(support, problem) == f"clamp {tuple(problem.clamp)} not declared"


@pytest.mark.parametrize("problem", catalogue.EXACT, ids=lambda p: p.id)
def test_exact_problems_have_something_to_compare(problem: Problem) -> None:
    for name, want in reference(problem).oracle.values.items():
        assert want.isfinite().all()
        assert want.count_nonzero() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_lies_near_a_kink(dtype: torch.dtype) -> None:
    problem = replace(catalogue.SMALL, T=2000, activation="relu", output_activation="relu", dtype=dtype)
    inputs = make_inputs(problem)
    assert not near_kink(problem, inputs, torch.arange(problem.T)).any()
    assert dtype not in LOW_PRECISION


def test_gates_of_low_precision_are_not_asked_for_beside_another_dtype() -> None:
    low = [p for p in catalogue.SIZES if p.low_gates]
    assert low and not any(fit(p, Support(dtypes=(torch.float64,))).low_gates for p in low)


def test_same_problem_makes_the_same_inputs_and_another_seed_others() -> None:
    def numbers(inputs: Inputs) -> list[Tensor]:
        return [*inputs.tensors.values(), inputs.routing.expert_ids, inputs.dy]

    first, again, other = (make_inputs(replace(catalogue.SMALL, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(numbers(first), numbers(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(numbers(first), numbers(other), strict=True))


@pytest.mark.parametrize("load", [*loads.LOADS, "zipf_0.5", "hot_experts_1"])
@pytest.mark.parametrize("E, K", [(1, 1), (7, 1), (7, 3), (7, 7)])
def test_loads_give_distinct_valid_experts(load: str, E: int, K: int) -> None:
    ids = make_inputs(replace(catalogue.SMALL, T=50, E=E, K=K, load=load)).routing.expert_ids
    assert ids.shape == (50, K) and ids.min() >= 0 and ids.max() < E
    assert all(len(set(row)) == K for row in ids.tolist())


def test_loads_differ_in_how_they_spread() -> None:
    counts = {
        load: make_inputs(replace(catalogue.SMALL, T=4000, E=16, K=2, load=load)).routing.expert_ids.flatten()
        for load in [*loads.LOADS, "zipf_0.1", "zipf_2", "hot_experts_3"]
    }
    counts = {load: ids.bincount(minlength=16) for load, ids in counts.items()}
    assert counts["uniform"].min() > 0.8 * 4000 * 2 / 16
    assert counts["one_hot_expert"].max() == 4000
    assert (counts["same_experts"] > 0).sum() == 2
    assert (counts["half_empty"] > 0).sum() == 8
    assert counts["zipf"].max() > 4 * counts["zipf"].median()
    assert counts["zipf_0.1"].max() < 1.6 * counts["zipf_0.1"].min()
    assert counts["zipf_2"].max() > 1.5 * counts["zipf"].max()
    assert counts["hot_experts_3"].topk(3).values.sum() == 8000
    assert counts["router"].max() > 2 * counts["router"].min()


def test_tokens_of_one_text_share_experts_of_a_router() -> None:
    """Neighbours do so more often than tokens of different texts."""
    ids = make_inputs(replace(catalogue.SMALL, T=6400, E=32, K=1, load="router")).routing.expert_ids.flatten()
    texts = ids.view(-1, 64)
    assert (texts[:, 0] == texts[:, 1]).sum() > 1.5 * (texts[:-1, 0] == texts[1:, 0]).sum()


@pytest.mark.parametrize(
    "load", ["", "zip", "zipf_", "zipf_0", "zipf_nan", "zipf_10", "hot_experts_0", "hot_experts_1.5", "_2"]
)
def test_a_load_that_does_not_exist_is_refused_with_the_valid_ones(load: str) -> None:
    with pytest.raises(ValueError, match=f"load is '{load}'; valid are uniform, .*hot_experts_<number>"):
        make_inputs(replace(catalogue.SMALL, load=load))


def test_more_hot_experts_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="load is 'hot_experts_9'; there are E = 5 experts"):
        make_inputs(replace(catalogue.SMALL, load="hot_experts_9"))
