"""What a whole layer is held to in modes other than plain evaluation: autocast, compiled, exported, merged,
with biases and placements that it may come to hold, and inputs that saturate it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import (
    B,
    Bench,
    Expected,
    S,
    T,
    build,
    copies_of,
    reached,
)
from correctness.judging.layer_steps import (
    as_it_is,
    during,
    fresh,
    gradients_of,
    held,
    is_noisy,
    put_back,
    require_gradients,
    same,
)
from correctness.judging.layer_weights import check_weights
from correctness.problems.layers import LayerProblem
from moe_impls.interface import dtype_name
from moe_impls.registry import one_line


def _y(bench: Bench, x: Tensor | None = None) -> Tensor:
    """Call the layer on tokens [T, D], in sequences."""
    x = bench.x if x is None else x
    return bench.call(x.unflatten(0, (-1, S))).flatten(0, 1)


def _require_gradients(bench: Bench, where: str) -> None:
    bench = bench.dropping()
    require_gradients(bench, gradients_of(bench), where)


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
                y = _y(bench, many.x.float().to(bench.device))
            put_back(bench.layer, start)
            found = gradients_of(bench) if support.gradients else {}
            put_back(bench.layer, start)
            again = _y(bench)
            put_back(bench.layer, start)
        if low == torch.bfloat16:
            where += _swayed(many, y)
        replace(bench, expected=many).require_y(y, context=where)
        bench.require_y(again, context=where)
        require_gradients(bench, found, where)


def _swayed(many: Expected, y: Tensor) -> str:
    """Say so where the wrong tokens are those that rounded logits send to other experts."""
    is_wrong = ((y.double().cpu() - many.want["y"]).abs() > many.allowed["y"]).any(dim=1)
    if not bool(is_wrong.any()) or bool((is_wrong & ~many.is_swayed).any()):
        return ""
    return (
        f"; all {int(is_wrong.sum())} wrong tokens of {len(y)} are those that logits rounded to bfloat16 "
        "send elsewhere: autocast makes a router's product in bfloat16 even of arguments made float32"
    )


def fullgraph(bench: Bench) -> None:
    """Compile to one graph by torch.compile that is right for other tokens, lengths and gradients."""
    torch.compiler.reset()
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
            _require_gradients(bench, " compiled")
            with torch.no_grad():
                bench.require_y(_y(bench), context=" compiled, under no_grad")
        if bench.subject.support.training:
            _compiled_training(bench)
    finally:
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
        twin.require_y(_y(twin, x), context=" compiled, in training mode")


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
    """Export by torch.export to a program that is right for other tokens."""
    x = bench.x.unflatten(0, (B, S))
    with torch.no_grad():
        try:
            program = torch.export.export(bench.layer, (x.flip(0, 1),)).module()
        except Exception as error:
            raise CheckFailed(f"torch.export raises {one_line(error)[:500]}") from error
        for rows in (torch.arange(T), torch.arange(T) * 5 % T):
            y = replace(bench, layer=program).call(x.flatten(0, 1)[rows].unflatten(0, (B, S)))
            bench.require_y(y.flatten(0, 1), rows, " from the exported program")


def saturated(bench: Bench) -> None:
    """Be right for hidden values sixteen times as large: in clamps, and where activations saturate."""
    weights = bench.subject.read(bench.layer)
    parts = [part for part in (weights.experts, weights.shared) if part is not None]
    inner = {n for part in parts for t in (part.w_in, part.b_in) if t is not None for n in _of(bench, t)}
    outer = {n for t in (weights.router_weight, weights.router_bias) if t is not None for n in _of(bench, t)}
    with torch.no_grad():
        for name in inner - outer:
            dict(bench.layer.named_parameters())[name].mul_(16)
    large = as_it_is(bench, gradients=bench.subject.support.gradients)
    where = " with hidden values sixteen times as large"
    large.require_y(_y(large), context=where)
    if bench.subject.support.gradients:
        _require_gradients(large, where)


def _of(bench: Bench, tensor: Tensor) -> set[str]:
    return set(reached(bench.layer, tensor))


def placement(bench: Bench) -> None:
    """Follow buffers of integers that say where experts lie, as `read` does, when experts are moved."""
    subject, layer = bench.subject, bench.layer
    maps = {}
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point() or buffer.dtype == torch.bool or buffer.ndim != 1:
            continue
        before, old = copies_of(subject, layer), buffer.clone()
        if len(set(old.tolist())) > 1 and _readable(bench, buffer, old.roll(1)):
            buffer.copy_(old.roll(1))
            after = copies_of(subject, layer)
            if any(not torch.equal(before[n], after[n]) for n in before):
                maps[name] = buffer
        buffer.copy_(old)
    start = held(layer)
    for order in _orders(maps):
        for name, buffer in maps.items():
            buffer.copy_(start[name][order(len(buffer))])
        now = as_it_is(bench, gradients=subject.support.gradients)
        where = f" after the experts were moved by {', '.join(maps)}"
        now.require_y(_y(now), context=where)
        if subject.support.gradients:
            _require_gradients(now, where)
        put_back(layer, start)


def _readable(bench: Bench, buffer: Tensor, new: Tensor) -> bool:
    """Tell whether `read` still makes sense with other integers in a buffer; they stay as they were."""
    old = buffer.clone()
    buffer.copy_(new)
    try:
        check_weights(bench.subject.read(bench.layer), bench.layer)
    except Exception:  # it is no map of experts
        return False
    finally:
        buffer.copy_(old)
    return True


def _orders(maps: dict[str, Tensor]) -> list[Callable[[int], Tensor]]:
    """Return orders of a map; several maps, of which one may be the other's inverse, are swapped in pairs."""

    def halves(n: int) -> Tensor:
        """Exchange two ranks."""
        return torch.arange(n).roll(n // 2) if n % 2 == 0 else torch.arange(n).flip(0)

    if not maps:
        return []
    if len(maps) > 1:
        return [lambda n: torch.arange(n).flip(0), halves]
    return [halves, lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(9))]


