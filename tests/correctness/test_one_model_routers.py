"""Routers of one model, as their models write them: judged on what they declare, and told the cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from correctness.checks import routers
from correctness.checks.case import Check, cases
from correctness.checks.routers import router
from correctness.judging.finding import CheckFailed
from correctness.problems.routers import KINDS, PROBLEMS
from correctness.session.subjects import find_subjects
from moe_impls import RouterSpec, RouterSupport, Routing
from moe_impls.registry import ResolveError
from moe_impls.router_interface import SCORES
from tests.correctness.findings import findings

WITH_BIAS, WITHOUT = (True,), (False,)


def deepseek_v3(
    logits: Tensor,
    spec: RouterSpec,
    *,
    selection_bias: Any = None,
    masked: float = float("-inf"),
    best: int = 2,
    epsilon: float = 1e-20,
    score: Callable[[Tensor], Tensor] = torch.sigmoid,
    bias_in_gates: bool = False,
    logit_bias: bool = False,
    groups_biased: bool = True,
) -> Routing:
    scores = score(logits.float())
    for_choice = (logits.float() if logit_bias else scores) + selection_bias.float()
    by_group = (for_choice if groups_biased else scores).view(-1, 4, 8).topk(best, dim=-1)[0].sum(dim=-1)
    mask = torch.zeros_like(by_group).scatter_(1, by_group.topk(2, dim=-1)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 8).reshape(-1, 32).bool()
    ids = for_choice.masked_fill(~mask, masked).topk(4, dim=-1)[1]
    weights = (for_choice if bias_in_gates else scores).gather(1, ids)
    return Routing(ids, weights / (weights.sum(dim=-1, keepdim=True) + epsilon) * 2.5)


def grouped_logits(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, masked: float = -torch.inf
) -> Routing:
    z = logits.float()
    best = z.unflatten(1, (4, 8)).amax(dim=2).topk(2, dim=1).indices
    others = torch.ones(len(z), 4, dtype=torch.bool).scatter(1, best, False).repeat_interleave(8, dim=1)
    ids = z.masked_fill(others, masked).topk(4, dim=1).indices
    return Routing(ids, z.gather(1, ids).softmax(dim=1))


def qwen3(
    logits: Tensor,
    spec: RouterSpec,
    *,
    selection_bias: Any = None,
    rounded: bool = False,
    renormalise: bool = True,
    again: bool = False,
) -> Routing:
    z = logits.bfloat16() if rounded else logits
    weights, ids = F.softmax(z, dim=-1, dtype=torch.float).topk(8, dim=-1)
    if again:
        return Routing(ids, weights.softmax(dim=-1))
    return Routing(ids, weights / weights.sum(dim=-1, keepdim=True) if renormalise else weights)


def mixtral(logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, epsilon: float = 0.0) -> Routing:
    weights, ids = F.softmax(logits.float(), dim=1).topk(2, dim=-1)
    return Routing(ids, weights / (weights.sum(dim=-1, keepdim=True) + epsilon))


def gpt_oss(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, softmax_first: bool = False
) -> Routing:
    values, ids = (logits.float().softmax(1) if softmax_first else logits.float()).topk(4, dim=-1)
    return Routing(ids, values if softmax_first else values.softmax(dim=1))


def llama4(logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, softmax: bool = False) -> Routing:
    values, ids = logits.float().topk(1, dim=1)
    return Routing(ids, logits.float().softmax(1).gather(1, ids) if softmax else values.sigmoid())


def phimoe(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, reach: float = 0.02, plain: bool = False
) -> Routing:
    scores, gates, chosen = logits.float(), [], []
    left = scores
    for _ in range(2):
        with torch.no_grad():
            best, index = left.max(dim=-1, keepdim=True)
            far = ((best - scores) / scores.abs().clamp(min=best)) > reach
        masked = left if plain else left.masked_fill(far, float("-inf"))
        gates.append(masked.softmax(dim=-1).gather(-1, index))
        chosen.append(index)
        left = left.scatter(-1, index, float("-inf"))
    return Routing(torch.cat(chosen, dim=-1), torch.cat(gates, dim=-1))


def deepseek_v4(
    logits: Tensor,
    spec: RouterSpec,
    *,
    selection_bias: Any = None,
    root: bool = True,
    start: float = -float("inf"),
) -> Routing:
    scores = F.softplus(logits.float())
    scores = scores.sqrt() if root else scores
    ids = (scores + selection_bias).clamp(min=start).topk(6, dim=-1).indices
    weights = scores.gather(1, ids)
    return Routing(ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 1.5)


def glm(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Any = None, scaled: bool = True, biased: bool = True
):
    scores = logits.float().sigmoid()
    ids = (scores + selection_bias if biased else scores).topk(8, dim=-1)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(ids, weights * 2.5 if scaled else weights)


TO_ONE = {"renormalise": True, "epsilon": 1e-20}
GROUPS = {"groups": 4, "keep_groups": 2, "group_score": "top2_sum"}
WIDE = (torch.float32, torch.bfloat16, torch.float16)  # each computes in float32
# Not those extremes: where one logit alone is not -inf, PhiMoE chooses one expert twice, and the root of a
# softplus that underflows has a gradient that is no number.
DECLARED: dict[Callable, RouterSupport] = {
    function: RouterSupport((spec,), num_experts, dtypes=WIDE, extremes=extremes, biases=biases)
    for function, spec, num_experts, extremes, biases in (
        (deepseek_v3, RouterSpec(4, "sigmoid", scale=2.5, **TO_ONE, **GROUPS), 32, True, WITH_BIAS),
        (grouped_logits, RouterSpec(4, "topk_softmax", groups=4, keep_groups=2), 32, True, WITHOUT),
        (qwen3, RouterSpec(8, renormalise=True), 128, True, WITHOUT),
        (mixtral, RouterSpec(2, renormalise=True), 8, True, WITHOUT),
        (gpt_oss, RouterSpec(4, "topk_softmax"), 32, True, WITHOUT),
        (llama4, RouterSpec(1, "sigmoid"), 16, True, WITHOUT),
        (phimoe, RouterSpec(2, "sparsemixer"), 16, False, WITHOUT),
        (deepseek_v4, RouterSpec(6, "sqrtsoftplus", scale=1.5, **TO_ONE), 64, False, WITH_BIAS),
        (glm, RouterSpec(8, "sigmoid", scale=2.5, **TO_ONE), 160, True, WITH_BIAS),
    )
}


def found(function: Callable, checks: tuple[str, ...] = (), **wrong: object) -> str | None:
    """What is found first in a router of one model; without names of checks, on the first problem of each."""

    def route(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        return function(logits, spec, selection_bias=selection_bias, **wrong)

    done: set[Check] = set()
    for case in cases([router(function.__name__, route, DECLARED[function])]):
        if (
            case.skip
            or case.check.drawn
            or (case.check in done if not checks else case.check.name not in checks)
        ):
            continue
        done.add(case.check)
        try:
            case.run()
        except CheckFailed as failure:
            return str(failure)
    return None


@pytest.mark.parametrize("function", DECLARED)
def test_a_right_router_of_one_model_is_accepted(function: Callable) -> None:
    assert found(function) is None


WRONG = [
    (deepseek_v3, {"masked": 0.0}, "masked with -inf, not with 0"),
    (grouped_logits, {"masked": 0.0}, "more than 2 groups of 8\n.*masked with -inf, not with 0"),
    (deepseek_v3, {"groups_biased": False}, "the choice with the groups ranked without the selection bias"),
    (deepseek_v3, {"best": 1}, "the choice of group_score='max'"),
    (deepseek_v3, {"epsilon": 1e-3}, "divided by their sum \\+ 0.001, where the spec has epsilon=1e-20"),
    (deepseek_v3, {"score": lambda z: z.softmax(1)}, "the choice by score 'softmax' \\+ bias"),
    (deepseek_v3, {"bias_in_gates": True}, "the gates that contain the selection bias"),
    (deepseek_v3, {"logit_bias": True}, "the choice with the selection bias added to the logit"),
    (qwen3, {"rounded": True}, "the choice by logits rounded to bfloat16|the gate of token"),
    (qwen3, {"renormalise": False}, "the gates of renormalise=False"),
    (qwen3, {"again": True}, "the gates of a second softmax, over the probabilities of the chosen experts"),
    (mixtral, {"epsilon": 1e-6}, "divided by their sum \\+ 1e-06, where the spec has epsilon=0: declare"),
    (gpt_oss, {"softmax_first": True}, "the gates of score='softmax'"),
    (llama4, {"softmax": True}, "the gates of score='softmax'"),
    (phimoe, {"plain": True}, "the gate of token"),
    (phimoe, {"reach": 0.01}, "the gate of token"),
    (deepseek_v4, {"root": False}, "the choice|the gate of token"),
    (deepseek_v4, {"start": 0.0}, "a search for the best must not begin at 0"),
    (glm, {"scaled": False}, "the gates of scale=1.0"),
    (glm, {"biased": False}, "the choice without the selection bias .*biases=\\(False,\\)"),
]


@pytest.mark.parametrize(("function", "wrong", "cause"), WRONG, ids=[cause for *_, cause in WRONG])
def test_a_wrong_router_of_one_model_is_rejected_for_its_cause(
    function: Callable, wrong: dict[str, object], cause: str
) -> None:
    finding = found(function, ("values",), **wrong)
    assert finding is not None
    assert re.search(cause, finding), finding


def test_a_cause_is_told_in_full_once() -> None:
    wrong = router("mine", lambda z, spec, **_: gpt_oss(z, spec, softmax_first=True), DECLARED[gpt_oss])
    first, *others = findings(
        wrong, [c for c in wrong.kind.checks if c.name in ("values", "tokens_apart")]
    ).values()
    assert "hint: they are the gates of score='softmax'; the spec is" in first
    (other,) = others
    assert "hint: as 'values' on declared_E_" in other
    assert "tells, they are the gates of score='softmax'\n" in other


def test_what_is_declared_is_tested_and_nothing_else() -> None:
    """All that is skipped belongs to other specs."""
    for function, support in DECLARED.items():
        listed = cases([router("mine", function, support)])
        specs = {case.problem.spec for case in listed if case.problem and not case.skip}
        assert specs == set(support.specs or ())
        assert {case.problem.E for case in listed if case.problem and not case.skip} == {support.num_experts}
        assert {case.check.name for case in listed if not case.skip} >= {
            "values",
            "gradients",
            "state",
            "ties",
        }


@pytest.mark.parametrize(
    "declared",
    [
        {"scores": ("sigmoid",), "groups": False},
        {"scores": ("sqrtsoftplus", "sparsemixer"), "epsilon": False, "scale": False},
        {"gradients": False, "renormalise": (True,)},
        {"biases": (True,), "biased": ("logit",)},
        {"num_experts": 6},
        {"dtypes": (torch.bfloat16,)},
    ],
)
def test_each_check_has_a_problem_of_what_is_declared(declared: dict[str, Any]) -> None:
    support = RouterSupport(**declared)
    listed = [case for case in cases([router("mine", mixtral, support)]) if not case.skip]
    names = {case.check.name for case in listed}
    unneeded = {"every_field_counts", *(() if support.gradients else ("gradients",))}
    assert names | unneeded == {check.name for check in routers.CHECKS} | unneeded
    for case in listed:
        if case.problem is not None:
            assert routers.undeclared(support, case.problem) is None


def test_logits_that_a_router_never_meets_are_told_as_that() -> None:
    for function, biases in ((deepseek_v4, (True,)), (phimoe, (False,))):
        declared = DECLARED[function]
        subject = router("mine", function, RouterSupport(declared.specs, declared.num_experts, biases=biases))
        checks = [c for c in subject.kind.checks if c.name in ("masked_experts", "large_logits")]
        found = findings(subject, checks)
        assert found
        assert all("declares extremes=False" in finding for finding in found.values())


def test_a_file_declares_what_its_router_carries_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from moe_impls import RouterSupport, Support\n"
        "SUPPORT = RouterSupport(scores=('sigmoid',), groups=False)\n"
        "def route(logits, spec, *, selection_bias=None): ...\n"
    )
    (subject,) = find_subjects(None, [f"{file}:route"], None, 0)
    assert subject.support == RouterSupport(scores=("sigmoid",), groups=False)
    other = tmp_path / "other.py"
    other.write_text(
        file.read_text().replace("= RouterSupport(scores=('sigmoid',), groups=False)", "= Support()")
    )
    with pytest.raises(
        ResolveError, match="SUPPORT is a Support; of a router it must be a moe_impls.RouterSupp"
    ):
        find_subjects(None, [f"{other}:route"], None, 0)


def test_every_score_has_a_problem_of_its_own() -> None:
    assert {problem.spec.score for problem in PROBLEMS} == set(SCORES)
    assert {problem.spec.score for problem in KINDS} == set(SCORES)
