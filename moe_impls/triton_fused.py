"""Triton: tokens are gathered inside the first product and activated in its epilogue, for CUDA.

Slots are sorted by expert; every product is one kernel over tiles of one expert's rows, and the host never
learns how many rows an expert has. The tiles of large products are those of a handful that were fastest in
the first call of their sizes, which waits for the GPU; ``choices`` tells which. The backward writes each
weight gradient once. What waits for it are the inputs of the activation, or nothing where those are larger
than the inputs of the two products: then they are computed again; and the experts' outputs where a combine or
an output activation needs them.

``moe_impls/triton_kernels.py`` holds the kernels. With TRITON_INTERPRET=1 in the environment Triton runs
them on the CPU, slowly, for checks of their arithmetic.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import combine_slots, needs_gradients
from moe_impls.interface import GATED_ACTIVATIONS, Clamp, Experts, Routing, Support

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SUPPORT = Support(
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    activations=(
        "relu",
        "relu2",
        "gelu",
        "gelu_tanh",
        "silu",
        "swiglu",
        "geglu",
        "geglu_tanh",
        "reglu",
        "swiglu_clamped",
    ),
    fullgraph=True,
    no_host_sync=True,
    compiles_per_case=True,
)
LEAST_CAPABILITY = (8, 0)  # of a GPU whose tensor cores take bfloat16
MOST_PROGRAMS = 2**31 - 1  # along the first dimension of a grid
MOST_EXPERTS = 65535  # along the second


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_available() -> bool:
    """Tell whether Triton is installed, and the GPU, if there is one, not too old for it."""
    return _is_installed() and (
        not torch.cuda.is_available() or torch.cuda.get_device_capability() >= LEAST_CAPABILITY
    )


@functools.cache
def _kernels() -> ModuleType:
    if not _is_installed():
        raise RuntimeError(
            "implementation 'triton_fused' needs triton: pip install triton, or use 'grouped_mm'"
        )
    return importlib.import_module("moe_impls.triton_kernels")


def _check(x: Tensor, E: int) -> None:
    """Raise RuntimeError where the kernels cannot run."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"implementation 'triton_fused' needs CUDA tensors and x is on {x.device}: use 'grouped_mm', or "
            "set TRITON_INTERPRET=1 before Python starts to interpret its kernels"
        )
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        if capability < LEAST_CAPABILITY:
            raise RuntimeError(
                f"implementation 'triton_fused' needs a GPU of compute capability "
                f"{'.'.join(map(str, LEAST_CAPABILITY))} and {x.device} has "
                f"{'.'.join(map(str, capability))}: use 'sorted_dispatch'"
            )
    if x.dtype not in SUPPORT.dtypes:
        raise TypeError(
            f"x has dtype {x.dtype}; 'triton_fused' takes {', '.join(map(str, SUPPORT.dtypes))}: "
            "use 'sorted_dispatch'"
        )
    if E > MOST_EXPERTS:
        raise ValueError(f"E is {E}; 'triton_fused' takes at most {MOST_EXPERTS} experts")
    _kernels()


def _precision() -> str:
    """Name how float32 is multiplied: as such, unless torch was told to multiply it as TF32 itself."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Blocks(NamedTuple):
    """Rows, columns and depth of the tiles of a product, and how it is launched on a GPU."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3

    @property
    def launch(self) -> dict[str, Any]:
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "PRECISION": _precision()}
        return sizes if INTERPRETED else sizes | {"num_warps": self.warps, "num_stages": self.stages}


def candidates(rows_per_expert: float, dtype: torch.dtype) -> tuple[_Blocks, ...]:
    """List tiles for so many rows of an expert on average, the usual first; large calls try the others."""
    return (_Blocks(32, 64, 64),) if INTERPRETED else _on_gpus(rows_per_expert, dtype)


