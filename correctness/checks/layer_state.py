"""Checks of what a whole layer holds: each parameter counts, nothing else does, all of it can be copied."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from correctness.judging.budget import eps, roundings
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import (
    B,
    Bench,
    S,
    T,
    build,
    copies_of,
    draw,
    judged,
    weights_of,
)
from correctness.judging.layer_steps import erase, is_noisy, require_own_gradients, same, seeded
from correctness.oracle import layer as oracle
from moe_impls.registry import one_line


def every_parameter_counts(bench: Bench) -> None:
    """Follow new numbers in each parameter with the output that is right for them.

    A parameter that `read` ignores is a finding unless it is named in training_only, and such a one must not
    change the output. So is a buffer of one number an expert that does.
    """
    subject, x = bench.subject, bench.expected.x
    twin = build(subject, bench.dtype).to("cpu", torch.float64)
    before, generator = copies_of(subject, twin), torch.Generator().manual_seed(3)
    training_only = subject.read(bench.layer).training_only
    wide = dict(twin.named_parameters())
    with torch.no_grad():
        first = bench.call(bench.x.unsqueeze(0)).squeeze(0)
    with torch.inference_mode():
        bench.call(bench.x.unsqueeze(0))  # after which a copy of a weight would be at hand
    for name, parameter in bench.layer.named_parameters():
        old, new = parameter.detach().clone(), draw(parameter, generator).to(parameter.dtype)
        with torch.no_grad():
            parameter.copy_(new)
            wide[name].copy_(new)
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            with torch.inference_mode():
                inferred = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            after = copies_of(subject, twin)
            is_read = any(not torch.equal(before[n], after[n]) for n in before)
            if name in training_only and is_read:
                raise CheckFailed(f"read(layer) depends on {name}, which training_only holds")
            if name not in training_only and not is_read:
                raise CheckFailed(f"read(layer) does not depend on {name}; is it for training_only?")
            if is_read:
                weights = weights_of(subject, twin)
                logits_dtype = subject.logits_dtype(bench.dtype)
                ids, clear = oracle.choose(x, weights, logits_dtype)
                if not clear.any():
                    raise CheckFailed(f"after new numbers in {name} no token has a clear choice of experts")
                dropped = bench.dropped(bench.x, ids, clear, weights)
                kept = None if dropped is None else dropped[clear]
                arguments = (x[clear], ids[clear], weights, None, bench.dtype)
                want, allowed = judged(*arguments, logits_dtype, kept)
                where = f" after new numbers in {name}"
                if torch.equal(y, first):
                    where += ", with which y stays the same: the layer never reads it, or kept a copy"
                bench.require("y", y[clear], want["y"], allowed["y"], where)
                where = f" under inference_mode, after new numbers in {name} since the last call"
                bench.require("y", inferred[clear], want["y"], allowed["y"], where)
            else:
                bench.require_y(y, context=f" after new numbers in {name}, which is for training only")
            parameter.copy_(old)
            wide[name].copy_(old.double())
    if bench.subject.support.deterministic:
        _require_buffers_read(bench)


def _require_buffers_read(bench: Bench) -> None:
    """Raise CheckFailed if y depends on a buffer of one number an expert that `read` does not look at."""
    E = len(bench.expected.weights.router_weight)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        first = bench.call(bench.x.unsqueeze(0))
        for name, buffer in bench.layer.named_buffers():
            is_read = name in bench.subject.buffers_read
            if not is_read and buffer.is_floating_point() and buffer.numel() == E:
                old = buffer.clone()
                buffer.add_(torch.randn(buffer.shape, generator=generator).to(buffer))
                y = bench.call(bench.x.unsqueeze(0))
                buffer.copy_(old)
                if not same(y, first):
                    raise CheckFailed(
                        f"read(layer) returns nothing made of the buffer {name}, on which y depends; is it "
                        "selection_bias?"
                    )


def mode_switched(bench: Bench) -> None:
    """Hold the same when train() and eval() are called, to rounding, as where they merge and unmerge."""
    subject, before = bench.subject, copies_of(bench.subject, bench.layer)
    bench.layer.train().eval()
    for name, tensor in copies_of(subject, bench.layer).items():
        held, now = before[name].detach().double(), tensor.detach().double()
        if bool(((now - held).abs() > roundings(eps(bench.dtype)) * held.abs().max()).any()):
            apart = float((now - held).abs().max())
            raise CheckFailed(f"{name} moves by {apart:.3g} when train() and eval() are called")
    bench.require_y(bench.call(bench.x.unsqueeze(0)).squeeze(0), context=" after train() and eval()")


def evaluation(bench: Bench) -> None:
    """Add no noise in eval mode: equal inputs give bit-equal outputs."""
    x = bench.x.unflatten(0, (B, S))
    first = bench.call(x)
    for _ in range(3):
        if not torch.equal(bench.call(x), first):
            raise CheckFailed("two calls in eval mode on equal inputs differ")


def without_gradients(bench: Bench) -> None:
    """Return the right output under no_grad and inference_mode, and leave it alone in later calls."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            bench.require_y(y, context=f" under {mode.__name__}")
            bench.call(bench.x.flip(0).unsqueeze(0))
            bench.require_y(y, context=f" under {mode.__name__}, after another call")
            alone = {t: bench.call(bench.x[t].view(1, 1, -1)).flatten(0, 1) for t in (0, 5, T - 1)}
            for t, y in alone.items():
                where = f" under {mode.__name__}, with one token, after calls with others"
                bench.require_y(y, torch.tensor([t]), where)


