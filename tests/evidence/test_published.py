"""The re-created rules accept and reject what the published ones do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from correctness.problems.problem import Problem
from evidence import published
from evidence.published import EXPERTS, Addresses, Subject, inputs_of
from evidence.published_suites import (
    KERNELBENCH,
    LIGER,
    SCATTERMOE,
    SUITES,
    TORCHAO,
    VLLM,
    Comparison,
    Rule,
    Suite,
    allclose,
    allclose_as_float32,
    allclose_relative_to_result,
    describe,
    largest_error,
    matched,
    sqnr,
)

RULES = (
    partial(allclose, atol=1e-2, rtol=1e-2),
    partial(allclose_as_float32, atol=1e-2, rtol=1e-2),
    partial(allclose_relative_to_result, atol=1e-2, rtol=1e-2),
    partial(largest_error, below=1e-2),
    partial(sqnr, at_least=20.0),
    partial(matched, atol=1e-2, rtol=1e-2, ratio=0.95),
)
by_rule = pytest.mark.parametrize("rule", RULES, ids=describe)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@by_rule
def test_a_rule_accepts_equal_tensors_and_small_errors(rule: Rule) -> None:
    want = numbers(40, 50)
    assert rule(want.clone(), want)
    assert rule(want * (1 + 1e-4), want)


@by_rule
def test_a_rule_rejects_zeros_negatives_and_nan(rule: Rule) -> None:
    want = numbers(40, 50)
    one_nan = want.clone()
    one_nan[3, 4] = torch.nan
    assert not rule(torch.zeros_like(want), want)
    assert not rule(-want, want)
    assert not rule(one_nan, want)


def test_an_absolute_tolerance_above_the_signal_accepts_zeros_and_a_ratio_of_norms_does_not() -> None:
    want = 1e-3 * numbers(40, 50)
    assert allclose(torch.zeros_like(want), want, atol=1e-1, rtol=1e-2)
    assert not sqnr(torch.zeros_like(want), want, at_least=23.0)


def test_matched_accepts_one_row_in_twenty_that_is_wrong_and_not_two() -> None:
    want = numbers(20, 50)
    got = want.clone()
    got[0] += 1
    assert matched(got, want, atol=1e-2, rtol=1e-2, ratio=0.95)
    got[1] += 1
    assert not matched(got, want, atol=1e-2, rtol=1e-2, ratio=0.95)


def test_sqnr_is_one_figure_for_all_rows() -> None:
    want = numbers(1000, 50)
    got = want.clone()
    got[0] = 0
    assert sqnr(got, want, at_least=29.0)
    assert not sqnr(got[:10], want[:10], at_least=29.0)


def test_only_the_rules_that_look_at_dtypes_reject_another_one() -> None:
    want = numbers(4, 5).bfloat16()
    rejecting = {describe(rule).partition("(")[0] for rule in RULES if not rule(want.float(), want)}
    assert rejecting == {"allclose", "allclose_relative_to_result", "matched"}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_inputs_have_the_published_scales(suite: Suite) -> None:
    comparison = max(suite.comparisons[:50], key=lambda c: c.problem.T)
    D, H = comparison.published
    inputs, p = inputs_of(suite, comparison), comparison.problem
    x, w_in, w_out = inputs.x.double(), inputs.experts.w_in.double(), inputs.experts.w_out.double()
    # What a sum over features measures: the root of their number times the weights' standard deviation.
    assert w_in.std() * p.D**0.5 == pytest.approx(suite.weights(D) * D**0.5, rel=0.1)
    assert w_out.std() * p.H**0.5 == pytest.approx(suite.weights(H) * H**0.5, rel=0.1)
    assert x.std() == pytest.approx(p.x_scale, rel=0.2)


def small(suite: Suite, **changes) -> Suite:
    """Keep the first comparison of a suite only, changed."""
    return replace(suite, comparisons=suite.comparisons[:1], **changes)


def verdict(suite: Suite, name: str) -> Subject:
    """Apply a suite to one mutant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "EXPERTS", [m for m in EXPERTS if m.name == name])
        return next(s for s in published.apply(suite) if s.name == name)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_first_comparison_of_a_suite_accepts_right_implementations(suite: Suite) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "EXPERTS", [])
        found = [s for s in published.apply(small(suite)) if s.kind == "right"]
    assert [s.rejected_by for s in found] == [""] * len(published.RIGHT)
    assert not any(s.shown for s in found)


