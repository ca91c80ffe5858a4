"""Checks of the gradients of a whole layer: of x, of every parameter, and of the router."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import COPIES, B, Bench, S, T, reached, spread, trained
from correctness.oracle import layer as oracle
from moe_impls.registry import one_line


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


def require_gradient(bench: Bench, name: str, got: Tensor | None, context: str = "") -> None:
    """Raise CheckFailed unless the gradient of x or of a parameter is right."""
    want, allowed = bench.expected.want[name], bench.expected.allowed[name]
    if got is None and bool(want.any()):
        raise CheckFailed(f"the gradient of {name} is missing{context}: y does not depend on it")
    if got is not None:
        bench.require(f"the gradient of {name}", got, want, allowed, context)


def gradients_of(bench: Bench, *, copies: int = 1, x_wanted: bool = True) -> Mapping[str, Tensor | None]:
    """Return the gradients of x and each parameter, by name; another call comes between forward and backward.

    copies: of each token; the gradient flows into one of them, in all parts of the call.
    """
    x = bench.x.repeat(copies, 1).requires_grad_(x_wanted)
    y = bench.call(x.unflatten(0, (B * copies, S)))
    leaves = {**({"x": x} if x_wanted else {}), **trained(bench.layer)}
    if not leaves:
        return {}
    if not y.requires_grad:
        raise CheckFailed("y does not require a gradient though x and the parameters do: the graph is cut")
    bench.call(x.flip(0).unflatten(0, (B * copies, S)))
    rows = spread(copies)
    dy = torch.zeros(len(x), y.shape[-1], dtype=y.dtype).index_copy(0, rows, bench.expected.dy)
    dy = dy.to(bench.device).reshape(y.shape)
    try:
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    except Exception as error:
        raise CheckFailed(f"the backward of layer(x) raises {one_line(error)}") from error
    found = dict(zip(leaves, grads, strict=True))
    if (dx := found.get("x")) is not None:
        found["x"] = dx[rows.to(dx.device)]
    return found


def frozen(bench: Bench) -> None:
    """Keep the gradients of x and of the other parameters what they are when any one parameter is frozen."""
    bench = bench.dropping()
    for name, parameter in trained(bench.layer).items():
        parameter.requires_grad_(False)
        for other, got in gradients_of(bench).items():
            if other in bench.expected.want:
                require_gradient(bench, other, got, f" with {name} frozen")
        parameter.requires_grad_()


def training(bench: Bench) -> None:
    """Be right in training mode, with few tokens and many, unless a random generator decides the output.

    Where it does, every parameter that is trained has a gradient nevertheless.
    """
    bench.layer.train()
    x, drawn = bench.x.unflatten(0, (B, S)), []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn.append(bench.call(x).detach())
    gradients = bench.subject.support.gradients
    if torch.equal(*drawn):
        bench.require_y(drawn[0].flatten(0, 1), context=" in training mode")
        many = bench.call(bench.x.repeat(COPIES, 1).unsqueeze(0)).squeeze(0)
        where = f" in training mode, with {len(many)} tokens"
        bench.require_y(many, torch.arange(T).repeat(COPIES), where)
        for copies, context in ((1, " in training mode"), (COPIES, where)):
            dropping = bench.dropping(copies) if gradients else bench
            for name, got in gradients_of(dropping, copies=copies).items() if gradients else ():
                if name in bench.expected.want:
                    require_gradient(dropping, name, got, context)
    elif gradients:
        for name, got in gradients_of(bench).items():
            if got is None and name in bench.expected.want and bool(bench.expected.want[name].any()):
                raise CheckFailed(f"the gradient of {name} is missing in training mode")


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
