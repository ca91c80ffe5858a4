"""``--verdict FILE.json``: what a run found, and beside it the same as a page of markdown for a pull request.

Both are on disk from the moment that the run begins and are written again while it goes on, so that a process
that is killed leaves what was found until then. `verdict.schema.json` says what the JSON holds.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from correctness.judging.blame import REPRODUCE
from correctness.session.families import FAMILIES
from correctness.session.summary import TENSORS, Result, result
from correctness.session.verdict_page import page
from moe_impls import suite
from moe_impls.interface import DTYPES, dtype_name
from moe_impls.registry import PEERS, PEERS_ON_RANKS, PREPARED
from reporting import provenance
from reporting.pages import write_atomically

FORMAT = 1  # of the JSON; another number where a reader of this one would go wrong
KILLED = "the process ended before the run did, as by a crash or a lack of memory; --isolate survives both"
SELECTING = {"keyword": "-k", "markexpr": "-m", "deselect": "--deselect", "lf": "--lf"}
LIBRARIES = ("torch", "numpy", "triton", "transformers")
PLAIN_S, FAILED_S = (
    5.0,
    0.2,
)  # between two times that it is written, where nothing new failed and where something did


def begin(config: pytest.Config) -> None:
    """Register the plugin if ``--verdict`` asks for it, and write a first verdict: nothing is known yet.

    Raises:
        UsageError: the file has another suffix than .json, or cannot be written.
    """
    if not config.option.verdict:
        return
    path = Path(config.option.verdict).absolute()
    if path.suffix != ".json":
        raise pytest.UsageError(f"--verdict is {config.option.verdict}; it must end in .json")
    plugin = Verdict(path, config)
    try:
        plugin.write()
    except OSError as error:
        raise pytest.UsageError(f"--verdict: {path} cannot be written: {error.strerror or error}") from error
    config.pluginmanager.register(plugin, "moe-verdict")


def refuse(config: pytest.Config, reason: str) -> None:
    """Let the verdict say why nothing can be checked."""
    plugin: Verdict | None = config.pluginmanager.get_plugin("moe-verdict")
    if plugin:
        plugin.end(reason)


class Verdict:
    """The pytest plugin, in the process that workers report to, that writes the verdict of all results."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self.path, self.config = path, config
        self.results: dict[str, Result] = {}  # by test
        self.planned: list[str] = []
        self.ended: set[str] = set()
        self.reason = KILLED  # why the run is not complete; empty if it is
        self.told = ""  # what pytest says of a test that has no result
        self.begun, self.clock = datetime.now(UTC), time.monotonic()
        self.written, self.failure = 0.0, ""
        named = [("implementation", name) for name in config.option.impl or ()]
        named += [("router", config.option.router)] if config.option.router else []
        # Of families the results say which blocks there are.
        named += [("layer", name) for name in config.option.layer or () if not name.startswith(FAMILIES)]
        self.sources = {subject: source(*subject) for subject in named}  # as they are when they are imported
        self.made_by = versions(), machine(config.option.device)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: object) -> NoReturn:
        self.session.shouldstop = "SIGTERM ended the run"  # should a subject catch what is raised here
        raise KeyboardInterrupt(self.session.shouldstop)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.planned = [item.nodeid for item in session.items if "subject" in dict(item.user_properties)]
        self._write_if_possible()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.planned = list(ids)
        self._write_if_possible()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if ended := result(report):
            self.results[report.nodeid] = ended
        elif report.failed:
            self.told = str(report.longrepr).partition("\n")[0]  # of a crash, by pytest-xdist
        if report.when == "call" or not report.passed:
            self.ended.add(report.nodeid)
        if time.monotonic() - self.written > (FAILED_S if report.failed else PLAIN_S):
            self._write_if_possible()

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.end(str(excinfo.value) or "it was interrupted")  # who interrupts may not wait for what follows

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.end(f"internal error: {excinfo.exconly()}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)
        reason = self.reason
        if reason == KILLED:
            left = len(set(self.planned) - self.ended)
            not_run = f"{left} tests were not run" if left else "" if self.planned else "no test was selected"
            if exitstatus == pytest.ExitCode.USAGE_ERROR:
                not_run = "pytest refused the request"
            reason = str(session.shouldfail or session.shouldstop or self.told or not_run)
        self.end(reason)
        if self.failure and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Say where it is, in the very last line."""
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and self.reason != KILLED:
            paths = (os.path.relpath(path) for path in (self.path, self.path.with_suffix(".md")))
            terminal.write_line(self.failure or f"verdict: {' and '.join(paths)}")

    def end(self, reason: str) -> None:
        """Write the verdict of a run that is complete, or is not for this reason."""
        self.reason = reason
        self._write_if_possible()

    def _write_if_possible(self) -> None:
        try:
            self.write()
            self.failure = ""
        except OSError as error:
            self.failure = f"verdict: {self.path} cannot be written: {error.strerror or error}"

    def write(self) -> None:
        """Write both files, each whole or not at all."""
        found = self.found()
        write_atomically(self.path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        write_atomically(self.path.with_suffix(".md"), page(found).encode())
        self.written = time.monotonic()

    def found(self) -> dict[str, Any]:
        """What the JSON holds."""
        place = {test: number for number, test in enumerate(self.planned)}
        tests = sorted(self.results, key=lambda test: (place.get(test, len(place)), test))
        by_subject: dict[tuple[str, str], list[Result]] = {subject: [] for subject in self.sources}
        for test in tests:
            facts = self.results[test].facts
            by_subject.setdefault((facts["kind"], facts["name"]), []).append(self.results[test])
        subjects = []
        for subject, results in by_subject.items():
            if subject not in self.sources:
                self.sources[subject] = source(*subject)
            kind, name = subject
            subjects.append({"kind": kind, "name": name, "source": self.sources[subject], **of(results)})
        failed = any(r.outcome == "failed" for r in self.results.values())
        versions, machine = self.made_by
        return {
            "format": FORMAT,
            "outcome": "wrong" if failed else "incomplete" if self.reason else "right",
            "complete": not self.reason,
            "reason": self.reason,
            "selection": selection(self.config),
            "planned": len(self.planned),
            "subjects": subjects,
            "versions": versions,
            "machine": machine,
            "run": {
                "arguments": sys.argv[1:],
                "begin": self.begun.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self.clock, 1),
            },
        }


def selection(config: pytest.Config) -> list[str]:
    """The options that leave out tests which would be run without them."""
    option = config.option
    chosen = []
    for name, flag in SELECTING.items():
        value = getattr(option, name, None)
        values = value if isinstance(value, list) else [value]
        chosen += [flag if v is True else f"{flag} {shlex.quote(str(v))}" for v in values if v]
    return chosen + [argument for argument in config.args if "::" in argument]


def source(kind: str, name: str) -> dict[str, str] | None:
    """The file that a subject's name leads to, and its SHA-256; None if there is none."""
    place, package = name.rpartition(":")[0], Path(suite.__file__).parent
    if place.endswith(".py"):
        path = Path(place)
    elif place:
        path = _file_of_module(place)
    elif kind in ("layer", "losses"):
        path = package / f"{kind}.py"
    elif name in PEERS or name in PEERS_ON_RANKS:
        path = package / "peers" / f"{name.partition('.')[0]}.py"
    else:
        path = package / f"{name.removesuffix(PREPARED)}.py"
    if path is None or not path.is_file():
        return None
    shown = path.name if path.is_relative_to(package) else os.path.relpath(path)
    return {"file": shown, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _file_of_module(name: str) -> Path | None:
    """The file of a module that is not imported for it; None if there is none."""
    top, *inner = name.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top)
    if spec is None or not inner:
        return Path(spec.origin) if spec and spec.origin else None
    places = [Path(folder, *inner) for folder in spec.submodule_search_locations or ()]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def versions() -> dict[str, str]:
    found = {
        "moe-impls": suite.project()["version"],
        "commit": provenance.git_commit(),
        "python": platform.python_version(),
    }
    for name in LIBRARIES:
        if list(importlib.metadata.distributions(name=name)):
            found[name] = importlib.metadata.version(name)
    return found | {"torch": str(torch.__version__)}  # with its build, as +cu130


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "device_name": provenance.device_name(device),
        "processor": provenance.device_name("cpu"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def of(results: list[Result]) -> dict[str, Any]:
    """What the JSON says of the results of one subject."""
    run = [r for r in results if r.outcome != "skipped"]
    exact = [r for r in run if r.facts["exact"]]
    failed = [r for r in run if r.outcome == "failed"]
    reasons = Counter(r.reason for r in results if r.outcome == "skipped")
    checks: dict[str, list[Result]] = {}
    for r in results:
        checks.setdefault(r.facts["check"], []).append(r)
    return {
        "tests": _outcomes(results),
        "problems": _problems(run),
        "bit_equal": {"run": len(exact), "passed": sum(r.outcome == "passed" for r in exact)},
        "checks": [
            {
                "name": name,
                **_outcomes(own),
                "problems": _problems([r for r in own if r.outcome != "skipped"]),
            }
            for name, own in checks.items()
        ],
        "skipped": [{"reason": reason, "tests": n} for reason, n in sorted(reasons.items())],
        "worst_errors": worst_errors(run),
        "findings": [finding(r) for r in failed],
    }


def _outcomes(results: Iterable[Result]) -> dict[str, int]:
    counts = Counter(r.outcome for r in results)
    return {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")}


def _problems(results: Iterable[Result]) -> int:
    return len({r.facts["problem"] for r in results})


def worst_errors(results: Iterable[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """By tensor and dtype the worst error as a fraction of the budget, and its problem."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for r in results:
        for tensor, fraction in r.fractions.items() if not r.facts["exact"] else ():
            at = tensor, r.facts["dtype"]
            known = worst.get(at)
            if known is None or _size(fraction) > _size(known[0]):
                worst[at] = fraction, r.facts["problem"]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for tensor in TENSORS:
        for dtype in map(dtype_name, DTYPES):
            if (tensor, dtype) in worst:
                fraction, problem = worst[tensor, dtype]
                shown = float(f"{fraction:.3g}") if math.isfinite(fraction) else None
                found.setdefault(tensor, {})[dtype] = {"fraction": shown, "problem": problem}
    return found


def _size(fraction: float) -> float:
    """NaN is as bad as infinity."""
    return math.inf if math.isnan(fraction) else fraction


def finding(failed: Result) -> dict[str, str]:
    facts = failed.facts
    _, _, after = failed.finding.partition(REPRODUCE)
    return {
        "check": facts["check"],
        "problem": facts["problem"],
        "dtype": facts["dtype"],
        "message": failed.finding,
        "reproduce": after.partition("\n")[0] or facts["code"],
    }
