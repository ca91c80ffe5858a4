"""The likely cause of a whole layer's wrong output: tries `layer_causes`, one after another."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from correctness.judging.budget import entry_budgets, relative_errors
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import B, Bench, Expected, Layer, S, judged, reached, trained
from correctness.judging.layer_causes import Cause, causes
from correctness.judging.layer_weights import check_weights
from correctness.judging.router_hints import likely_epsilon
from correctness.oracle import layer as oracle
from moe_impls.layer_interface import LayerWeights

FEW = 6  # tokens on which a cause is tried first
A_LOT = 1e-2  # of y's scale: a cause that is so far off on these is none
MOST_NAMES = 12  # of parameters in a hint
MOST_SLOTS = 6  # of a token, of which each may be dropped or not
LEAST = 0.5  # of the tokens must have a clear choice of experts for the layer that a cause describes


@functools.lru_cache(maxsize=32)
def cause_of(subject: Layer) -> Cause | None:
    """Find why y of a layer, as `build` makes it in float32, is wrong; None if nothing explains it."""
    if torch.float32 not in subject.support.dtypes:
        return None
    bench = Bench.of(subject, torch.float32)
    try:
        y = bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1).detach().cpu()
        dropped = bench.dropped(bench.x, bench.expected.ids)
    except CheckFailed:
        return None  # which says more than y could
    with contextlib.suppress(CheckFailed):
        bench.require_y(y)
        return None
    right = bench.expected
    if found := _of_epsilon(right, y):
        return found
    if dropped is not None and (found := _of_drops(right, y, dropped)):
        return found
    for cause in causes(right.weights):
        weights = _changed(cause, right.weights, bench.layer)
        if weights and _explains(cause, weights, right, y, dropped):
            return cause
    if dropped is None:
        return _of_whole_rows(right, y) or _of_whole_experts(right, y)
    want, allowed = judged(right.x, right.ids, right.weights, None, torch.float32, dropped=dropped)
    return _of_whole_rows(replace(right, want=want, allowed=allowed), y)


def _changed(cause: Cause, weights: LayerWeights, layer: nn.Module) -> LayerWeights | None:
    """Return what a layer holds as a cause says; None where that does not fit together."""
    if cause.weights is None:
        return weights
    try:
        changed = cause.weights(weights)
        check_weights(changed, layer)
    except ValueError:  # as of a spec that leaves fewer experts than a token visits
        return None
    return changed


def _explains(
    cause: Cause, weights: LayerWeights, right: Expected, y: Tensor, dropped: Tensor | None
) -> bool:
    """Tell whether all tokens with a clear choice have the y [T, O] of a cause's layer, of such weights."""
    for rows in (slice(FEW), slice(None)):
        ids, clear = oracle.choose(right.x[rows], weights)
        if dropped is not None and not torch.equal(ids, right.ids[rows]):
            return False
        if int(clear.sum()) < LEAST * len(ids):
            return False
        arguments = (right.weights, right.x[rows], ids, weights, None if dropped is None else dropped[rows])
        exact = _evaluated(cause, *arguments, torch.float64)
        want, got = exact.values["y"][clear], y[rows][clear]
        if not bool(((got - want).abs() <= A_LOT * want.abs().max()).all()):
            return False
    plain = _evaluated(cause, *arguments, torch.float32)
    allowed = entry_budgets(exact, plain, torch.float32)["y"]
    return bool((relative_errors(got, want, allowed[clear]) <= 1).all())


def _evaluated(
    cause: Cause,
    read: LayerWeights,
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    dropped: Tensor | None,
    dtype: torch.dtype,
) -> oracle.Terms:
    """Evaluate the layer that a cause describes, where the file's own `read` returned ``read``."""
    wide = x.to(dtype)
    given = None if cause.gates is None else cause.gates(oracle.logits(wide, weights), ids, weights)
    options = {"dtype": dtype, "wide": dtype, "given": given, "dropped": dropped}
    terms = oracle.evaluate_layer(x, ids, weights, None, **options)
    if cause.y is not None:
        terms.values["y"] = cause.y(wide, ids, read, terms.values["y"])
    return terms


