"""Why a whole layer returns other numbers than the right ones: the layer that would make them right.

Each cause is another layer than the one that `read` describes: as other `LayerWeights`, or, where these
cannot say it, as what else becomes of the gates or of y. The first whose output explains y within its budget
is the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from correctness.oracle import layer as oracle
from correctness.oracle import router
from moe_impls.interface import ACTIVATIONS, CLAMPED, GATED_ACTIVATIONS, OUTPUT_ACTIVATIONS, Clamp, Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.router_interface import BIASED, GROUP_SCORES, SCORES

NO_LIMIT = 1e30
NUMBERS = ((7.0, 10.0, NO_LIMIT), (1.702, 1.0), (1.0, 0.0))  # limits, alphas and offsets of clamps
NORM_EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 0.0, torch.finfo(torch.float32).eps)


class Cause(NamedTuple):
    """A layer that would be right, in words that follow "y is right with", and as one of three changes.

    weights: of what `read` returns. gates: of logits [T, E + Z], ids [T, K] and weights, in place of its own.
    y: of tokens x [T, D], their ids [T, K], what the layer holds, and the right y [T, O].
    """

    text: str
    weights: Callable[[LayerWeights], LayerWeights] | None = None
    gates: Callable[[Tensor, Tensor, LayerWeights], Tensor] | None = None
    y: Callable[[Tensor, Tensor, LayerWeights, Tensor], Tensor] | None = None


def causes(weights: LayerWeights) -> Iterator[Cause]:
    """List what may be wrong with a layer of this form, the likeliest first."""
    other = "input" if weights.gates_on == "output" else "output"
    if weights.combine == "sum":
        text = f"the gates on the experts' {other}s: gates_on={other!r}"
        yield Cause(text, lambda w: replace(w, gates_on=other))
    yield from _of_shared(weights)
    yield from _of_router(weights)
    yield from _of_experts(weights, "experts")
    if weights.shared is not None:
        yield from _of_experts(weights, "shared")
        if weights.shared.activation == weights.experts.activation:  # where one function serves both
            yield from _of_experts(weights, "experts", "shared")
    if weights.experts.b_out is not None and weights.combine == "sum":
        yield Cause("experts.b_out not multiplied by the gates", _without_b_out, y=_add_b_out)
    yield from _of_gates(weights)
    if weights.experts.w_out.shape[1] == weights.experts.w_in.shape[2]:
        yield Cause("x added to it, as by a residual connection", y=lambda x, ids, w, y: y + x)


def _without_b_out(weights: LayerWeights) -> LayerWeights:
    return replace(weights, experts=replace(weights.experts, b_out=None))


def _add_b_out(x: Tensor, ids: Tensor, weights: LayerWeights, y: Tensor) -> Tensor:
    b_out = weights.experts.b_out
    assert b_out is not None
    return y + (b_out.to(y)[ids.clamp(max=len(b_out) - 1)] * (ids < len(b_out)).unsqueeze(2)).sum(dim=1)


def _of_shared(weights: LayerWeights) -> Iterator[Cause]:
    """Leave the shared experts out, count them twice, or forget their gate."""
    if weights.shared is None:
        return
    yield Cause("the shared experts left out", lambda w: replace(w, shared=None, shared_gate=None))
    yield Cause("the shared experts counted twice", lambda w: replace(w, shared=_times(w.shared, 2)))
    if weights.shared_gate is not None:
        yield Cause("the shared experts' gate ignored", lambda w: replace(w, shared_gate=None))
    if (scale := weights.router.scale) != 1:
        text = "the shared experts scaled like the routed ones"
        yield Cause(text, lambda w: replace(w, shared=_times(w.shared, scale)))
    if (S := len(weights.shared.w_in)) > 1:
        yield Cause("the shared experts averaged", lambda w: replace(w, shared=_times(w.shared, 1 / S)))
        for s in range(S):
            yield Cause(f"the shared expert {s} alone", lambda w, s=s: _one_shared(w, s))


def _times(experts: Any, factor: float) -> Experts:
    """Multiply what experts return, where no output activation stands between."""
    changed = {"w_out": experts.w_out * factor}
    if experts.b_out is not None:
        changed["b_out"] = experts.b_out * factor
    return replace(experts, **changed)


def _one_shared(weights: LayerWeights, s: int) -> LayerWeights:
    gate = None if weights.shared_gate is None else weights.shared_gate[s : s + 1]
    assert weights.shared is not None
    return replace(weights, shared=weights.shared.map(lambda t: t[s : s + 1]), shared_gate=gate)


def _of_router(weights: LayerWeights) -> Iterator[Cause]:
    """Change what becomes of the logits, or leave one of the router's tensors out."""
    spec = weights.router

    def routed(text: str, **changes: Any) -> Cause:
        return Cause(text, lambda w: replace(w, router=replace(w.router, **changes)))

    for name in ("expert_scale", "router_bias", "selection_bias", "router_norm"):
        if getattr(weights, name) is not None:
            none = {"selection_bias": None, "bias_rule": None} if name == "selection_bias" else {name: None}
            yield Cause(f"{name} left out", lambda w, none=none: replace(w, **none))
    if spec.scale != 1:
        yield routed("the router's scale left out: scale=1", scale=1.0)
        yield routed("the router's scale applied twice", scale=spec.scale**2)
    others = [(s, r) for s in (spec.score, *SCORES) for r in (not spec.renormalise, spec.renormalise)]
    for score, renormalise in dict.fromkeys(others):
        if (score, renormalise) != (spec.score, spec.renormalise):
            said = [f"score={score!r}"] * (score != spec.score)
            said += [f"renormalise={renormalise}"] * (renormalise != spec.renormalise)
            if score != "sparsemixer" or (spec.groups == 1 and weights.selection_bias is None):
                yield routed(f"a router of {', '.join(said)}", score=score, renormalise=renormalise)
    if weights.selection_bias is not None:
        for biased in BIASED:
            if biased != spec.biased:
                yield routed(f"the selection bias added to the {biased}s: biased={biased!r}", biased=biased)
    if spec.groups > 1:
        for group_score in GROUP_SCORES:
            if group_score != spec.group_score:
                yield routed(f"group_score={group_score!r}", group_score=group_score)
        yield routed("the groups of experts ignored", groups=1, keep_groups=1)
        for n in (spec.keep_groups - 1, spec.keep_groups + 1):
            if 1 <= n <= spec.groups:
                yield routed(f"keep_groups={n}", keep_groups=n)
    for n in (spec.top_k - 1, spec.top_k + 1):
        if 1 <= n <= len(weights.router_weight):
            yield routed(f"{n} experts for each token: top_k={n}", top_k=n)
    if weights.router_norm is not None:
        for epsilon in NORM_EPSILONS:
            text = f"router_norm_epsilon={epsilon:.3g}"
            yield Cause(text, lambda w, e=epsilon: replace(w, router_norm_epsilon=e))
    N, D = weights.router_weight.shape
    if N == D:
        yield Cause("router_weight transposed", lambda w: replace(w, router_weight=w.router_weight.mT))


