"""Arguments that the contract does not allow are refused with their name, their value and what is valid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from moe_impls import Clamp, Experts, RouterSpec, RouterSupport, Routing, Support, check_inputs

T, D, H, O, E, K = 37, 12, 10, 7, 5, 2  # problems.SMALL


def arguments(**changes: Any) -> dict[str, Any]:
    """The arguments of a valid call, x, expert_ids, gates and the fields of Experts, with changes."""
    x, (ids, gates), experts, _ = make_inputs(catalogue.SMALL)
    options = {"activation": experts.activation, "output_activation": "none", "combine": "sum"}
    return {"x": x, "expert_ids": ids, "gates": gates, **experts.tensors, **options, **changes}


def check(given: dict[str, Any]) -> None:
    routing = Routing(given.pop("expert_ids"), given.pop("gates"))
    x, combine = given.pop("x"), given.pop("combine")
    check_inputs(x, routing, Experts(**given), combine)


def test_valid_arguments_pass() -> None:
    check(arguments())
    check(arguments(activation="swiglu_clamped", clamp=Clamp(float("inf"), 1, 0)))
    check(arguments(b_in=None, b_out=None))
    check(arguments(x=torch.zeros(0, D), expert_ids=torch.zeros(0, K).long(), gates=torch.zeros(0, K)))


IDS = torch.zeros(T, K, dtype=torch.int64) + torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is a list; it must be a tensor of shape \[T, D\]"),
        ({"x": torch.zeros(T)}, ValueError, r"x has shape \[37\]; it must be \[T, D\]"),
        ({"x": torch.zeros(T, D).long()}, TypeError, "x has dtype torch.int64; valid are torch.float64, "),
        (
            {"w_in": None},
            TypeError,
            r"w_in is a NoneType; it must be a tensor of shape \[E, F, 12\]",
        ),
        ({"w_in": torch.zeros(E, 7, D)}, ValueError, "w_in has 7 rows; activation 'swiglu' needs an even"),
        (
            {"w_out": torch.zeros(E, O, 3)},
            ValueError,
            r"w_out has shape \[5, 7, 3\]; it must be \[5, O, 10\]",
        ),
        ({"b_in": torch.zeros(E, 3)}, ValueError, r"b_in has shape \[5, 3\]; it must be \[5, 20\]"),
        ({"b_out": torch.zeros(E, 3)}, ValueError, r"b_out has shape \[5, 3\]; it must be \[5, 7\]"),
        ({"b_out": torch.zeros(E, O, device="meta")}, ValueError, "b_out is on meta; it must be on .* cpu"),
        ({"b_out": torch.zeros(E, O).double()}, TypeError, "b_out has dtype torch.float64; .* torch.float32"),
        ({"expert_ids": IDS.int()}, TypeError, "expert_ids has dtype torch.int32; it must be torch.int64"),
        (
            {"expert_ids": IDS[:, :0]},
            ValueError,
            "K, the second dimension of expert_ids, is 0; .* 1 to E = 5",
        ),
        ({"gates": torch.ones(T, 3)}, ValueError, r"gates has shape \[37, 3\]; it must be \[37, 2\]"),
        ({"gates": torch.ones(T, K).double()}, TypeError, "gates has dtype torch.float64; it must be"),
        ({"expert_ids": IDS - 1}, ValueError, r"expert_ids holds -1; ids must be in \[0, 5\)"),
        ({"expert_ids": IDS + 4}, ValueError, r"expert_ids holds 5; ids must be in \[0, 5\)"),
        (
            {"expert_ids": IDS * 0},
            ValueError,
            r"expert_ids\[0\] is \[0, 0\]; the ids of a row must be distinct",
        ),
        ({"combine": "logsumexp", "gates": -torch.ones(T, K)}, ValueError, "gates holds -1.0; .* gates >= 0"),
        ({"combine": "mean"}, ValueError, "combine is 'mean'; valid are sum, logsumexp"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; valid are relu, "),
        ({"output_activation": "silu"}, ValueError, "output_activation is 'silu'; valid are none, relu"),
        (
            {"clamp": (7.0, 1.0, 0.0)},
            TypeError,
            r"clamp is \(7.0, .*; it must be a Clamp\(limit, alpha, offset",
        ),
        ({"clamp": Clamp(0.0)}, ValueError, "clamp is Clamp.limit=0.0, .*; its limit must be above 0, alpha"),
        ({"clamp": Clamp(float("nan"))}, ValueError, "clamp is .*; its limit must be above 0, alpha"),
        ({"clamp": Clamp(alpha=float("inf"))}, ValueError, "clamp is .*; .* alpha and offset finite"),
        ({"clamp": Clamp(10.0)}, ValueError, "clamp is .*; activation 'swiglu' reads none, only 'swiglu_cl"),
    ],
)
def test_check_inputs_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(arguments(**changes))


def test_declarations_and_specs_refuse_what_is_not_valid() -> None:
    with pytest.raises(TypeError, match="dtypes of Support is .*; it must be a tuple of .*, not empty"):
        Support(dtypes=())
    with pytest.raises(ValueError, match="devices of Support is 'tpu'; valid are cpu, cuda"):
        Support(devices=("tpu",))
    with pytest.raises(
        TypeError, match=r"clamps of Support is \(\); it must be a tuple of Clamp, or None for"
    ):
        Support(clamps=())
    with pytest.raises(TypeError, match="clamps of Support is 7.0; it must be a Clamp"):
        Support(clamps=(7.0,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="keep_groups is 3; it must not exceed groups, 2"):
        RouterSpec(1, groups=2, keep_groups=3)
    with pytest.raises(TypeError, match="top_k is True; it must be an int"):
        RouterSpec(True)
    with pytest.raises(ValueError, match="biased is 'gate'; valid are score, logit"):
        RouterSpec(1, biased="gate")
    for epsilon in (-1e-20, 1e-45, 1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon is .*; it must be 0, or from 1.18e-38 to below 1"):
            RouterSpec(1, epsilon=epsilon)
    with pytest.raises(ValueError, match="groups is 2; with score 'sparsemixer' it must be 1"):
        RouterSpec(1, "sparsemixer", groups=2)


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"scores": "sigmoid"}, TypeError, "scores of RouterSupport is 'sigmoid'; it must be a tuple of "),
        ({"scores": ("tanh",)}, ValueError, "scores of RouterSupport is 'tanh'; valid are softmax, "),
        ({"biases": ()}, TypeError, r"biases of RouterSupport is \(\); it must be a tuple of .*, not empty"),
        ({"dtypes": (torch.int8,)}, ValueError, "dtypes of RouterSupport is torch.int8; valid are "),
        ({"num_experts": 0}, ValueError, "num_experts of RouterSupport is 0; it must be at least 1"),
        (
            {"specs": RouterSpec(2)},
            TypeError,
            "specs of RouterSupport is .*; it must be a tuple of RouterSpec",
        ),
        (
            {"specs": ()},
            TypeError,
            r"specs of RouterSupport is \(\); it must be a tuple of RouterSpec, not empty",
        ),
        (
            {"specs": (RouterSpec(2),), "scores": ("softmax",)},
            ValueError,
            "scores of RouterSupport is given beside specs, which say it already",
        ),
        (
            {"specs": (RouterSpec(4),), "num_experts": 3},
            ValueError,
            "top_k is 4; it must be at most the number of experts to choose from, 3",
        ),
        (
            {"specs": (RouterSpec(2, "sparsemixer"),), "biases": (True,)},
            ValueError,
            r"biases of RouterSupport is \(True,\); score 'sparsemixer' takes no bias",
        ),
    ],
)
def test_a_router_declares_what_is_valid(
    declared: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RouterSupport(**declared)
