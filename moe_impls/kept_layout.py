"""A copy of weights in another layout, kept until they change.

Where they are is compared in each call, with their version counters, and a sample of their numbers on a CPU:
what is written through ``.data`` (merged adapters, some optimizers) moves no counter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_SAMPLE = 256  # numbers of each tensor that are compared, at least 4 of each expert
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # equal bits, NaN included


class KeptLayout:
    """What was made of some tensors, and of which contents of theirs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the copy, so that the next call makes it again."""
        self._key: Hashable = None
        self._samples: list[Tensor] = []
        self._made: Any = None

    def get(self, purpose: Hashable, weights: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """Return what ``make()`` made of the weights for this purpose, made again if they have changed."""
        key = purpose, *((w.data_ptr(), _version(w), w.shape, w.stride(), w.dtype, w.device) for w in weights)
        samples = [_sample(w) for w in weights if w.device.type == "cpu"]
        same = key == self._key and all(map(torch.equal, samples, self._samples))
        if not same:
            self.clear()  # first, or both copies would be held
            with torch.no_grad():
                self._made = make()
            self._key, self._samples = key, samples
        return self._made


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """Copy the bits of numbers that lie evenly in a tensor."""
    return weight.detach()[_places(weight.shape)].view(INTEGERS[weight.dtype.itemsize])


@functools.lru_cache(maxsize=64)
def _places(shape: torch.Size) -> tuple[Tensor, ...]:
    number = min(max(LEAST_SAMPLE, 4 * shape[0]), shape.numel())
    places = torch.linspace(0, shape.numel() - 1, number, dtype=torch.float64, device="cpu").long()
    return torch.unravel_index(places, shape)