def _of_experts(weights: LayerWeights, *fields: str) -> Iterator[Cause]:
    """Permute, transpose or leave out the weights of experts, or change their activation.

    What is transposed has the same shape as before, in each of the fields.
    """
    field, each = " and ".join(fields), [getattr(weights, name) for name in fields]
    experts: Experts = each[0]

    def made_of(text: str, change: Callable[[Experts], Experts]) -> Cause:
        return Cause(text, lambda w: replace(w, **{name: change(getattr(w, name)) for name in fields}))

    def rows(change: Callable[[Tensor], Tensor]) -> Callable[[Experts], Experts]:
        """Change the order of the rows of w_in and b_in, [..., F, D] and [..., F]."""

        def of(e: Experts) -> Experts:
            b_in = None if e.b_in is None else change(e.b_in)
            return replace(e, w_in=change(e.w_in.mT).mT, b_in=b_in)

        return of

    def halves(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Make rows [..., 2H] anew of the H of the gate and the H of up."""
        return lambda t: change(*t.tensor_split(2, dim=-1))

    D = experts.w_in.shape[2]
    if gated := experts.activation in GATED_ACTIVATIONS:
        swapped = rows(halves(lambda gate, up: torch.cat([up, gate], dim=-1)))
        yield made_of(f"gate and up swapped in {field}.w_in", swapped)
        alternate = rows(lambda t: torch.cat([t[..., 0::2], t[..., 1::2]], dim=-1))
        yield made_of(f"rows of gate and up that alternate in {field}.w_in, as read returns it", alternate)
        apart = rows(halves(lambda gate, up: torch.stack([gate, up], dim=-1).flatten(-2)))
        yield made_of(f"rows of gate and up that do not alternate in {field}.w_in", apart)
    if all(e.w_in.shape[1] == D for e in each):
        yield made_of(f"{field}.w_in transposed", lambda e: replace(e, w_in=e.w_in.mT))
    if gated and all(e.w_out.shape[2] == D for e in each):
        square = lambda t: t.unflatten(1, (2, D)).mT.flatten(1, 2)  # noqa: E731
        yield made_of(f"gate and up of {field}.w_in transposed", lambda e: replace(e, w_in=square(e.w_in)))
    if all(e.w_out.shape[1] == e.w_out.shape[2] for e in each):
        yield made_of(f"{field}.w_out transposed", lambda e: replace(e, w_out=e.w_out.mT))
    for name in ("b_in", "b_out"):
        if any(getattr(e, name) is not None for e in each):
            yield made_of(f"{field}.{name} left out", lambda e, name=name: replace(e, **{name: None}))
    if experts.activation == CLAMPED:
        for limit, alpha, offset in dict.fromkeys(product(*NUMBERS)):
            if (clamp := Clamp(limit, alpha, offset)) != experts.clamp:
                text = f"{clamp} in {field}" if limit < NO_LIMIT else f"{clamp} in {field}, which is no limit"
                yield made_of(text, lambda e, c=clamp: replace(e, clamp=c))
    for activation in ACTIVATIONS:
        if activation != experts.activation and (activation in GATED_ACTIVATIONS) == gated:
            text = f"the activation {activation!r} in {field}, not {experts.activation!r}"
            yield made_of(text, lambda e, a=activation: replace(e, activation=a, clamp=Clamp()))
    for activation in OUTPUT_ACTIVATIONS:
        if activation != experts.output_activation:
            text = f"the output activation {activation!r} in {field}"
            yield made_of(text, lambda e, a=activation: replace(e, output_activation=a))


def _of_gates(weights: LayerWeights) -> Iterator[Cause]:
    """Change the gates in a way that no router's spec has."""

    def plain(z: Tensor, ids: Tensor, w: LayerWeights) -> Tensor:
        return oracle.gates(z, ids, w.router) * oracle.slot_scale(ids, w, z)

    def with_bias(z: Tensor, ids: Tensor, w: LayerWeights) -> Tensor:
        assert w.selection_bias is not None
        scores = torch.stack([router.scores(row, w.router) for row in z]) + w.selection_bias.to(z)
        chosen = scores.gather(1, ids)
        if w.router.renormalise:
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        return w.router.scale * chosen * oracle.slot_scale(ids, w, z)

    if weights.selection_bias is not None:
        yield Cause("the selection bias in the gates", gates=with_bias)
    probabilities = replace(weights.router, score="softmax", renormalise=False, scale=1.0)

    def twice(z: Tensor, ids: Tensor, w: LayerWeights) -> Tensor:
        again = oracle.gates(z, ids, probabilities).softmax(dim=1)
        return w.router.scale * again * oracle.slot_scale(ids, w, z)

    def ranked(z: Tensor, ids: Tensor, w: LayerWeights) -> Tensor:
        return plain(z, ids, w).sort(dim=1, descending=True).values

    def last(z: Tensor, ids: Tensor, w: LayerWeights) -> Tensor:
        return plain(z, ids, w) * (ids == ids.amax(dim=1, keepdim=True))

    if weights.router.top_k > 1:
        yield Cause("a second softmax, over the probabilities of the chosen experts", gates=twice)
        yield Cause("the gates of each token in reverse", gates=lambda z, ids, w: plain(z, ids, w).flip(1))
        yield Cause("the gates of each token sorted apart from its experts", gates=ranked)
        yield Cause("the last expert of each token alone, as where it is written and not added", gates=last)
    yield Cause("every gate 1", gates=lambda z, ids, w: torch.ones_like(plain(z, ids, w)))
    yield Cause("each gate applied twice", gates=lambda z, ids, w: plain(z, ids, w).square())
    if weights.identity_experts:
        E = len(weights.experts.w_in)
        yield Cause("the identity experts left out", gates=lambda z, ids, w: plain(z, ids, w) * (ids < E))
    if weights.router.top_k > 1:
        first = lambda z, ids, w: plain(z, ids, w)[:, :1].expand(ids.shape)  # noqa: E731
        yield Cause("the first choice's gate for all choices", gates=first)
