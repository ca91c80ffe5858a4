"""Sorted slices with the backward written out: of all activations only h, [T * K, F], is kept for it.

Gathered tokens and activations are computed again, which costs memory traffic and no matrix product. The
experts' outputs are not needed: the gradient of a gate, dy · f, is (W_outᵀ dy) · a + dy · b_out, and that
product is computed anyway (as in SonicMoE, arXiv:2512.14080). The product that makes an expert's weight
gradient writes it to its place, once, in memory that is kept for the next backward (``kept_memory``).

Where a CPU has no instructions for products of a dtype, each expert's weights are converted to float32 and
the products are made in that: several times faster than those of the dtype, and no less exact.

For training on CPUs: the host reads the sizes of the slices, once per call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.checking import check_supported
from moe_impls.dispatcher import sort_by_expert
from moe_impls.functional import accumulation_dtype, activate, needs_gradients
from moe_impls.interface import Clamp, Experts, Routing, Support
from moe_impls.kept_memory import take
from moe_impls.operators import operator
from moe_impls.processor import multiplies

SUPPORT = Support(
    devices=("cpu",), combines=("sum",), output_activations=("none",), fullgraph=True, exports=True
)


class _Weights:
    """The matrices of a layer [E, N, M], one after the other in the dtype that products are made in."""

    def __init__(self, w: Tensor) -> None:
        self.matrices = w.unbind(0)
        self.converts = not multiplies(w.dtype)
        self.buffer = take(w.shape[1:] if self.converts else [0], torch.float32)

    def __getitem__(self, e: int) -> Tensor:
        return self.buffer.copy_(self.matrices[e]) if self.converts else self.matrices[e]

    def write_product(self, a: Tensor, b: Tensor, to: Tensor) -> None:
        """Compute ``a @ b`` of the shape of a matrix; what was got before is no longer there."""
        if self.converts:
            to.copy_(torch.mm(a, b, out=self.buffer))
        else:
            torch.mm(a, b, out=to)


class _Sum(torch.autograd.Function):
    """y [T, O] from x [T, D], gates and ids [T, K] and the experts' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        expert_ids: Tensor,
        activation: str,
        clamp: Clamp,
        keep: bool,
    ) -> Tensor:
        order, counts = sort_by_expert(expert_ids, len(w_in))  # [T * K], [E]
        K, sizes = expert_ids.shape[1], counts.tolist()
        wide = accumulation_dtype(x.dtype)
        slot_gates = gates.flatten()[order].to(wide).unsqueeze(1)  # [T * K, 1]
        kept = x.new_empty(len(order) if keep else 0, w_in.shape[1])  # h, [T * K, F]
        kept_parts = kept.split(sizes) if keep else [None] * len(sizes)
        y = x.new_zeros(len(x), w_out.shape[1], dtype=wide)
        of_in, of_out = _Weights(w_in), _Weights(w_out)
        parts = zip((order // K).split(sizes), slot_gates.split(sizes), kept_parts, strict=True)
        for e, (tokens, gate, kept_part) in enumerate(parts):
            if len(tokens) == 0:
                continue
            w = of_in[e]
            h = F.linear(x[tokens].to(w.dtype), w, None if b_in is None else b_in[e].to(w.dtype))
            if kept_part is not None:
                kept_part.copy_(h)
            f = F.linear(
                activate(h, activation, clamp), of_out[e], None if b_out is None else b_out[e].to(w.dtype)
            )
            y.index_add_(0, tokens, gate * f)
        ctx.save_for_backward(x, w_in, w_out, b_out, order, slot_gates, kept)
        ctx.sizes, ctx.K, ctx.activation, ctx.gates_dtype = sizes, K, (activation, clamp), gates.dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients without a graph would be taken for constants
            raise RuntimeError(
                "'recompute' has no gradients of gradients (create_graph=True): use 'sorted_dispatch'"
            )
        x, w_in, w_out, b_out, order, slot_gates, kept = ctx.saved_tensors
        wants_x, wants_gates, wants_w_in, wants_b_in, wants_w_out, wants_b_out, *_ = ctx.needs_input_grad
        wide = slot_gates.dtype
        dx = torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format)
        d_slot_gates = x.new_zeros(len(order), dtype=wide)
        dw_in = take(w_in.shape if wants_w_in else [0], w_in.dtype)
        dw_out = take(w_out.shape if wants_w_out else [0], w_out.dtype)
        db_in, db_out = (w.new_zeros(w.shape[:2]) for w in (w_in, w_out))
        of_in, of_out = _Weights(w_in), _Weights(w_out)
        per_slot = (order // ctx.K, slot_gates, kept, d_slot_gates)
        parts = zip(*(t.split(ctx.sizes) for t in per_slot), strict=True)
        for e, (tokens, gate, h, d_gates) in enumerate(parts):
            if len(tokens) == 0:
                for wanted, dw in ((wants_w_in, dw_in), (wants_w_out, dw_out)):
                    if wanted:
                        dw[e].zero_()
                continue
            w = of_out[e]
            rows, dy_rows = x[tokens].to(w.dtype), dy[tokens].to(w.dtype)
            with torch.enable_grad():
                h = h.detach().to(w.dtype).requires_grad_()
                a = activate(h, *ctx.activation)  # [N, H]
            da = dy_rows @ w  # [N, H], without the gate
            if wants_gates:
                torch.sum(da.to(wide) * a.detach(), 1, out=d_gates)
                if b_out is not None:
                    d_gates += dy_rows.to(wide) @ b_out[e].to(wide)
            if wants_w_out or wants_b_out:
                df = gate * dy_rows  # [N, O]
                if wants_w_out:
                    of_out.write_product(df.to(w.dtype).mT, a.detach(), dw_out[e])
                db_out[e] = df.sum(0)
            if wants_x or wants_w_in or wants_b_in:
                (dh,) = torch.autograd.grad(a, h, (gate * da).to(w.dtype))  # [N, F]
                db_in[e] = dh.sum(0, dtype=wide)
                if wants_x:
                    dx.index_add_(0, tokens, (dh @ of_in[e]).to(wide))
                if wants_w_in:
                    of_in.write_product(dh.mT, rows, dw_in[e])
        dgates = torch.empty_like(d_slot_gates).scatter_(0, order, d_slot_gates).view(-1, ctx.K)
        found = (dx.to(x.dtype), dgates.to(ctx.gates_dtype), dw_in, db_in, dw_out, db_out, *[None] * 4)
        return tuple(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=True))


@operator(SUPPORT)
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    check_supported("recompute", SUPPORT, experts, combine)
    weights = experts.w_in, experts.b_in, experts.w_out, experts.b_out
    keep = needs_gradients(x, routing.gates, *weights)
    options = experts.activation, experts.clamp, keep
    return _Sum.apply(x, routing.gates, *weights, routing.expert_ids, *options)
