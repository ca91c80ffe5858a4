"""Checks of what a whole layer returns: right numbers, in each dtype, of any shape that it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import COPIES, B, Bench, S, T
from correctness.judging.layer_rounding import rounded_tensor


def values(bench: Bench) -> None:
    """Return the oracle's output for x [B, S, D] and the weights that `read` returns."""
    bench.require_y(bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1))


def low_precision(bench: Bench) -> None:
    """Choose the right experts where x is bfloat16, by logits as declared, and keep y within its budget."""
    y = bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1)
    try:
        bench.require_y(y)
    except CheckFailed as failure:
        if bench.subject.routing or not _is_right_in_float32(bench) or not (name := rounded_tensor(bench, y)):
            raise
        declared = ", or declare SUPPORT = LayerSupport(router_dtype='input')"
        what = f"{name} in 16 bits send tokens to other experts: make them in float32"
        raise CheckFailed(f"{failure}\n  hint: {what}{declared}") from failure


def _is_right_in_float32(bench: Bench) -> bool:
    try:
        values(Bench.of(bench.subject, torch.float32))
    except CheckFailed:
        return False
    return True


def half_precision(bench: Bench) -> None:
    """Choose the right experts where x is float16, too, and keep y within its budget."""
    low_precision(bench)


def double_precision(bench: Bench) -> None:
    """Return the right y in float64, where the budget leaves room for a router that works in float32."""
    others = ", ".join(str(dtype) for dtype in bench.subject.support.dtypes if dtype != bench.dtype)
    with _told(bool(others), _declares(f"dtypes=({others},)", "takes no float64"), if_raised=True):
        values(bench)


def strides(bench: Bench) -> None:
    """Be right for an x [B, S, D] that is not contiguous, or refuse it with an error."""
    x = bench.x.unflatten(0, (B, S))
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        try:
            y = bench.call(strided)
        except CheckFailed as failure:
            if isinstance(failure.__cause__, RuntimeError):
                continue
            raise
        bench.require_y(y.flatten(0, 1), context=f" for x with strides {strided.stride()}")


def leading_dimensions(bench: Bench) -> None:
    """Accept x of shape [D], [T, D], [B, S, D] or longer."""
    for shape in ((T,), (B, S), (S, B), (2, 2, S), ()):
        rows = slice(None) if shape else slice(5, 6)
        for mode, how in ((contextlib.nullcontext, ""), (torch.no_grad, " under no_grad")):
            declares = _declares("leading='batch_sequence'", "takes [B, S, D] only")
            with mode(), _told(len(shape) != 2, declares):
                y = bench.call(bench.x[rows].reshape(*shape, bench.x.shape[1]))
            bench.require_y(y.reshape(-1, y.shape[-1]), rows, f" for x {[*shape, bench.x.shape[1]]}{how}")


def no_tokens(bench: Bench) -> None:
    """Return no outputs for no tokens."""
    for shape in ((2, 0), (0, 3), *([(0,)] if bench.subject.support.any_leading else [])):
        with _told(True, _declares("no_tokens=False", "always has tokens")):
            bench.call(bench.x.new_empty(*shape, bench.x.shape[1]))


@contextlib.contextmanager
def _told(applies: bool, hint: str, *, if_raised: bool = False) -> Iterator[None]:
    """Add to a finding what would make it none; with ``if_raised`` only where the layer raised."""
    try:
        yield
    except CheckFailed as failure:
        if not applies or (if_raised and failure.__cause__ is None):
            raise
        raise CheckFailed(f"{failure}\n  hint: {hint}") from failure.__cause__


def _declares(declaration: str, means: str) -> str:
    return f"SUPPORT = LayerSupport({declaration}) declares a layer that {means}"


def tokens_apart(bench: Bench) -> None:
    """Treat each token without regard to the others: in reverse, in parts, among many, alone."""
    reverse, many = torch.arange(T).flip(0), torch.arange(T).repeat(COPIES)
    groups = (reverse, torch.arange(1), torch.arange(1, T), torch.arange(T // 2).repeat_interleave(2), many)
    values(bench)  # where tokens are wrong by themselves, it is not for the others
    with _told(bench.subject.routing is None, _REPORTS):
        for rows in groups:
            y = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
            bench.require_y(y, rows, f" among {len(rows)} tokens, {rows[:3].tolist()}...")
        for mode, how in ((contextlib.nullcontext, ""), (torch.no_grad, ", under no_grad")):
            with mode():
                y = bench.call(bench.x.unsqueeze(1)).squeeze(1)
            bench.require_y(y, context=f" with each token alone in its sequence{how}")


_REPORTS = (
    "tokens decide about each other; of a layer that drops some its file reports which: routing(layer, x)"
)


def nan_contained(bench: Bench) -> None:
    """Refuse a token with NaN with a ValueError, or make its own output NaN and leave the others right."""
    bench.call(bench.x.unflatten(0, (B, S)))  # or refusing every input would do
    x, sound = bench.x, torch.arange(T) != 3
    x[3, -1] = torch.nan
    try:
        y = bench.call(x.unflatten(0, (B, S))).flatten(0, 1)
    except CheckFailed as failure:
        if isinstance(failure.__cause__, ValueError):
            return
        raise
    bench.require_y(y, context=" in a token beside one with NaN", x=x, only=sound)
    if not bool(y[3].isnan().all()):
        raise CheckFailed("a NaN in a token does not make its own output NaN")
