"""What the numbers of a whole layer are like: parameters and tokens of other sizes and signs than usual."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from correctness.judging.layer_bench import Bench, Expected, Layer, T, expected_of, reached

FAR = 512.0  # times: a token's square is out of the range of float16, or below an epsilon of 1e-6


def _same(t: Tensor) -> Tensor:
    return t


def _alike(x: Tensor) -> Tensor:
    """Move all tokens [N, D] by one vector, so that most visit the same experts."""
    D = x.shape[1]
    return x + 2 * torch.randn(D, generator=torch.Generator().manual_seed(D))


@dataclass(frozen=True)
class Numbers:
    """What is done to usual numbers.

    tokens: to tokens [N, D]. router: to its weight. hidden: times all hidden values before the activation.
    far: times all tokens, which weights then make logits and hidden features of unit scale of.
    """

    tokens: Callable[[Tensor], Tensor] = _same
    router: Callable[[Tensor], Tensor] = _same
    hidden: float = 1.0
    far: float = 1.0


NUMBERS = {
    "usual": Numbers(),
    "large tokens": Numbers(far=FAR),
    "small tokens": Numbers(far=1 / FAR),
    "large hidden values": Numbers(hidden=16),
    "large logits": Numbers(router=lambda w: 4 * w),
    "logits below zero": Numbers(torch.abs, lambda w: -4 * w.abs()),
    "logits above zero": Numbers(torch.abs, lambda w: 4 * w.abs()),
    "tokens alike": Numbers(_alike),
}


def set_numbers(bench: Bench, name: str) -> None:
    """Make the parameters that were drawn as usual what `NUMBERS` says; those that serve one end alone."""
    numbers, weights = NUMBERS[name], bench.subject.read(bench.layer)
    parts = [part for part in (weights.experts, weights.shared) if part is not None]
    seen = 1.0 if weights.router_norm is not None else numbers.far  # by the router
    ends: tuple[tuple[list[Tensor | None], Callable[[Tensor], Tensor]], ...] = (
        ([weights.router_weight], lambda w: numbers.router(w) / seen),
        ([weights.shared_gate], lambda w: w / numbers.far),
        ([part.w_in for part in parts], lambda w: w * numbers.hidden / numbers.far),
        ([part.b_in for part in parts], lambda b: b * numbers.hidden),
        ([part.w_out for part in parts], _same),
        ([weights.expert_scale, weights.router_bias, weights.router_norm], _same),
    )
    names = [{n for t in some if t is not None for n in reached(bench.layer, t)} for some, _ in ends]
    parameters = dict(bench.layer.named_parameters())
    with torch.no_grad():
        for own, (_, change) in zip(names, ends, strict=True):
            for parameter in own:
                if sum(parameter in others for others in names) == 1:
                    parameters[parameter].copy_(change(parameters[parameter]))


def as_it_is_with(bench: Bench, name: str, gradients: bool) -> Bench:
    """Draw tokens as `NUMBERS` says, and make what is right for them with what the layer holds now."""
    is_kept = _size(bench.layer) <= KEPT_SIZE
    held = _Held(bench, bench.subject, bench.dtype, _digest(bench.layer) if is_kept else "")
    right = _right if is_kept else _right.__wrapped__
    return replace(bench, expected=right(held, name, gradients))


KEPT_SIZE = 2**16  # numbers of a layer for which what is right is kept


@dataclass(frozen=True)
class _Held:
    """A layer that is under test in a dtype, equal to another of its subject that holds the same."""

    bench: Bench = field(compare=False)
    subject: Layer
    dtype: torch.dtype
    digest: str


@functools.lru_cache(maxsize=128)
def _right(held: _Held, name: str, gradients: bool) -> Expected:
    bench, numbers = held.bench, NUMBERS[name]
    arguments = (bench.subject, bench.twin(), bench.dtype, gradients, T)
    return expected_of(*arguments, like=lambda x: numbers.far * numbers.tokens(x))


def _state(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(), *layer.named_buffers()]


def _size(layer: nn.Module) -> int:
    return sum(tensor.numel() for _, tensor in _state(layer))


def _digest(layer: nn.Module) -> str:
    """Make a name for all that a layer holds."""
    found = hashlib.sha256()
    for name, tensor in _state(layer):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()
