"""Which rounded tensor sends a layer's tokens to other experts in low precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from correctness.judging.budget import relative_errors
from correctness.judging.layer_bench import Bench, judged
from correctness.oracle import layer as oracle
from correctness.oracle import router
from moe_impls.layer_interface import LayerWeights


def rounded_tensor(bench: Bench, y: Tensor) -> str:
    """Name the tensor whose rounding to the dtype of x explains all wrong rows of y [T, O]; or return ""."""
    right, y = bench.expected, y.detach().cpu()
    is_wrong = (relative_errors(y, right.want["y"], right.allowed["y"]) > 1).any(dim=1)
    for name, rank in _ranked(right.x.double(), right.weights, bench.dtype):
        # Ranks are chosen from as they are: no score, no bias. A tie may go either way.
        spec = replace(right.weights.router, score="topk_softmax", renormalise=False)
        rows = [router.select(row, spec, None, 0.0) for row in rank]
        ids = torch.tensor([chosen for chosen, _ in rows])
        clear = torch.tensor([is_clear for _, is_clear in rows])
        want, allowed = judged(right.x[clear], ids[clear], right.weights, None, bench.dtype, bench.dtype)
        agrees = (relative_errors(y[clear], want["y"], allowed["y"]) <= 1).all()
        if bool(agrees) and bool((is_wrong <= (~clear | _moved(ids, right.ids))).all()):
            return name
    return ""


def _moved(ids: Tensor, right: Tensor) -> Tensor:
    """Tell which tokens visit other experts: bool [T]."""
    return (ids.sort(dim=1).values != right.sort(dim=1).values).any(dim=1)


def _ranked(x: Tensor, weights: LayerWeights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Rank experts, [T, E + Z], with one tensor after another rounded to ``dtype``."""

    def kept(t: Tensor) -> Tensor:
        return t.to(dtype).to(t.dtype)

    def rank(z: Tensor, score: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
        scores = score(torch.stack([router.scores(row, weights.router) for row in z]))
        return scores if weights.selection_bias is None else total(scores + weights.selection_bias.to(scores))

    def same(t: Tensor) -> Tensor:
        return t

    exact = oracle.logits(x, weights)
    yield "the logits", rank(kept(exact), same, same)
    yield "the logits", rank(oracle.logits(x, weights, dtype), same, same)
    yield "the scores", rank(exact, kept, same)
    if weights.selection_bias is not None:
        yield "the sums of scores and selection bias", rank(exact, same, kept)
    if weights.router_norm is not None:
        n = kept(oracle.router_input(x, weights))
        z = n @ weights.router_weight.to(x).T
        z = z if weights.router_bias is None else z + weights.router_bias.to(x)
        yield "the router's norm", rank(z, same, same)
