"""The Triton kernels of ``triton_fused``: grouped products whose rows are gathered on the way in.

Rows are slots sorted by expert. A *tile* is at most BLOCK_M rows of one expert: ``tile_expert`` [tiles] holds
its expert, or E where there is no such tile, ``tile_begin`` its first row, and ``ends`` [E] where the rows of
each expert end. No kernel asks the host how many rows an expert has. Products accumulate in float32;
PRECISION says how float32 operands are multiplied, "ieee" as such or "tf32".
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_impls import triton_fused

INTERPRETED = tl.constexpr(triton_fused.INTERPRETED)


def _inlined(function):
    """Mark a function that kernels call: the interpreter would prepare its language anew for each call."""
    return function if triton_fused.INTERPRETED else triton.jit(function)


@_inlined
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply the bits of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@_inlined
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@_inlined
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@_inlined
def _relu(z):
    return tl.where(z <= 0, 0.0, z)  # of NaN it is NaN, unlike maximum


@_inlined
def _silu_slope(z):
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@_inlined
def _gelu_slope(z):
    return _normal_cdf(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@_inlined
def _tanh_cdf(z):
    """Approximate the CDF of the standard Normal as gelu_tanh does: (1 + tanh(u)) / 2 is sigmoid(2 u)."""
    return _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))


@_inlined
def _gelu_tanh_slope(z):
    s = _tanh_cdf(z)
    return s + z * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * z * z)


@_inlined
def _clamped(gate, up, limit):
    """Bring the inputs of swiglu_clamped within its bounds."""
    return tl.where(gate > limit, limit, gate), tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@_inlined
def _activated(gate, up, limit, alpha, offset, ACTIVATION: tl.constexpr):
    """Compute hidden features; ``up`` is read only if the activation is gated, the numbers if clamped."""
    if ACTIVATION == "relu":
        return _relu(gate)
    elif ACTIVATION == "relu2":
        return _relu(gate) * _relu(gate)
    elif ACTIVATION == "gelu_tanh":
        return gate * _tanh_cdf(gate)
    elif ACTIVATION == "geglu_tanh":
        return gate * _tanh_cdf(gate) * up
    elif ACTIVATION == "gelu":
        return gate * _normal_cdf(gate)
    elif ACTIVATION == "silu":
        return gate * _sigmoid(gate)
    elif ACTIVATION == "swiglu":
        return gate * _sigmoid(gate) * up
    elif ACTIVATION == "geglu":
        return gate * _normal_cdf(gate) * up
    elif ACTIVATION == "reglu":
        return _relu(gate) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_clamped")
        g, u = _clamped(gate, up, limit)
        return g * _sigmoid(alpha * g) * (u + offset)


@_inlined
def _slopes(gate, up, limit, alpha, offset, ACTIVATION: tl.constexpr):
    """Compute the derivatives of the hidden features by ``gate`` and by ``up``."""
    if ACTIVATION == "relu":
        return tl.where(gate > 0, 1.0, 0.0), up
    elif ACTIVATION == "relu2":
        return 2.0 * _relu(gate), up
    elif ACTIVATION == "gelu_tanh":
        return _gelu_tanh_slope(gate), up
    elif ACTIVATION == "geglu_tanh":
        return _gelu_tanh_slope(gate) * up, gate * _tanh_cdf(gate)
    elif ACTIVATION == "gelu":
        return _gelu_slope(gate), up
    elif ACTIVATION == "silu":
        return _silu_slope(gate), up
    elif ACTIVATION == "swiglu":
        return _silu_slope(gate) * up, gate * _sigmoid(gate)
    elif ACTIVATION == "geglu":
        return _gelu_slope(gate) * up, gate * _normal_cdf(gate)
    elif ACTIVATION == "reglu":
        return tl.where(gate > 0, up, 0.0), _relu(gate)
    else:
        tl.static_assert(ACTIVATION == "swiglu_clamped")
        g, u = _clamped(gate, up, limit)
        s = _sigmoid(alpha * g)
        by_gate = tl.where(gate > limit, 0.0, (u + offset) * s * (1.0 + alpha * g * (1.0 - s)))
        by_up = tl.where((up > limit) | (up < -limit), 0.0, g * s)
        return by_gate, by_up


@_inlined
def _tile_of_program(tiles, columns, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Find the tile and the columns of this program. GROUP tiles take turns on the same weights."""
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * blocks) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    within = program % (GROUP * blocks)
    return first + within % height, within // height


@_inlined
def _rows_of_tile(tile, e, tile_begin, ends, BLOCK_M: tl.constexpr):
    """List the rows of a tile of expert e, int64 [BLOCK_M], and which of them there are."""
    n = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
    return n, n < tl.load(ends + e)


