"""The oracle of routers, loads and balance losses: one token, one expert at a time, from the equations.

Gradients are written out by hand. Run in float64 it is what "right" means; run in float32 it shows what any
plain computation loses. It shares no code with ``moe_impls.router`` and ``moe_impls.losses``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_impls.interface import check_choice
from moe_impls.router_interface import SPARSEMIXER_REACH, RouterSpec

# How many units of rounding a right router's score may be off before its choice is called unclear.
SLACK = 16.0
SCORES = ("softmax", "sigmoid", "topk_softmax", "sqrtsoftplus", "sparsemixer")  # that have equations here
_COUNTED = {"max": 1, "top2_sum": 2}  # for each group score, how many of a group's best are added


def scores(z: Tensor, spec: RouterSpec) -> Tensor:
    """Compute what the experts of one token are ranked by, before a selection bias: logits z [E] -> [E].

    Raises:
        ValueError: the score has no equation here.
    """
    check_choice("score", spec.score, SCORES)
    if spec.score == "softmax":
        weights = torch.exp(z - z.max())
        return weights / weights.sum()
    if spec.score == "sqrtsoftplus":
        return _softplus(z).sqrt()
    return 1 / (1 + torch.exp(-z)) if spec.score == "sigmoid" else z


def _softplus(z: Tensor) -> Tensor:
    """Compute log(1 + exp(z)), whose small values adding to 1 would lose."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _sparse_softmax(z: Tensor, ids: Sequence[int]) -> Tensor:
    """Compute for each chosen expert the softmax [E] that its gate is read from: [K, E].

    PhiMoE (arXiv:2409.12136) in evaluation: over the experts that no better choice has taken and whose logit
    is within reach of the chosen one.
    """
    order = sorted(range(len(ids)), key=lambda k: -float(z[ids[k]]))  # best first
    best_first = [ids[k] for k in order]
    left = torch.ones(len(ids), len(z), dtype=torch.bool)
    left[:, best_first] = torch.ones(len(ids), len(ids)).triu().bool()
    within = ~(_distance(z, best_first) > 0)
    weights = torch.where(within & left, torch.exp(z - z[best_first].unsqueeze(1)), 0.0)
    rows = torch.empty_like(weights)
    rows[order] = weights / weights.sum(dim=1, keepdim=True)
    return rows


def _distance(z: Tensor, ids: Sequence[int]) -> Tensor:
    """Compute by how much each logit is out of reach of those of ``ids``: [K, E]."""
    best = z[ids].unsqueeze(1)
    return (best - z) - SPARSEMIXER_REACH * torch.maximum(z.abs(), best)


def _sparse_is_clear(z: Tensor, ids: Sequence[int], doubt: Tensor) -> bool:
    """Tell whether the order of the chosen, best first, and what is within their reach exceed the doubt.

    A chosen expert is within its own reach whatever its logit is, and a better choice is out of the softmax.
    """
    best, their_doubt = z[ids], doubt[ids]
    reach = (_distance(z, ids).abs() > doubt + their_doubt.unsqueeze(1)) | z.isinf()
    reach[:, ids] |= torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    order = best[:-1] - their_doubt[:-1] > best[1:] + their_doubt[1:]
    return bool(reach.all()) and bool(order.all())


def select(z: Tensor, spec: RouterSpec, selection_bias: Tensor | None, eps: float) -> tuple[list[int], bool]:
    """Choose the K experts of one token, and say whether every right router must choose them.

    The choice is clear if no score, computed with relative precision ``eps`` from logits z [E] of that
    precision, can cross from one side of a cut (between groups or between experts) to the other.
    """
    s = z if spec.biased == "logit" else scores(z, spec)
    rank = s if selection_bias is None else s + selection_bias.to(s.dtype)
    slack = SLACK * eps * (s.abs() * (1 + z.abs() + z.abs().max()) + rank.abs())
    value, doubt = rank.tolist(), slack.tolist()

    size = len(value) // spec.groups
    members = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
    check_choice("group_score", spec.group_score, tuple(_COUNTED))
    counted = _COUNTED[spec.group_score]
    group_value, group_doubt = [], []
    for group in members:
        best, _ = _largest(group, value, doubt, min(counted, size))
        group_value.append(sum(value[e] for e in best))
        group_doubt.append(counted * max(doubt[e] for e in group))
    kept, groups_clear = _largest(range(spec.groups), group_value, group_doubt, spec.keep_groups)
    chosen, experts_clear = _largest([e for g in kept for e in members[g]], value, doubt, spec.top_k)
    clear = groups_clear and experts_clear
    if spec.score == "sparsemixer":
        clear = clear and _sparse_is_clear(z, chosen, slack)
    return chosen, clear


def _largest(
    candidates: Sequence[int], value: Sequence[float], doubt: Sequence[float], n: int
) -> tuple[list[int], bool]:
    """Return the n candidates of largest value, and whether their lead exceeds the doubt."""
    order = sorted(candidates, key=lambda i: -value[i])
    chosen, rest = order[:n], order[n:]
    lowest = min(value[i] - doubt[i] for i in chosen)
    return chosen, all(value[i] + doubt[i] < lowest for i in rest)


def gates(z: Tensor, ids: Sequence[int], spec: RouterSpec) -> Tensor:
    """Compute the gates [K] of one token with logits z [E] that visits the experts ``ids``."""
    if spec.score == "topk_softmax":
        weights = torch.exp(z[ids] - z[ids].max())
        return spec.scale * weights / weights.sum()
    chosen = chosen_scores(z, ids, spec)
    return spec.scale * (chosen / (chosen.sum() + spec.epsilon) if spec.renormalise else chosen)


