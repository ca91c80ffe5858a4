"""Checks of the gradients of a whole layer: of x, of every parameter, and of the router."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor

from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import Bench, T, reached, trained
from correctness.judging.layer_steps import (
    gradients_of,
    held,
    in_sequences,
    is_noisy,
    put_back,
    require_gradient,
    require_gradients,
)
from correctness.oracle import layer as oracle

MORE = (T + 5, 32 * T)  # tokens: of which a tile leaves a rest, and a power of two
EXACT = 64  # visits of an expert, a tile of usual size


def gradients(bench: Bench) -> None:
    """Give x and every parameter the oracle's gradients, followed through `read`."""
    bench = bench.dropping()
    right, read = bench.expected, oracle.tensors(bench.subject.read(bench.layer))
    for name, tensor in read.items():
        if name != "selection_bias" and not reached(bench.layer, tensor) and not _is_buffer(bench, name):
            raise CheckFailed(
                f"{name}, as read(layer) returns it, is made of no parameter that is trained and of no buffer"
            )
    for asked, context in (
        ({}, ""),
        ({"x_wanted": False}, " where x needs none"),
        ({"strided": True}, " by a gradient of y that is not contiguous"),
    ):
        for name, got in gradients_of(bench, **asked).items():
            if name in right.want:
                require_gradient(bench, name, got, context)
            elif got is not None and bool(got.any()):
                raise CheckFailed(f"y depends on {name}, which read(layer) does not return")


def sizes(bench: Bench) -> None:
    """Give the oracle's gradients for any number of tokens, and none to experts that no token visits."""
    for tokens in MORE:
        among = bench.dropping(tokens)
        require_gradients(among, gradients_of(among, tokens=tokens), f" with {tokens} tokens")
    for rows in few(bench):
        alone = bench.alone(rows).dropping()
        where = f" with {len(rows)} tokens that visit experts {alone.expected.ids.unique().tolist()}"
        alone.require_y(alone.call(in_sequences(alone.x)).flatten(0, 1), context=where)
        require_gradients(alone, gradients_of(alone), where)


def few(bench: Bench) -> list[Tensor]:
    """Pick tokens that leave the last experts empty, one of them; then the first; and 64 times one token."""
    ids = bench.expected.ids
    low, high = ids.amax(dim=1).argmin(), ids.amin(dim=1).argmax()
    return [low.reshape(1), torch.stack([high, high]), low.repeat(EXACT)]


def _is_buffer(bench: Bench, name: str) -> bool:
    """Tell whether a tensor of `read` changes with the layer's buffers."""
    twin = copy.deepcopy(bench.layer)
    with torch.no_grad():
        before = oracle.tensors(bench.subject.read(twin))[name].clone()
        for buffer in twin.buffers():
            buffer.copy_(buffer == 0)  # of any dtype
        return not torch.equal(oracle.tensors(bench.subject.read(twin))[name], before)


def low_precision_gradients(bench: Bench) -> None:
    """Keep the gradients of x and of every parameter within their budget in 16 bits, in training mode too."""
    for training in (False, True)[: 1 + bench.subject.support.training]:
        start = held(bench.layer.train(training))
        if training and is_noisy(bench):
            return
        where = " in training mode" if training else ""
        with during("in training mode") if training else contextlib.nullcontext():
            y = bench.call(in_sequences(bench.x)).flatten(0, 1)
            bench.require_y(y, context=where)
            put_back(bench.layer, start)
            dropping = bench.dropping()
            put_back(bench.layer, start)
            require_gradients(dropping, gradients_of(dropping), where)
        put_back(bench.layer, start)


def frozen(bench: Bench) -> None:
    """Keep the gradients of x and of the other parameters what they are when any one parameter is frozen.

    In training mode, too, unless there is noise in it.
    """
    parameters, weights = trained(bench.layer), bench.subject.read(bench.layer)
    of_experts = {n for tensor in weights.experts.tensors.values() for n in reached(bench.layer, tensor)}
    together = {"all experts": sorted(of_experts), "all parameters": [*parameters]}
    for training in (False, True)[: 1 + bench.subject.support.training]:
        start = held(bench.layer.train(training))
        if training and is_noisy(bench):
            return
        where = " in training mode" * training
        dropping = bench.dropping()
        for what, names in {**{name: [name] for name in parameters}, **together}.items():
            put_back(bench.layer, start)
            for name in names:
                parameters[name].requires_grad_(False)
            with during(f"with {what} frozen{where}"):
                found = gradients_of(dropping)
            require_gradients(dropping, found, f" with {what} frozen{where}")
            for name in names:
                parameters[name].requires_grad_()


def router_gradient(bench: Bench) -> None:
    """Train the router by the output, also with K = 1, unless the gate of K = 1 is 1 by definition."""
    bench = bench.dropping()
    places = reached(bench.layer, bench.subject.read(bench.layer).router_weight)
    grads, right = gradients_of(bench), bench.expected
    for name, place in places.items():
        here, got = (place != 0).cpu(), grads[name]
        want, allowed = right.want[name][here], right.allowed[name][here]
        if bool(want.any()) and (got is None or not bool(got.cpu()[here].any())):
            raise CheckFailed(
                f"the output gives the router, {name}, no gradient though its gates depend on it"
            )
        if not want.any() and got is not None:
            context = ", as the gates are constant"
            bench.require(f"the gradient of {name}", got.cpu()[here], want, allowed, context)
