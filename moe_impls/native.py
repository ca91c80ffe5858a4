"""Each expert's rows by a small C++ kernel; the weights of an expert with few are read from memory once.

For few tokens the layer is bound by that reading, and products of one to a few dozen rows are what matrix
libraries are slowest at. Many tokens are computed in groups of slots, so that their hidden features take
memory that the process has already. ``prepare`` copies weights into tiles that are read in the order of use,
beside rows as they are. The wheel holds the kernel compiled; elsewhere the first call compiles it for the
processor at hand, in seconds, and keeps it in the user's cache directory. Sums and activations are in float32
in every dtype; hidden features are rounded to bfloat16 beside such weights, where the processor multiplies
pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_impls import kernel_library
from moe_impls.checking import watch_writes
from moe_impls.functional import activate, combine_slots, needs_gradients
from moe_impls.interface import CLAMPED, Clamp, Experts, Prepared, Routing, Support
from moe_impls.kept_memory import take
from moe_impls.kernel_library import DTYPES, Outcome, is_available, missing, of_dtype, pointer
from moe_impls.operators import as_one_node, operator

__all__ = ["SUPPORT", "forward", "forward_prepared", "is_available", "missing", "prepare"]
SUPPORT = Support(devices=("cpu",), dtypes=DTYPES, fullgraph=True, exports=True)
# Numbers in hidden features at a time: memory of this size is taken again, more would be new pages.
GROUP = 2**22
AT_ONCE = 2**19  # numbers in rows of all slots up to which all is one call of the kernel
WRONG_ID = "expert_ids holds an id that is not in [0, {})"


def _sorted(expert_ids: Tensor, E: int) -> tuple[Tensor, ...]:
    """Find where each expert's slots begin [E + 1], the slot of each place and its token [T * K]."""
    T, K = expert_ids.shape
    found = expert_ids.new_empty(E + 1 + 2 * T * K)
    ids = expert_ids.contiguous()
    if not kernel_library.library().sort_slots(pointer(ids), T * K, E, K, pointer(found)):
        raise ValueError(WRONG_ID.format(E))
    return found.split([E + 1, T * K, T * K])


