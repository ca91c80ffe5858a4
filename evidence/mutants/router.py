"""A right router, each step on a line of its own, so that it can be made wrong by changing one line.

Written from the equations of the released routers (see ``moe_impls.router_interface.RouterSpec``). It passes
every check of a router as it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.interface import Routing
from moe_impls.router_interface import RouterSpec


def route(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
    """Route logits [T, E]: expert_ids [T, K] int64, gates [T, K] in at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(wide)  # [T, E]
    scores = z  # [T, E]
    if spec.score == "softmax":
        scores = z.softmax(dim=1)
    if spec.score == "sigmoid":
        scores = z.sigmoid()
    if spec.score == "sqrtsoftplus":
        plus = F.softplus(z.clamp(min=-80), threshold=40)  # of which the root has no slope at 0
        scores = plus.sqrt()
    ids = choose(z.detach(), scores.detach(), spec, selection_bias)  # [T, K]

    gates = scores.gather(1, ids)
    if spec.score == "sparsemixer":
        gates = sparse(z, ids)
    renormalised = spec.renormalise or spec.score == "topk_softmax"
    has_logarithms = spec.score in ("softmax", "sigmoid", "topk_softmax")
    divides = not has_logarithms or (spec.epsilon > 0 and spec.score != "topk_softmax")
    if renormalised and divides:
        total = gates.sum(dim=1, keepdim=True)
        gates = gates / (total + spec.epsilon)
    elif renormalised:  # s / Σ s is the softmax of log s, whose largest is shifted to 0
        logs = z.gather(1, ids)
        if spec.score == "sigmoid":
            logs = F.logsigmoid(logs)
        gates = logs.softmax(dim=1)
    gates = gates * spec.scale
    return Routing(ids, gates)


def sparse(z: Tensor, ids: Tensor) -> Tensor:
    """Weigh the chosen [T, K], best first, each against the logits that are near below it."""
    gates, left = [], z
    for k in range(ids.shape[1]):
        best = z.gather(1, ids[:, k : k + 1]).detach()
        factor = torch.maximum(z.detach().abs(), best)
        far = (best - z.detach()) / factor > 0.02
        near = left.masked_fill(far, -torch.inf)
        gates.append(near.softmax(dim=1).gather(1, ids[:, k : k + 1]))
        left = left.scatter(1, ids[:, k : k + 1], -torch.inf)
    return torch.cat(gates, dim=1)


def choose(z: Tensor, scores: Tensor, spec: RouterSpec, selection_bias: Tensor | None) -> Tensor:
    """Find the best experts [T, K] by logits z, or by biased scores; both [T, E]."""
    (T, E), K = z.shape, spec.top_k
    rank = z  # in the order of the scores, without the ties of scores that saturate
    if spec.biased == "logit":
        scores = z
    if selection_bias is not None:
        rank = scores = scores + selection_bias.detach().to(scores.dtype)
    candidates = torch.arange(E).expand(T, E)
    if spec.groups > 1:
        members = torch.arange(E).view(spec.groups, -1)
        group_rank = rank[:, members].amax(dim=2)  # [T, groups]
        if spec.group_score == "top2_sum":
            group_rank = scores[:, members].topk(2, dim=2).values.sum(dim=2)
        kept = group_rank.topk(spec.keep_groups, dim=1).indices
        candidates = members[kept].flatten(1)
    best = rank.gather(1, candidates).topk(K, dim=1).indices
    return candidates.gather(1, best)