def inputs_unchanged(bench: Bench) -> None:
    """Write to neither x nor a parameter, and in eval mode to no buffer that `read` returns.

    With gradients and without, and with one token as with many.
    """

    def held() -> dict[str, Tensor]:
        return {**dict(bench.layer.named_parameters()), **oracle.tensors(bench.subject.read(bench.layer))}

    turns = [(False, way) for way in (torch.enable_grad, torch.no_grad, torch.inference_mode)]
    turns += [(True, torch.enable_grad)] * bench.subject.support.training
    for (training, way), rows in itertools.product(turns, (slice(0, T), slice(5, 6))):
        bench.layer.train(training)
        x, before = bench.x[rows], {name: tensor.detach().clone() for name, tensor in held().items()}
        with way():
            bench.call(x.unsqueeze(0))
        mode = f"{'training' if training else 'eval'} mode under {way.__name__}, with {len(x)} tokens"
        if not torch.equal(x, bench.x[rows]):
            raise CheckFailed(f"x was written to by a call in {mode}")
        for name, tensor in held().items():
            may_move = training and name == "selection_bias"
            if name not in before or not (may_move or torch.equal(tensor, before[name])):
                raise CheckFailed(f"{name} was written to by a call in {mode}")


def generator_goes_on(bench: Bench) -> None:
    """Leave torch's random generator where it stands or farther on: no call seeds it or sets it back."""
    for training in (False, True)[: 1 + bench.subject.support.training]:
        bench.layer.train(training)
        states = []
        for drawn in (1, 2):
            with seeded(bench.layer, 0):
                torch.rand(drawn)
                bench.call(bench.x.unsqueeze(0))
                states.append(torch.get_rng_state())
        if torch.equal(*states):
            mode = "training" if training else "eval"
            raise CheckFailed(
                f"after a call in {mode} mode torch's random generator is where it is whatever was drawn "
                "before: is it seeded in the layer, or set back?"
            )


def _state(layer: nn.Module) -> dict[str, Tensor]:
    """Name all parameters and buffers."""
    return {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}


def state(bench: Bench) -> None:
    """Carry everything in the state dict, and make a deepcopy a layer of its own."""
    x, other = bench.x.unsqueeze(0), build(bench.subject, bench.dtype, seed=7)
    with torch.inference_mode():
        replace(bench, layer=other).call(x)  # what it keeps of this call has to be forgotten
    try:
        other.load_state_dict(bench.layer.state_dict())
        twin, apart = copy.deepcopy(bench.layer), copy.deepcopy(bench.layer)
    except Exception as error:
        raise CheckFailed(f"load_state_dict or copy.deepcopy raises {one_line(error)}") from error
    for layer, how in ((other, "after load_state_dict"), (twin, "in a deepcopy")):
        for mode in (contextlib.nullcontext, torch.inference_mode):
            with mode():
                y = replace(bench, layer=layer).call(x).squeeze(0)
            bench.require_y(y, context=f" {how}")
    erase(twin)
    bench.require_y(bench.call(x).squeeze(0), context=" after its deepcopy was written to")
    erase(bench.layer)
    copied = replace(bench, layer=apart)
    copied.require_y(copied.call(x).squeeze(0), context=" in a deepcopy after the original was written to")
    support = bench.subject.support
    if support.training and support.gradients:
        apart.train()
        if not is_noisy(copied):
            require_own_gradients(copied, " in a deepcopy in training mode after the original was written to")
