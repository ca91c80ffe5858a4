"""What a whole layer is held to when torch.compile or torch.export has traced it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import B, Bench, S, T
from correctness.judging.layer_steps import (
    fresh,
    held,
    is_noisy,
    put_back,
    require_own_gradients,
    saturated_layer,
    y_of,
)
from correctness.problems.layers import LayerProblem
from correctness.problems.problem import LOW_PRECISION
from moe_impls.registry import one_line


def fullgraph(bench: Bench) -> None:
    """Compile to one graph by torch.compile that is right for other tokens, lengths and gradients.

    In 16 bits, and where hidden values are large, the graph alone is looked at: y of one call.
    """
    torch.compiler.reset()
    if _is_beside_float32(bench):
        _traced(bench, " compiled")
        return
    large = saturated_layer(fresh(bench.subject, bench, training=False))
    _traced(large, " compiled, with hidden values sixteen times as large")
    bench.layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = bench.subject.support.gradients
    try:
        for turn, (shape, rows) in enumerate(_calls(bench)):
            with torch.compiler.set_stance("default" if turn == 0 else "fail_on_recompile"):
                x = bench.x[rows].unflatten(0, shape)
                if not gradients:
                    with torch.no_grad():
                        y = bench.call(x)
                else:
                    y = bench.call(x.requires_grad_())
                bench.require_y(y.flatten(0, 1), rows, f" compiled, for x {list(x.shape)}")
        if gradients:
            require_own_gradients(bench, " compiled")
            with torch.no_grad():
                bench.require_y(y_of(bench), context=" compiled, under no_grad")
        if bench.subject.support.training:
            _compiled_training(bench)
    finally:
        torch.compiler.reset()


def _is_beside_float32(bench: Bench) -> bool:
    return bench.dtype in LOW_PRECISION and torch.float32 in bench.subject.support.dtypes


def _traced(bench: Bench, where: str) -> None:
    torch.compiler.reset()
    bench.layer.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        bench.require_y(y_of(bench), context=where)
    torch.compiler.reset()


def _compiled_training(bench: Bench) -> None:
    """Be right compiled in training mode, where no noise is added."""
    twin = fresh(bench.subject, bench)
    start = held(twin.layer)
    if is_noisy(twin):
        return
    put_back(twin.layer, start)
    twin.layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    x = bench.x.requires_grad_(bench.subject.support.gradients)
    with during("compiled in training mode"):
        twin.require_y(y_of(twin, x), context=" compiled, in training mode")
        put_back(twin.layer, start)
        if bench.subject.support.gradients:
            require_own_gradients(twin, " compiled, in training mode")


def _calls(bench: Bench) -> list[tuple[tuple[int, int], Tensor]]:
    """List shapes of calls and the tokens in them: other routings, other lengths.

    A length that is also a width would be taken for it by torch.compile, and be fixed as it is.
    """
    widths = {n for tensor in held(bench.layer).values() for n in tensor.shape}
    first, other = [(b, s) for b in (4, 3, 5, 2, 6) for s in range(5, 14) if not {b, s} & widths][:2]
    order = torch.arange(T)
    calls = (
        (first, order),
        (first, order.flip(0)),
        (other, order * 3),
        ((7, 9), order * 5),
        (first, 0 * order),
    )
    return [((b, s), rows.repeat(2)[: b * s] % T) for (b, s), rows in calls]


def exports(bench: Bench) -> None:
    """Export by torch.export to a program that is right for other tokens, and for large hidden values."""
    _require_exported(bench, "")
    if not _is_beside_float32(bench):
        large = saturated_layer(fresh(bench.subject, bench, training=False))
        _require_exported(large, ", with hidden values sixteen times as large")


def _require_exported(bench: Bench, where: str) -> None:
    x = bench.x.unflatten(0, (B, S))
    with torch.no_grad():
        try:
            program = torch.export.export(bench.layer, (x.flip(0, 1),)).module()
        except Exception as error:
            raise CheckFailed(f"torch.export raises {one_line(error)[:500]}") from error
        for rows in (torch.arange(T), torch.arange(T) * 5 % T):
            y = replace(bench, layer=program).call(x.flatten(0, 1)[rows].unflatten(0, (B, S)))
            bench.require_y(y.flatten(0, 1), rows, f" from the exported program{where}")


_TRACED = (LayerProblem(), LayerProblem(torch.bfloat16))

COMPILED = (
    Check(fullgraph, _TRACED, needs="fullgraph"),
    Check(exports, _TRACED, needs="exports"),
)