def test_a_wrong_gate_is_killed_and_the_tensor_is_named() -> None:
    found = verdict(small(SCATTERMOE), "gate_not_applied")
    assert found.rejected_by.startswith("y on T1-D128-H256-E8-K2")
    assert found.shown


def test_a_mutant_that_a_suite_does_not_show_survives() -> None:
    found = verdict(small(SCATTERMOE), "reglu_is_geglu")
    assert (found.rejected_by, found.shown) == ("", False)


def test_a_mutant_that_raises_is_killed() -> None:
    assert verdict(small(SCATTERMOE), "whole_result_detached").rejected_by.startswith("RuntimeError on")


def test_a_reference_computed_after_the_subject_agrees_with_ids_that_it_sorted() -> None:
    problem = replace(SCATTERMOE.comparisons[0].problem, T=64)
    suite = replace(SCATTERMOE, comparisons=(replace(SCATTERMOE.comparisons[0], problem=problem),))
    after = verdict(suite, "expert_ids_sorted_in_place")
    before = verdict(replace(suite, reference_first=True), "expert_ids_sorted_in_place")
    assert (after.rejected_by, after.shown) == ("", True)
    assert before.rejected_by.startswith("y on")


def test_a_second_call_shows_what_the_first_wrote_over_x() -> None:
    problem = Problem("", T=64, D=32, H=32, O=32, E=8, K=2, bias=False)
    comparison = Comparison(problem, VLLM.comparisons[0].rules, (32, 32))
    suite = replace(VLLM, comparisons=(comparison,), weights=_unit)
    assert verdict(suite, "result_written_over_x").rejected_by.startswith("y on")
    assert verdict(replace(suite, calls=1), "result_written_over_x").rejected_by == ""


def _unit(features: int) -> float:
    return features**-0.5


def test_a_new_process_has_forgotten_how_often_it_was_called() -> None:
    comparison = replace(KERNELBENCH.comparisons[1], problem=Problem("", T=40, D=8, H=8, O=8, E=4, K=2))
    first = replace(comparison, new_process=True)
    long = replace(KERNELBENCH, comparisons=(comparison,) * 14)
    short = replace(KERNELBENCH, comparisons=(first, *(comparison,) * 6, first, *(comparison,) * 6))
    assert verdict(long, "fewer_tokens_when_warm").rejected_by.startswith("y on")
    assert verdict(short, "fewer_tokens_when_warm").rejected_by == ""


def test_weights_that_a_suite_keeps_are_the_same_in_each_trial() -> None:
    first, second = (inputs_of(KERNELBENCH, c) for c in KERNELBENCH.comparisons[:2])
    assert torch.equal(first.experts.w_in, second.experts.w_in)
    assert not torch.equal(first.x, second.x)


def test_equal_shapes_share_addresses_and_keep_their_strides() -> None:
    comparison = VLLM.comparisons[0]
    addresses, inputs = Addresses(), inputs_of(VLLM, comparison)
    first = addresses.place(inputs, padded=True, owner=None)
    again = addresses.place(inputs, padded=True, owner=None)
    other = addresses.place(inputs, padded=True, owner=1)
    assert first.x.data_ptr() == again.x.data_ptr() != other.x.data_ptr()
    assert first.experts.w_in.stride(1) == comparison.problem.D + 128
    assert torch.equal(first.experts.w_in, inputs.experts.w_in)


def test_zeros_have_gradients_of_zero() -> None:
    comparison = SCATTERMOE.comparisons[0]
    got = published.results(published.zeros, SCATTERMOE, comparison, inputs_of(SCATTERMOE, comparison))
    assert set(got) == set(comparison.rules)
    assert not any(bool(t.any()) for t in got.values())


def test_what_a_subject_does_to_torch_is_undone() -> None:
    before = torch.get_rng_state()
    verdict(small(LIGER), "seeds_the_random_generator")
    verdict(replace(TORCHAO, comparisons=TORCHAO.comparisons[:1]), "leaves_gradients_off")
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_code_that_mutants_are_made_of_is_a_right_subject() -> None:
    assert {m.base for m in EXPERTS} <= set(published.RIGHT)
