"""Which experts each token visits and with which weights: the routers of released models, noisy top-k gating,
and the load and importance of experts that the balance losses are made of.

Everything is computed in at least float32: rounding router logits to bfloat16 makes ties, and ties send
tokens to other experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import accumulation_dtype
from moe_impls.interface import Routing, check_positive
from moe_impls.router_interface import SPARSEMIXER_REACH, RouterSpec, check_num_experts

NOISE_EPSILON = 1e-2  # the least standard deviation of the gate's noise, in units of logits


def check_logits(logits: Tensor, spec: RouterSpec, selection_bias: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless `route` can carry out ``spec`` on logits [T, E]."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits is of type {what}; it must be a tensor of a floating dtype")
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [T, E]")
    E = logits.shape[1]
    check_num_experts(spec, E)
    if selection_bias is not None and selection_bias.shape != (E,):
        raise ValueError(f"selection_bias has shape {list(selection_bias.shape)}; it must be [{E}]")
    if selection_bias is not None and spec.score == "sparsemixer":
        raise ValueError("selection_bias is given; with score 'sparsemixer' it must be None")


def route(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
    """Choose the best ``top_k`` experts for each token and weigh them.

    The scores of a token are the softmax, the sigmoid or the root of the softplus of its logits, or the
    logits themselves (topk_softmax, sparsemixer). The largest are chosen; with ``selection_bias``, the
    largest score + bias, as in DeepSeek-V3 (arXiv:2412.19437, equation 16), or logit + bias where the spec
    says so; the gates never contain the bias. Without a bias the logits decide: they order the experts as the
    scores do, and do not run into ties where a score saturates. Equal scores are told apart as torch.topk
    does it: always the same way, always distinct experts.

    With top_k = 1 a renormalised gate is 1 whatever the logits are (topk_softmax, too), and the output
    then gives the router no gradient.

    Args:
        logits: [T, E], any floating dtype; T may be 0.
        spec: what to do; see `RouterSpec`.
        selection_bias: [E] or None. It gets no gradient.

    Returns:
        expert_ids [T, K] int64, best first, and gates [T, K] in float32 (float64 for float64 logits). A NaN
        in the logits of a token makes its own gates NaN; its expert_ids are still valid and distinct. A logit
        of -inf has the score 0 (topk_softmax: -inf), so that without a bias it comes after all others.

    Raises:
        TypeError: logits are not floating.
        ValueError: a shape does not fit, groups does not divide E, or top_k exceeds the number of experts to
            choose from.
    """
    check_logits(logits, spec, selection_bias)
    z = logits.to(accumulation_dtype(logits.dtype))  # [T, E]
    scores = z  # [T, E]
    if spec.score == "softmax":
        scores = z.softmax(dim=1)
    elif spec.score == "sigmoid":
        scores = z.sigmoid()
    elif spec.score == "sqrtsoftplus":
        scores = _sqrt_softplus(z)
    expert_ids = _select(z.detach(), scores.detach(), spec, selection_bias)  # [T, K]

    # Without an epsilon, renormalising is a softmax over the logarithms of the chosen scores, which cannot
    # divide zero by zero.
    chosen = z.gather(1, expert_ids)
    by_logarithm = spec.renormalise and not spec.epsilon
    if spec.score == "topk_softmax" or (spec.score == "softmax" and by_logarithm):
        gates = chosen.softmax(dim=1)
    elif spec.score == "sigmoid" and by_logarithm:
        gates = F.logsigmoid(chosen).softmax(dim=1)
    else:
        gates = _sparse(z, expert_ids) if spec.score == "sparsemixer" else scores.gather(1, expert_ids)
        if spec.renormalise:
            epsilon = spec.epsilon or torch.finfo(gates.dtype).tiny
            gates = gates / (gates.sum(dim=1, keepdim=True) + epsilon)
    return Routing(expert_ids, gates * spec.scale)


def _sqrt_softplus(z: Tensor) -> Tensor:
    """Compute sqrt(log(1 + exp(z))): exp(z / 2) far below 0, where the slope of the root is infinite."""
    low = z < -40  # softplus(z) is exp(z) there to the last bit, in float64, too
    below, above = z.masked_fill(~low, 0), z.masked_fill(low, 0)
    return torch.where(low, (below / 2).exp(), F.softplus(above, threshold=40).sqrt())


def _sparse(z: Tensor, expert_ids: Tensor) -> Tensor:
    """Compute the gates [T, K] of sparsemixer from logits z [T, E]; ``expert_ids`` are best first."""
    gates, left = [], z
    for chosen in expert_ids.split(1, dim=1):  # [T, 1]
        best = z.detach().gather(1, chosen)
        far = (best - z.detach()) / z.detach().abs().maximum(best) > SPARSEMIXER_REACH
        gates.append(left.masked_fill(far, -torch.inf).softmax(dim=1).gather(1, chosen))
        left = left.scatter(1, chosen, -torch.inf)
    return torch.cat(gates, dim=1)


def _select(z: Tensor, scores: Tensor, spec: RouterSpec, selection_bias: Tensor | None) -> Tensor:
    """Choose experts [T, K] from logits and scores [T, E]."""
    if spec.biased == "logit":
        scores = z
    if selection_bias is not None:
        scores = scores + selection_bias.detach().to(scores.dtype)
    rank = z if selection_bias is None else scores  # [T, E], the larger the better
    if spec.groups == 1:
        return rank.topk(spec.top_k, dim=1).indices

    T, E = rank.shape
    size = E // spec.groups
    if spec.group_score == "max":
        group_rank = rank.unflatten(1, (spec.groups, size)).amax(dim=2)  # [T, groups]
    else:
        group_rank = scores.unflatten(1, (spec.groups, size)).topk(2, dim=2).values.sum(dim=2)
    kept = group_rank.topk(spec.keep_groups, dim=1).indices  # [T, keep_groups]
    # Only members of kept groups are looked at, so that no value, not even -inf, lets another one in.
    members = (kept.unsqueeze(2) * size + torch.arange(size, device=z.device)).flatten(1)  # [T, candidates]
    best = rank.gather(1, members).topk(spec.top_k, dim=1).indices
    return members.gather(1, best)


def noisy_top_k(
    clean: Tensor,
    raw_scale: Tensor,
    spec: RouterSpec,
    *,
    noise_epsilon: float = NOISE_EPSILON,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Routing, Tensor]:
    """Route on ``clean + eps * scale`` with eps drawn from the standard Normal: noisy top-k gating.

    Shazeer et al. 2017 (arXiv:1701.06538), equations 3 to 5, where
    ``scale = softplus(raw_scale) + noise_epsilon`` and the spec is ``RouterSpec(K, score="topk_softmax")``.

    Args:
        clean, raw_scale: [T, E], x @ w_gate and x @ w_noise.
        spec: without groups, since the load is estimated for a choice among all experts.
        generator: draws the noise; None is torch's global generator.
        noise: [T, E] of the standard Normal, if it has been drawn.

    Returns:
        the routing, and the load [E]: `smooth_load`, or with K = E, where every expert is certain to be
        chosen, `count_load`.

    Raises:
        TypeError, ValueError: as `route`; or spec has groups, or the two shapes differ.
    """
    check_logits(clean, spec)
    check_noise(spec)
    if raw_scale.shape != clean.shape:
        raise ValueError(
            f"raw_scale has shape {list(raw_scale.shape)}; it must be that of clean, {list(clean.shape)}"
        )
    dtype = accumulation_dtype(clean.dtype)
    clean = clean.to(dtype)
    scale = F.softplus(raw_scale.to(dtype)) + noise_epsilon
    if noise is None:
        if generator is None:  # in a graph of any number of tokens torch does not take the argument
            noise = torch.randn(clean.shape, device=clean.device, dtype=dtype)
        else:
            noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=dtype)
    noisy = clean + noise * scale
    routing = route(noisy, spec)
    E = clean.shape[1]
    if spec.top_k == E:
        return routing, count_load(routing, E)
    return routing, smooth_load(clean, noisy, scale, spec.top_k)


def check_noise(spec: RouterSpec) -> None:
    """Raise ValueError if the load under noise has no estimate for this router."""
    if spec.groups > 1:
        raise ValueError(f"groups is {spec.groups}; noisy gating estimates the load for groups = 1 only")


def smooth_load(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Estimate the number of tokens of each expert, as a smooth function of the logits.

    Shazeer et al. 2017 (arXiv:1701.06538), appendix A, equations 8 to 10: the probability that expert i
    stays among the top k if only its own noise is drawn again is the Normal CDF of
    ``(clean - threshold) / scale``, with the k-th largest noisy logit of the *other* experts as threshold.
    That is the (k+1)-th largest of all if i is among the top k, and the k-th largest if it is not.

    Args:
        clean, noisy, scale: [T, E], logits before and after the noise, and the noise's standard deviation.
        k: experts per token, less than E.

    Returns:
        [E], the sum over tokens, in at least float32, differentiable in all three tensors.
    """
    E = clean.shape[1]
    if not 0 < k < E:
        raise ValueError(f"k is {k}; the smooth load needs 1 <= k < E = {E}")
    dtype = accumulation_dtype(clean.dtype)
    clean, noisy, scale = (t.to(dtype) for t in (clean, noisy, scale))
    top = noisy.topk(k + 1, dim=1)
    among_top = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, top.indices[:, :k], True)  # [T, E]
    threshold = torch.where(among_top, top.values[:, k:], top.values[:, k - 1 : k])
    return torch.special.ndtr((clean - threshold) / scale).sum(dim=0)


