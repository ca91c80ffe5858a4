"""A layer under test, made anew with parameters and buffers that are drawn, and what its `read` looks at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from correctness.oracle import layer as oracle
from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import Routing
from moe_impls.layer_interface import LayerSupport, LayerWeights


@dataclass(frozen=True)
class Layer:
    """A way to make a layer, how to read it, and what it declares.

    losses: returns its balance losses. routing: reports the routing of tokens [T, D] in the layer's mode,
    where a slot that is dropped has the id E + Z. update_bias: moves selection_bias after a training step.
    """

    make: Callable[[], nn.Module]
    read: Callable[[Any], LayerWeights]
    losses: Callable[[Any, Tensor, Tensor | None], dict[str, Tensor]] | None = None
    support: LayerSupport = LayerSupport()
    routing: Callable[[Any, Tensor], Routing] | None = None
    update_bias: Callable[[Any], object] | None = None

    @functools.cached_property
    def selection_bias(self) -> bool:
        """Whether `read` returns one."""
        return self.read(self.make()).selection_bias is not None

    @functools.cached_property
    def moves_bias(self) -> bool:
        """Whether training may move the selection bias: it does as declared, or the bias lies in a buffer."""
        weights = self.read(layer := self.make())
        declared = self.update_bias is not None or weights.bias_rule is not None
        return self.selection_bias and (declared or bool(_touched(self.read, layer, torch.is_floating_point)))

    @functools.cached_property
    def counters(self) -> bool:
        """Whether the layer has buffers that `read` does not look at, such as loads."""
        return len(self.buffers_read) < len(dict(self.make().named_buffers()))

    @functools.cached_property
    def training_only(self) -> bool:
        """Whether `read` names parameters that evaluation does not use."""
        return bool(self.read(self.make()).training_only)

    @functools.cached_property
    def buffers_read(self) -> tuple[str, ...]:
        """The buffers that `read` looks at."""
        return _touched(self.read, self.make())

    @functools.cached_property
    def merge(self) -> bool:
        """Whether the layer has methods merge and unmerge."""
        layer = self.make()
        return all(callable(getattr(layer, name, None)) for name in ("merge", "unmerge"))

    @functools.cached_property
    def placement(self) -> tuple[str, ...]:
        """The buffers of different integers that `read` looks at, such as a map of experts to slots."""
        return _touched(self.read, self.make(), _are_different_integers)

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Say in which dtype at least logits are made where x is of ``dtype``."""
        return dtype if self.support.router_dtype == "input" and dtype in LOW_PRECISION else torch.float32


class _Arguments(TorchFunctionMode):
    """Notes each tensor that a function is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return function(*args, **(kwargs or {}))


def _touched(
    read: Callable[[Any], LayerWeights], layer: nn.Module, wanted: Callable[[Tensor], bool] = lambda t: True
) -> tuple[str, ...]:
    """Name the buffers that `read` computes with or returns."""
    with _Arguments() as arguments:
        weights = read(layer)
    seen = {id(t) for t in (*arguments.seen, *oracle.tensors(weights).values())}
    return tuple(name for name, t in layer.named_buffers() if id(t) in seen and wanted(t))


def _are_different_integers(t: Tensor) -> bool:
    is_integer = not t.is_floating_point() and t.dtype != torch.bool
    return is_integer and t.ndim == 1 and len(t.unique()) > 1


def build(subject: Layer, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Make a new layer in eval mode, with parameters and the buffers that are read drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = subject.make()
    layer = layer.eval().to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(parameter, generator))
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                old, before = buffer.clone(), copies_of(subject, layer)
                buffer.add_(1)
                after = copies_of(subject, layer)
                is_read = any(not torch.equal(before[name], after[name]) for name in before)
                # Small next to scores between 0 and 1, so that it decides some choices but not all.
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator) if is_read else old)
    return layer.to(dtype)


def draw(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Draw numbers that keep results of unit scale: weights by their inputs, vectors of scale 0.5."""
    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
    return scale * torch.randn(parameter.shape, generator=generator)


def copies_of(subject: Layer, layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in oracle.tensors(subject.read(layer)).items()}