def _row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the rows that the kernel takes beside weights of a dtype."""
    pairs = dtype == torch.bfloat16 and kernel_library.library().bfloat16_row_bytes() == 2
    return torch.bfloat16 if pairs else torch.float32


# Which the kernel computes itself, by its names for them, and whether gates are multiplied with others.
KERNELS_OWN = {
    "relu": (0, False),
    "relu2": (1, False),
    "silu": (2, False),
    "gelu_tanh": (3, False),
    "reglu": (0, True),
    "swiglu": (2, True),
    CLAMPED: (2, True),
    "geglu_tanh": (3, True),
}


def _features(activation: str, clamp: Clamp) -> tuple[bool, int, float, float, float]:
    """Write an activation of the kernel as it takes it."""
    function, gated = KERNELS_OWN[activation]
    limit, alpha, offset = clamp if activation == CLAMPED else (math.inf, 1.0, 0.0)
    return gated, function, limit, alpha, offset


def _hidden(h: Tensor, experts: Experts, dtype: torch.dtype) -> Tensor:
    """Compute the hidden features of h [N, F] float32: [N, H] in the dtype of the rows that follow.

    By the threads of the kernel: those of torch would look for more work for milliseconds after it, on the
    processors that the kernel needs next.
    """
    if experts.activation not in KERNELS_OWN:
        return activate(h, experts.activation, experts.clamp).to(dtype).contiguous()
    features = _features(experts.activation, experts.clamp)
    to = h.new_empty(len(h), experts.w_out.shape[2], dtype=dtype)
    shape = dtype == torch.bfloat16, *to.shape
    kernel_library.library().activate_rows(
        pointer(h), pointer(to), *shape, *features, torch.get_num_threads()
    )
    return to


class _Group(NamedTuple):
    """The places [start, stop) of the slots of some experts from the first on; begin [n + 1] of each."""

    first: int
    start: int
    stop: int
    begin: Tensor

    @property
    def places(self) -> slice:
        return slice(self.start, self.stop)

    def of_experts(self) -> Iterator[tuple[int, int, int]]:
        """List each expert with the places [start, stop) of its slots."""
        for e, (start, stop) in enumerate(pairwise(self.begin.tolist()), self.first):
            yield e, start, stop


def _groups(begin: Tensor, places: int, width: int, whole: bool = False) -> list[_Group]:
    """Group all places, as many together as have about GROUP numbers in rows of this width.

    whole: each expert is in one group, however many places it has.
    """
    most = max(GROUP // max(width, 1), 1)
    if places <= most:
        return [_Group(0, 0, places, begin)]
    groups: list[_Group] = []
    first, cuts = 0, [0]

    def end() -> None:
        groups.append(_Group(first, cuts[0], cuts[-1], begin.new_tensor(cuts)))

    for e, stop in enumerate(begin[1:].tolist()):
        while stop - cuts[0] > most and not (whole and len(cuts) == 1):
            if len(cuts) == 1:  # an expert with more of them
                cuts.append(cuts[0] + most)
            end()
            first, cuts = e, cuts[-1:]
        cuts.append(stop)
    end()
    return groups


class _Tiles(NamedTuple):
    """Weights of a shape [E, F, D], laid out in the tiles of ``tiles.h``, one expert's after the other's."""

    tiles: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor) -> _Tiles:
        E, features, D = weight.shape
        width, pair = kernel_library.library().tile_features(), 4 // _row_dtype(weight.dtype).itemsize
        tiles = weight.new_empty(E, -(-features // width), -(-D // pair), width, pair)
        for of_expert, w in zip(tiles, weight, strict=True):
            whole = F.pad(w, (0, -D % pair, 0, -features % width))
            of_expert.copy_(whole.reshape(-1, width, tiles.shape[2], pair).transpose(1, 2))
        return cls(tiles, weight.shape)


def _is_turned(weight: Tensor) -> bool:
    """Tell whether weights [E, P, Q] lie in memory as [E, Q, P], as those of gpt-oss do."""
    return weight.mT.is_contiguous() and not weight.is_contiguous()


def _laid_out(weight: Tensor) -> Tensor:
    """Return weights as the kernel takes them in training: as they are, contiguous or turned, or a copy.

    Of turned ones the product forward is the one that others have backward, and its rows are float32.
    """
    as_they_are = _is_turned(weight) and _row_dtype(weight.dtype) == torch.float32
    return weight if as_they_are else weight.contiguous()


def _products(
    rows: Tensor, index: Tensor | None, weight: Tensor | _Tiles, bias: Tensor | None, group: _Group
) -> Tensor:
    """Multiply a group's rows [N, D], or those that index [T * K] holds: [N, F] in float32."""
    if isinstance(weight, Tensor) and _is_turned(weight):
        return _products_along(rows, index, weight.mT, bias, group)
    first, start, stop, begin = group
    (_, features, D), experts, count = weight.shape, len(begin) - 1, stop - start
    kernels = kernel_library.library()
    out = rows.new_empty(count, features, dtype=torch.float32)
    of_rows = pointer(rows), pointer(index, start), pointer(begin)
    of_bias, sizes = pointer(bias, first * features), (experts, features, D, torch.get_num_threads())
    if isinstance(weight, _Tiles):
        tiles = weight.tiles
        products = of_dtype("tiled_products", tiles.dtype)
        products(*of_rows, pointer(tiles, first * tiles.stride(0)), of_bias, pointer(out), *sizes)
    else:
        packed = rows.new_empty(kernels.packed_numbers(experts, count, D))
        products = of_dtype("products", weight.dtype)
        of_weight = pointer(weight, first * features * D)
        products(*of_rows, of_weight, of_bias, pointer(out), pointer(packed), *sizes)
    return out


def _add_slots(
    out: Tensor, slots: Tensor, tokens: Tensor, gates: Tensor, y: Tensor, group: _Group, positive: bool
) -> None:
    """Add a group's out [N, O], or its positive part, times the gates [T, K] of its slots to y [T, O].

    The first group finds y as it was allocated.
    """
    start = group.start
    pointers = pointer(out), pointer(slots, start), pointer(tokens, start), pointer(gates), pointer(y)
    kernel_library.library().add_slots(
        *pointers, len(out), *y.shape, start == 0, positive, torch.get_num_threads()
    )


