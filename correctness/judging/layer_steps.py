"""Steps of a layer on the bench: seeds, what it holds, gradients, and what is right for it as it is."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import (
    Bench,
    Layer,
    S,
    T,
    build,
    call_of,
    expected_of,
    reached,
    trained,
)
from moe_impls.registry import one_line

SEEDS = (0, 1, 2)


class Step(NamedTuple):
    """What a call and its backward return: y, and the gradients of x and each parameter, by name."""

    y: Tensor
    grads: dict[str, Tensor | None]


def step(
    bench: Bench,
    x: Tensor,
    dy: Tensor,
    *,
    x_wanted: bool = True,
    call: Callable[[Tensor], Tensor] | None = None,
    between: Callable[[], object] | None = None,
) -> Step:
    """Call a layer on x [..., D] and go back from dy, of as many entries as y.

    The gradients flow into ``.grad``, as in a training loop: a reentrant checkpoint takes no other way. They
    flow outside of autocast. x is no leaf, as in a model.

    Args:
        call: in place of the layer's own.
        between: is done between the call and its backward.
    """
    source = x.clone().requires_grad_(x_wanted)
    leaves = {**({"x": source} if x_wanted else {}), **trained(bench.layer)}
    given = source * 1
    with torch.enable_grad():
        y = (call or bench.call)(given)
    if not torch.equal(given.detach(), x):
        raise CheckFailed("x was written to by a call in which it needs a gradient")
    if not leaves:
        return Step(y, {})
    if not y.requires_grad:
        if bench.subject.routing is not None and not bool(y.any()):  # every slot is dropped
            return Step(y, dict.fromkeys(leaves))
        whose = "x and the parameters do" if x_wanted else "the parameters do, where x needs none"
        what = f"y of x {list(x.shape)} does not require a gradient"
        raise CheckFailed(f"{what} though {whose}: the graph is cut")
    if between:
        kept = y.detach().clone()
        between()
        if not torch.equal(y.nan_to_num(), kept.nan_to_num()):
            raise CheckFailed("a later call overwrites the y that an earlier one has returned")
    before_it = {name: leaf.grad for name, leaf in leaves.items()}
    try:
        for leaf in leaves.values():
            leaf.grad = None
        dy = dy.to(y).reshape(y.shape)
        given, before = dy.clone(), dy.clone()
        with torch.autocast(y.device.type, enabled=False):
            y.backward(given)
        grads = {name: leaf.grad for name, leaf in leaves.items()}
    except Exception as error:
        raise CheckFailed(f"the backward of layer(x) raises {one_line(error)}") from error
    finally:
        for name, leaf in leaves.items():
            leaf.grad = before_it[name]
    if not torch.equal(given, before):
        raise CheckFailed("the backward of layer(x) writes to the gradient of y that it is given")
    return Step(y.detach(), grads)


def gradients_of(
    bench: Bench, *, tokens: int = 0, x_wanted: bool = True, flipped: bool = True, strided: bool = False
) -> Mapping[str, Tensor | None]:
    """Return the gradients of x and each parameter, by name.

    tokens: of the call; the gradient flows into one of each token, from the first of the call to the last.
    flipped: another call comes between forward and backward.
    strided: the gradient of y is not contiguous.
    """
    right = bench.expected
    rows, places = call_of(len(right.x), tokens)
    x, dy = bench.x[rows], torch.zeros(len(rows), right.dy.shape[1], dtype=right.dy.dtype)
    dy = in_sequences(dy.index_copy(0, places, right.dy).to(bench.device))
    found = step(
        bench,
        in_sequences(x),
        dy.mT.contiguous().mT if strided else dy,
        x_wanted=x_wanted,
        between=(lambda: bench.call(in_sequences(x.flip(0)))) if flipped else None,
    ).grads
    if (dx := found.get("x")) is not None:
        found["x"] = dx.flatten(0, 1)[places.to(dx.device)]
    return found


def in_sequences(x: Tensor) -> Tensor:
    """Part tokens [N, D] into sequences of S, or of one where that leaves a rest: [B, S, D]."""
    return x.unflatten(0, (-1, S if len(x) % S == 0 else len(x)))


def y_of(bench: Bench, x: Tensor | None = None) -> Tensor:
    """Call the layer on tokens [T, D], in sequences; its own by default."""
    x = bench.x if x is None else x
    return bench.call(x.unflatten(0, (-1, S))).flatten(0, 1)


def require_gradient(bench: Bench, name: str, got: Tensor | None, context: str = "") -> None:
    """Raise CheckFailed unless a gradient that `Expected` names is there and within its budget."""
    want, allowed = bench.expected.want[name], bench.expected.allowed[name]
    if got is None and bool(want.any()):
        raise CheckFailed(f"the gradient of {name} is missing{context}: y does not depend on it")
    if got is not None:
        bench.require(f"the gradient of {name}", got, want, allowed, context)


def require_gradients(bench: Bench, found: Mapping[str, Tensor | None], context: str = "") -> None:
    """Raise CheckFailed unless each gradient that `Expected` names is right."""
    for name, got in found.items():
        if name in bench.expected.want:
            require_gradient(bench, name, got, context)


def require_own_gradients(bench: Bench, where: str) -> None:
    """Raise CheckFailed unless the gradients of its own tokens are right."""
    bench = bench.dropping()
    require_gradients(bench, gradients_of(bench), where)


def generators(layer: nn.Module) -> list[torch.Generator]:
    """List the random generators that a layer's modules hold as attributes."""
    values = [value for module in layer.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, torch.Generator)]


