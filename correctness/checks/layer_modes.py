"""What a whole layer is held to under autocast, and where its activations or its router saturate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.judging.finding import during
from correctness.judging.layer_bench import Bench, Expected, T
from correctness.judging.layer_steps import (
    as_it_is,
    gradients_of,
    held,
    is_noisy,
    put_back,
    require_gradients,
    require_own_gradients,
    saturated_layer,
    scale,
    y_of,
)
from correctness.problems.layers import LayerProblem
from moe_impls.interface import dtype_name


def autocast(bench: Bench) -> None:
    """Make logits in float32 under autocast, too, keep the dtype of x, and be right to the autocast dtype.

    Gradients are compared, too, and training mode. Parameters and x are float32 and hold numbers that the
    autocast dtype has, so that rounding them changes nothing.
    """
    support, low = bench.subject.support, bench.dtype
    many, start, rights = as_it_is(bench, tokens=8 * T).expected, held(bench.layer), []
    for training in (False, True)[: 1 + support.training]:
        bench.layer.train(training)
        if not training or not is_noisy(bench):
            rights.append(bench.dropping().expected)
        put_back(bench.layer, start)
    bench.layer.float()
    for training, right in enumerate(rights):
        where = f" under autocast to {dtype_name(low)}{' in training mode' if training else ''}"
        bench.layer.train(bool(training))
        bench = replace(bench, expected=replace(right, x=right.x.float(), dy=right.dy.float()))
        with torch.autocast("cpu", dtype=low), during(where.strip()):
            with torch.no_grad():
                y = y_of(bench, many.x.float().to(bench.device))
            put_back(bench.layer, start)
            found = gradients_of(bench) if support.gradients else {}
            put_back(bench.layer, start)
            again = y_of(bench)
            put_back(bench.layer, start)
        if low == torch.bfloat16:
            where += _swayed(many, y)
        replace(bench, expected=many).require_y(y, context=where)
        bench.require_y(again, context=where)
        require_gradients(bench, found, where)
    if low == torch.bfloat16:
        bench.layer.eval()
        large = saturated_layer(bench)
        with torch.autocast("cpu", dtype=low), torch.no_grad():
            y = y_of(large, large.x.float())
        where = " under autocast to bfloat16, with hidden values sixteen times as large"
        large.require_y(y, context=where)


def _swayed(many: Expected, y: Tensor) -> str:
    """Say so where the wrong tokens are those that rounded logits send to other experts."""
    is_wrong = ((y.double().cpu() - many.want["y"]).abs() > many.allowed["y"]).any(dim=1)
    if not bool(is_wrong.any()) or bool((is_wrong & ~many.is_swayed).any()):
        return ""
    return (
        f"; all {int(is_wrong.sum())} wrong tokens of {len(y)} are those that logits rounded to bfloat16 "
        "send elsewhere: autocast makes a router's product in bfloat16 even of arguments made float32"
    )


def saturated(bench: Bench) -> None:
    """Be right for hidden values sixteen times as large: in clamps, and where activations saturate."""
    gradients, where = bench.subject.support.gradients, " with hidden values sixteen times as large"
    large = saturated_layer(bench, gradients=gradients)
    large.require_y(y_of(large), context=where)
    if gradients:
        require_own_gradients(large, where)


def sharp_routing(bench: Bench) -> None:
    """Be right for logits four times as large, with which the gates of a token lie far apart."""
    weights = bench.subject.read(bench.layer)
    experts = [
        *weights.experts.tensors.values(),
        *(weights.shared.tensors.values() if weights.shared else ()),
    ]
    scale(bench, [weights.router_weight], experts, 4, least_dims=2)
    sharp = as_it_is(bench)
    sharp.require_y(y_of(sharp), context=" with logits four times as large")


_FLOAT32 = (LayerProblem(),)
_LOW = (LayerProblem(torch.bfloat16), LayerProblem(torch.float16))

MODES = (
    Check(saturated, _FLOAT32),
    Check(sharp_routing, _FLOAT32),
    Check(autocast, _LOW, needs="autocast", fits=False),
)