def _of_epsilon(right: Expected, y: Tensor) -> Cause | None:
    """Find that the gates are divided by their sum and another epsilon than the spec's."""
    weights, want = right.weights, right.want["y"]
    if weights.combine != "sum" or weights.gates_on != "output":
        return None
    x, spec = right.x.double(), weights.router
    logits = oracle.logits(x, weights)
    none = torch.zeros(right.ids.shape, dtype=x.dtype)
    rest = oracle.evaluate_layer(x, right.ids, weights, None, given=none).values["y"]  # of shared experts
    # A quarter of the budget, of which rounding takes less.
    precision = right.allowed["y"].amax(dim=1) / (want - rest).abs().amax(dim=1) / 4
    found = likely_epsilon(y - rest, want - rest, logits, right.ids, spec, precision)
    if found is None or not 0 <= found < 1:
        return None
    text = f"epsilon={found:g} in its router's spec, not {spec.epsilon:g}"
    return Cause(text, lambda w: replace(w, router=replace(w.router, epsilon=found)))


def _of_drops(right: Expected, y: Tensor, reported: Tensor) -> Cause | None:
    """Find that y is right where other slots are dropped than ``reported``, bool [T, K]."""
    if right.weights.router.top_k > MOST_SLOTS or not bool(y.any()):
        return None
    choices = torch.tensor(list(product((False, True), repeat=right.weights.router.top_k)))  # [2^K, K]
    agree = []
    for choice in choices:
        dropped = choice.expand(right.ids.shape)
        want, allowed = judged(right.x, right.ids, right.weights, None, torch.float32, dropped=dropped)
        agree.append((relative_errors(y, want["y"], allowed["y"]) <= 1).all(dim=1))
    found = torch.stack(agree)  # [2^K, T]
    if not bool(found.any(dim=0).all()):
        return None
    if bool(found[0].all()):
        return Cause("no slot dropped, where routing(layer, x) reports that some are")
    as_reported = (choices.unsqueeze(1) == reported).all(dim=2)  # [2^K, T]
    others = (~(found & as_reported).any(dim=0)).nonzero().flatten().tolist()
    if not others:
        return None
    t = others[0]
    told = [
        ", ".join(map(str, right.ids[t][slots].tolist())) or "none"
        for slots in (choices[int(found[:, t].nonzero()[0])], reported[t])
    ]
    return Cause(
        f"other slots dropped than routing(layer, x) reports, for {len(others)} of {len(y)} tokens: "
        f"token {t} visits experts {right.ids[t].tolist()}; y drops {told[0]}, routing {told[1]}"
    )


def _of_whole_rows(right: Expected, y: Tensor) -> Cause | None:
    """Find that rows of y are the right ones of other tokens, or that all are multiplied by one number."""
    want, allowed = right.want["y"], right.allowed["y"]
    agree = (relative_errors(y.unsqueeze(1), want, allowed) <= 1).all(dim=2)  # [T, T]
    if bool(agree.any(dim=1).all()) and not bool(agree.diagonal().all()):
        t = int((~agree.diagonal()).nonzero()[0])
        return Cause(f"tokens in another order: y of token {t} is that of token {int(agree[t].nonzero()[0])}")
    if not bool(y.any()):
        return Cause("zeros in place of all of it")
    factor = float((y.double() * want).sum() / want.square().sum())
    if bool((relative_errors(y, factor * want, allowed * max(1.0, abs(factor))) <= 1).all()):
        return Cause(f"all of it times {factor:.6g}")
    return None


