"""Options of ``pytest correctness`` and the parameters they give to the tests."""

from __future__ import annotations

import os

# Read by OpenMP when torch is loaded: threads that wait for work sleep instead of spinning. The problems are
# small, and on a busy machine spinning threads make them twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402

from correctness import layer_checks  # noqa: E402
from correctness.checks import cases  # noqa: E402
from moe_impls.registry import IMPLEMENTATIONS, ResolveError, check_signature, load_function, resolve  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe", "MoE implementations and routers under test")
    group.addoption(
        "--impl",
        action="append",
        metavar="NAME",
        help="check only this implementation (repeatable): a name, package.module:fn or path/file.py:fn",
    )
    group.addoption(
        "--router", metavar="FILE:FN", help="check only this route(logits, spec, *, selection_bias=None)"
    )
    group.addoption(
        "--layer", metavar="FILE:CLASS", help="check only this whole layer; its file holds read(layer), too"
    )
    group.addoption(
        "--seeds",
        type=int,
        metavar="N",
        help="of test_lookalikes.py: run every numeric problem on N seeds, not one seed of a few problems",
    )
    group.addoption(
        "--error-budget", metavar="CSV", help="write there how much of the budget each lookalike uses"
    )


def pytest_configure(config: pytest.Config) -> None:
    names, router = config.getoption("impl"), config.getoption("router")
    try:
        config.stash[SUBJECTS] = [resolve(name) for name in names or IMPLEMENTATIONS]
        config.stash[ROUTER] = _router(router or "moe_impls.router:route")
        layer = config.getoption("layer")
        config.stash[LAYERS] = [layer_checks.resolve_layer(layer)] if layer else layer_checks.own_layers()
    except ResolveError as error:
        raise pytest.UsageError(str(error)) from error


SUBJECTS = pytest.StashKey[list]()
ROUTER = pytest.StashKey[tuple]()
LAYERS = pytest.StashKey[list]()


def _router(name: str) -> tuple:
    _, function = load_function(name)
    check_signature(name, function, 2, ("selection_bias",))
    return name, function


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(
            "case",
            [
                pytest.param(
                    case, id=case.id, marks=[pytest.mark.skip(reason=case.skip)] if case.skip else []
                )
                for case in cases(config.stash[SUBJECTS])
            ],
        )
    if "router" in metafunc.fixturenames:
        name, function = config.stash[ROUTER]
        metafunc.parametrize("router", [pytest.param(function, id=name.rpartition(":")[2])])
    if "layer_case" in metafunc.fixturenames:
        layer_cases = layer_checks.cases(config.stash[LAYERS])
        metafunc.parametrize(
            "layer_case",
            [
                pytest.param(c, id=c.id, marks=[pytest.mark.skip(reason=c.skip)] if c.skip else [])
                for c in layer_cases
            ],
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --impl, --router or --layer only the tests of that subject run, and at least one must."""
    options = (("case", "impl"), ("router", "router"), ("layer_case", "layer"))
    wanted = {name for name, option in options if config.getoption(option)}
    if not wanted:
        return
    keep = [item for item in items if wanted & set(getattr(item, "fixturenames", ()))]
    dropped = [item for item in items if item not in set(keep)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = keep
    for name in config.getoption("impl") or ():
        cases = [c.params["case"] for i in keep if (c := getattr(i, "callspec", None)) and "case" in c.params]
        if not any(case.subject.name == name and case.skip is None for case in cases):
            raise pytest.UsageError(f"{name}: nothing that it declares in SUPPORT can be checked here")
