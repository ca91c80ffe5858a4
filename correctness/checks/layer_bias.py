"""The check of a whole layer's selection bias: of any sign, whatever groups it decides between."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from correctness.judging.budget import relative_errors
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import Bench, judged, weights_of
from correctness.judging.layer_tokens import draw_tokens
from correctness.judging.router_hints import HINT, masked_with_zero
from correctness.oracle import layer as oracle
from moe_impls.layer_interface import LayerWeights

MOST = 0.9  # of the tokens: of others a rank may tie with those that are masked
GROUPS_AT_ZERO = "y is right with experts of other groups masked with 0, not with -inf"
# What biases are drawn around, and how far apart: little where all are of one sign.
DRAWN = {"all below zero": (-1.0, 0.1), "all above zero": (1.0, 0.1), "large, of either sign": (0.0, 0.5)}


def selection_bias(bench: Bench) -> None:
    """Choose experts by score plus selection bias also where all biases are below zero, or large."""
    subject, dtype = bench.subject, bench.dtype
    if not subject.selection_bias:
        return  # as a finding's cause may say of a layer
    names = made_of(bench)
    if not names:
        raise CheckFailed("selection_bias, as read(layer) returns it, is made of no parameter and no buffer")
    for what, (center, spread) in DRAWN.items():
        generator, held = torch.Generator().manual_seed(6), _tensors(bench.layer)
        with torch.no_grad():
            for name in names:
                drawn = torch.randn(held[name].shape, generator=generator)
                held[name].copy_(center + spread * drawn)
        weights = weights_of(subject, copy.deepcopy(bench.layer).to("cpu", torch.float64))
        x, ids = draw_tokens(weights, dtype, subject.logits_dtype(dtype))
        dropped = bench.dropped(x.to(bench.device), ids, weights=weights)
        want, allowed = judged(x, ids, weights, None, dtype, subject.logits_dtype(dtype), dropped)
        y = bench.call(x.to(bench.device).unsqueeze(0)).squeeze(0)
        try:
            bench.require("y", y, want["y"], allowed["y"], f" with selection biases {what}")
        except CheckFailed as failure:
            hint = HINT + GROUPS_AT_ZERO if _is_masked_with_zero(bench, weights, x, y) else ""
            raise CheckFailed(f"{failure}{hint}", failure.fractions) from failure.__cause__


def _is_masked_with_zero(bench: Bench, weights: LayerWeights, x: Tensor, y: Tensor) -> bool:
    """Tell whether y [T, O] is right where experts of groups that are not kept rank as 0."""
    spec, logits_dtype = weights.router, bench.subject.logits_dtype(bench.dtype)
    if spec.groups == 1:
        return False
    ranks = [masked_with_zero(z, spec, weights.selection_bias) for z in oracle.logits(x.double(), weights)]
    clear = torch.tensor([rank is not None for rank in ranks])
    if not bool(clear.any()):
        return False
    ids = torch.stack([rank.topk(spec.top_k).indices for rank in ranks if rank is not None])
    want, allowed = judged(x[clear], ids, weights, None, bench.dtype, logits_dtype)
    is_right = relative_errors(y.detach().cpu()[clear], want["y"], allowed["y"]) <= 1
    return bool(is_right.all(dim=1).double().mean() > MOST)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: t for name, t in named if t.is_floating_point()}


def made_of(bench: Bench) -> list[str]:
    """Name the parameters and buffers that the selection bias is made of."""
    found = []
    for name in _tensors(bench.layer):
        twin = copy.deepcopy(bench.layer)
        before = _bias(bench, twin)
        with torch.no_grad():
            _tensors(twin)[name].add_(1)
        if not torch.equal(before, _bias(bench, twin)):
            found.append(name)
    return found


def _bias(bench: Bench, layer: nn.Module) -> Tensor:
    bias = bench.subject.read(layer).selection_bias
    if bias is None:
        raise CheckFailed("read(layer) returns a selection_bias of some layers, and none of others")
    return bias.detach().clone()
