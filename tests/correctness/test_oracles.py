"""The oracles agree with scalar arithmetic and finite differences, and refuse what they do not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from correctness.oracle import layer, layer_losses, router
from correctness.oracle.experts import act, act_derivative, evaluate
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls.interface import ACTIVATIONS, COMBINES, OUTPUT_ACTIVATIONS, Clamp
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import SCORES, RouterSpec


def scalar_activation(name: str, h: list[float], clamp: Clamp) -> list[float]:
    """The activation in plain Python floats, one unit at a time."""

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    single = {
        "relu": lambda v: max(v, 0.0),
        "relu2": lambda v: max(v, 0.0) ** 2,
        "gelu_tanh": lambda v: v * sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)),
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "silu": lambda v: v * sigmoid(v),
    }
    if name in single:
        return [single[name](v) for v in h]
    pairs = list(zip(h[: len(h) // 2], h[len(h) // 2 :], strict=True))
    if name == "swiglu_clamped":
        limit, alpha, offset = clamp
        clamped = [(min(g, limit), max(-limit, min(u, limit))) for g, u in pairs]
        return [g * sigmoid(alpha * g) * (u + offset) for g, u in clamped]
    of_gates = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "geglu_tanh": "gelu_tanh"}
    function = single[of_gates[name]]
    return [function(g) * u for g, u in pairs]


def scalar_layer(problem: Problem) -> list[list[float]]:
    """y[t][o] in plain Python floats, straight from the equations."""
    x, (ids, gates), experts, _ = make_inputs(problem)
    w_in, w_out = experts.w_in.tolist(), experts.w_out.tolist()
    b_in = experts.b_in.tolist() if experts.b_in is not None else [[0.0] * problem.F] * problem.E
    b_out = experts.b_out.tolist() if experts.b_out is not None else [[0.0] * problem.O] * problem.E

    def expert(e: int, row: list[float]) -> list[float]:
        h = [
            sum(w * v for w, v in zip(ws, row, strict=True)) + b
            for ws, b in zip(w_in[e], b_in[e], strict=True)
        ]
        a = scalar_activation(experts.activation, h, experts.clamp)
        f = [
            sum(w * v for w, v in zip(ws, a, strict=True)) + b
            for ws, b in zip(w_out[e], b_out[e], strict=True)
        ]
        return [max(v, 0.0) for v in f] if experts.output_activation == "relu" else f

    y = []
    for row, chosen, weights in zip(x.tolist(), ids.tolist(), gates.tolist(), strict=True):
        outputs = [expert(e, row) for e in chosen]
        columns = list(zip(*outputs, strict=True))
        if problem.combine == "sum":
            y.append([sum(g * f for g, f in zip(weights, column, strict=True)) for column in columns])
        else:
            y.append(
                [
                    math.log(sum(g * math.exp(f) for g, f in zip(weights, column, strict=True)))
                    for column in columns
                ]
            )
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output_activation", OUTPUT_ACTIVATIONS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("bias", [True, False])
def test_oracle_equals_scalar_arithmetic(
    activation: str, output_activation: str, combine: str, bias: bool
) -> None:
    problem = Problem(
        "scalar", T=9, D=4, H=3, O=5, E=4, K=2, activation=activation, output_activation=output_activation,
        combine=combine, bias=bias, dtype=torch.float64, gates="unnormalised", clamp=catalogue.NEAR,
    )  # fmt: skip
    x, (ids, gates), experts, _ = make_inputs(problem)
    want = torch.tensor(scalar_layer(problem), dtype=torch.float64)
    got = evaluate(x, ids, gates, experts, None, combine).values["y"]
    assert (got - want).abs().max() < 64 * torch.finfo(torch.float64).eps * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("problem", catalogue.GRADCHECK, ids=lambda p: p.id)
def test_oracle_gradients_equal_finite_differences(problem: Problem) -> None:
    inputs = make_inputs(problem)
    x, (ids, gates), experts, dy = inputs
    oracle = evaluate(x, ids, gates, experts, dy, problem.combine)
    step = 1e-6
    for name, tensor in inputs.tensors.items():
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype)
        original = tensor.clone()
        sides = []
        for sign in (1, -1):
            tensor.copy_(original + sign * step * direction)
            sides.append((evaluate(x, ids, gates, experts, None, problem.combine).values["y"] * dy).sum())
        tensor.copy_(original)
        slope = float((sides[0] - sides[1]) / (2 * step))
        # Central differences: error of order step², and cancellation of eps / step.
        assert slope == pytest.approx(float((oracle.values[name] * direction).sum()), rel=1e-7, abs=1e-7), (
            name
        )


CLAMP = Clamp(2.3, 0.8, 0.4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivative_is_that_of_the_definition(activation: str) -> None:
    h = torch.linspace(-9, 9, 38, dtype=torch.float64).view(-1, 2)
    step = 1e-6
    slope = act_derivative(h, activation, CLAMP)
    for unit in (0, 1):
        shift = torch.zeros_like(h)
        shift[:, unit] = step
        numeric = (act(h + shift, activation, CLAMP) - act(h - shift, activation, CLAMP)).sum(dim=1) / (
            2 * step
        )
        assert torch.all((numeric - slope[:, unit]).abs() < 1e-7 * (1 + slope[:, unit].abs()))


def evaluate_with(**unknown: str) -> None:
    """Evaluate a small problem with another activation, output activation or combine."""
    x, (ids, gates), experts, dy = make_inputs(catalogue.SMALL)
    combine = unknown.pop("combine", "sum")
    evaluate(x, ids, gates, replace(experts, **unknown), dy, combine)


def spec_with(**unknown: str) -> RouterSpec:
    """A spec as it will be when interface knows a name that the oracle does not."""
    spec = RouterSpec(1)
    for name, value in unknown.items():
        object.__setattr__(spec, name, value)
    return spec


def layer_of(spec: RouterSpec, **unknown: str) -> LayerWeights:
    experts = replace(make_inputs(catalogue.SMALL).experts, **unknown)
    return LayerWeights(experts, spec, router_weight=torch.randn(len(experts.w_in), experts.w_in.shape[2]))


Z, X, IDS = torch.zeros(4), torch.zeros(1, catalogue.SMALL.D), torch.zeros(1, 1, dtype=torch.int64)

REFUSED: dict[str, Callable[[], object]] = {
    "activation is 'swish'; valid are relu, ": lambda: act(torch.zeros(2, 2), "swish"),
    "activation is 'tanh'; valid are relu, ": lambda: evaluate_with(activation="tanh"),
    "output_activation is 'gelu'; valid are none, relu": lambda: evaluate_with(output_activation="gelu"),
    "combine is 'mean'; valid are sum, logsumexp": lambda: evaluate_with(combine="mean"),
    "score is 'entmax'; valid are softmax, ": lambda: router.scores(Z, spec_with(score="entmax")),
    "score is 'cosine'; valid are softmax, ": lambda: router.gates(Z, [0], spec_with(score="cosine")),
    "score is 'sparsemax'; valid are softmax, ": lambda: router.gate_gradient(
        Z, [0], spec_with(score="sparsemax"), torch.ones(1)
    ),
    "group_score is 'mean'; valid are max, top2_sum": lambda: router.select(
        Z, spec_with(group_score="mean"), None, 0.0
    ),
    "loss is 'entropy_loss'; valid are load_balancing_loss, ": lambda: layer_losses.loss(
        "entropy_loss", X, IDS, layer_of(RouterSpec(1))
    ),
    "score is 'none'; valid are softmax, ": lambda: layer.choose(X, layer_of(spec_with(score="none"))),
    "activation is 'elu'; valid are relu, ": lambda: layer.evaluate_layer(
        X, IDS, layer_of(RouterSpec(1), activation="elu"), None
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_oracle_refuses_what_it_has_no_equation_for(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("epsilon", (0.0, 0.3))
@pytest.mark.parametrize("renormalise", (False, True))
@pytest.mark.parametrize("score", SCORES)
def test_the_gradient_of_gates_equals_finite_differences(
    score: str, renormalise: bool, epsilon: float
) -> None:
    spec = RouterSpec(4, score, renormalise, scale=2.5, epsilon=epsilon)
    generator = torch.Generator().manual_seed(0)
    z = 1 + 0.02 * torch.randn(9, generator=generator, dtype=torch.float64)  # within reach of one another
    ids, clear = router.select(z, spec, None, 1e-16)
    assert clear
    dgates = torch.randn(4, generator=generator, dtype=torch.float64)
    step = 1e-6 * torch.eye(9, dtype=torch.float64)
    sides = [[router.gates(z + sign * e, ids, spec) @ dgates for e in step] for sign in (1, -1)]
    slopes = [float(up - down) / 2e-6 for up, down in zip(*sides, strict=True)]
    got, _ = router.gate_gradient(z, ids, spec, dgates)
    assert got.tolist() == pytest.approx(slopes, rel=1e-7, abs=1e-8)


def test_sparsemixer_is_clear_at_low_precision_where_no_other_expert_is_near_the_reach() -> None:
    spec, precision = RouterSpec(2, "sparsemixer"), 2**-11
    for logits, right in (([2.0, 1.0, -1.0], True), ([2.0, 1.0, 0.98], False), ([2.0, 1.99, -1.0], False)):
        ids, clear = router.select(torch.tensor(logits, dtype=torch.float64), spec, None, precision)
        assert ids == [0, 1] and clear == right, logits


def test_the_gates_of_each_score_equal_scalar_arithmetic() -> None:
    z, ids, e = [1.0, 0.99, 0.975, -2.0], [0, 1], math.exp
    softplus = [math.log(1 + e(v)) for v in z]
    first = 1 / (1 + e(-0.01))  # 0.975 is out of reach of 1, which is out of the second choice
    second = 1 / (1 + e(-0.015))
    total = sum(e(v) for v in z)
    want = {
        "softmax": [e(1.0) / total, e(0.99) / total],
        "sigmoid": [1 / (1 + e(-1.0)), 1 / (1 + e(-0.99))],
        "sqrtsoftplus": [math.sqrt(softplus[0]), math.sqrt(softplus[1])],
        "sparsemixer": [first, second],
    }
    for score, scores in want.items():
        for epsilon in (0.0, 0.25):
            divided = [s / (sum(scores) + epsilon) for s in scores]
            for renormalise, gates in ((False, scores), (True, divided)):
                spec = RouterSpec(2, score, renormalise, epsilon=epsilon)
                got = router.gates(torch.tensor(z, dtype=torch.float64), ids, spec)
                assert got.tolist() == pytest.approx(gates, rel=1e-14)
