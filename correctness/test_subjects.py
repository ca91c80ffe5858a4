"""What judges a subject: implementations, routers and whole layers, on listed problems and generated ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from correctness.checks import routers
from correctness.checks.generated import ROUTING, VALUES, search
from correctness.checks.layers import LayerCase
from correctness.checks.routers import RouterCase, RouterSubject
from correctness.checks.table import Case
from correctness.problems import generated
from correctness.problems.routers import RouterProblem
from moe_impls.interface import (
    Implementation,
)


def test_values_hold_on_generated_problems(subject: Implementation) -> None:
    search(lambda problem: Case(subject, VALUES, problem).run(), generated.problems(subject.support))


def test_routing_holds_on_generated_problems(router: RouterSubject) -> None:
    def holds(problem: RouterProblem) -> None:
        RouterCase(ROUTING, problem).run(router.route, router.name)

    search(holds, generated.router_problems())


def test_implementation(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("fractions", case.run())


def test_layer(layer_case: LayerCase) -> None:
    layer_case.run()


@pytest.mark.parametrize("router_case", routers.cases(), ids=lambda case: case.id)
def test_router(router: RouterSubject, router_case: RouterCase) -> None:
    router_case.run(router.route, router.name)
