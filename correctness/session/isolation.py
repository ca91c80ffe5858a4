"""``--isolate``: subjects run in a child process; one that kills its process fails a test, not the run.

pytest-xdist keeps one worker and replaces it when it dies. Here is what it does not know: which check was
running, by what the process ended, and where; and that an import, too, may end a process. The worker writes
what it is about to run into a file, its black box, and so does Python's fault handler with its last words.

The worker is xdist's own process and not one of ``child``: xdist sends tests and reports between processes
and starts another worker after a crash, which is most of what isolating a run of pytest takes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from correctness.judging.blame import REPRODUCE, own_frames
from correctness.session.child import DYING_S, Child, Ended, ending
from correctness.session.limits import MAX_CRASHES
from moe_impls.registry import ResolveError


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def use_a_worker(config: pytest.Config) -> None:
    """Make pytest-xdist run the tests in one child process."""
    if not config.pluginmanager.hasplugin("xdist"):
        raise pytest.UsageError("--isolate needs pytest-xdist: pip install pytest-xdist")
    config.option.numprocesses = config.option.numprocesses or 1
    config.option.maxworkerrestart = config.option.maxworkerrestart or MAX_CRASHES


def try_in_child(what: str, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a child process, to see whether that can be survived.

    Raises:
        ResolveError: as it does there, or because it ends the process; ``what`` says what was done.
    """
    child = Child.of_functions()
    try:
        child.call(_tried, function, *arguments)
    except Ended as error:
        raise ResolveError(f"{what} {error}") from None
    finally:
        child.end()


def _tried(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)  # what it returns need not travel


class BlackBox:
    """The plugin of a worker: its file holds what is running, and after a crash the stacks, too."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # until the process ends

    def pytest_sessionstart(self) -> None:
        faulthandler.enable(file=self.file)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        running = {
            "pid": os.getpid(),
            "test": item.nodeid,
            "start": time.time(),
            "subject": dict(item.user_properties).get("subject"),
        }
        self.file.truncate(0)
        self.file.write(json.dumps(running) + "\n")
        self.file.flush()
        return (yield)


class Controller:
    """The plugin beside pytest-xdist that says what a test was doing when its process ended."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moe-isolate-"))

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["black_box"] = str(self.folder / node.gateway.id)

    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        box = self.folder / report.node.gateway.id
        line, _, last_words = box.read_text(encoding="utf-8").partition("\n")
        running = json.loads(line)
        facts = running["subject"]
        if running["test"] != crashitem or not facts:
            return
        report.user_properties = [("subject", facts)]
        report.location = (*report.location[:2], crashitem.rpartition("::")[2])
        report.duration = time.time() - running["start"]
        how = ending(_exit_status(running["pid"]))
        if last_words.startswith("Timeout"):
            report.user_properties.append(("hung", True))
            how = "did not end in time, nor when it was interrupted"
        finding = f"{facts['name']} fails {facts['check']!r}: it {how}"
        report.longrepr = f"{finding}{_lines(last_words)}{REPRODUCE}{facts['code']}"

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _exit_status(pid: int) -> int | None:
    """The exit status of a child that is about to end; None if it has to be killed."""
    process = psutil.Process(pid)
    try:
        return process.wait(DYING_S)
    except psutil.TimeoutExpired:
        process.kill()
        return None


def _lines(last_words: str) -> str:
    """The subject's lines in what the fault handler wrote, the outermost first."""
    stack = [
        traceback.FrameSummary(file, int(line), name)
        for file, line, name in re.findall(r'^  File "(.+)", line (\d+) in (.+)$', last_words, re.MULTILINE)
    ]
    return "".join(f"\n  at {f.filename}:{f.lineno} in {f.name}" for f in own_frames(stack[::-1]))
