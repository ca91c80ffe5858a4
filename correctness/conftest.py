"""Options of ``pytest correctness``, the cases that they select, and how a finding is reported."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

# Read by OpenMP when torch is loaded: threads that wait for work sleep instead of spinning. The problems are
# small, and on a busy machine spinning threads make them twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

import correctness.session.profiles  # noqa: E402, F401  # of Hypothesis
from correctness.checks.case import Case, Subject, cases  # noqa: E402
from correctness.judging.finding import CheckFailed, Timeout  # noqa: E402
from correctness.judging.process_state import restored  # noqa: E402
from correctness.judging.process_state import settings as process_settings  # noqa: E402
from correctness.problems.problem import check_device  # noqa: E402
from correctness.session import isolation, parallel, shrink, summary, verdict  # noqa: E402
from correctness.session.limits import Limits, time_limit  # noqa: E402
from correctness.session.subjects import find_subjects  # noqa: E402
from reporting.provenance import which  # noqa: E402

SUBJECTS = pytest.StashKey[list[Subject]]()
DRAWN = 3  # times the limit of a test is that of one with a hundred problems


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe", "MoE implementations, routers and layers under test")
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
        "--layer",
        action="append",
        metavar="FILE:CLASS",
        help="check only this whole layer (repeatable): its file holds read(layer), too; transformers:FAMILY "
        "means a block of transformers, transformers:all every one",
    )
    group.addoption("--device", default="cpu", metavar="NAME", help="of implementations: cpu (default), cuda")
    group.addoption(
        "--isolate",
        action="store_true",
        help="run in a child process: a crash fails a test, not the run",
    )
    group.addoption(
        "--verdict", metavar="FILE.json", help="write there what was found, and as a page beside it (.md)"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    if isolation.is_worker(config):
        return
    if config.getoption("isolate"):
        isolation.use_a_worker(config)
    else:
        parallel.use_workers(config)


def pytest_configure(config: pytest.Config) -> None:
    impl, router, layer = (config.getoption(name) for name in ("impl", "router", "layer"))
    wanted = (impl, [router] if router else [], layer or [])
    limits, is_worker = Limits(config), isolation.is_worker(config)
    isolated = config.getoption("isolate") and not is_worker
    # Of the compiler's own making, where a subject's file holds a torch.compile.
    warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
    if not is_worker:
        verdict.begin(config)
    try:
        if isolated:
            names = ", ".join(name for names in wanted for name in names or ())
            what = f"importing {names or 'the project'}"
            isolation.try_in_child(what, find_subjects, *wanted, time_limit(config))
        if not isolated or config.option.collectonly:
            check_device(config.option.device, "--device")
            config.stash[SUBJECTS] = find_subjects(*wanted, time_limit(config), config.option.device)
    except ValueError as error:
        verdict.refuse(config, str(error))
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(limits)
    if not is_worker:
        config.pluginmanager.register(summary.Summary())
    if isolated:
        config.pluginmanager.register(isolation.Controller())
    elif box := getattr(config, "workerinput", {}).get("black_box"):
        black_box = isolation.BlackBox(box)
        limits.output = black_box.file
        config.pluginmanager.register(black_box)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which copy of the project judges: a checkout and an installed one may lie side by side.

    The command `moe-impls`, which loads no conftest as such, has said it already.
    """
    return [] if config.option.noconftest else [which()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seconds = time_limit(metafunc.config)

    def marks(case: Case) -> list[pytest.MarkDecorator]:
        if case.skip:
            return [pytest.mark.skip(reason=case.skip)]
        return [pytest.mark.timeout(DRAWN * seconds)] if case.check.drawn else []

    listed = cases(metafunc.config.stash[SUBJECTS])
    metafunc.parametrize("case", [pytest.param(case, id=case.id, marks=marks(case)) for case in listed])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    parallel.exit_status(session)


def pytest_itemcollected(item: pytest.Item) -> None:
    if facts := summary.facts(item):
        item.user_properties.append(("subject", facts))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """Put back what a subject changes in the process, so that the next test does not find it."""
    with restored(process_settings(torch.float32)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Report a finding without the traceback through the suite (see --full-trace)."""
    try:
        return (yield)
    except (CheckFailed, Timeout) as failure:
        smaller = ""
        if isinstance(failure, CheckFailed):
            pyfuncitem.user_properties.append(("fractions", failure.fractions))
            case: Any = pyfuncitem.funcargs["case"]
            smaller = shrink.smaller_failure(pyfuncitem.config, case)
        if pyfuncitem.config.option.fulltrace:
            raise
        raise pytest.fail.Exception(f"{failure}{smaller}", pytrace=False) from None
