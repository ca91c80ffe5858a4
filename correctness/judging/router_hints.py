"""Which mistake explains a wrong routing: the gates, or the choice, that another spec or another bias gives.

An explanation is given only if it holds for every token that is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from correctness.judging.budget import eps, roundings
from correctness.oracle import router as oracle
from moe_impls.router_interface import BIASED, GROUP_SCORES, SCORES, RouterSpec

MOST_TOKENS = 64
PRECISION = roundings(eps(torch.float32))
HINT = "\n  hint: "
FAR = -1e6  # below every score + bias


class Routed(NamedTuple):
    """What a router was given, and what it made of it: logits [T, E], ids and gates [T, K]."""

    logits: Tensor
    selection_bias: Tensor | None
    spec: RouterSpec
    ids: Tensor
    gates: Tensor


def epsilon_hint(
    got: Tensor,
    want: Tensor,
    logits: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    precision: float | Tensor = PRECISION,
) -> str:
    """Name the epsilon in the denominator of the gates that explains a wrong result; empty if none does.

    The arguments are those of `likely_epsilon`.
    """
    found = likely_epsilon(got, want, logits, ids, spec, precision)
    if found is None:
        return ""
    if found == 0:
        return f"the gates are divided by their sum alone; the spec adds epsilon={spec.epsilon:g} to it"
    return (
        f"the gates are divided by their sum + {found:g}, where the spec has epsilon={spec.epsilon:g}: "
        f"declare RouterSpec(..., epsilon={found:g}), or divide as the spec says"
    )


def likely_epsilon(
    got: Tensor, want: Tensor, logits: Tensor, ids: Tensor, spec: RouterSpec, precision: float | Tensor
) -> float | None:
    """Find the epsilon other than the spec's with which a result would be right; None if there is none.

    Args:
        got, want: [T, N], what is there and what is right: gates, or what routed experts give a token in sum.
            Each row is right but for a factor, if an epsilon is the cause.
        logits, ids: [T, E] and [T, K], of the tokens and of the experts that they visit.
        spec: whose epsilon ``want`` has.
        precision: the largest error of an entry that is right, relative to the largest of its row; one for
            all, or [T].
    """
    if not spec.renormalise or spec.score == "topk_softmax" or not len(got):
        return None
    got, want = got.detach().double()[:MOST_TOKENS], want.detach().double()[:MOST_TOKENS]
    rows = list(zip(logits.detach().double(), ids.tolist(), strict=True))[:MOST_TOKENS]
    sums = torch.stack([oracle.chosen_scores(z, chosen, spec).sum() for z, chosen in rows])
    precision = torch.as_tensor(precision, dtype=torch.float64).expand(len(logits))[:MOST_TOKENS]
    size = want.abs().amax(dim=1)
    factor = (got * want).sum(dim=1) / want.square().sum(dim=1)
    apart = (got - factor.unsqueeze(1) * want).abs().amax(dim=1) > 2 * precision * size * factor.abs()
    if bool(apart.any()) or not bool((factor > 0).all()):
        return None
    denominator = (sums + spec.epsilon) / factor
    low = float((denominator * (1 - precision) - sums).max())
    high = float((denominator * (1 + precision) - sums).min())
    if low > high or high < 0 or low <= spec.epsilon <= high:
        return None
    return _roundest(low, high) if low > 0 else 0.0


def _roundest(low: float, high: float) -> float:
    """Return a power of ten from low to high, or else the number of fewest digits."""
    power = 10.0 ** math.floor(math.log10(high))
    if low <= power:
        return power
    middle = (low + high) / 2
    rounded = (float(f"{middle:.{digits}e}") for digits in range(17))
    return next((number for number in rounded if low <= number <= high), middle)


def gates_hint(routed: Routed, budgets: Tensor) -> str:
    """Name the spec whose gates the router gives in place of the right ones; empty if there is none.

    budgets: [T, K], the relative error allowed for each gate.
    """
    logits, bias, spec, ids, gates = routed
    got = gates.detach().double()
    rows = list(zip(logits.detach().double(), ids.tolist(), strict=True))
    right = torch.stack([oracle.gates(z, chosen, spec) for z, chosen in rows])
    if found := epsilon_hint(got, right, logits, ids, spec, max(float(budgets.max()), eps(gates.dtype))):
        return HINT + found
    few = slice(MOST_TOKENS)
    for text, other in _other_gates(spec, bias):
        want = torch.stack([other(z, chosen) for z, chosen in rows[few]])
        if bool(((got[few] - want).abs() <= budgets[few] * want.abs()).all()):
            return f"{HINT}they are the gates {text}; the spec is {spec}"
    return ""


OtherGates = Callable[[Tensor, Sequence[int]], Tensor]  # of one token: logits [E] and ids -> [K]


def _other_gates(spec: RouterSpec, bias: Tensor | None) -> Iterator[tuple[str, OtherGates]]:
    """List mistakes in the gates: what to say, and what gates they give."""

    def of(**changes: Any) -> tuple[str, OtherGates]:
        other = replace(spec, **changes)
        text = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        return f"of {text}", lambda z, ids: oracle.gates(z, ids, other)

    yield of(renormalise=not spec.renormalise)
    if spec.scale != 1:
        yield of(scale=1.0)
        yield of(renormalise=not spec.renormalise, scale=1.0)
    for score in SCORES:
        if score != spec.score and (score != "sparsemixer" or spec.groups == 1):
            yield of(score=score)
            yield of(score=score, renormalise=not spec.renormalise)
    plain = replace(spec, renormalise=False, scale=1.0)

    def from_scores(divided: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> OtherGates:
        def gates(z: Tensor, ids: Sequence[int]) -> Tensor:
            chosen = oracle.gates(z, ids, plain)
            return spec.scale * divided(chosen if bias is None else chosen + bias[list(ids)].double())

        return gates

    def by_sum(p: Tensor) -> Tensor:
        return p / (p.sum() + spec.epsilon) if spec.renormalise else p

    if spec.renormalise and spec.epsilon:
        each = from_scores(lambda p: (p + spec.epsilon) / (p + spec.epsilon).sum())
        yield "with epsilon added to each score, not to their sum", each
        larger = from_scores(lambda p: p / p.sum().clamp(min=spec.epsilon))
        yield "divided by the larger of their sum and epsilon, not by the sum of both", larger
    softmax = replace(plain, score="softmax")

    def twice(z: Tensor, ids: Sequence[int]) -> Tensor:
        return spec.scale * oracle.gates(z, ids, softmax).softmax(dim=0)

    yield "of a second softmax, over the probabilities of the chosen experts", twice
    if bias is not None:
        yield "that contain the selection bias", from_scores(by_sum, bias)


def choice_hint(routed: Routed, choices: Sequence[tuple[list[int], bool]]) -> str:
    """Name the mistake that gives the experts that a router chose; empty if there is none.

    choices: for each token the right experts, and whether the choice is clear.
    """
    logits, bias, spec, ids, _ = routed
    rows = [set(row) for row in ids.tolist()]
    is_wrong = [clear and row != set(right) for row, (right, clear) in zip(rows, choices, strict=True)]
    wrong = [t for t, is_one in enumerate(is_wrong) if is_one][:MOST_TOKENS]
    others = [t for t, is_one in enumerate(is_wrong) if not is_one][:MOST_TOKENS]
    z = logits.detach().double()
    for text, choose in _other_choices(spec, bias, logits.shape[1]):
        found = {t: choose(z[t]) for t in (*wrong, *others)}
        agrees = all(set(chosen) == rows[t] for t, (chosen, clear) in found.items() if clear)
        if agrees and any(found[t][1] for t in wrong):
            return f"{HINT}this is the choice {text}; the spec is {spec}"
    as_zero = {t: _is_masked_with_zero(routed, t) for t in (*wrong, *others) if spec.groups > 1}
    if all(found is not False for found in as_zero.values()) and any(as_zero.get(t) for t in wrong):
        return (
            f"{HINT}experts of other groups must be masked with -inf, not with 0, above which experts of the "
            f"best groups may not be; the spec is {spec}"
        )
    if bias is not None:
        ranks = [_rank(z[t], spec, bias) for t in wrong]
        if all(float(rank[choices[t][0]].min()) < 0 for t, rank in zip(wrong, ranks, strict=True)):
            return (
                f"{HINT}wrong where score + bias of a right expert is below 0: experts of other groups must "
                "be masked with -inf, not with 0, and a search for the best must not begin at 0"
            )
    return ""


def _is_masked_with_zero(routed: Routed, t: int) -> bool | None:
    """Tell whether a token visits experts that are best where those of other groups rank as 0.

    None: the groups are tied, so that it may visit others.
    """
    logits, bias, spec, ids, _ = routed
    masked = masked_with_zero(logits[t].detach().double(), spec, bias)
    if masked is None:
        return None
    best = masked.sort(descending=True).values[: spec.top_k]
    got = masked[ids[t]].sort(descending=True).values
    return bool((got - best).abs().max() <= PRECISION * masked.abs().max())


def masked_with_zero(z: Tensor, spec: RouterSpec, bias: Tensor | None) -> Tensor | None:
    """Rank the experts of a token, logits [E], with 0 for those of groups that are not kept: [E].

    None where the choice of groups is not clear.
    """
    rank = oracle.scores(z, spec) if bias is None else _rank(z, spec, bias)
    candidates = len(z) // spec.groups * spec.keep_groups
    kept, clear = oracle.select(z, replace(spec, top_k=candidates), bias, eps(torch.float32))
    return torch.zeros_like(rank).index_copy(0, torch.tensor(kept), rank[kept]) if clear else None


def _rank(z: Tensor, spec: RouterSpec, bias: Tensor) -> Tensor:
    return (z if spec.biased == "logit" else oracle.scores(z, spec)) + bias.double()


Choose = Callable[[Tensor], tuple[list[int], bool]]  # of a token: logits [E] -> ids, is it clear


def _other_choices(spec: RouterSpec, bias: Tensor | None, E: int) -> Iterator[tuple[str, Choose]]:
    """List mistakes in the choice: what to say, and what chooses so."""
    precision = eps(torch.float32)

    def of(other: RouterSpec, bias: Tensor | None) -> Choose:
        return lambda z: oracle.select(z, other, bias, precision)

    if bias is not None:
        declared = "a router that takes none declares RouterSupport(..., biases=(False,))"
        yield f"without the selection bias ({declared})", of(spec, None)
        other = BIASED[1 - BIASED.index(spec.biased)]
        yield f"with the selection bias added to the {other}", of(replace(spec, biased=other), bias)
        yield "with the selection bias subtracted", of(spec, -bias)
    if spec.groups > 1:
        ungrouped = replace(spec, groups=1, keep_groups=1)
        yield "without groups", of(ungrouped, bias)
        if bias is not None:
            wide, inside = bias.double(), replace(spec, top_k=E // spec.groups * spec.keep_groups)

            def unbiased_groups(z: Tensor) -> tuple[list[int], bool]:
                kept, groups_clear = oracle.select(z, inside, None, precision)
                others = torch.full_like(wide, FAR).index_copy(0, torch.tensor(kept), wide[kept])
                chosen, clear = oracle.select(z, ungrouped, others, precision)
                return chosen, clear and groups_clear

            yield "with the groups ranked without the selection bias", unbiased_groups
        for group_score in GROUP_SCORES:
            yield f"of group_score={group_score!r}", of(replace(spec, group_score=group_score), bias)
        for kept in range(1, spec.groups + 1):
            if E // spec.groups * kept >= spec.top_k:
                yield f"of keep_groups={kept}", of(replace(spec, keep_groups=kept), bias)
    for score in SCORES[:4] if bias is not None else ():
        yield f"by score {score!r} + bias", of(replace(spec, score=score), bias)
    right = of(spec, bias)
    yield "by logits rounded to bfloat16", lambda z: right(z.bfloat16().double())