def _on_gpus(rows_per_expert: float, dtype: torch.dtype) -> tuple[_Blocks, ...]:
    """List tiles for a GPU: with few rows, narrow ones read the weights once."""
    depth = 32 if dtype == torch.float32 else 64
    if rows_per_expert <= 16:
        return (
            _Blocks(16, 64, depth, 4, 4), _Blocks(16, 128, depth, 4, 3), _Blocks(16, 32, 2 * depth, 4, 4)
        )  # fmt: skip
    if rows_per_expert <= 64 or dtype == torch.float32:
        return _Blocks(64, 64, depth, 4, 3), _Blocks(64, 128, depth, 4, 3), _Blocks(64, 64, depth, 4, 4)
    return (
        _Blocks(128, 128, depth, 8, 3), _Blocks(128, 64, depth, 4, 3), _Blocks(128, 128, depth // 2, 8, 4),
        _Blocks(64, 128, depth, 4, 3),
    )  # fmt: skip


def configurations(dtype: torch.dtype) -> tuple[_Blocks, ...]:
    """List every tile that some call of this dtype may take on a GPU, whichever is fastest there."""
    found = [sizes for rows in (16, 64, math.inf) for sizes in _on_gpus(rows, dtype)]
    return tuple(dict.fromkeys(found))


_CHOSEN: dict[tuple[Any, ...], _Blocks] = {}


def choices() -> dict[tuple[Any, ...], _Blocks]:
    """Return the fastest tiles of first calls, by device, dtype, precision, activation, rows, E, D, F, O."""
    return dict(_CHOSEN)


_TUNING_S = 0.0


def tuning_seconds() -> float:
    """Return the seconds that trying tiles took in this process, compilation included."""
    return _TUNING_S


LARGE = 2**31  # multiply-adds of a call for which tiles are tried


def _blocks_for(
    x: Tensor, expert_ids: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None,
    activation: str, clamp: Clamp,
) -> _Blocks:  # fmt: skip
    """Choose the tiles of a call. The first large one of its kind tries all, which waits for the GPU."""
    (E, F, D), O, N = w_in.shape, w_out.shape[1], expert_ids.numel()
    few = candidates(N / E, x.dtype)
    if len(few) == 1 or N * F * D < LARGE:
        return few[0]
    # The next power of two of the rows has the same candidates, so no call gets what another's were.
    key = (x.device, x.dtype, _precision(), activation, 2 ** math.ceil(math.log2(N / E)), E, D, F, O)
    if key in _CHOSEN:
        return _CHOSEN[key]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return few[0]

    def products(sizes: _Blocks) -> None:
        plan = _plan(expert_ids, E, sizes)
        _, hidden = _hidden(x, plan, w_in, b_in, activation, clamp, keep=False, activate=True)
        _product(hidden, plan, w_out.mT, b_out)

    global _TUNING_S
    begin = time.perf_counter()
    _CHOSEN[key] = min(few, key=lambda sizes: _milliseconds(lambda: products(sizes)))
    _TUNING_S += time.perf_counter() - begin
    return _CHOSEN[key]


def _milliseconds(call: Callable[[], None]) -> float:
    """Measure the mean milliseconds of a call on the current device, after compilation."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 3


class _Plan(NamedTuple):
    """How slots lie by expert, and the tiles of their rows; all on the device."""

    order: Tensor  # [N], slots by expert
    token: Tensor  # [N], of each
    ends: Tensor  # [E], where the rows of each expert end
    tile_expert: Tensor  # [tiles], E where there is no such tile
    tile_begin: Tensor  # [tiles], its first row
    blocks: _Blocks

    @property
    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tile_expert, self.tile_begin, self.ends


def _plan(expert_ids: Tensor, E: int, sizes: _Blocks) -> _Plan:
    T, K = expert_ids.shape
    N = T * K
    order, counts = sort_by_expert(expert_ids, E)
    ends = counts.cumsum(0)
    in_expert = (counts + sizes.m - 1) // sizes.m  # tiles
    last_tile = in_expert.cumsum(0)
    # Every expert may have one tile that is not full.
    tile = torch.arange(min(N, N // sizes.m + E), device=expert_ids.device)
    expert = torch.searchsorted(last_tile, tile, right=True)
    safe = expert.clamp(max=E - 1)
    begin = (ends - counts)[safe] + (tile - (last_tile - in_expert)[safe]) * sizes.m
    return _Plan(order, order // K, ends, expert, begin, sizes)


_INTERPRETER = threading.RLock()  # it replaces Triton's functions while a kernel runs


def _on(x: Tensor) -> Any:
    """Make the device of x the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else _INTERPRETER


GROUP = 8  # tiles that read the same weights one after the other


def _grid(plan: _Plan, columns: int) -> tuple[int]:
    programs = len(plan.tile_expert) * -(-columns // plan.blocks.n)
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"T * K of {len(plan.order)} slots and {columns} columns need {programs} programs; "
            f"'triton_fused' takes at most {MOST_PROGRAMS}: split the tokens"
        )
    return (programs,)


def _strides(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.stride(0), bias.stride(1))


def _hidden(
    x: Tensor, plan: _Plan, w_in: Tensor, b_in: Tensor | None, activation: str, clamp: Clamp,
    *, keep: bool, activate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute what is activated [N, F], unless not kept, and hidden features [N, H], unless not activated."""
    E, F, D = w_in.shape
    gated = activation in GATED_ACTIVATIONS
    H, N = F // 2 if gated else F, len(plan.order)
    pre = x.new_empty(N, F) if keep else x.new_empty(0)
    hidden = x.new_empty(N, H) if activate else x.new_empty(0)
    _kernels().hidden_kernel[_grid(plan, H)](
        x, plan.token, w_in, x if b_in is None else b_in, pre, hidden, *plan.tiles,
        len(plan.tile_expert), E, D, H, *w_in.stride(), *_strides(b_in), *clamp,
        ACTIVATION=activation, GATED=gated, HAS_BIAS=b_in is not None, KEEP=keep, ACTIVATE=activate,
        GROUP=GROUP, **plan.blocks.launch,
    )  # fmt: skip
    return pre, hidden


def _product(
    rows: Tensor, plan: _Plan, w: Tensor, bias: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """Compute rows [N, depth] @ w[e] [depth, columns] + bias[e], in the order of slots: [T * K, columns]."""
    E, depth, columns = w.shape
    out = rows.new_empty(len(plan.order), columns)
    _kernels().product_kernel[_grid(plan, columns)](
        rows, w, rows if bias is None else bias, out, plan.order, *plan.tiles,
        len(plan.tile_expert), E, depth, columns, *w.stride(), *_strides(bias),
        HAS_BIAS=bias is not None, RELU=relu, GROUP=GROUP, **plan.blocks.launch,
    )  # fmt: skip
    return out


def _weight_grads(
    left: Tensor, left_rows: Tensor | None, gates: Tensor | None, right: Tensor, right_rows: Tensor | None,
    plan: _Plan, *, bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute d_w [E, P, Q] and d_bias [E, P], empty without one."""
    E, P, Q = len(plan.ends), left.shape[1], right.shape[1]
    d_w = right.new_empty(E, P, Q)
    d_bias = right.new_empty(E, P) if bias else right.new_empty(0)
    sizes = plan.blocks
    grid = (-(-P // sizes.m) * -(-Q // sizes.n), E)
    _kernels().weight_grad_kernel[grid](
        left, plan.order if left_rows is None else left_rows, right if gates is None else gates, plan.order,
        right, plan.order if right_rows is None else right_rows, plan.ends, d_w, d_bias, P, Q,
        HAS_LEFT_ROWS=left_rows is not None, HAS_RIGHT_ROWS=right_rows is not None,
        HAS_GATES=gates is not None, HAS_BIAS=bias, **sizes.launch,
    )  # fmt: skip
    return d_w, d_bias


def _keeps_pre(D: int, F: int, H: int) -> bool:
    """Tell whether what is activated takes no more memory than the rows of the two products."""
    return F <= D + H


def _needs_outputs(output_activation: str, combine: str) -> bool:
    """Tell whether the backward needs the experts' outputs."""
    return output_activation == "relu" or combine != "sum"


def _unwritten(
    x: Tensor, expert_ids: Tensor, w_in: Tensor, w_out: Tensor,
    output_activation: str, combine: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Make what `_forward` returns, with nothing written."""
    (T, D), N = x.shape, expert_ids.numel()
    (_, O, H), F = w_out.shape, w_in.shape[1]
    pre = x.new_empty(N, F) if keep and _keeps_pre(D, F, H) else x.new_empty(0)
    outputs = x.new_empty(N, O) if keep and _needs_outputs(output_activation, combine) else x.new_empty(0)
    return x.new_empty(T, O), pre, outputs


@torch.library.custom_op("moe_impls::triton_fused", mutates_args=())
def _forward(
    x: Tensor, expert_ids: Tensor, gates: Tensor,
    w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None,
    activation: str, limit: float, alpha: float, offset: float,
    output_activation: str, combine: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y [T, O] and, for the backward, pre [N, F] and outputs [N, O], each empty unless needed."""
    (T, D), K, clamp = x.shape, expert_ids.shape[1], Clamp(limit, alpha, offset)
    E, O, H = w_out.shape
    _check(x, E)
    if T == 0:
        return _unwritten(x, expert_ids, w_in, w_out, output_activation, combine, keep)
    x, gates = x.contiguous(), gates.contiguous()
    with _on(x):
        blocks = _blocks_for(x, expert_ids, w_in, b_in, w_out, b_out, activation, clamp)
        plan = _plan(expert_ids, E, blocks)
        keep_pre = keep and _keeps_pre(D, w_in.shape[1], H)
        pre, hidden = _hidden(x, plan, w_in, b_in, activation, clamp, keep=keep_pre, activate=True)
        outputs = _product(hidden, plan, w_out.mT, b_out, relu=output_activation == "relu")
        if combine == "sum":
            y = x.new_empty(T, O)
            block_t, block_o = (32, 64) if INTERPRETED else (4, 256)
            _kernels().combine_kernel[(-(-T // block_t), -(-O // block_o))](
                outputs, gates, y, T, K, O, BLOCK_T=block_t, BLOCK_O=block_o
            )
        else:
            y = combine_slots(outputs.view(T, K, O), gates, combine)
    if not (keep and _needs_outputs(output_activation, combine)):
        outputs = x.new_empty(0)
    return y, pre, outputs


@_forward.register_fake
def _(x, expert_ids, gates, w_in, b_in, w_out, b_out, *options):
    return _unwritten(x, expert_ids, w_in, w_out, *options[-3:])


def _combine_grads(dy: Tensor, outputs: Tensor, gates: Tensor, combine: str) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``combine_slots``, in float32 and the dtype of gates; outputs [T, K, O]."""
    dy, values, weights = dy.float().unsqueeze(1), outputs.float(), gates.float().unsqueeze(-1)
    if combine == "sum":
        return dy * weights, (dy * values).sum(-1).to(gates.dtype)
    largest = values.masked_fill(weights == 0, -torch.inf).amax(1, keepdim=True)
    powers = (values - largest.masked_fill(largest == -torch.inf, 0)).clamp(max=80.0).exp()
    by_total = dy / (weights * powers).sum(1, keepdim=True) * powers
    return by_total * weights, by_total.sum(-1).to(gates.dtype)


@torch.library.custom_op("moe_impls::triton_fused_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, expert_ids: Tensor, gates: Tensor,
    w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, pre: Tensor, outputs: Tensor,
    activation: str, limit: float, alpha: float, offset: float,
    output_activation: str, combine: str, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients of x, gates, w_in, b_in, w_out, b_out; those that are not wanted are empty."""
    (T, D), K, clamp = x.shape, expert_ids.shape[1], Clamp(limit, alpha, offset)
    (E, O, H), F = w_out.shape, w_in.shape[1]
    leaves = (x, gates, w_in, b_in, w_out, b_out)
    grads = [x.new_empty(0) for _ in leaves]
    if T == 0:
        return [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format)
            if want and leaf is not None
            else empty
            for leaf, want, empty in zip(leaves, wanted, grads, strict=True)
        ]
    x, gates, dy = x.contiguous(), gates.contiguous(), dy.contiguous()
    gated = activation in GATED_ACTIVATIONS
    with _on(x):
        blocks = _blocks_for(x, expert_ids, w_in, b_in, w_out, b_out, activation, clamp)
        plan = _plan(expert_ids, E, blocks)
        if not _keeps_pre(D, F, H):
            pre, _ = _hidden(x, plan, w_in, b_in, activation, clamp, keep=True, activate=False)
        if _needs_outputs(output_activation, combine):
            d_outputs, grads[1] = _combine_grads(dy, outputs.view(T, K, O), gates, combine)
            if output_activation == "relu":
                d_outputs = d_outputs.masked_fill(outputs.view(T, K, O) <= 0, 0)
            dy, rows, gates_of_rows = d_outputs.to(x.dtype).view(T * K, O), plan.order, None
        else:
            rows, gates_of_rows = plan.token, gates

        hidden, d_pre = x.new_empty(T * K, H), x.new_empty(T * K, F)
        parts = torch.empty(T * K, -(-H // plan.blocks.n), dtype=torch.float32, device=x.device)
        _kernels().hidden_grad_kernel[_grid(plan, H)](
            dy, rows, gates, plan.order, w_out, x if b_out is None else b_out, pre, hidden, d_pre, parts,
            *plan.tiles, len(plan.tile_expert), E, O, H, *w_out.stride(), *_strides(b_out), *clamp,
            ACTIVATION=activation, GATED=gated, HAS_BIAS=b_out is not None,
            HAS_GATES=gates_of_rows is not None, GROUP=GROUP, **plan.blocks.launch,
        )  # fmt: skip
        if gates_of_rows is not None:
            of_slots = torch.empty(T * K, dtype=torch.float32, device=x.device)
            grads[1] = of_slots.scatter_(0, plan.order, parts.sum(1)).view(T, K).to(gates.dtype)
        if wanted[0]:
            grads[0] = _product(d_pre, plan, w_in).view(T, K, D).sum(1)
        if wanted[2] or wanted[3]:
            grads[2], grads[3] = _weight_grads(d_pre, None, None, x, plan.token, plan, bias=wanted[3])
        if wanted[4] or wanted[5]:
            grads[4], grads[5] = _weight_grads(dy, rows, gates_of_rows, hidden, None, plan, bias=wanted[5])
    return [grad if want else x.new_empty(0) for grad, want in zip(grads, wanted, strict=True)]


@_backward.register_fake
def _(dy, x, expert_ids, gates, w_in, b_in, w_out, b_out, *rest):
    return [
        torch.empty_like(leaf, memory_format=torch.contiguous_format)
        if leaf is not None and want else x.new_empty(0)
        for leaf, want in zip((x, gates, w_in, b_in, w_out, b_out), rest[-1], strict=True)
    ]  # fmt: skip


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, options = inputs[:7], inputs[7:-1]
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.options = options
    ctx.set_materialize_grads(False)  # of what is kept there are none, and zeros would take as much memory


def _gradients(
    ctx: Any, dy: Tensor | None, d_pre: Tensor | None, d_outputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:  # y went into what gives it no gradient
        return (None,) * (8 + len(ctx.options))
    x_wanted, _, *rest = ctx.needs_input_grad[:7]
    wanted = [x_wanted, *rest]
    dx, *grads = [
        grad if want else None
        for grad, want in zip(_backward(dy, *ctx.saved_tensors, *ctx.options, wanted), wanted, strict=True)
    ]
    return dx, None, *grads, *[None] * (len(ctx.options) + 1)


torch.library.register_autograd("moe_impls::triton_fused", _gradients, setup_context=_setup)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract.

    Raises:
        RuntimeError: no CUDA tensors and no interpreter, no Triton, or a GPU too old.
        TypeError: a dtype that the kernels do not take.
        ValueError: sizes beyond a limit of the kernels.
    """
    weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    keep = needs_gradients(x, routing.gates, *weights)
    options = (experts.activation, *experts.clamp, experts.output_activation, combine)
    y, _, _ = _forward(x, *routing, *weights, *options, keep)
    return y
