"""Options of ``pytest correctness`` and the parameters they give to the tests."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is loaded: threads that wait for work sleep instead of spinning. The problems are
# small, and on a busy machine spinning threads make them twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

import correctness.session.profiles  # noqa: E402, F401  # of Hypothesis
from correctness.checks import layers  # noqa: E402
from correctness.checks.table import cases  # noqa: E402
from correctness.judging.finding import CheckFailed, Timeout  # noqa: E402
from correctness.judging.process_state import restored  # noqa: E402
from correctness.judging.process_state import settings as process_settings  # noqa: E402
from correctness.problems.problem import check_device  # noqa: E402
from correctness.session import isolation, shrink, summary, verdict  # noqa: E402
from correctness.session.limits import Limits, time_limit  # noqa: E402
from correctness.session.subjects import Subjects, find_subjects  # noqa: E402

MOST_WORKERS = 8  # each holds a copy of torch in memory


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
    elif _is_whole(config) and config.pluginmanager.hasplugin("xdist"):
        config.option.numprocesses = min(torch.get_num_threads(), MOST_WORKERS)
        os.environ["OMP_NUM_THREADS"] = "1"  # of each worker


def _is_whole(config: pytest.Config) -> bool:
    """Whether all of ``pytest correctness`` is to be run, if only on some subjects, and nothing says how."""
    options = (
        *("keyword", "markexpr", "deselect", "lf", "failedfirst"),  # which tests
        *("collectonly", "usepdb", "trace", "maxfail"),  # and how
    )
    folders = {Path(argument).resolve() for argument in config.args}
    return (
        folders == {Path(__file__).parent}
        and not any(config.getoption(name, None) for name in options)
        and config.getoption("numprocesses", None) is None  # -n 0 is an answer, too
        and config.getoption("capture") != "no"
    )


def pytest_configure(config: pytest.Config) -> None:
    wanted = (config.getoption("impl"), config.getoption("router"), config.getoption("layer"))
    limits, is_worker = Limits(config), isolation.is_worker(config)
    isolated = config.getoption("isolate") and not is_worker
    # Of the compiler's own making, where a subject's file holds a torch.compile.
    warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
    if not is_worker:
        verdict.begin(config)
    try:
        if isolated:
            names = [*(wanted[0] or ()), *filter(None, wanted[1:])]
            what = f"importing {', '.join(names) or 'the project'}"
            isolation.try_in_child(what, find_subjects, *wanted, time_limit(config))
        if not isolated or config.option.collectonly:
            config.stash[SUBJECTS] = find_subjects(*wanted, time_limit(config), _device(config))
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[object]:
    """A subject that changes a setting of the process does not change what the tests after it find."""
    with restored(process_settings(torch.float32)):
        return (yield)


def _device(config: pytest.Config) -> str:
    check_device(config.option.device, "--device")
    return config.option.device


SUBJECTS = pytest.StashKey[Subjects]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(
            "case",
            [
                pytest.param(
                    case, id=case.id, marks=[pytest.mark.skip(reason=case.skip)] if case.skip else []
                )
                for case in cases(config.stash[SUBJECTS].implementations, device=config.option.device)
            ],
        )
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize(
            "subject",
            [
                pytest.param(subject, id=subject.name)
                for subject in config.stash[SUBJECTS].implementations
                if "cpu" in subject.support.devices
            ],
        )
    if "router" in metafunc.fixturenames:
        router = config.stash[SUBJECTS].router
        metafunc.parametrize("router", [pytest.param(router, id=router.name.rpartition(":")[2])])
    if "layer_case" in metafunc.fixturenames:
        layer_cases = layers.cases(config.stash[SUBJECTS].layers)
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
    )
    wanted = {name for name, option in options if config.getoption(option)}
    if not wanted:
        return
    keep = [item for item in items if wanted & set(getattr(item, "fixturenames", ()))]
    dropped = [item for item in items if item not in set(keep)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = keep


def pytest_itemcollected(item: pytest.Item) -> None:
    if facts := summary.facts(item):
        item.user_properties.append(("subject", facts))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A finding about a subject is told without the traceback through the suite (see --full-trace)."""
    try:
        return (yield)
    except (CheckFailed, Timeout) as failure:
        if "subject" not in dict(pyfuncitem.user_properties):
            raise
        smaller = ""
        if isinstance(failure, CheckFailed):
            pyfuncitem.user_properties.append(("fractions", failure.fractions))
            smaller = _smallest_failure(pyfuncitem)
        if pyfuncitem.config.option.fulltrace:
            raise
        raise pytest.fail.Exception(f"{failure}{smaller}", pytrace=False) from None


SHRINKING_S = 15.0  # what looking for smaller problems may take in a run
SHRUNK = pytest.StashKey[dict[tuple[str, str], float]]()  # (subject, check) -> the seconds that it took


def _smallest_failure(item: pytest.Function) -> str:
    """A line that reproduces the smallest problem on which the test's check fails, once for each check."""
    case: Any = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    spent = item.config.stash.setdefault(SHRUNK, {})
    if case is None or (case.subject.name, case.check.name) in spent or sum(spent.values()) > SHRINKING_S:
        return ""
    begin = time.monotonic()
    try:
        smallest = shrink.smallest_failure(case.check.function, case.subject, case.problem)
    except Timeout:  # the failure itself is still to be told
        smallest = case.problem
    spent[case.subject.name, case.check.name] = time.monotonic() - begin
    return "" if smallest == case.problem else f"\n  smallest failing case: {smallest.code()}"