def _outputs(
    x: Tensor,
    tokens: Tensor,
    groups: list[_Group],
    experts: Experts,
    w_in: Tensor | _Tiles,
    w_out: Tensor | _Tiles,
) -> Iterator[tuple[_Group, Tensor, Tensor]]:
    """Compute, of each group, h [N, F] before the activation and the outputs [N, O] of its slots, float32."""
    row_dtype = _row_dtype(experts.w_in.dtype)
    rows = x.to(row_dtype).contiguous()
    b_in, b_out = (None if b is None else b.contiguous() for b in (experts.b_in, experts.b_out))
    for group in groups:
        h = _products(rows, tokens, w_in, b_in, group)
        yield group, h, _products(_hidden(h, experts, row_dtype), None, w_out, b_out, group)


def _at_once(
    x: Tensor, routing: Routing, experts: Experts, w_in: Tensor | _Tiles, w_out: Tensor | _Tiles
) -> Tensor:
    """Compute y [T, O] by one call of the kernel, with sums of few slots and an activation of its own."""
    (T, K), (E, features, D), (_, O, H) = routing.expert_ids.shape, w_in.shape, w_out.shape
    y = x.new_empty(T, O)
    ids, gates = routing.expert_ids.contiguous(), routing.gates.to(torch.float32).contiguous()
    tiled = isinstance(w_in, _Tiles)
    first, last = (w.tiles if isinstance(w, _Tiles) else w for w in (w_in, w_out))
    b_in, b_out = (None if b is None else b.contiguous() for b in (experts.b_in, experts.b_out))
    tensors = x.contiguous(), first, b_in, last, b_out, ids, gates, y
    call = kernel_library.Layer(
        *map(pointer, tensors), T, K, E, D, features, H, O,
        *_features(experts.activation, experts.clamp),
        experts.output_activation == "relu", tiled, torch.get_num_threads(),
    )  # fmt: skip
    outcome = of_dtype("layer", x.dtype)(call)
    if outcome == Outcome.WRONG_ID:
        raise ValueError(WRONG_ID.format(E))
    if outcome == Outcome.NO_MEMORY:
        raise MemoryError(f"no memory for the hidden features and outputs of {T * K} slots")
    return y


def _compute(
    x: Tensor, routing: Routing, experts: Experts, w_in: Tensor | _Tiles, w_out: Tensor | _Tiles, combine: str
) -> Tensor:
    """Compute y [T, O] with weights that are contiguous, or in tiles."""
    (T, K), (E, features, D), (_, O, _) = routing.expert_ids.shape, w_in.shape, w_out.shape
    few = 0 < T * K * max(D, features, O) <= AT_ONCE
    if few and combine == "sum" and experts.activation in KERNELS_OWN and x.dtype == experts.w_in.dtype:
        return _at_once(x, routing, experts, w_in, w_out)
    begin, slots, tokens = _sorted(routing.expert_ids, E)
    gates = routing.gates.to(torch.float32).contiguous()
    positive = experts.output_activation == "relu"
    sums = combine == "sum"
    y = x.new_empty(T if sums else T * K, O, dtype=torch.float32)  # of tokens, or of their slots
    groups = _groups(begin, T * K, max(D, features))
    for group, _, out in _outputs(x, tokens, groups, experts, w_in, w_out):
        if sums:
            _add_slots(out, slots, tokens, gates, y, group, positive)
        else:
            y[slots[group.places]] = out.relu_() if positive else out
    return (y if sums else combine_slots(y.view(T, K, O), routing.gates, combine)).to(x.dtype)


def _products_along(
    rows: Tensor, index: Tensor | None, weight: Tensor, bias: Tensor | None, group: _Group
) -> Tensor:
    """Multiply a group's rows [N, F], or those that index [T * K] holds, by [E, F, D]: [N, D], float32."""
    if _is_turned(weight):
        return _products(rows, index, weight.mT, bias, group)
    (_, features, D), count = weight.shape, group.stop - group.start
    out = rows.new_empty(count, D)
    products = of_dtype("products_along", weight.dtype)
    of_rows = pointer(rows), pointer(index, group.start), pointer(group.begin)
    of_weight = pointer(weight, group.first * features * D)
    sizes = len(group.begin) - 1, features, D, torch.get_num_threads()
    products(*of_rows, of_weight, pointer(bias, group.first * D), pointer(out), *sizes)
    return out


