"""What is under test: the names on the command line, or the project's own, as subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from correctness.checks.routers import RouterSubject
from correctness.checks.table import cases
from correctness.judging.blame import process_kept
from correctness.judging.layer_bench import LayerSubject
from correctness.session import layer_subject
from correctness.session.limits import limited
from moe_impls.interface import Implementation
from moe_impls.registry import IMPLEMENTATIONS, ResolveError, check_signature, load_function, resolve


class Subjects(NamedTuple):
    implementations: list[Implementation]
    router: RouterSubject
    layers: list[LayerSubject]


def find_subjects(
    implementations: Sequence[str] | None,
    router: str | None,
    layer: str | None,
    seconds: float,
    device: str = "cpu",
) -> Subjects:
    """Import what these names mean, each in ``seconds`` at most (0: no limit).

    Raises:
        ResolveError: a name leads to nothing that can be tested.
    """
    found = []
    for name in implementations or IMPLEMENTATIONS:
        with process_kept(), limited(seconds):
            found.append(resolve(name))
        if implementations and all(case.skip for case in cases(found[-1:], device=device)):
            raise ResolveError(f"{name}: nothing that it declares in SUPPORT can be checked here")
    with process_kept(), limited(seconds):
        route = _router(router or "moe_impls.router:route")
    with process_kept(), limited(seconds):
        layers = [layer_subject.resolve_layer(layer)] if layer else layer_subject.own_layers()
    return Subjects(found, route, layers)


def _router(name: str) -> RouterSubject:
    _, function = load_function(name)
    check_signature(name, function, 2, ("selection_bias",))
    return RouterSubject(name, function)
