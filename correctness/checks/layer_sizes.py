"""What a whole layer is held to for tokens of any number and size: one, very many, zeros, large logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.judging.budget import relative_errors
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import COPIES, B, Bench, S, T, call_of, judged, reached
from correctness.judging.layer_steps import gradients_of, require_gradients, step
from correctness.oracle import layer as oracle
from correctness.problems.layers import LayerProblem

MANY = 65_536  # tokens, up to which a count in 16 bits or a grid of blocks goes
FEW = range(2, 10)  # tokens, for which a decoding layer may have a path of its own
POWERS = [2**n for n in range(6, 13)]  # tokens, of which tiles and chunks leave no rest
LARGE = 64  # times a logit, of which the exponential then is infinite
CHOICES = 5000  # of experts, which are all tried
LIMIT = 2**30  # bytes of one tensor [T, E, F], which a plain layer may well make


def padding(bench: Bench) -> None:
    """Be finite for a token of zeros, as padding is, and for large logits, and leave other tokens right.

    A token of zeros is right, too, for one of the choices of experts that equal logits leave; where experts
    have no biases it is zeros whatever it visits.
    """
    weights, gradients = bench.expected.weights, bench.subject.support.gradients
    x, sound = bench.x, torch.arange(T) != 3
    x[3] = 0
    parts = [part for part in (weights.experts, weights.shared) if part is not None]
    if weights.router_norm is None or weights.router_norm_epsilon > 0:
        y = _finite(bench, x, " with a token of zeros", gradients)
        if bench.subject.routing is None:
            bench.require_y(y, context=" beside a token of zeros", only=sound)
        plain = all(
            part.b_in is None and part.b_out is None and part.output_activation == "none" for part in parts
        )
        if plain and weights.combine == "sum" and bool(y[3].any()):
            raise CheckFailed(f"y[3] of a token of zeros is {y[3].tolist()}, right is 0")
        if bench.subject.routing is None:
            _require_some_choice(bench, x[3:4].cpu(), y[3])
    if (
        weights.router.score == "softmax" and weights.combine == "sum"
    ):  # another may come to zero, and have no gradient there
        names = reached(bench.layer, bench.subject.read(bench.layer).router_weight)
        with torch.no_grad():
            for name in names:
                dict(bench.layer.named_parameters())[name].mul_(LARGE)
        _finite(bench, bench.x, f" with logits {LARGE} times as large", gradients)


def _require_some_choice(bench: Bench, x: Tensor, y: Tensor) -> None:
    """Raise CheckFailed unless y [O] is right for x [1, D] and some of its experts, where these are few."""
    weights, logits_dtype = bench.expected.weights, bench.subject.logits_dtype(bench.dtype)
    E, K = len(weights.router_weight), weights.router.top_k
    ids, is_clear = oracle.choose(x, weights, logits_dtype)
    if not bool(is_clear.all()):
        if math.comb(E, K) > CHOICES:
            return
        ids = torch.combinations(torch.arange(E), K)
    want, allowed = judged(x.expand(len(ids), -1), ids, weights, None, bench.dtype, logits_dtype)
    errors = relative_errors(y.detach().cpu().expand_as(want["y"]), want["y"], allowed["y"]).amax(dim=1)
    if float(errors.min()) > 1:
        near = ids[errors.argmin()].tolist()
        raise CheckFailed(
            f"y[3] of a token of zeros is {y.tolist()}, which is right for no choice of {K} of {E} experts; "
            f"nearest is {want['y'][errors.argmin()].tolist()} of experts {near}"
        )


def _finite(bench: Bench, x: Tensor, where: str, gradients: bool) -> Tensor:
    """Raise CheckFailed unless y [T, O], which is returned, and all gradients are finite."""
    if gradients:
        y, found = step(bench, x.unflatten(0, (B, S)), bench.expected.dy.to(bench.device))
    else:
        y, found = bench.call(x.unflatten(0, (B, S))), {}
    named = {"y": y, **{f"the gradient of {name}": grad for name, grad in found.items()}}
    for name, tensor in named.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise CheckFailed(f"{name} is not finite{where}")
    return y.flatten(0, 1)


def lengths(bench: Bench) -> None:
    """Be right without gradients for any few tokens, for powers of two, and for one token many times.

    Also for as many tokens as the layer has features, hidden units or experts, for which one may broadcast as
    the other. Of 2,560 tokens more than 2,048 visit one expert, which is as far as float16 counts.
    """
    order = torch.arange(T)
    skewed = torch.cat([order.repeat(8), torch.zeros(72 * T, dtype=torch.int64)])
    with torch.no_grad():
        few = [order[:n] for n in FEW]
        weights = bench.expected.weights
        parts = [part for part in (weights.experts, weights.shared) if part is not None]
        own = {size for part in parts for w in (part.w_in, part.w_out) for size in w.shape}
        whole = [torch.arange(n) % T for n in sorted({*POWERS, *own})]
        for rows in (*order.split(1), *few, order[:1].repeat(64), *whole, skewed):
            y = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
            some = torch.arange(0, len(rows), max(1, len(rows) // T))  # comparing a report takes long
            only = some if bench.subject.routing else slice(None)
            bench.require_y(y, rows, f" among {len(rows)} tokens, {rows[:3].tolist()}...", only=only)


def many_tokens(bench: Bench) -> None:
    """Be right for more than 65,536 tokens, gradients too, or as many as keep all hidden values in 1 GiB.

    Also where all of them are one token, which fills whatever holds a fixed number of an expert's tokens.
    """
    weights = bench.subject.read(bench.layer)
    E, F, _ = weights.experts.w_in.shape
    fitting = LIMIT // (E * F * weights.experts.w_in.element_size())
    tokens = max(COPIES * T, min(MANY + 3 * T, fitting)) | 1
    rows = torch.arange(tokens) % (T - 1)  # whose period divides no power of two
    with torch.no_grad():
        y = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
    # What a layer reports of its routing is compared token by token: of some of them, the last ones too.
    some = torch.cat([call_of(T, tokens)[1], torch.arange(tokens)[-T:]])
    only = some if bench.subject.routing else slice(None)
    bench.require_y(y, rows, f" with {tokens} tokens", only=only)
    same = torch.zeros_like(rows)
    with torch.no_grad():
        y = bench.call(bench.x[same].unsqueeze(0)).squeeze(0)
    bench.require_y(y, same, f" with {tokens} times the same token", only=only)
    if bench.subject.support.gradients:
        bench = bench.dropping(tokens)
        found = gradients_of(bench, tokens=tokens, flipped=False)
        require_gradients(bench, found, f" with {tokens} tokens")


_FLOAT32 = (LayerProblem(),)
_LOW = (LayerProblem(torch.bfloat16), LayerProblem(torch.float16))

SIZES = (
    Check(padding, _FLOAT32),
    Check(lengths, (*_LOW, *_FLOAT32), fits=False),
    Check(many_tokens, _FLOAT32),
)