def _write_products(
    a: Tensor, a_index: Tensor | None, b: Tensor, b_index: Tensor | None, to: Tensor, group: _Group
) -> None:
    """Write the sums of aᵀ b over the rows of each expert of a group, [P, Q], to those of to [E, P, Q]."""
    if _is_turned(to):
        a, a_index, b, b_index, to = b, b_index, a, a_index, to.mT
    (_, P, Q), kernels, start = to.shape, kernel_library.library(), group.start
    packed = a.new_empty((group.stop - start) * kernels.packed_numbers_of_rows(P, Q))
    of_rows = pointer(a), pointer(a_index, start), pointer(b), pointer(b_index, start), pointer(group.begin)
    products = of_dtype("products_of_rows", to.dtype)
    sizes = len(group.begin) - 1, P, Q, torch.get_num_threads()
    products(*of_rows, pointer(to, group.first * P * Q), pointer(packed), *sizes)


def _gradient_of(weight: Tensor, wanted: bool) -> Tensor:
    """Take memory for the gradient of what `_laid_out` returned, in its layout; none if that is unwanted."""
    if not wanted:
        return take([0], weight.dtype)
    return take(weight.mT.shape, weight.dtype).mT if _is_turned(weight) else take(weight.shape, weight.dtype)


def _hidden_backward(
    h: Tensor,
    da: Tensor,
    gates: Tensor | None,
    slots: Tensor,
    d_gates: Tensor | None,
    group: _Group,
    activation: str,
    clamp: Clamp,
) -> tuple[Tensor, Tensor]:
    """Go back from da [N, H], by the hidden features and without gates, to dh [N, F].

    Returns it and the hidden features times gates [N, H]; writes to d_gates, of all slots.
    """
    if activation in KERNELS_OWN:
        dh, a = torch.empty_like(h), torch.empty_like(da)
        pointers = pointer(h), pointer(da), pointer(gates), pointer(slots, group.start)
        kernel_library.library().activate_rows_backward(
            *pointers, pointer(dh), pointer(a), pointer(d_gates), *da.shape,
            *_features(activation, clamp), torch.get_num_threads(),
        )  # fmt: skip
        return dh, a
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        a = activate(h, activation, clamp)
    own = slots[group.start : group.stop]
    if d_gates is not None:
        d_gates.view(-1)[own] = (da * a.detach()).sum(1)
    gate = 1.0 if gates is None else gates.flatten()[own].unsqueeze(1)  # [N, 1]
    (dh,) = torch.autograd.grad(a, h, gate * da)
    return dh, gate * a.detach()


def _write_sums(
    rows: Tensor, index: Tensor | None, gates: Tensor | None, slots: Tensor, to: Tensor, group: _Group
) -> None:
    """Write the sum over each expert's rows, times their gates, to those of a group in to [E, F]."""
    start, F = group.start, to.shape[1]
    of_rows = (
        pointer(rows),
        pointer(index, start),
        pointer(gates),
        pointer(slots, start),
        pointer(group.begin),
    )
    sizes = len(group.begin) - 1, F, torch.get_num_threads()
    kernel_library.library().sum_rows(*of_rows, pointer(to, group.first * F), *sizes)


def _add_dots(rows: Tensor, index: Tensor, vectors: Tensor, slots: Tensor, to: Tensor, group: _Group) -> None:
    """Add the dot products of a group's rows with those vectors [E, F] of their experts, at their slots."""
    start, F = group.start, vectors.shape[1]
    of_rows = pointer(rows), pointer(index, start), pointer(group.begin), pointer(vectors, group.first * F)
    sizes = len(group.begin) - 1, F, torch.get_num_threads()
    kernel_library.library().add_dots(*of_rows, pointer(slots, start), pointer(to), *sizes)


