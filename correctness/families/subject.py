"""A block of a family of transformers as a layer under test."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from correctness.families import beside, tiny
from correctness.families.declared import is_wide, support_of
from correctness.families.probe import NotInTheContract, randomise
from correctness.families.reading import Reading, reading_of
from correctness.judging.layer_bench import Layer


@functools.cache
def layer_of(block: str) -> Layer:
    """Make the layer that ``transformers:<block>`` names; what it does is found out by running it.

    Raises:
        ResolveError: it cannot be made.
        NotInTheContract: `LayerWeights` cannot say what it does; the message is the reason.
    """
    make = functools.partial(tiny.make, block)
    if block in beside.READINGS:
        known = beside.READINGS[block]
        support = support_of(
            _drawn(make), lambda dtype, autocast: known.router_dtype == "float32" and not autocast
        )
        return Layer(make, known.read, support=support)
    reading = find_reading(block)
    support = support_of(_drawn(make), functools.partial(is_wide, _drawn(make), reading))
    return Layer(make, reading.read, support=support)


def find_reading(block: str) -> Reading:
    """Find out how to read a block on transformers' interface for experts, and step3p7."""
    if block in beside.REFUSED:
        raise NotInTheContract(beside.REFUSED[block])
    return reading_of(randomise(tiny.make(block)))


def _drawn(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: randomise(make())