def count_load(routing: Routing, num_experts: int) -> Tensor:
    """Count the tokens that visit each expert: [E] int64, without a gradient. A gate of zero is a visit."""
    return sort_by_expert(routing.expert_ids, num_experts)[1]


def without_sentinels(routing: Routing, num_experts: int) -> Routing:
    """Replace slots that a router dropped, of id E, by experts that the row does not visit, with gates of 0.

    Expert-parallel code and routers with a capacity mark a slot that no expert computes so; implementations
    take ids in [0, E) only. The replaced slots add 0 times an output, and no gradient flows into their gates.
    They count as visits: take the load of the routing as it was. Experts are taken in turn, the first after
    number t of those that token t does not visit, so that none becomes busy by it.

    Args:
        routing: expert_ids [T, K] in [0, E]; E may be repeated in a row, the others are distinct. K <= E.
        num_experts: E.

    Raises:
        TypeError: num_experts is no int, or expert_ids are not int64.
        ValueError: num_experts is below 1 or below K. Of the ids no values are read on the host.
    """
    check_positive("num_experts", num_experts)
    ids, gates = routing
    if ids.dtype != torch.int64:
        raise TypeError(f"expert_ids has dtype {ids.dtype}; it must be torch.int64")
    (T, K), E = ids.shape, num_experts
    if K > E:
        raise ValueError(f"num_experts is {E}; it must be at least K, {K}")
    dropped = ids == E  # [T, K]
    token, expert = torch.arange(T, device=ids.device).unsqueeze(1), torch.arange(E, device=ids.device)
    visited = torch.zeros(T, E + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)[:, :E]
    distance = (expert - token) % E + E * visited  # [T, E], all different in a row
    free = distance.argsort(dim=1)[:, :K]  # [T, K], those that are not visited first
    rank = (dropped.cumsum(dim=1) - 1).clamp(min=0)  # of a slot among the dropped ones of its row
    return Routing(torch.where(dropped, free.gather(1, rank), ids), torch.where(dropped, 0, gates))


def dense_gates(routing: Routing, num_experts: int) -> Tensor:
    """Return gates as a table [T, E] with zeros where a token does not visit an expert."""
    ids, gates = routing
    return gates.new_zeros(ids.shape[0], num_experts).scatter(1, ids, gates)


def importance(routing: Routing, num_experts: int) -> Tensor:
    """Sum each expert's gates over tokens: [E], in at least float32 (arXiv:1701.06538, equation 6)."""
    gates = routing.gates.to(accumulation_dtype(routing.gates.dtype))
    return dense_gates(routing._replace(gates=gates), num_experts).sum(dim=0)