class _Slots(torch.autograd.Function):
    """The sums y [T, O] of the slots' outputs times gates [T, K]; without gates all outputs [T * K, O].

    Of all activations h [T * K, F] is kept for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor | None,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        expert_ids: Tensor,
        activation: str,
        clamp: Clamp,
    ) -> Tensor:
        (T, K), (E, features, D) = expert_ids.shape, w_in.shape
        begin, slots, tokens = _sorted(expert_ids, E)
        wide = None if gates is None else gates.to(torch.float32).contiguous()
        y = x.new_empty(T * K if wide is None else T, w_out.shape[1], dtype=torch.float32)
        groups, kept = _groups(begin, T * K, max(features, D), whole=True), []
        experts = Experts(w_in, b_in, w_out, b_out, activation, clamp=clamp)
        for group, h, out in _outputs(x, tokens, groups, experts, _laid_out(w_in), _laid_out(w_out)):
            kept.append(h)
            if wide is None:
                y[slots[group.places]] = out
            else:
                _add_slots(out, slots, tokens, wide, y, group, positive=False)
        ctx.save_for_backward(x, wide, w_in, w_out, b_out, begin, slots, tokens, *kept)
        ctx.activation = activation, clamp
        ctx.gates_dtype = None if gates is None else gates.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients without a graph would be taken for constants
            raise RuntimeError(
                "'native' has no gradients of gradients (create_graph=True): use 'sorted_dispatch'"
            )
        x, gates, w_in, w_out, b_out, begin, slots, tokens, *kept = ctx.saved_tensors
        wants_x, wants_gates, wants_w_in, wants_b_in, wants_w_out, wants_b_out, *_ = ctx.needs_input_grad
        rows, dy = x.to(torch.float32).contiguous(), dy.contiguous()
        of_in, of_out = _laid_out(w_in), _laid_out(w_out)
        b_out = None if b_out is None else b_out.to(torch.float32).contiguous()
        dx, db_in, db_out = torch.empty_like(rows), *(rows.new_empty(w.shape[:2]) for w in (w_in, w_out))
        d_gates = torch.empty_like(gates) if wants_gates else None
        dw_in, dw_out = (_gradient_of(w, want) for w, want in ((of_in, wants_w_in), (of_out, wants_w_out)))
        ones = rows.new_ones(len(slots))
        index = slots if gates is None else tokens  # of a place's row of dy
        groups = _groups(begin, len(slots), max(w_in.shape[1:]), whole=True)
        for group, h in zip(groups, kept, strict=True):
            da = _products_along(dy, index, of_out, None, group)  # [N, H], without gates
            dh, a = _hidden_backward(h, da, gates, slots, d_gates, group, *ctx.activation)
            del da
            if d_gates is not None and b_out is not None:
                _add_dots(dy, index, b_out, slots, d_gates, group)
            if wants_w_out:
                _write_products(dy, index, a, None, dw_out, group)
            if wants_w_in:
                _write_products(dh, None, rows, tokens, dw_in, group)
            if wants_b_out:
                _write_sums(dy, index, gates, slots, db_out, group)
            if wants_b_in:
                _write_sums(dh, None, None, slots, db_in, group)
            if wants_x:
                of_slots = _products_along(dh, None, of_in, None, group)
                _add_slots(of_slots, slots, tokens, ones, dx, group, positive=False)
        if d_gates is not None:
            d_gates = d_gates.to(ctx.gates_dtype)
        found = (
            dx.to(x.dtype),
            d_gates,
            dw_in,
            db_in.to(w_in.dtype),
            dw_out,
            db_out.to(w_out.dtype),
            *[None] * 3,
        )
        return tuple(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=True))


def _with_gradients(x: Tensor, routing: Routing, experts: Experts, combine: str) -> Tensor:
    """Compute y [T, O] for a backward."""
    weights = experts.w_in, experts.b_in, experts.w_out, experts.b_out
    options = routing.expert_ids, experts.activation, experts.clamp
    if combine == "sum" and experts.output_activation == "none":
        return _Slots.apply(x, routing.gates, *weights, *options).to(x.dtype)
    out = _Slots.apply(x, None, *weights, *options)
    if experts.output_activation == "relu":
        out = F.relu(out)
    of_slots = out.view(*routing.expert_ids.shape, out.shape[1])
    return combine_slots(of_slots, routing.gates, combine).to(x.dtype)


@operator(SUPPORT)
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    if needs_gradients(x, routing.gates, *experts.tensors.values()):
        return _with_gradients(x, routing, experts, combine)
    with torch.no_grad():
        return _compute(x, routing, experts, experts.w_in.contiguous(), experts.w_out.contiguous(), combine)


@torch.no_grad()
def prepare(experts: Experts) -> Prepared:
    """Lay the weights out for ``f(x, routing, *, combine="sum") -> y``, without gradients.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    w_in, w_out = _Tiles.of(experts.w_in), _Tiles.of(experts.w_out)

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        return _compute(x, routing, experts, w_in, w_out, combine)

    return as_one_node(f, w_out.shape[1])


@operator(replace(SUPPORT, gradients=False), "native_prepared")
def forward_prepared(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O] on weights that are laid out anew; see ``moe_impls.interface``."""
    return prepare(experts)(x, routing, combine=combine)
