"""Right implementations that look different: none of them may be rejected, in any dtype, by any check.

They differ in what is theirs to choose: the order of sums, where and how often a value is rounded, the
formula of an activation, what is stored for the backward and what is computed again, the memory of the
result. They keep to the contract: sums accumulate in at least float32. A check that rejects one is wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evidence.mutants import dense, grouped
from moe_impls.functional import accumulation_dtype, activate, combine_slots, expert_mlp
from moe_impls.interface import GATED_ACTIVATIONS, Clamp, Experts, Implementation, Routing, Support

Expert = Callable[..., Tensor]  # with the signature of expert_mlp
# Of gated activations that multiply a function of the gate by the value: the function.
OF_GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "geglu_tanh": "gelu_tanh"}


def wide(t: Tensor) -> Tensor:
    return t.to(accumulation_dtype(t.dtype))


def add(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def activate_output(out: Tensor, output_activation: str) -> Tensor:
    return F.relu(out) if output_activation == "relu" else out


def sorted_slots(routing: Routing, experts: Experts) -> tuple[Tensor, list[int]]:
    """Sort the slots [T * K] in the order of their experts, and how many each expert has."""
    flat = routing.expert_ids.flatten()
    return flat.argsort(stable=True), flat.bincount(minlength=len(experts.w_in)).tolist()


def sorted_rows(x: Tensor, order: Tensor, K: int) -> Tensor:
    """Gather the rows of x of all slots, [T * K, D]; the gradients of a token add up in at least float32."""
    return wide(x).repeat_interleave(K, dim=0)[order].to(x.dtype)


def sorted_outputs(rows: Tensor, counts: list[int], experts: Experts, expert: Expert) -> Tensor:
    """Run ``expert`` on the rows of each expert that has some (of each if none has): [T * K, O]."""
    options = experts.activation, experts.output_activation, experts.clamp
    return torch.cat(
        [
            expert(part, *weights, *options)
            for part, weights in zip(rows.split(counts), experts.unbind(), strict=True)
            if len(part) or len(rows) == 0
        ]
    )


def slot_outputs(x: Tensor, routing: Routing, experts: Experts, expert: Expert = expert_mlp) -> Tensor:
    """Compute the output of each slot's expert, [T, K, O], in a loop over the experts."""
    T, K = routing.expert_ids.shape
    order, counts = sorted_slots(routing, experts)
    outputs = sorted_outputs(sorted_rows(x, order, K), counts, experts, expert)
    return outputs[order.argsort()].unflatten(0, (T, K))


