"""A right implementation with everything written out, so that it can be made wrong by changing one line.

Slots are sorted by expert, each expert's rows go through its MLP tile by tile, results are scattered back,
and the backward is written by hand: the steps of a grouped GEMM kernel, each where a mutant finds it. It
passes the whole suite as it stands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_impls.interface import Clamp, Experts, Routing, Support, check_choice

# Those that are written out here.
ACTIVATIONS = (
    "relu", "gelu", "silu", "gelu_tanh", "relu2", "swiglu", "geglu", "reglu", "swiglu_clamped", "geglu_tanh",
)  # fmt: skip
SUPPORT = Support(activations=ACTIVATIONS, autocast=True)
TILE = 32  # rows of one expert that are computed at once


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    check_choice("output_activation", experts.output_activation, ("none", "relu"))
    check_choice("combine", combine, ("sum", "logsumexp"))
    ids, gates = routing
    weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    form = experts.activation, experts.clamp
    y: Any = _Grouped.apply(x, ids, gates, *weights, form, experts.output_activation, combine)
    return y


def act(h: Tensor, form: tuple[str, Clamp]) -> Tensor:
    """Apply the activation to pre-activations h [N, F]: [N, H]."""
    name, (limit, alpha, offset) = form
    if name == "relu":
        return h.clamp(min=0)
    if name == "gelu":
        return torch.nn.functional.gelu(h)
    if name == "silu":
        return h * torch.sigmoid(h)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(h, approximate="tanh")
    if name == "relu2":
        return h.clamp(min=0).square()
    half = h.shape[1] // 2
    gate, up = h[:, :half], h[:, half:]
    if name == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if name == "geglu":
        return torch.nn.functional.gelu(gate) * up
    if name == "reglu":
        return gate.clamp(min=0) * up
    if name == "geglu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if name != "swiglu_clamped":
        raise ValueError(f"activation {name!r} is not written out here")
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + offset)


def act_backward(h: Tensor, da: Tensor, form: tuple[str, Clamp]) -> Tensor:
    """Compute the gradient of h [N, F] from that of the activation, da [N, H]."""
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        return torch.autograd.grad(act(leaf, form), leaf, da)[0]


def tiles(counts: list[int]) -> list[tuple[int, slice]]:
    """Cut the rows, sorted by expert, into tiles: (expert, rows)."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        end = start + count
        found += [(expert, slice(s, min(s + TILE, end))) for s in range(start, end, TILE)]
        start = end
    return found


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, gates, w_in, b_in, w_out, b_out, activation, output_activation, combine):
        T, K = ids.shape
        E, O, _ = w_out.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = ids.flatten()  # [T * K]
        order = flat.argsort(stable=True)  # slots, sorted by expert
        token = order // K  # the token of each row
        counts = flat.bincount(minlength=E).tolist()
        gate = gates.flatten()[order].to(wide).unsqueeze(1)  # [T * K, 1]

        rows = x[token]  # [T * K, D]
        h = rows.new_empty(len(rows), w_in.shape[1])
        out = rows.new_empty(len(rows), O)
        for e, tile in tiles(counts):
            h[tile] = rows[tile] @ w_in[e].T
            if b_in is not None:
                h[tile] += b_in[e]
            out[tile] = act(h[tile], activation) @ w_out[e].T
            if b_out is not None:
                out[tile] += b_out[e]
        f = out.to(wide).clamp(min=0) if output_activation == "relu" else out.to(wide)

        if combine == "sum":
            y = torch.zeros(T, O, dtype=wide, device=x.device)
            y.index_add_(0, token, gate * f)
        else:
            slots = torch.empty_like(f)
            slots[order] = f
            slots, weight = slots.view(T, K, O), gates.to(wide).unsqueeze(2)
            largest = slots.masked_fill(weight == 0, -math.inf).amax(dim=1)  # [T, O]
            largest = largest.masked_fill(largest == -math.inf, 0)
            total = (weight * (slots - largest.unsqueeze(1)).clamp(max=80).exp()).sum(dim=1)
            y = largest + total.log()
        ctx.save_for_backward(x, gates, w_in, b_in, w_out, b_out, order, h, out, y)
        ctx.rest = counts, activation, output_activation, combine
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)  # or the sums over tokens would be rounded tile by tile
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gates, w_in, b_in, w_out, b_out, order, h, out, y = ctx.saved_tensors
        counts, activation, output_activation, combine = ctx.rest
        wide = torch.promote_types(x.dtype, torch.float32)
        token = order // gates.shape[1]
        gate = gates.flatten()[order, None].to(wide)  # [T * K, 1]
        rows = x.index_select(0, token).to(wide)
        d_rows = dy[token].to(wide)  # [T * K, O]
        f = out.to(wide)
        if output_activation == "relu":
            f = f.clamp(min=0)

        share = torch.ones_like(f)  # df / dy without the gate
        if combine == "logsumexp":
            share = (f - y[token]).clamp(max=80).exp()  # [T * K, O]
        d_gate = (d_rows * (share if combine == "logsumexp" else f)).sum(dim=1)
        d_out = gate * share * d_rows
        d_out = d_out * (out > 0) if output_activation == "relu" else d_out
        d_out = d_out.to(x.dtype).to(wide)  # [T * K, O]

        dx_rows = torch.empty_like(rows)
        dw_in, dw_out = (torch.zeros_like(w, dtype=wide) for w in (w_in, w_out))
        db_in, db_out = (None if b is None else torch.zeros_like(b, dtype=wide) for b in (b_in, b_out))
        for e, tile in tiles(counts):
            a = act(h[tile], activation)
            da = d_out[tile].to(x.dtype) @ w_out[e]
            dh = act_backward(h[tile], da, activation)
            dx_rows[tile] = dh @ w_in[e]
            a, dh = a.to(wide), dh.to(wide)  # the weights' gradients are sums over tokens
            dw_in[e] += dh.T @ rows[tile]
            dw_out[e] += d_out[tile].T @ a
            if db_in is not None:
                db_in[e] += dh.sum(dim=0)
            if db_out is not None:
                db_out[e] += d_out[tile].sum(dim=0)
        dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(0, token, dx_rows)
        dgates = torch.empty_like(d_gate).index_copy_(0, order, d_gate).view(gates.shape)

        grads = (dx, None, dgates, dw_in, db_in, dw_out, db_out)
        likes = (x, None, gates, w_in, b_in, w_out, b_out)
        cast = (None if g is None or l is None else g.to(l.dtype) for g, l in zip(grads, likes, strict=True))
        return *cast, None, None, None
