"""The oracle: the layer's equations and their derivatives, one expert at a time, written out by hand.

It shares no code with any implementation, and takes no gradient from autograd but the elementwise derivative
of the activation. Run in float64 it is what "right" means; run in a lower dtype, rounding where any plain
computation must, it shows how much of the result that dtype cannot keep (see ``judging.compare``).

    h = x w_inᵀ + b_in        a = act(h)        f = out_act(a w_outᵀ + b_out)
    sum:        y = Σ_k g f                 df = g dy             dg = Σ_o dy f
    logsumexp:  y = log Σ_k g exp(f)        df = g exp(f-y) dy    dg = Σ_o dy exp(f-y)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_impls.interface import Clamp, Experts, check_choice


class Form(NamedTuple):
    """What is known of an activation.

    function: of its gate. gated: whether that is multiplied by a value.
    kinked: whether its derivative jumps where the gate is 0.
    clamped: whether gate and value have a limit, at which the derivatives jump.
    smooth: whether it is relu (or reglu) to the last bit for large gates alone.
    """

    function: str
    gated: bool = False
    kinked: bool = False
    clamped: bool = False
    smooth: bool = True

    def kinks(self, clamp: Clamp) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return where the derivative by the gate jumps, and where that by the value."""
        if self.clamped:
            return (clamp.limit,), (-clamp.limit, clamp.limit)
        return (0.0,) * self.kinked, ()


# What is not here has no equation.
FORMS = {
    "relu": Form("relu", kinked=True, smooth=False),
    "relu2": Form("relu2", smooth=False),
    "gelu": Form("gelu"),
    "gelu_tanh": Form("gelu_tanh"),
    "silu": Form("silu"),
    "swiglu": Form("silu", gated=True),
    "geglu": Form("gelu", gated=True),
    "geglu_tanh": Form("gelu_tanh", gated=True),
    "reglu": Form("relu", gated=True, kinked=True, smooth=False),
    "swiglu_clamped": Form("silu", gated=True, clamped=True),
}