def merged(bench: Bench) -> None:
    """With methods merge and unmerge: be right merged, and after unmerging as before, gradients too."""
    merge, unmerge = (getattr(bench.layer, name, None) for name in ("merge", "unmerge"))
    if not callable(merge) or not callable(unmerge):
        return
    for turn in ("", " for the second time"):
        with during("merge()"), torch.no_grad():
            merge()
        with torch.no_grad():
            bench.require_y(_y(bench), context=f" merged{turn}")
        with during("unmerge()"), torch.no_grad():
            unmerge()
        bench.require_y(_y(bench), context=f" after unmerge(){turn}")
    if bench.subject.support.gradients:
        _require_gradients(bench, " after merge() and unmerge()")


def round_trip(bench: Bench) -> None:
    """Carry every number through a saved state dict, copied or assigned, into a layer that was in use."""
    file = io.BytesIO()
    with during("torch.save of the state dict"):
        torch.save(bench.layer.state_dict(), file)
    for assign in (False, True):
        how = f"after load_state_dict(torch.load(...), assign={assign})"
        file.seek(0)
        saved = torch.load(file)
        other = replace(bench, layer=build(bench.subject, bench.dtype, seed=7))
        with torch.no_grad():
            _y(other)
        with during(how):
            other.layer.load_state_dict(saved, assign=assign)
        loaded = other.layer.state_dict()
        for name, value in bench.layer.state_dict().items():
            if isinstance(value, Tensor) and not same(loaded[name], value):
                raise CheckFailed(f"{name} in the state dict is another {how}")
        with torch.no_grad():
            bench.require_y(_y(other), context=f" {how}")
        bench.require_y(_y(other), context=f" {how}, with gradients")


_FLOAT32 = (LayerProblem(),)
_LOW = (LayerProblem(torch.bfloat16), LayerProblem(torch.float16))

MODES = (
    Check(saturated, _FLOAT32),
    Check(placement, _FLOAT32),
    Check(merged, _FLOAT32),
    Check(round_trip, _FLOAT32),
    Check(autocast, _LOW, needs="autocast", fits=False),
    Check(fullgraph, _FLOAT32, needs="fullgraph"),
    Check(exports, _FLOAT32, needs="exports"),
)
