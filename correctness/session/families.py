"""``transformers:FAMILY`` on the command line: blocks of transformers, which is imported only for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from correctness.judging.layer_bench import Layer
from moe_impls.registry import ResolveError, asking

FAMILIES = "transformers:"
ALL = f"{FAMILIES}all"


def named_layers(names: Sequence[str]) -> list[str]:
    """Replace the name of a family by those of its blocks, and ``transformers:all`` by all that can be read.

    Which are left out of all, and why, is written to standard error.

    Raises:
        ResolveError: there is no such family; the message lists those that there are.
    """
    found = []
    for name in names:
        if not name.startswith(FAMILIES):
            found.append(name)
            continue
        from correctness.families.tiny import blocks

        every = [FAMILIES + block for block in blocks(name.removeprefix(FAMILIES))]
        found += every if name != ALL else [block for block in every if not _refused(block)]
    return found


def _refused(name: str) -> bool:
    try:
        family_layer(name)
    except ResolveError as error:
        print(error, file=sys.stderr)
        return True
    return False


def family_layer(name: str) -> Layer:
    """Make the layer that ``transformers:FAMILY`` means, where the family has one block.

    Raises:
        ResolveError: no such family, its block cannot be made, or the contract cannot say what it does.
    """
    from correctness.families.probe import NotInTheContract
    from correctness.families.subject import layer_of
    from correctness.families.tiny import blocks

    (block, *others) = blocks(name.removeprefix(FAMILIES))
    if others:
        several = ", ".join(FAMILIES + other for other in (block, *others))
        raise ResolveError(f"{name} has several blocks; name one of {several}")
    try:
        with asking(f"{name}: finding out what it does failed"):
            return layer_of(block)
    except ResolveError as error:
        if isinstance(error.__cause__, NotInTheContract):
            raise ResolveError(f"{name} is refused: {error.__cause__}") from error.__cause__
        raise