def chosen_scores(z: Tensor, ids: Sequence[int], spec: RouterSpec) -> Tensor:
    """Compute what the gates [K] are before they are divided by their sum."""
    if spec.score == "sparsemixer":
        return _sparse_softmax(z, ids)[range(len(ids)), ids]
    return scores(z, spec)[ids]


def gate_gradient(z: Tensor, ids: Sequence[int], spec: RouterSpec, dgates: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient [E] of Σ_k dgates[k] * gates[k] in z [E], and for each entry its scale.

    The scale is the sum of the sizes of the terms that a right computation may add up. Terms that cancel
    exactly on paper leave rounding errors of their size: dividing a softmax by the sum of the chosen ones
    gives the other experts no gradient, but only up to rounding.
    """
    check_choice("score", spec.score, SCORES)
    d, size = torch.zeros_like(z), torch.zeros_like(z)
    if spec.score == "topk_softmax" or (spec.score == "softmax" and spec.renormalise and not spec.epsilon):
        weights = torch.exp(z - z[ids].max())
        share = weights / weights[ids].sum()  # of all experts, relative to the chosen ones
        d[ids] = spec.scale * share[ids] * (dgates - (dgates * share[ids]).sum())
        size = spec.scale * share * (dgates.abs() * share[ids]).sum()
        size[ids] += spec.scale * share[ids] * dgates.abs()
        return d, size

    chosen = chosen_scores(z, ids, spec)
    du, du_size = spec.scale * dgates, spec.scale * dgates.abs()  # of the chosen scores
    if spec.renormalise:  # u / (Σ u + epsilon)
        total = chosen.sum() + spec.epsilon
        du = (du - (du * chosen / total).sum()) / total
        du_size = (du_size + (du_size * chosen / total).sum()) / total

    if spec.score in ("softmax", "sparsemixer"):  # each chosen score is one of a softmax over some experts
        sparse = spec.score == "sparsemixer"
        p = _sparse_softmax(z, ids) if sparse else scores(z, spec).unsqueeze(0)  # [K or 1, E]
        d, size = (
            -((du * chosen).unsqueeze(1) * p).sum(dim=0),
            ((du_size * chosen).unsqueeze(1) * p).sum(dim=0),
        )
        d[ids] += du * chosen
        size[ids] += du_size * chosen
    elif spec.score == "sigmoid":
        d[ids], size[ids] = du * chosen * (1 - chosen), du_size * chosen
    else:
        plus, slope = _softplus(z[ids]), 1 / (1 + torch.exp(-z[ids]))
        rate = torch.where(plus > 0, slope / (2 * plus), 0.5)  # of the score, relative to itself
        d[ids], size[ids] = du * chosen * rate, du_size * chosen * rate
    return d, size


def stay_probability(clean: Tensor, noisy: Tensor, scale: Tensor, k: int, i: int) -> Tensor:
    """Compute P(x, i) of one token [E]: the chance that expert i is in the top k for new noise of its own.

    Shazeer et al. 2017 (arXiv:1701.06538), equations 8 and 9.
    """
    others = torch.cat([noisy[:i], noisy[i + 1 :]]).sort(descending=True).values
    distance = (clean[i] - others[k - 1]) / scale[i]
    return (1 + torch.erf(distance / math.sqrt(2))) / 2


def smooth_load(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Sum `stay_probability` over tokens, equation 10: [E]; all inputs are [T, E]."""
    T, E = clean.shape
    load = []
    for i in range(E):
        chances = [stay_probability(clean[t], noisy[t], scale[t], k, i) for t in range(T)]
        load.append(torch.stack(chances).sum() if chances else clean.new_zeros(()))
    return torch.stack(load)


def importance(expert_ids: Tensor, gates: Tensor, num_experts: int) -> list[float]:
    """Sum each expert's gates over tokens; expert_ids and gates are [T, K]."""
    total = [0.0] * num_experts
    for row_ids, row_gates in zip(expert_ids.tolist(), gates.tolist(), strict=True):
        for expert, gate in zip(row_ids, row_gates, strict=True):
            total[expert] += gate
    return total


def cv_squared(v: Sequence[float], population: bool = False) -> float:
    """Compute the squared coefficient of variation, equation 7, by default with the unbiased variance."""
    if len(v) == 1:
        return 0.0
    mean = math.fsum(v) / len(v)
    squares = math.fsum((value - mean) ** 2 for value in v)
    return squares / (len(v) if population else len(v) - 1) / (mean**2 + 1e-10)


def load_balancing_loss(logits: Tensor, expert_ids: Tensor, tokens: Sequence[int]) -> float:
    """Compute E Σ_i f_i P_i over the given tokens; Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6."""
    T, K, E = len(tokens), expert_ids.shape[1], logits.shape[1]
    if T == 0:
        return 0.0
    f, P = [0.0] * E, [0.0] * E
    for t in tokens:
        row = logits[t].tolist()
        largest = max(row)
        total = math.fsum(math.exp(value - largest) for value in row)
        for i in range(E):
            P[i] += math.exp(row[i] - largest) / total / T
        for i in expert_ids[t].tolist():
            f[i] += 1 / (T * K)
    return E * math.fsum(fi * Pi for fi, Pi in zip(f, P, strict=True))


def z_loss(logits: Tensor, tokens: Sequence[int]) -> float:
    """Average log² Σ_i exp(z_i) over the given tokens; Zoph et al. 2022 (arXiv:2202.08906), eq. 5."""
    squares = []
    for t in tokens:
        row = logits[t].tolist()
        largest = max(row)
        squares.append((largest + math.log(math.fsum(math.exp(value - largest) for value in row))) ** 2)
    return math.fsum(squares) / len(squares) if squares else 0.0
