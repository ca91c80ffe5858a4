"""Problems of routers, and the inputs made from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_impls.interface import DTYPES, dtype_name
from moe_impls.models import MODELS
from moe_impls.router_interface import GROUP_SCORES, RouterSpec


@dataclass(frozen=True)
class RouterProblem:
    """One call of a router, as data.

    bias: the mean of the selection bias, or None without one.
    spread: the standard deviation of the logits.
    """

    name: str
    E: int
    spec: RouterSpec
    bias: float | None = None
    dtype: torch.dtype = torch.float32
    T: int = 12
    spread: float = 2.0
    seed: int = 0

    @property
    def id(self) -> str:
        """A short name for test ids and messages."""
        return f"{self.name}-{dtype_name(self.dtype)}"

    def code(self) -> str:
        """Write one line of Python that makes this problem again."""
        return repr(self)


@dataclass(frozen=True)
class FieldProblem(RouterProblem):
    """Two calls that must give different routings, on the same logits.

    other: the second one, which differs in one field of the spec, or in having a bias.
    """

    other: RouterProblem = field(kw_only=True)


class RouterInputs(NamedTuple):
    """The arguments of one call, and ``dgates`` [T, K], the random gradient that flows into the gates."""

    logits: Tensor
    selection_bias: Tensor | None
    dgates: Tensor


def make_router_inputs(problem: RouterProblem) -> RouterInputs:
    """Make the inputs of a problem: always the same for the same problem."""
    p, g = problem, torch.Generator().manual_seed(problem.seed)
    logits = (p.spread * torch.randn(p.T, p.E, generator=g, dtype=torch.float64)).to(p.dtype)
    bias = None if p.bias is None else p.bias + 0.2 * torch.randn(p.E, generator=g)
    # Rounded so that a router may hand out gates in any dtype and still receive exactly this gradient.
    dgates = torch.randn(p.T, p.spec.top_k, generator=g).bfloat16().double()
    return RouterInputs(logits, bias, dgates)


def is_moderate(spec: RouterSpec) -> bool:
    """Tell whether right routers may differ on large logits.

    They do in what they add to a sum that may be 0, and in where a softplus is taken for its argument.
    """
    return spec.score == "sqrtsoftplus" or (spec.score in ("softmax", "sigmoid") and spec.renormalise)


def _spec(
    k: int, score: str = "softmax", renormalise: bool = False, scale: float = 1.0, **groups
) -> RouterSpec:
    return RouterSpec(k, score, renormalise, scale, **groups)


def _of_models() -> Iterator[RouterProblem]:
    """Make one problem for each router of a released model, named after the first that has it."""
    seen = set()
    for model in MODELS.values():
        router = (model.E, model.router, model.selection_bias)
        if model.router is not None and router not in seen:
            seen.add(router)
            bias = 0.0 if model.selection_bias else None
            yield RouterProblem(re.sub(r"\W", "_", model.name), model.E, model.router, bias)


_TOP2: dict[str, Any] = {"group_score": "top2_sum"}
# Routers of released models, then combinations that none of them has.
PROBLEMS = (
    *_of_models(),
    RouterProblem("one_expert", 1, _spec(1)),
    RouterProblem("one_expert_no_groups_top2", 1, _spec(1, **_TOP2)),
    RouterProblem("one_expert_of_three", 3, _spec(1, "topk_softmax")),
    RouterProblem("one_renormalised", 7, _spec(1, renormalise=True, scale=0.5)),
    RouterProblem("all_experts", 7, _spec(7)),
    RouterProblem("six_experts", 6, _spec(4)),  # no power of two, and few of them left where some are masked
    RouterProblem("all_experts_sigmoid", 5, _spec(5, "sigmoid", True)),
    RouterProblem("scale_not_renormalised", 24, _spec(3, "sigmoid", scale=2.5)),
    RouterProblem("scale_topk_softmax", 24, _spec(3, "topk_softmax", scale=0.25)),
    RouterProblem("softmax_bias", 24, _spec(4), bias=0.0),
    RouterProblem("softmax_bias_renormalised", 24, _spec(4, renormalise=True), bias=0.0),
    RouterProblem("topk_softmax_bias", 24, _spec(4, "topk_softmax"), bias=0.0),
    RouterProblem("sigmoid_bias_large", 64, _spec(6, "sigmoid"), bias=12.0),
    RouterProblem("groups_of_logits", 36, _spec(4, "topk_softmax", groups=6, keep_groups=2)),
    RouterProblem("groups_of_logits_top2", 36, _spec(4, "topk_softmax", groups=6, keep_groups=2, **_TOP2)),
    RouterProblem("groups_softmax_top2", 36, _spec(4, groups=4, keep_groups=2, **_TOP2)),
    RouterProblem("groups_sigmoid", 36, _spec(3, "sigmoid", groups=12, keep_groups=5)),
    RouterProblem("one_group_kept", 30, _spec(5, renormalise=True, groups=5, keep_groups=1)),
    RouterProblem("all_groups_kept", 30, _spec(5, groups=5, keep_groups=5)),
    RouterProblem("tiny_scores_large_bias", 48, _spec(40, "sigmoid"), bias=12.0, spread=12.0),
    RouterProblem("many_tokens", 8, _spec(2), T=1500),
    RouterProblem("many_tokens_bias", 8, _spec(2, "sigmoid", True), bias=0.0, T=1500),
    RouterProblem("many_tokens_and_experts", 128, _spec(8, renormalise=True), T=40),
    RouterProblem("many_choices", 48, _spec(20, renormalise=True), T=33),
    RouterProblem("many_experts", 1100, _spec(6), T=20),
    RouterProblem("most_groups", 54, _spec(7, groups=9, keep_groups=6)),
    RouterProblem("sigmoid_to_one", 64, _spec(6, "sigmoid", True), bias=0.0),
    RouterProblem("sqrtsoftplus", 24, _spec(4, "sqrtsoftplus")),
    RouterProblem("sqrtsoftplus_to_one", 24, _spec(4, "sqrtsoftplus", True), bias=0.0),
    # Their logits lie so densely that several are within reach, also of choices below zero.
    RouterProblem("sparsemixer_dense", 300, _spec(6, "sparsemixer", scale=2.0), T=33),
    RouterProblem("sparsemixer_many", 40, _spec(30, "sparsemixer"), T=60),
    RouterProblem("sparsemixer_to_one", 100, _spec(4, "sparsemixer", True, epsilon=0.1), T=33),
    RouterProblem("epsilon_softmax", 24, _spec(4, renormalise=True, epsilon=0.1)),
    RouterProblem("epsilon_softmax_bias", 24, _spec(4, renormalise=True, epsilon=1e-3), bias=0.0),
    RouterProblem("epsilon_sigmoid", 24, _spec(4, "sigmoid", True, 2.5, epsilon=0.5), bias=0.0),
    RouterProblem("epsilon_sqrtsoftplus", 24, _spec(4, "sqrtsoftplus", True, epsilon=1e-2)),
    RouterProblem("epsilon_not_renormalised", 24, _spec(4, "sigmoid", epsilon=0.5)),
    RouterProblem("epsilon_topk_softmax", 24, _spec(4, "topk_softmax", True, epsilon=0.5)),
    RouterProblem("logit_bias", 24, _spec(4, "sigmoid", True, biased="logit"), bias=0.0, spread=0.5),
    RouterProblem("logit_bias_softmax", 24, _spec(4, biased="logit"), bias=0.0, spread=0.5),
    RouterProblem(
        "logit_bias_groups",
        36,
        _spec(4, "sigmoid", groups=6, keep_groups=2, biased="logit", **_TOP2),
        bias=0.0,
    ),
    RouterProblem("many_groups", 96, _spec(6, "sigmoid", True, 2.5, groups=24, keep_groups=6), bias=0.0),
)
# With biases that leave every score, or every logit, below zero.
PROBLEMS += tuple(
    RouterProblem(
        f"{score}_{biased}_below_zero", 24, _spec(4, score, True, biased=biased), bias, spread=spread
    )
    for score, biased, bias, spread in (
        ("softmax", "score", -3.0, 2.0),
        ("sigmoid", "score", -3.0, 2.0),
        ("sqrtsoftplus", "score", -8.0, 2.0),
        ("topk_softmax", "score", -8.0, 0.5),
        ("sigmoid", "logit", -8.0, 0.5),
    )
) + tuple(
    RouterProblem(
        f"groups_{score}_{group_score}_below_zero", 64,
        _spec(6, score, True, groups=8, keep_groups=2, group_score=group_score), bias=-3.0,
    )
    for score in ("softmax", "sigmoid")
    for group_score in GROUP_SCORES
)  # fmt: skip


def _every_field() -> Iterator[FieldProblem]:
    """Make for each field of a spec, and for the bias, a pair of problems that differ in it alone."""
    plain = RouterProblem("", 12, _spec(3, groups=4, keep_groups=2), T=64)
    to_one = replace(plain, spec=_spec(3, "sigmoid", True))
    biased = replace(plain, spec=_spec(3, "sigmoid"), bias=0.0)
    for name, first, change in (
        ("top_k", plain, {"top_k": 2}),
        ("score", plain, {"score": "sigmoid"}),
        ("renormalise", plain, {"renormalise": True}),
        ("scale", plain, {"scale": 2.0}),
        ("keep_groups", plain, {"keep_groups": 3}),
        ("group_score", plain, {"group_score": "top2_sum"}),
        ("epsilon", to_one, {"epsilon": 0.1}),
        ("biased", biased, {"biased": "logit"}),
    ):
        other = replace(first, spec=replace(first.spec, **change))
        yield FieldProblem(**vars(replace(first, name=name)), other=other)
    for first, name in ((plain, "selection_bias"), (biased, "selection_bias_ungrouped")):
        yield FieldProblem(**vars(replace(first, name=name, bias=None)), other=replace(first, bias=0.0))


EVERY_FIELD = tuple(_every_field())
# Of those with many tokens, whose oracle takes a second each, in two.
ALL_DTYPES = tuple(
    replace(problem, dtype=dtype)
    for problem in PROBLEMS
    for dtype in DTYPES
    if problem.T < 1000 or dtype in (torch.float32, torch.bfloat16)
)


# Checks whose cause lies in the score or in the choice of groups need no more than one problem of each kind.
_ONE_OF_EACH = ("olmoe_1b_7b", "qwen3_30b_a3b", "notebook", "deepseek_v2", "deepseek_v3", "sigmoid_to_one",
                "deepseek_v4_flash", "phi_3_5_moe", "epsilon_sigmoid", "six_experts")  # fmt: skip
KINDS = tuple(problem for problem in PROBLEMS if problem.name in _ONE_OF_EACH)
