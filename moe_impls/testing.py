"""The suite inside tests of your own, in any repository; needs ``pip install 'moe-impls[suite]'``.

    from moe_impls.testing import verify

    def test_my_kernel():
        verify(my_kernel.forward)  # some seconds; an AssertionError says what is wrong and where

What a finding says after ``reproduce:`` is Python, too: a line that calls `rerun`, or a problem for
``from moe_impls.testing import *; x, routing, experts, dy = make_inputs(Problem(...))``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_impls import suite
from moe_impls.interface import Forward, Implementation, Routing, Support
from moe_impls.layer_interface import LayerSupport, LayerWeights
from moe_impls.registry import check_signature
from moe_impls.router_interface import RouterSpec, RouterSupport

if TYPE_CHECKING:
    from correctness.checks.case import Case, Subject
    from correctness.problems import Problem, RouterProblem, make_inputs, make_router_inputs

__all__ = ["Problem", "RouterProblem", "RouterSpec", "Verified", "make_inputs", "make_router_inputs",
           "rerun", "torch", "verify", "verify_layer", "verify_router"]  # fmt: skip


class Verified(NamedTuple):
    """What was checked, and found right.

    skipped: how many tests the declaration takes out, by reason. worst: the largest error of each tensor as a
    fraction of its budget, at most 1.
    """

    name: str
    checks: int
    tests: int
    skipped: dict[str, int]
    worst: dict[str, float]


def verify(
    forward: Forward, *, support: Support | None = None, device: str = "cpu", thorough: bool = False
) -> Verified:
    """Check that ``forward(x, routing, experts, *, combine="sum")`` keeps the contract of `moe_impls`.

    Each check runs on the first of its problems in each dtype. ``moe-impls verify`` also makes up problems,
    limits the time of each test and survives crashes.

    Args:
        support: what the function can do; ``SUPPORT`` of its module unless given, else everything.
        thorough: run each check on all of its problems, about ten times as long.

    Raises:
        AssertionError: something is wrong; the message says what, where, by how much and how to see it again.
        ValueError: the function cannot be called so, or declares nothing that can be checked on ``device``.
    """
    __tracebackhide__ = True
    name = _name(forward)
    check_signature(name, forward, 3, ("combine",))
    subject = Implementation(name, forward, _support(forward, support))
    with _suite():
        from correctness.checks.table import implementation
        from correctness.problems.problem import check_device

        check_device(device)
        return _run(implementation(subject, device), thorough)


def verify_router(
    route: Callable[..., Routing], *, support: RouterSupport | None = None, thorough: bool = False
) -> Verified:
    """Check that ``route(logits, spec, *, selection_bias=None)`` does what `moe_impls.router.route` promises.

    support: what it can carry out; ``SUPPORT`` of its module unless given, else everything.
    thorough: as for `verify`.

    Raises:
        AssertionError: something is wrong; the message says what, where and how to see it again.
        ValueError: the function cannot be called so.
    """
    __tracebackhide__ = True
    name = _name(route)
    check_signature(name, route, 2, ("selection_bias",))
    with _suite():
        from correctness.checks.routers import router

        module = sys.modules.get(getattr(route, "__module__", ""))
        declared = support or getattr(module, "SUPPORT", None)
        return _run(router(name, route, declared or RouterSupport()), thorough)


def verify_layer(
    make: Callable[[], torch.nn.Module],
    read: Callable[[Any], LayerWeights],
    *,
    losses: Callable[[Any, torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]] | None = None,
    routing: Callable[[Any, torch.Tensor], Routing] | None = None,
    update_bias: Callable[[Any], object] | None = None,
    support: LayerSupport | Support | None = None,
) -> Verified:
    """Check a whole layer, from x to the gradient of every parameter.

    Args:
        make: returns a new layer, from [..., D] to [..., O].
        read: returns the layer's parameters, or views and stacks of them, as `moe_impls.LayerWeights`.
        losses: returns its balance losses for x and a mask, to have them checked, too.
        routing: reports the routing of x [T, D], of a layer that drops tokens or has noise in training.
        update_bias: moves the selection bias after a training step, where the call does not.
        support: as for `verify`, of the module of ``make``.

    Raises:
        AssertionError: something is wrong; the message says what and where.
        ValueError: a function cannot be called so.
    """
    __tracebackhide__ = True
    name = _name(make)
    check_signature(name, make, 0, ())
    check_signature(_name(read), read, 1, ())
    with _suite():
        from correctness.checks.layers import layer
        from correctness.judging.layer_bench import Layer

        declared = LayerSupport.of(support or _support(make, None))
        return _run(layer(name, Layer(make, read, losses, declared, routing, update_bias)), thorough=True)


def rerun(kind: str, name: str, check: str, problem: str = "", *, device: str = "cpu") -> None:
    """Run one check again, by the words that a finding gives after ``reproduce:``.

    Raises:
        AssertionError: it fails again.
        ValueError: the words name no subject, or a check or problem that it does not have.
    """
    __tracebackhide__ = True
    with _suite():
        from correctness.session import subjects

        subjects.rerun(kind, name, check, problem, device=device)


@contextlib.contextmanager
def _suite() -> Iterator[None]:
    with suite.imported():
        try:
            from correctness.judging.process_state import restored, settings
        except ModuleNotFoundError as error:
            needs = f"moe_impls.testing needs {error.name}: pip install 'moe-impls[suite]'"
            raise ModuleNotFoundError(needs, name=error.name) from error
        with restored(settings(torch.float32)):
            yield


def _run(subject: Subject, thorough: bool) -> Verified:
    from correctness.checks.case import cases
    from correctness.judging.finding import CheckFailed

    __tracebackhide__ = True  # pytest then shows the line of the caller
    skipped: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    worst: dict[str, float] = {}
    listed = [case for case in cases([subject]) if not case.check.drawn]
    for case in listed if thorough else _first(listed):
        if case.skip:
            skipped[case.skip] += 1
            continue
        try:
            fractions = case.run()
        except CheckFailed as failure:
            raise failure.with_traceback(None) from None
        for tensor, fraction in fractions.items():
            worst[tensor] = max(fraction, worst.get(tensor, 0.0))
        checks[case.check.name] += 1
    if not checks:
        raise ValueError(f"{subject.name}: nothing that it declares in SUPPORT can be checked here")
    return Verified(subject.name, len(checks), checks.total(), dict(skipped), worst)


def _first(listed: list[Case]) -> list[Case]:
    """Pick the first problem of each dtype that can be run, for each check."""
    first: dict[object, Case] = {}
    for case in listed:
        key = case.check.function, getattr(case.problem, "dtype", None)
        if key not in first or first[key].skip:
            first[key] = case
    return list(first.values())


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"


def _support(function: Any, given: Support | None) -> Support:
    module = sys.modules.get(getattr(function, "__module__", ""))
    return given or getattr(module, "SUPPORT", Support())


def __getattr__(name: str) -> object:
    """Import what lines after ``reproduce:`` are made of."""
    if name not in __all__:
        raise AttributeError(f"module 'moe_impls.testing' has no attribute {name!r}")
    with suite.imported():
        return getattr(importlib.import_module("correctness.problems"), name)
