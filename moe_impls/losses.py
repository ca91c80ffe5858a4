"""Losses that keep experts evenly used and router logits small. All are scalars in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_impls.functional import accumulation_dtype

CV_EPSILON = 1e-10  # keeps cv_squared of all zeros at 0


def cv_squared(v: Tensor, *, population: bool = False) -> Tensor:
    """Compute the squared coefficient of variation, var(v) / (mean(v)² + 1e-10), of a value for each expert.

    The variance is the unbiased one, Σ (v - mean)² / (E - 1). The paper (arXiv:1701.06538, equation 7) and
    tensor2tensor take the population variance, Σ (v - mean)² / E: ``population=True``. The two differ by
    the constant factor E / (E - 1).

    Args:
        v: [E], floating or integer.

    Returns:
        A scalar; 0 for one expert. Its gradient at perfect balance is zero.
    """
    if v.ndim != 1:
        raise ValueError(f"v has shape {list(v.shape)}; it must be [E]")
    v = v.to(accumulation_dtype(v.dtype))
    if len(v) == 1:
        return v.new_zeros(())
    return v.var(correction=0 if population else 1) / (v.mean().square() + CV_EPSILON)


def auxiliary_loss(
    importance: Tensor, load: Tensor, loss_coef: float = 1e-2, *, population: bool = False
) -> Tensor:
    """Compute loss_coef * (cv²(importance) + cv²(load)), from importance [E] and load [E].

    Shazeer et al. 2017 (arXiv:1701.06538), equations 7 and 11, with one coefficient for both. A load that is
    a count has no gradient: only the importance then trains the gate.
    """
    balance = cv_squared(importance, population=population) + cv_squared(load, population=population)
    return loss_coef * balance


def load_balancing_loss(logits: Tensor, expert_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute E * Σ_i f_i * P_i: 1 at perfect balance, E when one expert takes everything (K = 1).

    Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6, for any K: f_i is the share of all slots that
    went to expert i, so that f sums to one, and P_i is the mean over tokens of the softmax over *all*
    experts. (transformers sums the shares over K instead, which gives K times this value.) f has no gradient.

    Args:
        logits: [T, E], before any softmax.
        expert_ids: [T, K] int64.
        mask: [T] bool, False for padding. What a padding row holds, even NaN, has no effect.

    Returns:
        A scalar; 0 without tokens.
    """
    logits, weight = _masked(logits, mask)
    T, E = logits.shape
    if expert_ids.ndim != 2 or len(expert_ids) != T:
        raise ValueError(f"expert_ids has shape {list(expert_ids.shape)}; it must be [{T}, K]")
    visits = torch.zeros_like(logits).scatter(1, expert_ids, 1.0)  # [T, E]
    tokens = weight.sum().clamp(min=1)
    f = (weight.unsqueeze(1) * visits).sum(dim=0) / (tokens * expert_ids.shape[1])  # [E]
    P = (weight.unsqueeze(1) * logits.softmax(dim=1)).sum(dim=0) / tokens  # [E]
    return E * (f * P).sum()


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Average logsumexp(logits)² over tokens, which keeps router logits small.

    Zoph et al. 2022 (arXiv:2202.08906), equation 5.

    Args:
        logits: [T, E]; large ones do not overflow.
        mask: [T] bool, False for padding. What a padding row holds, even NaN, has no effect.

    Returns:
        A scalar; 0 without tokens.
    """
    logits, weight = _masked(logits, mask)
    return (weight * logits.logsumexp(dim=1).square()).sum() / weight.sum().clamp(min=1)


def _masked(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits [T, E], at least float32, with zeros in padding rows, and each token's weight [T]."""
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [T, E]")
    logits = logits.to(accumulation_dtype(logits.dtype))
    if mask is None:
        return logits, logits.new_ones(len(logits))
    if mask.dtype != torch.bool or mask.shape != logits.shape[:1]:
        raise ValueError(
            f"mask is {mask.dtype} of shape {list(mask.shape)}; it must be bool of shape [{len(logits)}]"
        )
    return logits.masked_fill(~mask.unsqueeze(1), 0), mask.to(logits.dtype)
