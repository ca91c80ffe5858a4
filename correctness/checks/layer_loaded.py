"""What a whole layer is held to when its weights are moved, merged, loaded or cast."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from correctness.checks.case import Check
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import Bench, build
from correctness.judging.layer_steps import (
    as_it_is,
    held,
    is_noisy,
    put_back,
    require_own_gradients,
    same,
    y_of,
)
from correctness.problems.layers import LayerProblem
from moe_impls.interface import dtype_name


def placement(bench: Bench) -> None:
    """Follow buffers of integers that say where experts lie, as `read` does, when experts are moved."""
    subject, layer = bench.subject, bench.layer
    maps = {name: buffer for name, buffer in layer.named_buffers() if name in subject.placement}
    start = held(layer)
    for order in _orders(maps):
        for name, buffer in maps.items():
            buffer.copy_(start[name][order(len(buffer))])
        now = as_it_is(bench, gradients=subject.support.gradients)
        where = f" after the experts were moved by {', '.join(maps)}"
        now.require_y(y_of(now), context=where)
        if subject.support.gradients:
            require_own_gradients(now, where)
        put_back(layer, start)


def _orders(maps: dict[str, Tensor]) -> list[Callable[[int], Tensor]]:
    """Return orders of a map; several maps, of which one may be the other's inverse, are swapped in pairs."""

    def halves(n: int) -> Tensor:
        """Exchange two ranks."""
        return torch.arange(n).roll(n // 2) if n % 2 == 0 else torch.arange(n).flip(0)

    if len(maps) > 1:
        return [lambda n: torch.arange(n).flip(0), halves]
    return [halves, lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(9))]


def merged(bench: Bench) -> None:
    """With methods merge and unmerge: be right merged, and after unmerging as before, gradients too.

    A merged layer is right with the state dict of one that is not merged, or refuses it with an error.
    """
    merge, unmerge = (_method(bench.layer, name) for name in ("merge", "unmerge"))
    for turn in ("", " for the second time"):
        with during("merge()"), torch.no_grad():
            merge()
        with torch.no_grad():
            bench.require_y(y_of(bench), context=f" merged{turn}")
        _require_merged_in_training(bench, turn)
        with during("unmerge()"), torch.no_grad():
            unmerge()
        bench.require_y(y_of(bench), context=f" after unmerge(){turn}")
    if bench.subject.support.gradients:
        require_own_gradients(bench, " after merge() and unmerge()")
    other = replace(bench, layer=build(bench.subject, bench.dtype, seed=7))
    with torch.no_grad():
        _method(other.layer, "merge")()
        y_of(other)
    saved = bench.layer.state_dict()
    where = " of a layer that was merged when it loaded the state dict of one that is not"
    _require_or_refused(other, lambda: other.layer.load_state_dict(saved), where)


def _require_merged_in_training(bench: Bench, turn: str) -> None:
    """Raise CheckFailed unless a merged layer, which train() may unmerge, is right in training mode, too."""
    if not bench.subject.support.training:
        return
    bench.layer.train()
    if not is_noisy(bench):
        with torch.no_grad():
            bench.require_y(y_of(bench), context=f" merged{turn}, in training mode")
    bench.layer.eval()


def _method(layer: nn.Module, name: str) -> Callable[[], object]:
    return getattr(layer, name)


def _require_or_refused(bench: Bench, change: Callable[[], object], where: str) -> None:
    """Raise CheckFailed unless y is right after a change, or the layer refuses that with an error."""
    try:
        with torch.no_grad():
            change()
    except (RuntimeError, ValueError):
        return
    with torch.no_grad():
        bench.require_y(y_of(bench), context=where)


def round_trip(bench: Bench) -> None:
    """Carry every number through a saved state dict, copied or assigned, into a layer that was in use.

    Also one without the versions of modules, which safetensors does not keep, and by a new ``.data`` of each.
    """
    file = io.BytesIO()
    with during("torch.save of the state dict"):
        torch.save(bench.layer.state_dict(), file)
    for assign in (False, True):
        how = f"after load_state_dict(torch.load(...), assign={assign})"
        file.seek(0)
        saved = torch.load(file)
        other = replace(bench, layer=build(bench.subject, bench.dtype, seed=7))
        with torch.no_grad():
            y_of(other)
        with during(how):
            other.layer.load_state_dict(saved, assign=assign)
        loaded = other.layer.state_dict()
        for name, value in bench.layer.state_dict().items():
            if isinstance(value, Tensor) and not same(loaded[name], value):
                raise CheckFailed(f"{name} in the state dict is another {how}")
        with torch.no_grad():
            bench.require_y(y_of(other), context=f" {how}")
        bench.require_y(y_of(other), context=f" {how}, with gradients")
    for change, how in (
        (_load_bare, "a state dict without _metadata"),
        (_take_data, "a new .data of each parameter and buffer"),
    ):
        other = replace(bench, layer=build(bench.subject, bench.dtype, seed=7))
        with torch.no_grad():
            y_of(other)
        with during(how), torch.no_grad():
            change(other.layer, bench.layer)
            y = y_of(other)
        bench.require_y(y, context=f" after {how}, in a layer that was in use")


def _load_bare(layer: nn.Module, source: nn.Module) -> None:
    layer.load_state_dict(dict(source.state_dict()))


def _take_data(layer: nn.Module, source: nn.Module) -> None:
    copies = held(source)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name in copies:  # or it is made by a call, as is what the layer keeps of its tokens
            tensor.data = copies[name]


def cast(bench: Bench) -> None:
    """Be right in 16 bits after use in float32, where that is declared: a copy of a weight is cast, too."""
    wide = torch.float32 if torch.float32 in bench.subject.support.dtypes else bench.dtype
    used = replace(bench, layer=build(bench.subject, wide))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            y_of(used, bench.x.to(wide))
    used.layer.to(bench.dtype)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            used.require_y(y_of(used), context=f" in a layer that was used in {dtype_name(wide)} before")


_FLOAT32 = (LayerProblem(),)
_LOW = (LayerProblem(torch.bfloat16), LayerProblem(torch.float16))

LOADED = (
    Check(placement, _FLOAT32, needs="placement"),
    Check(merged, _FLOAT32, needs="merge"),
    Check(round_trip, _FLOAT32),
    Check(cast, _LOW, fits=False),
)
