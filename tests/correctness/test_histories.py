"""Histories of layers that nobody thought of: what is drawn, and what they find that no single check does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from correctness.checks.layer_history import HISTORY
from correctness.checks.layers import layer
from correctness.checks.search import search
from correctness.judging.finding import CannotTell, CheckFailed
from correctness.judging.layer_bench import Bench, Layer
from correctness.judging.layer_numbers import NUMBERS, as_it_is_with, set_numbers
from correctness.problems import histories
from correctness.problems.histories import Call, History
from moe_impls import LayerSupport
from tests.correctness import mode_layers, reused_layers
from tests.correctness.findings import findings, first_finding
from tests.correctness.mode_layers import Plain, read, subject

RIGHT = mode_layers.RIGHT | reused_layers.RIGHT


def drawn(support: LayerSupport, count: int = 200) -> list[History]:
    found: list[History] = []

    @settings(max_examples=count)
    @given(histories.histories(support))
    def draw(history: History) -> None:
        found.append(history)

    draw()
    return found


def test_only_what_is_declared_is_drawn() -> None:
    support = LayerSupport(dtypes=(torch.float64,), gradients=False, leading="batch_sequence", training=False)
    for history in drawn(support):
        assert history.dtype == torch.float64
        for step in history.steps:
            if isinstance(step, Call):
                assert step.way in ("no_grad", "inference_mode") and not step.training
                assert step.shape not in ("no sequence", "three leading dimensions")


def test_five_hundred_histories_reach_every_change_and_kind_of_call() -> None:
    found = drawn(LayerSupport(), 500)
    steps = [step for history in found for step in history.steps]
    calls = [step for step in steps if isinstance(step, Call)]
    assert {step for step in steps if isinstance(step, str)} == set(histories.CHANGES)
    for name, options in {
        "tokens": histories.TOKENS,
        "rows": histories.ROWS,
        "shape": histories.SHAPES,
        "memory": histories.MEMORY,
        "way": histories.WAYS,
        "training": (False, True),
    }.items():
        assert {getattr(call, name) for call in calls} == set(options)


@pytest.mark.parametrize("name", RIGHT)
def test_right_layers_pass(name: str) -> None:
    """A part of the histories and numbers; those of the project's own layers are all tried."""
    listed, any_history = HISTORY
    some = replace(listed, problems=listed.problems[::2]), replace(any_history, share=0.1)
    assert findings(RIGHT[name], some) == {}


