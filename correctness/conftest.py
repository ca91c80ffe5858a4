"""Options of ``pytest correctness`` and the parameters they give to the tests."""

from __future__ import annotations

import os

# Read by OpenMP when torch is loaded: threads that wait for work sleep instead of spinning. The problems are
# small, and on a busy machine spinning threads make them twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
from hypothesis import Phase, Verbosity, settings  # noqa: E402

from correctness import layer_checks  # noqa: E402
from correctness.checks import cases  # noqa: E402
from correctness.mutants import MUTANTS, table  # noqa: E402
from moe_impls.registry import IMPLEMENTATIONS, ResolveError, check_signature, load_function, resolve  # noqa: E402

# Hypothesis draws the same examples in every run, or with --hypothesis-profile=thorough many new ones.
QUICK = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,  # the failure itself says on which problem
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.register_profile("ci", QUICK)
settings.register_profile(
    "thorough",
    QUICK,
    max_examples=2000,
    derandomize=False,
    database=settings().database,
    verbosity=Verbosity.normal,
    print_blob=True,
)
settings.load_profile("ci")


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
        "--mutants",
        action="store_true",
        help="only the deliberately wrong subjects, each through every check; writes results/mutants.csv",
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
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize(
            "subject",
            [
                pytest.param(subject, id=subject.name)
                for subject in config.stash[SUBJECTS]
                if "cpu" in subject.support.devices
            ],
        )
    if "mutant" in metafunc.fixturenames:
        metafunc.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kind}-{mutant.name}")
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
    """With --impl, --router, --layer or --mutants only those tests run; of a subject at least one must."""
    options = (
        ("case", "impl"),
        ("subject", "impl"),
        ("router", "router"),
        ("layer_case", "layer"),
        ("mutant", "mutants"),
    )
    wanted = {name for name, option in options if config.getoption(option)}
    if not wanted:
        return
    keep = [item for item in items if wanted & set(getattr(item, "fixturenames", ()))]
    dropped = [item for item in items if item not in set(keep)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = keep
    for name in config.getoption("impl") or ():
        params = [callspec.params for item in keep if (callspec := getattr(item, "callspec", None))]
        subjects = [p["case"].subject for p in params if "case" in p and p["case"].skip is None]
        subjects += [p["subject"] for p in params if "subject" in p]
        if not any(subject.name == name for subject in subjects):
            raise pytest.UsageError(f"{name}: nothing that it declares in SUPPORT can be checked here")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("mutants"):
        _report_mutants(terminalreporter)


def _report_mutants(terminal: pytest.TerminalReporter) -> None:
    """The kill table, on the terminal and, if every mutant was judged, in the files of results/."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for report in (r for found in terminal.stats.values() for r in found if isinstance(r, pytest.TestReport)):
        for name, row in report.user_properties:
            if name == "mutant" and isinstance(row, dict):
                rows[row["kind"], row["mutant"]] = row
    judged = [rows[m.kind, m.name] for m in MUTANTS if (m.kind, m.name) in rows]
    if not judged:
        return
    frame = table.table(judged)
    terminal.section("mutants and the checks that kill them")
    for row in judged:
        kills = [column.partition(":")[2] for column in table.COLUMNS if row[column] == "killed"]
        others = f" and {len(kills) - 1} others" if len(kills) > 1 else ""
        terminal.write_line(
            f"{row['verdict']} {row['kind']:8} {row['mutant']:52} {row['meant_check']}{others}"
        )
    terminal.write_line(table.headline(frame))
    if len(judged) == len(MUTANTS):
        table.write(frame)
        terminal.write_line(f"{table.CSV}\n{table.SUMMARY}")
    else:
        terminal.write_line(f"{len(judged)} of {len(MUTANTS)} mutants judged: results/ is left as it is")