def reversed_order(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Take tokens, features, experts and choices all from last to first."""
    last = len(experts.w_in) - 1
    turned = Routing((last - routing.expert_ids).flip(0, 1), routing.gates.flip(0, 1))
    mirrored = experts.map(lambda w: w.flip(0))
    mirrored = Experts(
        mirrored.w_in.flip(2),
        mirrored.b_in,
        mirrored.w_out,
        mirrored.b_out,
        experts.activation,
        experts.output_activation,
        experts.clamp,
    )
    outputs = slot_outputs(x.flip(0, 1), turned, mirrored)
    return combine_slots(outputs, turned.gates, combine).flip(0).to(x.dtype)


def last_choice_first(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Keep a running sum over the choices from the last, or a running logaddexp with a derivative by hand."""
    values, gates = wide(slot_outputs(x, routing, experts)), wide(routing.gates).unsqueeze(-1)
    choices = range(values.shape[1] - 1, -1, -1)
    if combine == "sum":
        y = torch.zeros_like(values[:, 0])
        for k in choices:
            y = torch.addcmul(y, gates[:, k].expand_as(y), values[:, k])
        return y.to(x.dtype)
    with torch.no_grad():
        y = torch.full_like(values[:, 0], -torch.inf)
        for k in choices:
            y = torch.logaddexp(y, values[:, k] + gates[:, k].log())
    shares = gates * (values - y.unsqueeze(1)).clamp(max=80.0).exp()
    return (y + (shares - shares.detach()).sum(dim=1)).to(x.dtype)  # adds nothing but its derivative


def smallest_gates_first(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Sum each token's choices one by one, in the order of the size of their gates."""
    ids, gates = routing
    order = gates.detach().abs().argsort(dim=1)
    ordered = Routing(ids.gather(1, order), gates.gather(1, order))
    values = slot_outputs(x, ordered, experts)
    if combine == "sum":
        return (wide(values) * wide(ordered.gates).unsqueeze(-1)).cumsum(dim=1)[:, -1].to(x.dtype)
    return combine_slots(values, ordered.gates, combine).to(x.dtype)


def split_products(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Split both products in two halves of what they sum over, added in float32: split-K."""

    def product(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        n = w.shape[1] // 2
        halves = wide(rows[:, :n]) @ wide(w[:, :n]).T, wide(rows[:, n:]) @ wide(w[:, n:]).T
        return add(halves[0] + halves[1], b).to(rows.dtype)

    def expert(rows, w_in, b_in, w_out, b_out, activation, output_activation, clamp):
        out = product(activate(product(rows, w_in, b_in), activation, clamp), w_out, b_out)
        return activate_output(out, output_activation)

    return combine_slots(slot_outputs(x, routing, experts, expert), routing.gates, combine).to(x.dtype)


def token_chunks(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Take three chunks of tokens in turn; the weights' gradients are summed over them in float32."""
    size = len(x) // 3 + 1
    weights = experts.map(wide)
    parts = zip(wide(x).split(size), *(t.split(size) for t in routing), strict=True)
    return torch.cat(
        [combine_slots(slot_outputs(rows, Routing(i, g), weights), g, combine) for rows, i, g in parts]
    ).to(x.dtype)


def unfused(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Round every operation to the dtype of x: products, then biases, gate and up apart, gated outputs."""

    def expert(rows, w_in, b_in, w_out, b_out, activation, output_activation, clamp):
        h = add(rows @ w_in.T, b_in)
        if activation in OF_GATES:
            gate, up = h.chunk(2, dim=1)
            a = activate(gate, OF_GATES[activation]) * up
        else:
            a = activate(h, activation, clamp)
        return activate_output(add(a @ w_out.T, b_out), output_activation)

    outputs = slot_outputs(x, routing, experts, expert)
    if combine == "sum":
        return wide((outputs * routing.gates.unsqueeze(-1)).to(x.dtype)).sum(dim=1).to(x.dtype)
    return combine_slots(outputs, routing.gates, combine).to(x.dtype)


def float32_inside(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute everything in float32 (float64 where x is), and one rounding at the end."""
    outputs = slot_outputs(wide(x), routing, experts.map(wide))
    return combine_slots(outputs, routing.gates, combine).to(x.dtype)


def float64_inside(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute everything in float64, and one rounding at the end."""
    outputs = slot_outputs(x.double(), routing, experts.map(Tensor.double))
    return combine_slots(outputs, routing.gates.double(), combine).to(x.dtype)


def other_formulas(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute gelu by erfc, silu by tanh, relu as a maximum, clamps as minimum and maximum."""

    def single(h: Tensor, name: str) -> Tensor:
        if name == "gelu":
            return h / 2 * torch.special.erfc(h * -math.sqrt(0.5))
        if name == "silu":
            return h / 2 + h / 2 * torch.tanh(h / 2)
        if name == "gelu_tanh":
            return h * torch.sigmoid(h * (1.5957691216057308 + 0.07135481627260025 * h * h))
        if name == "relu2":
            return h * torch.maximum(h, torch.zeros_like(h))
        return torch.maximum(h, torch.zeros_like(h))

    def expert(rows, w_in, b_in, w_out, b_out, activation, output_activation, clamp):
        h = wide(F.linear(rows, w_in, b_in))
        if activation in GATED_ACTIVATIONS:
            gate, up = h.tensor_split(2, dim=1)
            if activation == "swiglu_clamped":
                limit, alpha, offset = clamp
                gate, up = limit - F.relu(limit - gate), F.hardtanh(up, -limit, limit)
                a = single(alpha * gate, "silu") / alpha * (up + offset)
            else:
                a = single(gate, OF_GATES[activation]) * up
        else:
            a = single(h, activation)
        out = F.linear(a.to(rows.dtype), w_out, b_out)
        return single(out, "relu") if output_activation == "relu" else out

    return combine_slots(slot_outputs(x, routing, experts, expert), routing.gates, combine).to(x.dtype)


def gate_on_hidden(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Multiply the hidden units by the gate, before the second product, wherever that is linear in it."""
    if combine != "sum" or experts.output_activation != "none":
        return combine_slots(slot_outputs(x, routing, experts), routing.gates, combine).to(x.dtype)
    K = routing.gates.shape[1]
    order, counts = sorted_slots(routing, experts)
    rows, gates = sorted_rows(x, order, K), wide(routing.gates).flatten()[order].unsqueeze(1)
    dtype = torch.promote_types(x.dtype, gates.dtype)
    y = torch.zeros(len(x), experts.w_out.shape[1], dtype=dtype, device=x.device)
    parts = zip(
        rows.split(counts), gates.split(counts), (order // K).split(counts), experts.unbind(), strict=True
    )
    for part, gate, tokens, (w_in, b_in, w_out, b_out) in parts:
        if len(part) or len(x) == 0:
            a = wide(activate(F.linear(part, w_in, b_in), experts.activation, experts.clamp)) * gate
            y = y.index_add(0, tokens, wide(F.linear(a.to(x.dtype), w_out)))
            if b_out is not None:
                y = y.index_add(0, tokens, gate * b_out)
    return y.to(x.dtype)


def gathered_weights(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Gather the weights of each slot; multiply one matrix by one vector for each slot."""
    K = routing.expert_ids.shape[1]
    size = max(1, 2**22 // (K * experts.w_in[0].numel()))  # tokens at a time, to bound memory
    weights = experts.map(wide)
    parts = []
    for rows, ids in zip(wide(x).split(size), routing.expert_ids.split(size), strict=True):
        own = weights.map(functools.partial(torch.index_select, dim=0, index=ids.flatten()))
        h = torch.bmm(own.w_in, rows.repeat_interleave(K, dim=0).unsqueeze(2)).squeeze(2)
        a = activate(add(h, own.b_in), experts.activation, experts.clamp)
        out = add(torch.bmm(own.w_out, a.unsqueeze(2)).squeeze(2), own.b_out)
        parts.append(activate_output(out, experts.output_activation).unflatten(0, (len(rows), K)))
    return combine_slots(torch.cat(parts), routing.gates, combine).to(x.dtype)


def sparse_matrices(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Dispatch and combine by products with a sparse matrix of ones [T * K, T] and its transpose."""
    T, K = routing.expert_ids.shape
    order, counts = sorted_slots(routing, experts)
    tokens = order // K
    entries = torch.stack([torch.arange(T * K, device=x.device), tokens])
    ones = torch.ones(T * K, dtype=accumulation_dtype(x.dtype), device=x.device)
    visits = torch.sparse_coo_tensor(entries, ones, (T * K, T), check_invariants=True)
    rows = torch.sparse.mm(visits, wide(x)).to(x.dtype)
    outputs = wide(sorted_outputs(rows, counts, experts, expert_mlp))  # [T * K, O]
    gates = wide(routing.gates).flatten()[order].unsqueeze(1)
    if combine == "sum":
        return torch.sparse.mm(visits.t(), gates * outputs).to(x.dtype)
    counted = outputs.detach().masked_fill(gates == 0, -torch.inf)
    largest = counted[order.argsort()].unflatten(0, (T, K)).amax(dim=1)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    powers = (outputs - largest[tokens]).clamp(max=80.0).exp()
    return (torch.sparse.mm(visits.t(), gates * powers).log() + largest).to(x.dtype)


def padded_batch(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Pad every expert's rows with zeros to those of the busiest: two batched products."""
    T, K = routing.expert_ids.shape
    E, O, _ = experts.w_out.shape
    order, counts = sorted_slots(routing, experts)
    capacity = max(counts)
    begins = torch.tensor(counts, device=x.device).cumsum(0).roll(1).index_fill(0, order.new_zeros(1), 0)
    expert = routing.expert_ids.flatten()[order]
    cell = expert * capacity + torch.arange(T * K, device=x.device) - begins[expert]
    rows = x.new_zeros(E * capacity, x.shape[1]).index_copy(0, cell, sorted_rows(x, order, K))
    h = torch.bmm(rows.unflatten(0, (E, capacity)), experts.w_in.mT)
    h = h if experts.b_in is None else h + experts.b_in.unsqueeze(1)
    out = torch.bmm(activate(h, experts.activation, experts.clamp), experts.w_out.mT)
    out = out if experts.b_out is None else out + experts.b_out.unsqueeze(1)
    out = activate_output(out, experts.output_activation).flatten(0, 1)[cell]
    return combine_slots(out[order.argsort()].unflatten(0, (T, K)), routing.gates, combine).to(x.dtype)


def accumulated_slots(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Add gated rows to their tokens in the order of the experts, by an accumulating index_put."""
    K = routing.expert_ids.shape[1]
    order, counts = sorted_slots(routing, experts)
    tokens = order // K
    gates = wide(routing.gates).flatten()[order].unsqueeze(1)
    out = wide(sorted_outputs(sorted_rows(x, order, K), counts, experts, expert_mlp))
    zeros = torch.zeros(len(x), out.shape[1], dtype=out.dtype, device=x.device)
    if combine == "sum":
        return zeros.index_put((tokens,), gates * out, accumulate=True).to(x.dtype)
    counted = out.detach().masked_fill(gates == 0, -torch.inf)
    index = tokens.unsqueeze(1).expand_as(counted)
    largest = zeros.scatter_reduce(0, index, counted, "amax", include_self=False)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    powers = gates * (out - largest[tokens]).clamp(max=80.0).exp()
    return (zeros.index_put((tokens,), powers, accumulate=True).log() + largest).to(x.dtype)


def checkpointed(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Run the experts again in the backward, by torch.utils.checkpoint."""
    outputs = checkpoint(slot_outputs, x, routing, experts, use_reentrant=False, preserve_rng_state=False)
    return combine_slots(outputs, routing.gates, combine).to(x.dtype)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, x, gates, w_in, b_in, w_out, b_out, options, combine):
        ctx.save_for_backward(ids, x, gates, w_in, b_in, w_out, b_out)
        ctx.options = options, combine
        experts = Experts(w_in, b_in, w_out, b_out, *options)
        return float32_inside(x, Routing(ids, gates), experts, combine=combine)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        ids, *saved = ctx.saved_tensors
        options, combine = ctx.options
        leaves = [None if t is None else t.detach().requires_grad_() for t in saved]
        present = [t for t in leaves if t is not None]
        x, gates = present[:2]
        with torch.enable_grad():
            experts = Experts(*leaves[2:], *options)  # type: ignore[arg-type]
            y = float32_inside(x, Routing(ids, gates), experts, combine=combine)
        grads = iter(torch.autograd.grad(y, present, dy))
        return None, *(None if t is None else next(grads) for t in leaves), None, None


def recomputed(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Keep the inputs only; the backward runs the whole layer again."""
    e = experts
    return _Recomputed.apply(
        routing.expert_ids, x, routing.gates,
        e.w_in, e.b_in, e.w_out, e.b_out, (e.activation, e.output_activation, e.clamp), combine,
    )  # fmt: skip


def slope(h: Tensor, activation: str, clamp: Clamp) -> Tensor:
    """Differentiate the activation by hand: ∂a/∂h, [N, F] as h."""
    if activation == "relu2":
        return 2 * h.clamp(min=0)
    if activation == "gelu_tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3)))
        return (1 + t) / 2 + h / 2 * (1 - t) * (1 + t) * math.sqrt(2 / math.pi) * (1 + 0.134145 * h.square())
    if activation == "relu":
        return (h > 0).to(h.dtype)
    if activation == "gelu":
        density = torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(h) + h * density
    if activation == "silu":
        s = torch.sigmoid(h)
        return s * (1 + h * (1 - s))
    gate, up = h.chunk(2, dim=1)
    if activation == "swiglu_clamped":
        limit, alpha, offset = clamp
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
        s = torch.sigmoid(alpha * g)
        of_gate = s * (1 + alpha * g * (1 - s)) * (u + offset) * (gate <= limit)
        return torch.cat([of_gate, g * s * (u == up)], dim=1)
    name = OF_GATES[activation]
    return torch.cat([slope(gate, name, clamp) * up, activate(gate, name)], dim=1)


class _Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, x, gates, w_in, b_in, w_out, b_out, options, combine):
        experts = Experts(w_in, b_in, w_out, b_out, *options)
        f = slot_outputs(x, Routing(ids, gates), experts)
        y = wide(combine_slots(wide(f), gates, combine))
        ctx.save_for_backward(ids, x, gates, w_in, b_in, w_out, b_out, f, y)
        ctx.options = options, combine
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        ids, x, gates, w_in, b_in, w_out, b_out, f, y = ctx.saved_tensors
        options, combine = ctx.options
        activation, output_activation, clamp = options
        experts = Experts(w_in, b_in, w_out, b_out, *options)
        K = ids.shape[1]
        dy, g = wide(dy).unsqueeze(1), wide(gates).unsqueeze(2)
        if combine == "sum":
            dgates, df = (dy * f).sum(dim=2), g * dy
        else:
            share = (wide(f) - y.unsqueeze(1)).clamp(max=80.0).exp()
            dgates, df = (dy * share).sum(dim=2), g * share * dy
        if output_activation == "relu":
            df = df * (f > 0)
        order, counts = sorted_slots(Routing(ids, gates), experts)
        rows, df = x[order // K], df.flatten(0, 1)[order].to(x.dtype)
        slot_dx = wide(torch.empty_like(rows))
        grads = {name: torch.zeros_like(t) for name, t in experts.tensors.items()}
        begin = 0
        for e, n in enumerate(counts):
            part = slice(begin, begin := begin + n)
            if n == 0:
                continue
            h = F.linear(rows[part], w_in[e], None if b_in is None else b_in[e])
            a = activate(h, activation, clamp)
            da = df[part] @ w_out[e]
            per_unit = wide(da) if len(a.T) == len(h.T) else wide(da).repeat(1, 2)
            dh = (slope(wide(h), activation, clamp) * per_unit).to(x.dtype)
            slot_dx[part] = wide(dh @ w_in[e])
            grads["w_in"][e], grads["w_out"][e] = dh.T @ rows[part], df[part].T @ a
            if b_in is not None:
                grads["b_in"][e] = wide(dh).sum(dim=0)
            if b_out is not None:
                grads["b_out"][e] = wide(df[part]).sum(dim=0)
        dx = torch.zeros_like(x, dtype=slot_dx.dtype).index_add(0, order // K, slot_dx).to(x.dtype)
        weights = (grads.get(name) for name in ("w_in", "b_in", "w_out", "b_out"))
        return None, dx, dgates.to(gates.dtype), *weights, None, None


def handwritten_backward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Write the chain rule out, as the backward of an autograd.Function."""
    e = experts
    return _Handwritten.apply(
        routing.expert_ids, x, routing.gates,
        e.w_in, e.b_in, e.w_out, e.b_out, (e.activation, e.output_activation, e.clamp), combine,
    )  # fmt: skip


def tokens_as_columns(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Multiply weights by columns, w @ xᵀ, as column-major libraries do; the result is a transposed view."""

    def expert(rows, w_in, b_in, w_out, b_out, activation, output_activation, clamp):
        h = w_in @ rows.mT if b_in is None else torch.addmm(b_in.unsqueeze(1), w_in, rows.mT)  # [F, N]
        a = activate(h.mT, activation, clamp).mT.contiguous()
        out = w_out @ a if b_out is None else torch.addmm(b_out.unsqueeze(1), w_out, a)
        return activate_output(out, output_activation).mT

    y = combine_slots(slot_outputs(x, routing, experts, expert), routing.gates, combine).to(x.dtype)
    return y.mT.contiguous().mT


def larger_buffer(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Return a window of a larger buffer whose other cells hold NaN."""
    buffer = x.new_full((len(x) + 3, experts.w_out.shape[1] + 2), torch.nan)
    window = (slice(1, len(x) + 1), slice(2, None))
    buffer[window] = combine_slots(slot_outputs(x, routing, experts), routing.gates, combine)
    return buffer[window]


PLAIN = Support(autocast=True)
WRITTEN_OUT = replace(PLAIN, activations=grouped.ACTIVATIONS)  # activations one by one
# Declared where the graph of the backward is of its own kind: it is slow to check.
TWICE = replace(PLAIN, second_order=True)
# An accumulating index_put adds in the order in which threads arrive.
ANY_ORDER = replace(TWICE, deterministic=False)

LOOKALIKES = tuple(
    Implementation(forward.__name__, forward, support)
    for forward, support in (
        (reversed_order, PLAIN),
        (last_choice_first, PLAIN),
        (smallest_gates_first, PLAIN),
        (split_products, PLAIN),
        (token_chunks, Support()),  # autocast would sum weights' gradients over the chunks in bfloat16
        (unfused, WRITTEN_OUT),
        (float32_inside, PLAIN),
        (float64_inside, PLAIN),
        (other_formulas, WRITTEN_OUT),
        (gate_on_hidden, PLAIN),
        (gathered_weights, TWICE),
        (sparse_matrices, replace(TWICE, autocast=False)),  # or the combine, a product, sums in bfloat16
        (padded_batch, TWICE),
        (accumulated_slots, ANY_ORDER),
        (checkpointed, TWICE),
        (recomputed, PLAIN),
        (handwritten_backward, WRITTEN_OUT),
        (tokens_as_columns, TWICE),
        (larger_buffer, TWICE),
    )
) + (  # what mutants are edits of
    Implementation("one_hot_einsum", dense.forward, dense.SUPPORT),
    Implementation("grouped", grouped.forward, grouped.SUPPORT),
)
