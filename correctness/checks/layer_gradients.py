"""Checks of the gradients of a whole layer: of x, of every parameter, and of the router."""

from __future__ import annotations

import copy

import torch

from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import Bench, reached, trained
from correctness.judging.layer_steps import gradients_of, require_gradient
from correctness.oracle import layer as oracle


def gradients(bench: Bench) -> None:
    """Give x and every parameter the oracle's gradients, followed through `read`."""
    bench = bench.dropping()
    right, read = bench.expected, oracle.tensors(bench.subject.read(bench.layer))
    for name, tensor in read.items():
        if name != "selection_bias" and not reached(bench.layer, tensor) and not _is_buffer(bench, name):
            raise CheckFailed(
                f"{name}, as read(layer) returns it, is made of no parameter that is trained and of no buffer"
            )
    for x_wanted, context in ((True, ""), (False, " where x needs none")):
        for name, got in gradients_of(bench, x_wanted=x_wanted).items():
            if name in right.want:
                require_gradient(bench, name, got, context)
            elif got is not None and bool(got.any()):
                raise CheckFailed(f"y depends on {name}, which read(layer) does not return")


def _is_buffer(bench: Bench, name: str) -> bool:
    """Tell whether a tensor of `read` changes with the layer's buffers."""
    twin = copy.deepcopy(bench.layer)
    with torch.no_grad():
        before = oracle.tensors(bench.subject.read(twin))[name].clone()
        for buffer in twin.buffers():
            buffer.copy_(buffer == 0)  # of any dtype
        return not torch.equal(oracle.tensors(bench.subject.read(twin))[name], before)


def low_precision_gradients(bench: Bench) -> None:
    """Keep the gradients of x and of every parameter within their budget in bfloat16."""
    bench = bench.dropping()
    for name, got in gradients_of(bench).items():
        if name in bench.expected.want:
            require_gradient(bench, name, got)


def frozen(bench: Bench) -> None:
    """Keep the gradients of x and of the other parameters what they are when any one parameter is frozen."""
    bench = bench.dropping()
    for name, parameter in trained(bench.layer).items():
        parameter.requires_grad_(False)
        for other, got in gradients_of(bench).items():
            if other in bench.expected.want:
                require_gradient(bench, other, got, f" with {name} frozen")
        parameter.requires_grad_()


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
