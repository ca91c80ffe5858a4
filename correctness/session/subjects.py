"""What is under test: the names on the command line, or the project's own, as subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import correctness.session.profiles  # noqa: F401  # of Hypothesis, for checks whose problems are drawn
import moe_impls
from correctness.checks.balance import losses
from correctness.checks.case import Subject, cases
from correctness.checks.routers import router
from correctness.checks.table import implementation
from correctness.judging.blame import process_kept
from correctness.ranks.checks import distributed
from correctness.ranks.work import by_name
from correctness.session.families import named_layers
from correctness.session.layer_subject import own_layers, resolve_layer
from correctness.session.limits import limited
from moe_impls.registry import (
    DISTRIBUTED,
    IMPLEMENTATIONS,
    ResolveError,
    check_signature,
    load_function,
    resolve,
)
from moe_impls.router_interface import RouterSupport

OWN_ROUTER, OWN_LOSSES = "moe_impls.router:route", "moe_impls"


def find_subjects(
    implementations: Sequence[str] | None,
    routers: Sequence[str] | None,
    layers: Sequence[str] | None,
    seconds: float,
    device: str = "cpu",
) -> list[Subject]:
    """Import what these names mean, each in ``seconds`` at most (0: no limit).

    Without any name: the project's own implementations, router, layers, losses and loads.

    Raises:
        ResolveError: a name leads to nothing that can be tested.
    """
    named = [
        (find, name)
        for find, names in (
            (lambda name: _implementation(name, device), implementations),
            (_router, routers),
            (resolve_layer, named_layers(layers or ())),
        )
        for name in names or ()
    ]
    if not named:
        own = [implementation(resolve(name), device) for name in IMPLEMENTATIONS]
        own += [_implementation(name) for name in DISTRIBUTED]
        return [*own, _router(OWN_ROUTER), *own_layers(), losses(OWN_LOSSES, moe_impls)]
    found = []
    for find, name in named:
        with process_kept(), limited(seconds):
            found.append(find(name))
    return found


def _implementation(name: str, device: str = "cpu") -> Subject:
    found = by_name(name)
    subject = implementation(found, device)
    if found.support.distributed:
        if device != "cpu":
            raise ResolveError(
                f"{name} is distributed; --device is {device}, it must be cpu, where ranks are"
            )
        subject = distributed(name, found.support, by_name, name)
    if all(case.skip for case in cases([subject])):
        raise ResolveError(f"{name}: nothing that it declares in SUPPORT can be checked here")
    return subject


def _router(name: str) -> Subject:
    module, function = load_function(name)
    check_signature(name, function, 2, ("selection_bias",))
    support = getattr(module, "SUPPORT", RouterSupport())
    if not isinstance(support, RouterSupport):
        raise ResolveError(
            f"{name}: SUPPORT is a {type(support).__name__}; of a router it must be a moe_impls.RouterSupport"
        )
    return router(name, function, support)


# How a subject of each kind is found, by its name and device.
FIND: dict[str, Callable[[str, str], Subject]] = {
    "implementation": _implementation,
    "router": lambda name, device: _router(name),
    "layer": lambda name, device: resolve_layer(name),
    "losses": lambda name, device: losses(name, moe_impls),
}


def rerun(kind: str, name: str, check: str, problem: str = "", *, device: str = "cpu") -> None:
    """Run one case again: a check of a subject, by its kind and name, on the problem of that short name.

    Raises:
        CheckFailed: it fails again.
    """
    listed = cases([FIND[kind](name, device)])
    case = next((c for c in listed if (c.check.name, c.problem_id) == (check, problem)), None)
    if case is None:
        raise ValueError(f"{kind} {name} has no check {check!r} on problem {problem!r}")
    case.run()
