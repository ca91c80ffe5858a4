"""Right balance losses, loads and noisy gating, each step on a line of its own, as `router` has them.

Written from the papers' equations: Shazeer et al. 2017 (arXiv:1701.06538) for noisy gating, loads and the
coefficient of variation, Fedus et al. 2021 (arXiv:2101.03961) for the load-balancing loss and Zoph et al.
2022 (arXiv:2202.08906) for the z-loss. They pass every check of a loss or load as they stand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.interface import Routing
from moe_impls.router_interface import RouterSpec


def wide(t: Tensor) -> torch.dtype:
    """Choose the dtype in which sums over ``t`` are kept: at least float32."""
    return torch.promote_types(t.dtype, torch.float32)


def cv_squared(v: Tensor, *, population: bool = False) -> Tensor:
    """Compute var(v) / mean(v)² of v [E]; the variance divides by E - 1, that of the population by E."""
    v = v.to(wide(v))
    if len(v) == 1:
        return 0 * v.sum()
    freedom = len(v) - (0 if population else 1)
    variance = (v - v.mean()).square().sum() / freedom
    squared_mean = v.mean().square()
    return variance / (squared_mean + 1e-10)


def auxiliary_loss(
    importance: Tensor, load: Tensor, loss_coef: float = 1e-2, *, population: bool = False
) -> Tensor:
    """Compute loss_coef * (cv²(importance) + cv²(load)), both [E]."""
    balance = cv_squared(importance, population=population)
    balance = balance + cv_squared(load, population=population)
    return balance * loss_coef


def load_balancing_loss(logits: Tensor, expert_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute E * Σ f P of logits [T, E]: f, each expert's share of the slots, P, its mean probability."""
    (T, E), K = logits.shape, expert_ids.shape[1]
    logits, weight = masked(logits, mask)
    tokens = weight.sum().clamp(min=1)
    visits = logits.new_zeros(T, E).scatter(1, expert_ids, 1.0)
    f = weight @ visits / (tokens * K)  # [E]
    P = weight @ logits.softmax(dim=1) / tokens  # [E]
    return f @ P * E


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Average logsumexp² over the tokens of logits [T, E]."""
    logits, weight = masked(logits, mask)
    z = logits.logsumexp(dim=1)  # [T]
    squares = z.square()
    return weight @ squares / weight.sum().clamp(min=1)


def masked(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits [T, E] with zeros in padding rows, and the weight of each token, [T]."""
    logits = logits.to(wide(logits))
    mask = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    logits_without_padding = logits.masked_fill(~mask.unsqueeze(1), 0)
    return logits_without_padding, mask.to(logits.dtype)


def noisy_top_k(
    clean: Tensor, raw_scale: Tensor, spec: RouterSpec, *, generator: torch.Generator | None = None
) -> tuple[Routing, Tensor]:
    """Route clean [T, E] + Normal noise of scale softplus(raw_scale) + 0.01; with the load [E]; K < E."""
    deviation = F.softplus(raw_scale) + 0.01
    eps = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    noisy = clean + eps * deviation
    top = noisy.topk(spec.top_k, dim=1)
    return Routing(top.indices, top.values.softmax(dim=1)), smooth_load(clean, noisy, deviation, spec.top_k)


def smooth_load(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Sum over tokens the chance that an expert is among the top k if its own noise is drawn again: [E]."""
    clean, noisy, scale = (t.to(wide(t)) for t in (clean, noisy, scale))
    top = noisy.topk(k + 1, dim=1).values  # [T, k + 1]
    kth, one_after = top[:, k - 1 : k], top[:, k:]
    largest_of_others = torch.where(noisy >= kth, one_after, kth)  # the k-th largest, [T, E]
    chance = torch.special.ndtr((clean - largest_of_others) / scale)
    return chance.sum(dim=0)


def count_load(routing: Routing, num_experts: int) -> Tensor:
    """Count the tokens that visit each expert: [E]."""
    return routing.expert_ids.flatten().bincount(minlength=num_experts)


def importance(routing: Routing, num_experts: int) -> Tensor:
    """Sum each expert's gates: [E], in at least float32."""
    gates = routing.gates.to(wide(routing.gates))
    return gates.new_zeros(num_experts).index_add(0, routing.expert_ids.flatten(), gates.flatten())