@contextlib.contextmanager
def seeded(layer: nn.Module, seed: int) -> Iterator[None]:
    """Start all random generators that a layer may draw from at a seed, and restore them afterwards."""
    own = generators(layer)
    before = [generator.get_state() for generator in own], random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for generator in own:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(own, before[0], strict=True):
                generator.set_state(state)
            random.setstate(before[1])
            np.random.set_state(before[2])


def held(layer: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters and buffers, by name."""
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def put_back(layer: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Write what `held` copied into the parameters and buffers that changed since; return their names."""
    named = dict((*layer.named_parameters(), *layer.named_buffers()))
    changed = [name for name, tensor in named.items() if not same(tensor, before.get(name))]
    for name in changed:
        if name in before and named[name].shape == before[name].shape:
            overwrite(named[name], before[name])
    return changed


def overwrite(tensor: Tensor, value: Tensor | float) -> None:
    """Write to a parameter, or to a buffer even if it was made under inference_mode."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(torch.as_tensor(value))


def erase(layer: nn.Module) -> None:
    """Write zeros to all that a layer holds, which must not matter to a copy of it."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        overwrite(tensor, 0)


def same(a: Tensor, b: Tensor | None) -> bool:
    """Tell whether two tensors are bit-equal, NaN included."""
    return b is not None and a.shape == b.shape and torch.equal(a.detach().nan_to_num(), b.nan_to_num())


def as_it_is(bench: Bench, *, gradients: bool = False, tokens: int = T) -> Bench:
    """Draw tokens anew, and make what is right for them with what the layer holds now."""
    return replace(bench, expected=expected_of(bench.subject, bench.twin(), bench.dtype, gradients, tokens))


def saturated_layer(bench: Bench, *, gradients: bool = False) -> Bench:
    """Make the layer's hidden values sixteen times as large, and what is right then."""
    weights = bench.subject.read(bench.layer)
    parts = [part for part in (weights.experts, weights.shared) if part is not None]
    inner = [t for part in parts for t in (part.w_in, part.b_in)]
    scale(bench, inner, [weights.router_weight, weights.router_bias], 16)
    return as_it_is(bench, gradients=gradients)


def scale(
    bench: Bench,
    wanted: Sequence[Tensor | None],
    spared: Sequence[Tensor | None],
    factor: float,
    least_dims: int = 0,
) -> None:
    """Multiply the parameters that some tensors of `read` are made of, and others are not.

    least_dims: that a parameter must have: with 2 a temperature is none of them.
    """
    names, others = (
        {name for t in some if t is not None for name in reached(bench.layer, t)} for some in (wanted, spared)
    )
    parameters = dict(bench.layer.named_parameters())
    with torch.no_grad():
        for name in names - others:
            if parameters[name].ndim >= least_dims:
                parameters[name].mul_(factor)


def fresh(subject: Layer, bench: Bench, *, training: bool = True) -> Bench:
    """Put another layer with the same parameters on the bench, as made, in training mode."""
    return replace(bench, layer=build(subject, bench.dtype).train(training))


def is_noisy(bench: Bench) -> bool:
    """Tell whether a random generator decides the output in the layer's present mode; leave its state."""
    before, x, drawn = held(bench.layer), bench.x.repeat(8, 1).unsqueeze(0), []
    for seed in SEEDS:
        with seeded(bench.layer, seed):
            drawn.append(bench.call(x).detach())
        put_back(bench.layer, before)
    return not all(torch.equal(y, drawn[0]) for y in drawn)