@_inlined
def _dot_along(
    left, right, are_rows, are_columns, depth, right_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum left[m, k] right[k, n] over k, [BLOCK_M, BLOCK_N]; pointers are at the first block of the depth."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, depth, BLOCK_K):
        inside = k < depth - done
        a = tl.load(left, mask=are_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & are_columns[None, :], other=0.0)
        total = _dot(a, b, total, PRECISION)
        left += BLOCK_K
        right += BLOCK_K * right_stride
    return total


@triton.jit
def hidden_kernel(
    x, row_of, w, bias, pre, hidden, tile_expert, tile_begin, ends,
    tiles, E, D, H,
    stride_e, stride_f, stride_d, stride_be, stride_bf,
    limit, alpha, offset,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr, ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write hidden [N, H] = act(x[row_of] @ w[e]ᵀ + bias[e]) and, to KEEP, what is activated: pre [N, F]."""
    tile, block = _tile_of_program(tiles, H, BLOCK_N, GROUP)
    e = tl.load(tile_expert + tile)
    if e == E:
        return
    n, valid = _rows_of_tile(tile, e, tile_begin, ends, BLOCK_M)
    source = tl.load(row_of + n, mask=valid, other=0)
    h = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    rows = x + source[:, None] * D + d[None, :]
    of_d = w + e * stride_e + d[:, None].to(tl.int64) * stride_d
    weights = of_d + h[None, :].to(tl.int64) * stride_f
    up_weights = of_d + (h + H)[None, :].to(tl.int64) * stride_f
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        inside = d < D - k
        a = tl.load(rows, mask=valid[:, None] & inside[None, :], other=0.0)
        both = inside[:, None] & (h < H)[None, :]
        gate = _dot(a, tl.load(weights, mask=both, other=0.0), gate, PRECISION)
        if GATED:
            up = _dot(a, tl.load(up_weights, mask=both, other=0.0), up, PRECISION)
        rows += BLOCK_K
        weights += BLOCK_K * stride_d
        up_weights += BLOCK_K * stride_d
    if HAS_BIAS:
        biases = bias + e * stride_be
        of_gate = tl.load(biases + h.to(tl.int64) * stride_bf, mask=h < H, other=0.0)
        gate += of_gate.to(tl.float32)[None, :]
        if GATED:
            of_up = tl.load(biases + (h + H).to(tl.int64) * stride_bf, mask=h < H, other=0.0)
            up += of_up.to(tl.float32)[None, :]
    mask = valid[:, None] & (h < H)[None, :]
    if KEEP:
        width = 2 * H if GATED else H
        places = pre + n[:, None] * width + h[None, :]
        tl.store(places, gate.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(places + H, up.to(pre.dtype.element_ty), mask=mask)
    if ACTIVATE:
        a = _activated(gate, up, limit, alpha, offset, ACTIVATION)
        tl.store(hidden + n[:, None] * H + h[None, :], a.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    rows, w, bias, out, place_of, tile_expert, tile_begin, ends,
    tiles, E, depth, columns,
    stride_e, stride_k, stride_n, stride_be, stride_bn,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write out[place_of[n]] = rows[n] @ w[e] + bias[e], or its relu; rows [N, depth], out [N, columns]."""
    tile, block = _tile_of_program(tiles, columns, BLOCK_N, GROUP)
    e = tl.load(tile_expert + tile)
    if e == E:
        return
    n, valid = _rows_of_tile(tile, e, tile_begin, ends, BLOCK_M)
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = rows + n[:, None] * depth + k[None, :]
    right = w + e * stride_e + k[:, None].to(tl.int64) * stride_k + c[None, :].to(tl.int64) * stride_n
    total = _dot_along(left, right, valid, c < columns, depth, stride_k, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        biases = bias + e * stride_be + c.to(tl.int64) * stride_bn
        total += tl.load(biases, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = _relu(total)
    place = tl.load(place_of + n, mask=valid, other=0)
    places = out + place[:, None] * columns + c[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=valid[:, None] & (c < columns)[None, :])


@triton.jit
def hidden_grad_kernel(
    dy, row_of, gates, slot_of, w, bias, pre, hidden, d_pre, d_gates, tile_expert, tile_begin, ends,
    tiles, E, O, H,
    stride_e, stride_o, stride_h, stride_be, stride_bo,
    limit, alpha, offset,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write d_pre [N, F] from dy[row_of] @ w[e] and pre [N, F], and again what pre becomes: hidden [N, H].

    With gates the gradient of row n is dy[row_of[n]] times the gate of its slot, and d_gates [N, blocks]
    gets the part of this block of H in the product of dy with the expert's output:
    dy · (w a + bias) = (wᵀ dy) · a + dy · bias, so that no output need be kept.
    """
    tile, block = _tile_of_program(tiles, H, BLOCK_N, GROUP)
    e = tl.load(tile_expert + tile)
    if e == E:
        return
    n, valid = _rows_of_tile(tile, e, tile_begin, ends, BLOCK_M)
    source = tl.load(row_of + n, mask=valid, other=0)
    h = block * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.arange(0, BLOCK_K)
    left = dy + source[:, None] * O + o[None, :]
    right = w + e * stride_e + o[:, None].to(tl.int64) * stride_o + h[None, :].to(tl.int64) * stride_h
    total = _dot_along(left, right, valid, h < H, O, stride_o, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    by_bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_BIAS and HAS_GATES and block == 0:
        for done in range(0, O, BLOCK_K):
            inside = o < O - done
            a = tl.load(left + done, mask=valid[:, None] & inside[None, :], other=0.0)
            biases = bias + e * stride_be + (done + o).to(tl.int64) * stride_bo
            column = tl.load(biases, mask=inside, other=0.0).to(tl.float32)
            by_bias += tl.sum(a.to(tl.float32) * column[None, :], axis=1)
    mask = valid[:, None] & (h < H)[None, :]
    width = 2 * H if GATED else H
    places = n[:, None] * width + h[None, :]
    gate = tl.load(pre + places, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(pre + places + H, mask=mask, other=0.0).to(tl.float32)
    a = _activated(gate, up, limit, alpha, offset, ACTIVATION)
    tl.store(hidden + n[:, None] * H + h[None, :], a.to(hidden.dtype.element_ty), mask=mask)
    if HAS_GATES:
        part = tl.sum(tl.where(mask, total * a, 0.0), axis=1) + by_bias
        tl.store(d_gates + n * tl.cdiv(H, BLOCK_N) + block, part, mask=valid)
        slot = tl.load(slot_of + n, mask=valid, other=0)
        total *= tl.load(gates + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    by_gate, by_up = _slopes(gate, up, limit, alpha, offset, ACTIVATION)
    tl.store(d_pre + places, (total * by_gate).to(d_pre.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(d_pre + places + H, (total * by_up).to(d_pre.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    left, left_row_of, gates, slot_of, right, right_row_of, ends, d_w, d_bias,
    P, Q,
    HAS_LEFT_ROWS: tl.constexpr, HAS_RIGHT_ROWS: tl.constexpr, HAS_GATES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write d_w[e] = Σ_n left[n] rightᵀ[n] and d_bias[e] = Σ_n left[n], n the rows of expert e, once.

    left [N, P] and right [N, Q], or gathered by their row numbers; left times the gate of its slot or not.
    An expert without rows gets zeros.
    """
    e = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(Q, BLOCK_N)
    block_p, block_q = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    p = block_p * BLOCK_M + tl.arange(0, BLOCK_M)
    q = block_q * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K).to(tl.int64)
        valid = n < end
        left_row, right_row = n, n
        if HAS_LEFT_ROWS:
            left_row = tl.load(left_row_of + n, mask=valid, other=0)
        if HAS_RIGHT_ROWS:
            right_row = tl.load(right_row_of + n, mask=valid, other=0)
        a = tl.load(
            left + left_row[None, :] * P + p[:, None], mask=valid[None, :] & (p < P)[:, None], other=0.0
        )
        b = tl.load(
            right + right_row[:, None] * Q + q[None, :], mask=valid[:, None] & (q < Q)[None, :], other=0.0
        )
        if HAS_GATES:
            slot = tl.load(slot_of + n, mask=valid, other=0)
            scaled = a.to(tl.float32) * tl.load(gates + slot, mask=valid, other=0.0).to(tl.float32)[None, :]
        else:
            scaled = a.to(tl.float32)
        if HAS_BIAS:
            sums += tl.sum(scaled, axis=1)
        total = _dot(scaled.to(b.dtype), b, total, PRECISION)
    places = d_w + e * P * Q + p[:, None].to(tl.int64) * Q + q[None, :]
    tl.store(places, total.to(d_w.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])
    if HAS_BIAS and block_q == 0:
        tl.store(d_bias + e * P + p, sums.to(d_bias.dtype.element_ty), mask=p < P)


@triton.jit
def combine_kernel(slots, gates, y, T, K, O, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):
    """Write y[t] = Σ_k gates[t, k] * slots[t, k], in the order of k; slots [T, K, O]."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (t < T)[:, None] & (o < O)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for k in range(K):
        gate = tl.load(gates + t * K + k, mask=t < T, other=0.0).to(tl.float32)
        slot = tl.load(slots + (t * K + k)[:, None] * O + o[None, :], mask=mask, other=0.0)
        total += gate[:, None] * slot.to(tl.float32)
    tl.store(y + t[:, None] * O + o[None, :], total.to(y.dtype.element_ty), mask=mask)