def _of_whole_experts(right: Expected, y: Tensor) -> Cause | None:
    """Find which expert stands in for which: y is a sum of experts' outputs, whose shares follow from it."""
    weights = right.weights
    E, K = len(weights.experts.w_in), weights.router.top_k
    if weights.combine != "sum" or weights.gates_on != "output" or y.numel() < 2 * E * E:
        return None
    x = right.x.double()
    g = oracle.gates(oracle.logits(x, weights), right.ids, weights.router)
    g = g * oracle.slot_scale(right.ids, weights, x)

    def output(ids: Tensor, gates: Tensor) -> Tensor:
        return oracle.evaluate_layer(x, ids, weights, None, given=gates).values["y"]

    rest = output(right.ids, g * (right.ids >= E))  # shared and identity experts
    each = [
        output(torch.full((len(x), K), e), torch.eye(1, K, dtype=x.dtype).expand(len(x), K))
        - output(right.ids, 0 * g)
        for e in range(E)
    ]
    outputs = torch.stack(each, dim=1)  # [T, E, O]: of every expert for every token
    table = x.new_zeros(len(x), E).scatter_add(1, right.ids.clamp(max=E - 1), g * (right.ids < E))
    terms = torch.einsum("te,tfo->toef", table, outputs).reshape(-1, E * E)
    shares = torch.linalg.lstsq(terms, (y.double() - rest).reshape(-1, 1), driver="gelsd").solution.view(E, E)
    factor, alone = float(shares.diagonal().mean()), torch.eye(E, dtype=x.dtype)
    for whole in (shares.round(), factor * alone):
        found = rest + torch.einsum("te,ef,tfo->to", table, whole, outputs)
        size = max(1.0, abs(factor))  # the budget is that of y as it should be
        if bool((relative_errors(y, found, size * right.allowed["y"]) <= 1).all()):
            return _in_words(whole, factor)
    return None


def _in_words(shares: Tensor, factor: float) -> Cause | None:
    """Say how often which expert [E, E] counts in place of which."""
    E = len(shares)
    if torch.equal(shares, factor * torch.eye(E, dtype=shares.dtype)):
        return Cause(f"the routed experts times {factor:.6g}") if factor != 1 else None
    pairs = [(e, shares[e].nonzero().flatten().tolist()) for e in range(E)]
    told = [f"expert {', '.join(map(str, o)) or 'none'} in place of {e}" for e, o in pairs if o != [e]]
    return Cause(f"other experts: {'; '.join(told)}") if told else None


@functools.lru_cache(maxsize=32)
def is_unsteady(subject: Layer) -> bool:
    """Tell whether two calls in eval mode on equal tokens differ."""
    if torch.float32 not in subject.support.dtypes:
        return False
    bench = Bench.of(subject, torch.float32)
    x = bench.x.unflatten(0, (B, S))
    try:
        return not torch.equal(bench.call(x), bench.call(x))
    except CheckFailed:
        return False  # which says more than y could


def is_mixed(subject: Layer) -> bool:
    """Tell whether y of a token changes, beyond rounding, with the other tokens of its call."""
    if torch.float32 not in subject.support.dtypes:
        return False
    bench = Bench.of(subject, torch.float32)
    some = torch.arange(len(bench.x) // 2) * 2
    try:
        together, apart = (bench.call(x.unsqueeze(0)).squeeze(0) for x in (bench.x, bench.x[some]))
    except CheckFailed:
        return False
    moved = (apart - together[some]).abs().cpu()
    return bool((moved > bench.expected.allowed["y"][some]).any())


def misread(subject: Layer) -> list[str]:
    """Say which parameters y depends on and `read` does not return, and of which y is independent instead."""
    if torch.float32 not in subject.support.dtypes or not subject.support.gradients:
        return []
    bench = Bench.of(subject, torch.float32)
    parameters = trained(bench.layer)
    try:
        y = bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1)
        dy = bench.expected.dy.to(y)
        grads = torch.autograd.grad(y, list(parameters.values()), dy, allow_unused=True)
    except (CheckFailed, RuntimeError):
        return []
    depends = {n for n, g in zip(parameters, grads, strict=True) if g is not None and bool(g.any())}
    returned = {
        n for t in oracle.tensors(subject.read(bench.layer)).values() for n in reached(bench.layer, t)
    }
    want, told = bench.expected.want, []
    forgotten = [name for name in parameters if name in depends - returned]
    named = [name for name in forgotten if name in bench.expected.weights.training_only]
    if named:
        told.append(f"y in eval mode depends on {_listed(named)}, which training_only holds")
    if forgotten := [name for name in forgotten if name not in named]:
        told.append(f"read(layer) returns nothing made of {_listed(forgotten)}, on which y depends")
    wanted = (name for name in parameters if name in want and bool(want[name].any()))
    if unread := [name for name in wanted if name not in depends]:
        told.append(f"y does not depend on {_listed(unread)}")
    return told


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
