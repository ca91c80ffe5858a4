"""The workloads are data: these tests hold the data to what it says."""

from __future__ import annotations

import pytest

from benchmarks.workloads import GRIDS, MODELS, MODES, SECONDS, Workloads, flops
from correctness.problems.inputs import make_inputs
from correctness.problems.loads import LOADS
from correctness.problems.problem import Problem
from moe_impls.router import route


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_holds_distinct_problems_with_k_at_most_e(grid: str) -> None:
    problems = [problem for block in GRIDS[grid] for problem in block.problems()]
    assert len(problems) == len(set(problems)) > 0
    assert all(1 <= p.K <= p.E for p in problems)
    assert grid in SECONDS


def test_the_default_grid_sweeps_t_e_and_k_and_holds_olmoe_at_full_size() -> None:
    problems = [problem for block in GRIDS["default"] for problem in block.problems()]
    swept = [p for p in problems if p.name == "sweep" and p.load == "uniform"]
    assert all(len({getattr(p, axis) for p in swept}) >= 3 for axis in ("T", "E", "K"))
    assert {p.load for p in problems} == set(LOADS)
    (olmoe,) = (p for p in problems if p.name == "olmoe-1b-7b")
    assert (olmoe.D, olmoe.H, olmoe.E, olmoe.K, olmoe.activation, olmoe.bias) == (
        2048,
        1024,
        64,
        8,
        "swiglu",
        False,
    )


def test_combinations_with_more_choices_than_experts_are_left_out() -> None:
    assert [(p.E, p.K) for p in Workloads(E=(2, 4), K=(2, 3)).problems()] == [(2, 2), (4, 2), (4, 3)]


@pytest.mark.parametrize("name", MODELS)
def test_a_models_router_chooses_its_k_of_its_e_experts(name: str) -> None:
    import torch

    model = MODELS[name]
    assert model.router is not None and (model.router.top_k,) == model.K
    routing = route(torch.randn(5, model.E[0]), model.router)
    assert routing.expert_ids.shape == (5, model.K[0])


@pytest.mark.parametrize(("activation", "factor"), [("swiglu", 6), ("relu", 4), ("swiglu_clamped", 6)])
def test_flops_follow_the_convention(activation: str, factor: int) -> None:
    p = Problem("p", T=3, D=5, H=7, O=5, E=4, K=2, activation=activation)
    assert flops(p, "forward") == factor * 3 * 2 * 5 * 7
    assert flops(p, "forward_backward") == 3 * factor * 3 * 2 * 5 * 7


def test_flops_count_the_output_width_when_it_is_not_d() -> None:
    p = Problem("p", T=1, D=5, H=7, O=11, E=1, K=1, activation="relu")
    inputs = make_inputs(p)
    assert flops(p, MODES[0]) == 2 * (inputs.experts.w_in.numel() + inputs.experts.w_out.numel())