def act(h: Tensor, name: str, clamp: Clamp = Clamp()) -> Tensor:
    """Compute the activation from its definition: [N, F] -> [N, H].

    Raises:
        ValueError: it has no equation here.
    """
    check_choice("activation", name, tuple(FORMS))
    function, gated, _, clamped, _ = FORMS[name]
    if clamped:
        limit, alpha, offset = clamp
        gate, value = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
        gate = torch.minimum(gate, torch.full_like(gate, limit))
        value = torch.maximum(
            torch.minimum(value, torch.full_like(value, limit)), torch.full_like(value, -limit)
        )
        return gate * torch.sigmoid(alpha * gate) * (value + offset)
    gate = h[:, : h.shape[1] // 2] if gated else h
    if function == "relu":
        result = gate * (gate > 0)
    elif function == "relu2":
        result = gate * gate * (gate > 0)
    elif function == "gelu_tanh":
        result = gate * (1 + torch.tanh(_tanh_argument(gate))) / 2
    elif function == "gelu":
        result = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    else:
        result = gate * torch.sigmoid(gate)
    return result * h[:, h.shape[1] // 2 :] if gated else result


def _tanh_argument(gate: Tensor) -> Tensor:
    """Compute √(2/π) (g + 0.044715 g³): Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)


def act_derivative(h: Tensor, name: str, clamp: Clamp = Clamp()) -> Tensor:
    """Take ∂a/∂h for each entry of h, [N, F]; a gated activation has two entries for each unit of a."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        return torch.autograd.grad(act(h, name, clamp).sum(), h)[0]


def act_squares(h: Tensor, h_squares: Tensor, name: str, clamp: Clamp = Clamp()) -> Tensor:
    """Compute the squared scale of a (see ``Evaluation``), [N, H], from that of h, [N, F].

    An error of h reaches a by the slope.
    """
    a = act(h, name, clamp)
    squares = a.square() + _reached(act_derivative(h, name, clamp), h_squares, a.shape[1])
    gate, factor = _gate_and_factor(h, name, clamp)
    return squares + _step_squares(gate, name, clamp) * (gate * factor).square()


def slope_squares(h: Tensor, h_squares: Tensor, name: str, clamp: Clamp = Clamp()) -> Tensor:
    """Compute the squared scale of ∂a/∂h, [N, F], from that of h.

    An error of h reaches the slope by the curvature.
    """
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        a = act(h, name, clamp)
        slope = torch.autograd.grad(a.sum(), h, create_graph=True)[0]
        H = a.shape[1]
        curvatures = [
            torch.autograd.grad(part.sum(), h, retain_graph=True)[0] if part.requires_grad else 0 * slope
            for part in slope.split(H, dim=1)  # of the gate, and of the value that it multiplies
        ]
    gate, factor = _gate_and_factor(h.detach(), name, clamp)
    step = _step_squares(gate, name, clamp)
    own = torch.cat([step * factor.square(), step * gate.square()], dim=1)[:, : h.shape[1]]
    reached = torch.cat([_reached(curvature.detach(), h_squares, H) for curvature in curvatures], dim=1)
    return slope.detach().square() + reached + own


def _reached(derivative: Tensor, h_squares: Tensor, H: int) -> Tensor:
    """Carry squared errors of h, [N, F], into the unit that they reach, [N, H]."""
    return (derivative.square() * h_squares).unflatten(1, (-1, H)).sum(dim=1)


def _step_squares(gate: Tensor, name: str, clamp: Clamp) -> Tensor:
    """Square the terms of (1 + t) / 2, which smooth activations multiply the gate by.

    t is erf(gate / √2) for gelu, tanh(gate / 2) for silu and another tanh for gelu_tanh. Where the gate is
    negative the terms cancel.
    """
    function, _, _, clamped, smooth = FORMS[name]
    if not smooth:
        return torch.zeros_like(gate)
    if function == "gelu":
        t = torch.erf(gate / math.sqrt(2))
    elif function == "gelu_tanh":
        t = torch.tanh(_tanh_argument(gate))
    else:
        t = torch.tanh(gate * (clamp.alpha if clamped else 1) / 2)
    return (1 + t.square()) / 4


def _gate_and_factor(h: Tensor, name: str, clamp: Clamp) -> tuple[Tensor, Tensor]:
    """Return the gate, [N, H], and what multiplies its function: 1 if the activation is not gated."""
    if FORMS[name].clamped:
        gate, value = h.chunk(2, dim=1)
        return gate.clamp(max=clamp.limit), value.clamp(-clamp.limit, clamp.limit) + clamp.offset
    if FORMS[name].gated:
        gate, value = h.chunk(2, dim=1)
        return gate, value
    return h, torch.ones_like(h)


def hidden_and_output(x: Tensor, experts: Experts, expert: int) -> tuple[Tensor, Tensor]:
    """Return one expert's h [N, F] and outputs before the output activation [N, O], for x [N, D]."""
    h = x @ experts.w_in[expert].to(x.dtype).T
    if experts.b_in is not None:
        h = h + experts.b_in[expert].to(x.dtype)
    out = act(h, experts.activation, experts.clamp) @ experts.w_out[expert].to(x.dtype).T
    if experts.b_out is not None:
        out = out + experts.b_out[expert].to(x.dtype)
    return h, out


# Below float32's smallest normal number a share exp(f - y) has no relative precision: its error may be as
# large as that number, which is eps times this.
UNDERFLOW = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Evaluation:
    """Results by name (y, and with gradients x, gates, w_in, b_in, w_out, b_out), and for each its scale.

    scale: what an entry would measure if the terms that are summed into it did not cancel: the root of the
    sum of their squares, where each term counts with the scale of what it was computed from. Rounding errors
    are relative to this and not to the entry, which may be small by cancellation. y, x: the average over a
    token's row, [T]; gates: [T, K]; weights: as the gradient. Empty if scales were not asked for.
    kept: the experts whose weight gradients are held, in order.
    """

    values: dict[str, Tensor]
    scale: dict[str, Tensor]
    kept: list[int]


@torch.no_grad()
def evaluate(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    experts: Experts,
    dy: Tensor | None,
    combine: str,
    *,
    dtype: torch.dtype = torch.float64,
    wide: torch.dtype = torch.float64,
    keep: list[int] | None = None,
    scales: bool = True,
) -> Evaluation:
    """Compute the layer's output and, if ``dy`` [T, O] is given, all gradients.

    ``dtype`` is the dtype in which every intermediate is kept, ``wide`` the one in which sums accumulate.
    ``keep`` limits the experts whose weight gradients are returned (all by default).

    Raises:
        ValueError: an activation, output activation or combine has no equation here.
    """
    check_choice("activation", experts.activation, tuple(FORMS))
    check_choice("output_activation", experts.output_activation, ("none", "relu"))
    check_choice("combine", combine, ("sum", "logsumexp"))

    def kept(t: Tensor) -> Tensor:
        return t.to(dtype).to(wide)

    form = experts.activation, experts.clamp
    (T, K), N = expert_ids.shape, expert_ids.numel()
    E, O, _ = experts.w_out.shape
    keep = list(range(E)) if keep is None else keep
    x, g = x.to(wide), gates.to(wide)  # g [T, K]
    # The slots of one expert after those of another, each expert's in the order of tokens.
    slots = expert_ids.flatten().argsort(stable=True)  # [N]
    t, k = slots // K, slots % K
    part = _part_of_expert(expert_ids)

    def widened(name: str, expert: int) -> Tensor:
        return experts.tensors[name][expert].to(wide)

    def squared(name: str, expert: int) -> Tensor:
        return widened(name, expert).square()

    def products(rows: Tensor, w: str, transpose: bool = True, of: Callable = widened) -> Tensor:
        """Multiply the rows of each expert by its weight."""
        out = rows.new_empty(N, experts.tensors[w].shape[1 if transpose else 2])
        for e, its in part.items():
            out[its] = rows[its] @ (of(w, e).T if transpose else of(w, e))
        return out

    def plus_bias(rows: Tensor, b: str, of: Callable = widened) -> Tensor:
        if b in experts.tensors:
            for e, its in part.items():
                rows[its] += of(b, e)
        return rows

    rows = x[t]  # [N, D]
    h = kept(plus_bias(products(rows, "w_in"), "b_in"))  # [N, F]
    a = kept(act(h, *form))  # [N, H]
    out = kept(plus_bias(products(a, "w_out"), "b_out"))
    f = x.new_zeros(T, K, O)
    f[t, k] = out * (out > 0) if experts.output_activation == "relu" else out
    f_squares = x.new_zeros(T, K)  # squared scale of f, averaged over O
    h2 = a2 = x.new_zeros(0, 0)
    if scales:
        h2 = plus_bias(products(rows.square(), "w_in", of=squared), "b_in", squared)
        a2 = act_squares(h, h2, *form)
        f_squares[t, k] = plus_bias(products(a2, "w_out", of=squared), "b_out", squared).mean(dim=1)

    if combine == "sum":
        share = torch.ones_like(f)  # df/dy without the gate
        y = (g.unsqueeze(-1) * f).sum(dim=1)
        y_squares = (g.square() * f_squares).sum(dim=1)
        dg_terms, sensitivity = f_squares.unsqueeze(-1), torch.ones_like(f_squares)
    else:
        y = _log_sum(g, f)
        share = torch.exp(f - y.unsqueeze(1))
        weight = g.unsqueeze(-1) * share
        y_squares = (weight.square() * f_squares.unsqueeze(-1)).sum(dim=1).mean(dim=1)
        y_squares = y_squares + y.square().mean(dim=1)
        # An error of size s in f or y changes the share by the factor 1 + s.
        sensitivity = 1 + f_squares + y_squares.unsqueeze(1)
        dg_terms = share.square() * sensitivity.unsqueeze(-1) + UNDERFLOW**2
    values, scale = {"y": kept(y)}, {"y": y_squares}
    if dy is None:
        return Evaluation(values, _roots(scale) if scales else {}, keep)

    dy = dy.to(wide)
    values["gates"] = (dy.unsqueeze(1) * (f if combine == "sum" else share)).sum(dim=-1)
    scale["gates"] = (dy.square().unsqueeze(1) * dg_terms).sum(dim=-1)
    df = kept(g.unsqueeze(-1) * share * dy.unsqueeze(1))  # [T, K, O]
    d_out = df[t, k] * (f[t, k] > 0) if experts.output_activation == "relu" else df[t, k]  # [N, O]
    da = kept(products(d_out, "w_out", transpose=False))  # [N, H]
    slope = act_derivative(h, *form)  # [N, F]
    repeats = slope.shape[1] // da.shape[1]
    dh = kept(slope * da.repeat(1, repeats))
    values["x"] = torch.zeros_like(x).index_add_(0, t, kept(products(dh, "w_in", transpose=False)))
    d_out2 = dh2 = x.new_zeros(0, 0)
    if scales:
        d_out2 = d_out.square() * sensitivity[t, k].unsqueeze(-1)
        if combine == "logsumexp":
            d_out2 = d_out2 + (UNDERFLOW * g[t, k].unsqueeze(-1) * dy[t]).square()
        da2 = products(d_out2, "w_out", transpose=False, of=squared).repeat(1, repeats)
        dh2 = slope_squares(h, h2, *form) * da2
        dx2 = products(dh2, "w_in", transpose=False, of=squared).mean(dim=1)
        scale["x"] = x.new_zeros(T).index_add_(0, t, dx2)

    for name, w in experts.tensors.items():
        values[name] = w.new_zeros(len(keep), *w.shape[1:], dtype=wide)
        if scales:
            scale[name] = torch.zeros_like(values[name])
    for row, its in enumerate(part.get(expert, slice(0)) for expert in keep):
        values["w_in"][row] = running_product(dh[its], rows[its])
        values["w_out"][row] = running_product(d_out[its], a[its])
        for bias, sums in (("b_in", dh), ("b_out", d_out)):
            if bias in values:
                values[bias][row] = _running_sum(sums[its])
        if scales:
            scale["w_in"][row] = _with_mean(dh2[its].T @ rows[its].square())
            scale["w_out"][row] = _with_mean(d_out2[its].T @ a2[its])
            for bias, sums in (("b_in", dh2), ("b_out", d_out2)):
                if bias in values:
                    scale[bias][row] = _with_mean(sums[its].sum(dim=0))
    for name in ("x", *experts.tensors):
        values[name] = kept(values[name])
    return Evaluation(values, _roots(scale) if scales else {}, keep)


def _running_sum(rows: Tensor) -> Tensor:
    """Add row by row into one accumulator, which of all orders loses most: [N, n] -> [n]."""
    total = rows.new_zeros(1, rows.shape[1])
    return total.index_add_(0, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), rows)[0]


# Multiply-adds of one product in the order of its rows; of a larger one some rows of the result are such.
MOST_IN_ORDER = 2**27
BLOCK = 2**20  # numbers at a time


def running_product(left: Tensor, right: Tensor) -> Tensor:
    """Sum left[n] rightᵀ[n] over n, [P, Q], of rows [N, P] and [N, Q], one after the other where it rounds.

    A matrix library adds in an order of its own on each processor, and a plain loop, which is as right, loses
    several times as much. In float64, which is what right means, the order does not matter.
    """
    product = left.T @ right
    (N, P), Q = left.shape, right.shape[1]
    if left.dtype == torch.float64 or N * P * Q == 0:
        return product
    rows = torch.arange(0, P, -(-N * P * Q // MOST_IN_ORDER), device=left.device)
    total = product.new_zeros(1, len(rows) * Q)
    step = max(1, BLOCK // total.shape[1])
    for some_left, some_right in zip(left[:, rows].split(step), right.split(step), strict=True):
        terms = some_left.unsqueeze(2) * some_right.unsqueeze(1)  # [step, rows, Q]
        total.index_add_(0, torch.zeros_like(terms[:, 0, 0], dtype=torch.int64), terms.flatten(1))
    product[rows] = total.view(len(rows), Q)
    return product


def _with_mean(squares: Tensor) -> Tensor:
    """Add its row's average to each entry, so that none is held to a scale of nearly zero."""
    return squares + squares.mean(dim=-1, keepdim=True)


def _part_of_expert(expert_ids: Tensor) -> dict[int, slice]:
    """Return for each expert that is visited its part of the slots, where they are sorted by expert."""
    visited, loads = expert_ids.unique(return_counts=True)
    ends = loads.cumsum(0).tolist()
    return {e: slice(*its) for e, its in zip(visited.tolist(), itertools.pairwise([0, *ends]), strict=True)}


def _log_sum(g: Tensor, f: Tensor) -> Tensor:
    """Compute log Σ_k g exp(f), [T, O]; slots with gate zero are no part of the sum."""
    exponents = f + torch.log(g).unsqueeze(-1)
    return torch.logsumexp(exponents, dim=1)


def _roots(scale: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.sqrt() for name, value in scale.items()}
