"""What a layer reports of its own routing: which slots it drops, and that the others are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from correctness.judging.budget import allowed_error, relative_errors
from correctness.judging.finding import CheckFailed
from correctness.oracle import layer as oracle
from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import Routing
from moe_impls.layer_interface import LayerWeights
from moe_impls.registry import one_line

MANY = 4  # visits of an expert; a capacity, of whatever size, leaves it one of so many


def dropped_slots(
    routing: Callable[[Any, Tensor], Routing],
    layer: nn.Module,
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    logits_dtype: torch.dtype,
    only: Tensor | slice = slice(None),
) -> Tensor:
    """Call ``routing(layer, x)`` for tokens x [N, D], and return which slots of ``ids`` [N, K] it drops.

    A dropped slot has the id E + Z. The others must be those of ``ids``, in any order, with the gates of
    the oracle; this is checked for the tokens ``only``.

    Raises:
        CheckFailed: it raises, or what it reports is no routing, or not the right one.
    """
    try:
        with torch.no_grad():
            reported, gates = (t.detach().cpu() for t in routing(layer, x))
    except Exception as error:
        raise CheckFailed(f"routing(layer, x) with x {list(x.shape)} raises {one_line(error)}") from error
    sentinel = len(weights.router_weight)
    for name, tensor in (("expert_ids", reported), ("gates", gates)):
        if tensor.shape != ids.shape:
            raise CheckFailed(
                f"routing(layer, x) returns {name} {list(tensor.shape)}; it must be {list(ids.shape)}"
            )
    if reported.dtype != torch.int64:
        raise CheckFailed(f"routing(layer, x) returns expert_ids of {reported.dtype}; it must be torch.int64")
    same = reported.unsqueeze(2) == ids.unsqueeze(1)  # [N, reported slot, right slot]
    dropped = ~same.any(dim=1)
    known = same.any(dim=2) | (reported == sentinel)
    wrong = ~known.all(dim=1) | ((reported == sentinel).sum(dim=1) != dropped.sum(dim=1))
    where = torch.zeros(len(ids), dtype=torch.bool)
    where[only] = True
    if bool((wrong & where).any()):
        t = int((wrong & where).nonzero()[0])
        raise CheckFailed(
            f"routing(layer, x) says that token {t} visits {reported[t].tolist()}; right are "
            f"{ids[t].tolist()}"
            + f", any of them {sentinel} if it is dropped"
            * bool((reported == sentinel).any())
        )
    _require_gates(x, ids, weights, logits_dtype, gates, same, where)
    _require_some(ids[where], dropped[where])
    return dropped


def _require_gates(
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    logits_dtype: torch.dtype,
    gates: Tensor,
    same: Tensor,
    where: Tensor,
) -> None:
    """Raise CheckFailed unless the gates of slots that are not dropped are the oracle's."""
    x, ids = x.cpu()[where], ids[where]
    want, plain = (
        oracle.gates(oracle.logits(wide, weights, rounded), ids, weights.router)
        * oracle.slot_scale(ids, weights, wide)
        for wide, rounded in (
            (x.double(), None),
            (x.float(), logits_dtype if logits_dtype in LOW_PRECISION else None),
        )
    )
    dtype = x.dtype if x.dtype != torch.float64 else torch.float32
    lost = relative_errors(plain.to(dtype), want, want.abs())
    allowed = allowed_error(lost, dtype, dtype) * want.abs()
    kept = same[where]
    got = (kept * gates[where].unsqueeze(2)).sum(dim=1)  # [N, right slot]
    ratio = relative_errors(got.double(), want, allowed).where(kept.any(dim=1), 0.0)
    if ratio.numel() and float(ratio.max()) > 1:
        t, k = (int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise CheckFailed(
            f"routing(layer, x) says that the gate of token {t} for expert {int(ids[t, k])} is "
            f"{float(got[t, k]):.6g}; right is {float(want[t, k]):.6g}"
        )


def _require_some(ids: Tensor, dropped: Tensor) -> None:
    """Raise CheckFailed if an expert that is visited often keeps no token at all."""
    for expert in ids.unique().tolist():
        visits = ids == expert
        if int(visits.sum()) >= MANY and bool(dropped[visits].all()):
            raise CheckFailed(
                f"routing(layer, x) says that expert {expert} drops all of its {int(visits.sum())} tokens"
            )