def test_all_numbers_are_listed() -> None:
    assert tuple(NUMBERS) == histories.NUMBERS
    assert {history.numbers for history in histories.LISTED} == set(NUMBERS) - {"usual"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_what_their_name_says(name: str) -> None:
    made = subject(Plain).tested
    bench = Bench.of(made, torch.float32)
    set_numbers(bench, name)
    weights, x = made.read(bench.layer), as_it_is_with(bench, name, gradients=False).x
    z, h = F.linear(x, weights.router_weight), F.linear(x, weights.experts.w_in[0])
    says = {
        "usual": z.abs().mean() < 3 and h.abs().mean() < 3 and x.abs().max() < 8,
        "large tokens": x.abs().max() > 512 and z.abs().mean() < 3 and h.abs().mean() < 3,
        "small tokens": x.abs().max() < 1 / 64 and z.abs().mean() > 0.1 and h.abs().mean() > 0.1,
        "large hidden values": h.abs().mean() > 5 > 3 > z.abs().mean(),
        "large logits": z.abs().mean() > 3 > h.abs().mean(),
        "logits below zero": (z < 0).all(),
        "logits above zero": (z > 0).all(),
        "tokens alike": F.cosine_similarity(x, x.mean(0, keepdim=True)).mean() > 0.6,
    }
    assert says[name]


class DropsWhatIsSmall(Plain):
    """Sums of scores below a thousandth are taken for one."""

    spec = mode_layers.Biased.spec

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = self.logits(x).sigmoid().topk(self.spec.top_k, -1)
        return ids, scores / scores.sum(-1, keepdim=True).clamp(min=1e-3)


class SquaresInTheDtypeOfX(Plain):
    """The length of a token, that nothing depends on, overflows in float16."""

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        length = x.square().sum(-1, keepdim=True)
        return super().combine(x, ids, gates) * (length / length)


class CapacityInTraining(Plain):
    """In training an expert takes at most twice its share of more than 500 tokens."""

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if self.training and len(x) > 500:
            hot = F.one_hot(ids.flatten(), self.E)
            rank = (hot.cumsum(0) * hot).sum(-1).view_as(ids)
            gates = gates * (rank <= 2 * self.spec.top_k * len(x) // self.E)
        return super().combine(x, ids, gates)


class KeepsWeightsOfInference(Plain):
    """Under inference_mode a copy is kept that the next training alone gives up."""

    kept: Any = None

    def weights(self) -> tuple[Tensor, Tensor]:
        if self.training:
            self.kept = None
        elif torch.is_inference_mode_enabled():
            if self.kept is None:
                self.kept = self.w_in.detach().clone(), self.w_out.detach().clone()
            return self.kept
        return super().weights()


class OneWideRow(Plain):
    """[N, 1, D] in training mode is taken for N sequences of the first token."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.ndim == 3 and x.shape[1] == 1 and len(x) > 100:
            x = x[:1].expand_as(x)
        return super().forward(x)


WRONG = (
    DropsWhatIsSmall,
    SquaresInTheDtypeOfX,
    CapacityInTraining,
    KeepsWeightsOfInference,
    OneWideRow,
)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_layers_fail(wrong: type[nn.Module]) -> None:
    assert findings(subject(wrong), HISTORY)


def test_what_a_call_makes_under_inference_mode_may_be_copied_and_written_to() -> None:
    tested = RIGHT["a buffer is made in the first call"].tested
    changes = ("a deepcopy", "a new layer that loads its state dict")
    for dtype in (torch.float32, torch.bfloat16):
        for change in changes:
            steps = (Call(way="inference_mode"), change, Call(way="inference_mode"), Call(way="backward"))
            HISTORY[1].function(Bench.of(tested, dtype), History(dtype, steps=steps))


def test_a_finding_tells_the_steps_that_are_needed_and_no_others() -> None:
    finding = first_finding(subject(KeepsWeightsOfInference), HISTORY[1])
    assert finding is not None
    smallest = finding.partition("\nThe first problem that failed")[0]
    assert "inference_mode" in smallest and smallest.count("tokens (") <= 3
    assert "rerun('layer', 'KeepsWeightsOfInference', 'any_history')" in smallest


def test_numbers_of_which_nothing_can_be_told_are_passed_over_but_usual_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot_tell(*_: object) -> None:
        raise CannotTell("nothing is clear")

    monkeypatch.setattr("correctness.checks.layer_history.as_it_is_with", cannot_tell)
    bench = Bench.of(subject(Plain).tested, torch.float32)
    check = HISTORY[1].function
    check(bench, History(numbers="large tokens"))
    with pytest.raises(CheckFailed, match=r"step 1 of float32, usual numbers: .*nothing is clear"):
        check(bench, History())


def test_a_search_ends_soon_after_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("correctness.checks.search.SHRINKING", 0.2)
    tried: list[int] = []

    def fails_slowly(n: int) -> None:
        tried.append(n)
        begin = time.process_time()
        while time.process_time() - begin < 0.1:
            pass
        if n > 10:
            raise CheckFailed(f"{n} is too large")

    with pytest.raises(CheckFailed, match="is too large"):
        search(fails_slowly, st.integers(0, 10**9))
    assert len(tried) < 40


def test_a_layer_without_gradients_in_one_dtype_is_tried_with_what_it_declares() -> None:
    support = LayerSupport(dtypes=(torch.float64,), gradients=False, leading="batch_sequence", training=False)
    made = layer("narrow", Layer(Plain, read, support=support))
    assert first_finding(made, HISTORY[1]) is None
