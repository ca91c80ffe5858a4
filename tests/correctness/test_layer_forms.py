"""What a layer declares and what `LayerWeights` can say of it are tested, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from correctness.checks import layers
from correctness.checks.case import Subject, cases
from correctness.checks.layers import CHECKS, layer
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import Bench, Layer
from correctness.judging.layer_causes import causes
from correctness.judging.layer_tokens import draw_tokens, is_swayed
from correctness.judging.layer_weights import check_weights
from correctness.judging.layer_why import cause_of
from correctness.oracle import layer as oracle
from evidence.mutants import layer_deepseek, layer_gemma, layer_llama4, layer_switch
from moe_impls import Experts, LayerSupport, LayerWeights, RouterSpec, Routing, Support
from tests.correctness import mode_layers
from tests.correctness.findings import findings


def subject(module: Any, **changes: Any) -> Subject:
    """The layer of a module of ``evidence.mutants``, with other fields of `Layer`."""
    support = getattr(module, "SUPPORT", LayerSupport())
    tested = Layer(module.Layer, module.read, support=support, routing=getattr(module, "routing", None))
    return layer(module.__name__.rpartition(".")[2], replace(tested, **changes))


def skips(subject: Subject) -> dict[str, str]:
    return {case.check.name: case.skip for case in cases([subject]) if case.skip}


def only(*names: str) -> list[Any]:
    return [check for check in CHECKS if check.name in names]


# Declarations


def test_what_is_not_declared_is_skipped_by_name() -> None:
    declared = LayerSupport((torch.float32,), gradients=False, leading="batch_sequence", no_tokens=False)
    skipped = skips(subject(layer_deepseek, support=replace(declared, training=False)))
    assert skipped["leading_dimensions"] == "any_leading not declared"
    assert skipped["no_tokens"] == "no_tokens not declared"
    assert skipped["training"] == "training not declared"
    assert skipped["gradients"] == "gradients not declared"
    assert skipped["low_precision"] == "dtype bfloat16 not declared"
    assert "values" not in skipped and "strides" not in skipped


def test_a_declaration_of_implementations_says_what_the_two_share() -> None:
    declared = Support(dtypes=(torch.float64,), gradients=False, autocast=True)
    assert LayerSupport.of(declared) == LayerSupport((torch.float64,), gradients=False, autocast=True)
    assert LayerSupport.of(LayerSupport(leading="batch_sequence")).leading == "batch_sequence"
    with pytest.raises(TypeError, match="SUPPORT is a dict; it must be a moe_impls.LayerSupport or Support"):
        LayerSupport.of({})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"leading": "all"}, "leading of LayerSupport is 'all'; valid are any, batch_sequence"),
        (
            {"router_dtype": "bfloat16"},
            "router_dtype of LayerSupport is 'bfloat16'; valid are float32, input",
        ),
        ({"dtypes": ()}, "dtypes of LayerSupport is"),
    ],
)
def test_a_declaration_that_means_nothing_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LayerSupport(**wrong)


def test_rounding_the_logits_sways_no_token_of_a_layer_that_declares_it() -> None:
    weights = Bench.of(subject(layer_llama4).tested, torch.bfloat16).expected.weights
    assert not is_swayed(draw_tokens(weights, torch.bfloat16, torch.bfloat16)[0], weights).any()
    assert is_swayed(draw_tokens(weights, torch.bfloat16)[0], weights).any()


def test_experts_stay_tested_in_low_precision_where_the_router_rounds_its_logits() -> None:
    class Wrong(layer_llama4.Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if x.dtype != torch.bfloat16 else y * 1.2

    found = findings(subject(layer_llama4, make=Wrong), only("values", "low_precision"))
    assert list(found) == ["low_precision"]


# What LayerWeights can say


def weights(**changes: Any) -> LayerWeights:
    experts = Experts(torch.ones(4, 6, 5), None, torch.ones(4, 5, 6), None)
    return replace(LayerWeights(experts, RouterSpec(2), torch.ones(4, 5)), **changes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates_on": "both"}, "gates_on is 'both'; valid are output, input"),
        ({"identity_experts": -1}, "identity_experts is -1; it must be an int, at least 0"),
        ({"router_norm_epsilon": -1.0}, "router_norm_epsilon is -1.0; it must be at least 0"),
        ({"expert_scale": torch.ones(5)}, r"expert_scale has shape \[5\]; it must be \[4\]"),
        ({"router_norm": torch.ones(4)}, r"router_norm has shape \[4\]; it must be \[5\]"),
        ({"router_norm": 1.0}, "router_norm is a float; it must be"),
        ({"gates_on": "input", "combine": "logsumexp"}, "with gates on the input it must be 'sum'"),
        (
            {"identity_experts": 2},
            r"router_weight has shape \[4, 5\]; it must be \[6, 5\], E \+ Z with 2 identity experts",
        ),
        (
            {"identity_experts": 2, "combine": "logsumexp", "router_weight": torch.ones(6, 5)},
            "with identity experts combine must be 'sum'",
        ),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_weights(weights(**wrong), torch.nn.Linear(1, 1))


MODULES = ("layer_deepseek", "layer_llama4", "layer_gemma", "layer_switch", "layer_gpt_oss")


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_the_oracle_are_its_derivatives(name: str) -> None:
    """Along a random direction of x and of each tensor, in float64."""
    module = importlib.import_module(f"evidence.mutants.{name}")
    expected = Bench.of(subject(module).tested, torch.float64).expected
    x, ids, held, dy = expected.x[:4], expected.ids[:4], expected.weights, expected.dy[:4].double()
    found = oracle.evaluate_layer(x, ids, held, dy).values
    generator, step = torch.Generator().manual_seed(0), 1e-6

    def y(moved: str, by: Tensor) -> Tensor:
        tensors = oracle.tensors(held)
        changed = oracle.map_tensors(held, lambda t: t + by if t is tensors.get(moved) else t)
        return oracle.evaluate_layer(x + by if moved == "x" else x, ids, changed, None).values["y"]

    for moved in found.keys() - {"y", "selection_bias"}:
        along = torch.randn(found[moved].shape, generator=generator, dtype=torch.float64)
        slope = (dy * (y(moved, step * along) - y(moved, -step * along))).sum() / (2 * step)
        torch.testing.assert_close((found[moved] * along).sum(), slope, rtol=1e-6, atol=1e-8)


# Dropping by capacity


def reporting(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Subject:
    return subject(layer_switch, routing=lambda made, x: change(*layer_switch.routing(made, x)))


def test_a_slot_that_is_dropped_adds_nothing_and_has_no_gradient() -> None:
    bench = Bench.of(subject(layer_switch).tested, torch.float32)
    dropped = bench.dropped(bench.x, bench.expected.ids)
    assert dropped is not None and dropped.any() and not dropped.all()
    kept, all_of_it = bench.dropping().expected.want, bench.expected.want
    assert not torch.equal(kept["y"], all_of_it["y"]) and not torch.equal(kept["w_in"], all_of_it["w_in"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, gates: (ids.flip(0), gates), "says that token 0 visits"),
        (lambda ids, gates: (ids, 2 * gates), "says that the gate of token"),
        (
            lambda ids, gates: (ids[:, :1], gates[:, :1]),
            r"returns expert_ids \[32, 1\]; it must be \[32, 2\]",
        ),
        (lambda ids, gates: (ids.int(), gates), "expert_ids of torch.int32"),
        (lambda ids, gates: (torch.full_like(ids, layer_switch.E), gates), "drops all of its"),
        (lambda ids, gates: 1 / 0, "raises ZeroDivisionError"),
    ],
)
def test_a_wrong_report_of_the_routing_is_a_finding(change: Any, message: str) -> None:
    bench = Bench.of(reporting(change).tested, torch.float32)
    with pytest.raises(CheckFailed, match=message):
        bench.dropped(bench.x, bench.expected.ids)


def test_a_layer_that_drops_tokens_and_does_not_report_it_is_told_so() -> None:
    class Roomy(layer_switch.Layer):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if len(x) > 100:
                return super().route(x)
            gates, ids = (x @ self.router.mT).softmax(dim=1).topk(layer_switch.K)
            return ids, gates

    found = findings(subject(layer_switch, make=Roomy, routing=None), only("tokens_apart"))
    assert "of a layer that drops some its file reports which: routing(layer, x)" in found["tokens_apart"]


# Causes


def test_one_cause_is_told_once_and_explains_what_else_fails() -> None:
    def read(made: Any) -> LayerWeights:
        return replace(layer_gemma.read(made), gates_on="input", identity_experts=2)

    wrong = subject(layer_gemma, read=read)
    found = findings(wrong, only("values", "gradients", "low_precision", "strides"))
    assert found["values"].count("hint: y is right with the gates on the experts' outputs") == 1
    for name in ("gradients", "low_precision", "strides"):
        assert "as 'values' tells, y is right with the gates on the experts' outputs" in found[name]
        assert "hint" not in found[name]


def test_a_second_mistake_keeps_a_finding_of_its_own() -> None:
    class Wrong(layer_deepseek.Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if x.dtype == torch.float32 else 0 * y

    def read(made: Any) -> LayerWeights:
        held = layer_deepseek.read(made)
        return replace(held, router=replace(held.router, renormalise=False))

    found = findings(subject(layer_deepseek, make=Wrong, read=read), only("values", "half_precision"))
    assert "hint: y is right with a router of renormalise=True" in found["values"]
    assert "fails 'half_precision': y[" in found["half_precision"]


def test_the_factor_of_the_routed_experts_is_told_where_read_has_none() -> None:
    def read(made: Any) -> LayerWeights:
        held = layer_deepseek.read(made)
        return replace(held, router=replace(held.router, scale=1.0))

    cause = cause_of(subject(layer_deepseek, read=read).tested)
    assert cause is not None and cause.text == "the routed experts times 2.5"


@pytest.mark.parametrize("name", MODULES)
def test_a_right_layer_has_no_cause(name: str) -> None:
    assert cause_of(subject(importlib.import_module(f"evidence.mutants.{name}")).tested) is None


def test_a_report_of_drops_that_are_others_than_the_layers_is_told() -> None:
    class Serves(layer_switch.Layer):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gates, ids = F.linear(x.float(), self.router.float()).softmax(dim=1).topk(layer_switch.K, dim=1)
            return ids, gates

    class DropsTheLast(layer_switch.Layer):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            ids, gates = super().route(x.flip(0))
            return ids.flip(0), gates.flip(0)

    def routing(made: Any, x: Tensor) -> Any:
        return Routing(*layer_switch.Layer.route(made, x))

    for make, told in (
        (Serves, "no slot dropped, where routing(layer, x) reports that some are"),
        (DropsTheLast, "other slots dropped than routing(layer, x) reports, for "),
    ):
        found = findings(subject(layer_switch, make=make, routing=routing), only("values"))
        assert f"hint: y is right with {told}" in found["values"]


def test_what_read_forgets_is_told_first() -> None:
    def read(made: Any) -> LayerWeights:
        return replace(layer_deepseek.read(made), shared=None, shared_gate=None)

    found = findings(subject(layer_deepseek, read=read), only("values"))["values"]
    told = found.partition("hint: ")[2].splitlines()[0]
    assert (
        told == "read(layer) returns nothing made of shared_in, shared_out, shared_gate, on which y depends"
    )


def test_a_layer_that_ignores_its_selection_bias_fails_by_that() -> None:
    class Ignores(layer_deepseek.Layer):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            bias, self.bias = self.bias, torch.zeros_like(self.bias)
            routed = super().route(x)
            self.bias = bias
            return routed

    found = findings(subject(layer_deepseek, make=Ignores), only("selection_bias"))
    assert "as 'values' tells, y is right with selection_bias left out" in found["selection_bias"]


def test_only_what_keeps_its_shape_is_transposed() -> None:
    def told(S: int) -> set[str]:
        square, shared = torch.ones(4, 8, 8), torch.ones(1, 2 * S, 8)
        experts = Experts(square, None, torch.ones(4, 8, 4), None, "swiglu")
        both = Experts(shared, None, torch.ones(1, 8, S), None, "swiglu")
        weights = LayerWeights(experts, RouterSpec(2), torch.ones(4, 8), shared=both)
        return {cause.text for cause in causes(weights)}

    assert "experts and shared.w_in transposed" in told(4)
    assert "experts.w_in transposed" in told(6)
    assert "experts and shared.w_in transposed" not in told(6)


def test_a_search_for_causes_that_raises_leaves_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(tested: Layer) -> None:
        raise IndexError("out of bounds")

    def read(made: Any) -> LayerWeights:
        return replace(layer_gemma.read(made), gates_on="input")

    monkeypatch.setattr(layers, "cause_of", raises)
    found = findings(subject(layer_gemma, read=read), only("values"))["values"]
    assert "fails 'values': y[" in found
    assert "note: looking for a cause raised IndexError: out of bounds" in found


def test_a_layer_that_always_has_tokens_fails_by_that_alone() -> None:
    class Refuses(layer_gemma.Layer):
        def forward(self, x: Tensor) -> Tensor:
            if not x.numel():
                raise ValueError("x has no tokens")
            return super().forward(x)

    found = findings(subject(layer_gemma, make=Refuses), only("leading_dimensions", "no_tokens"))
    assert list(found) == ["no_tokens"]
    assert "hint: SUPPORT = LayerSupport(no_tokens=False)" in found["no_tokens"]


def of_gates(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Subject:
    """A layer that changes ids and gates after routing."""

    class Changed(mode_layers.Plain):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return change(*super().route(x))

    return mode_layers.subject(Changed)


def last_alone(ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return ids, gates * (ids == ids.amax(dim=1, keepdim=True))


def over_tokens(ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return ids, gates.softmax(dim=0)


def noisy(ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return ids, gates * torch.rand_like(gates)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ids, gates: (ids, gates.flip(1)), "y is right with the gates of each token in reverse"),
        (last_alone, "y is right with the last expert of each token alone, as where it is written and not"),
        (over_tokens, "y of a token changes with the other tokens of the call"),
        (noisy, "two calls in eval mode on equal inputs differ"),
    ],
)
def test_what_is_wrong_with_the_gates_is_told(change: Any, told: str) -> None:
    assert f"hint: {told}" in findings(of_gates(change), only("values"))["values"]


def test_noise_in_evaluation_is_told_once() -> None:
    found = findings(of_gates(noisy), only("values", "gradients", "evaluation"))
    assert "as 'evaluation' tells" in found["gradients"] and "differ" in found["evaluation"]


def test_a_parameter_of_training_that_evaluation_depends_on_is_told_as_that() -> None:
    class Scaled(mode_layers.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def tokens(self, x: Tensor) -> Tensor:
            return super().tokens(x) * self.scale

    made = mode_layers.subject(
        Scaled, read=lambda held: replace(mode_layers.read(held), training_only=("scale",))
    )
    told = findings(made, only("values"))["values"]
    assert "hint: y in eval mode depends on scale, which training_only holds" in told


def test_a_layer_that_drops_every_slot_of_a_small_call_is_right() -> None:
    class Strict(layer_switch.Layer):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            ids, gates = super().route(x)
            return (ids, gates) if len(x) > 1 else (torch.full_like(ids, layer_switch.E), gates)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if x.numel() > layer_switch.D else torch.zeros_like(y).detach()

    assert findings(subject(layer_switch, make=Strict), only("sizes")) == {}


def test_what_a_layer_without_float64_declares_is_told() -> None:
    class Low(mode_layers.Plain):
        def tokens(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("expected scalar type Float but found Double")
            return super().tokens(x)

    found = findings(mode_layers.subject(Low), only("double_precision"))["double_precision"]
    assert "declares a layer that takes no float64" in found
