"""What the suite says first against a copy of the project with one file edited, in a process of its own.

A `Worker` has a copy of the project and a process that has loaded torch and what else the checks need but
nothing of the project. That process forks for each mutant, which saves most of the seconds that a verdict
takes, and the fork imports the project from the copy.
"""

from __future__ import annotations

import compileall
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = ("moe_impls", "correctness", "reporting", "tests", "pyproject.toml")  # what is copied
# In the names of cases for which Triton's interpreter takes minutes.
LARGER = ("generated", "power_of_two", "4096_tokens", "8192_tokens")
TEST_S, SEARCH_S = 120.0, 360.0  # of processor time, as `pytest correctness` gives each
WAITING_S = 1200.0  # that a check may wait on a busy machine, whatever it computes
HANGING_S = 7200.0  # until a process that cannot be interrupted is killed
MOST_BYTES = 2**34  # of address space: a wrong size must not take the machine's memory


class Judges(NamedTuple):
    """What a file is held to.

    subjects: (kind, name) of those that use it: of `correctness.session.subjects.FIND`, or ("layers", "").
    tests: files of tests/moe_impls that hold its checks of arguments and what else is its own.
    named: those of the tests, by pytest's -k; all if empty.
    interpreted: Triton's kernels are interpreted, without the cases that LARGER names.
    """

    subjects: tuple[tuple[str, str], ...]
    tests: tuple[str, ...] = ()
    named: str = ""
    interpreted: bool = False


class Verdict(NamedTuple):
    """The check that found something, what it found, both empty if none did, and processor seconds."""

    check: str
    finding: str
    seconds: float


class Worker:
    """A copy of the project and the process that judges it, until the block of ``with`` ends."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Worker:
        self.folder = tempfile.TemporaryDirectory(prefix="moe-mutation-")
        for name in PROJECT:
            copy = shutil.copytree if (self.root / name).is_dir() else shutil.copy2
            copy(self.root / name, Path(self.folder.name) / name)
        compileall.compile_dir(self.folder.name, quiet=1)
        self.child: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.child:
            self.child.end()
        self.folder.cleanup()

    def judge(self, file: str, text: str, judges: Judges) -> Verdict:
        """Say what is found first in the project with this text in place of a file."""
        from correctness.session.child import Child, Ended

        self.child = self.child or Child.of_functions()
        place, begin = Path(self.folder.name) / file, time.monotonic()
        right = place.read_bytes()
        place.write_text(text, encoding="utf-8")
        try:
            is_over = lambda: time.monotonic() - begin > HANGING_S  # noqa: E731
            return self.child.call(in_fork, self.folder.name, judges, is_over=is_over)
        except Ended as ended:
            self.child = None
            return Verdict("process", f"it {ended}", time.monotonic() - begin)
        finally:
            place.write_bytes(right)


def in_fork(folder: str, judges: Judges) -> Verdict:
    """Judge the project in a folder in a fork of this process, which does not load it."""
    import correctness.conftest  # noqa: F401  # for the libraries that it loads
    from correctness.session.child import ending

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_judge, args=(theirs, os.getpid(), folder, judges))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:  # a crash
        process.join()
        return Verdict("process", f"it {ending(process.exitcode)}", 0.0)
    finally:
        process.join()


def _judge(connection: Any, parent: int, folder: str, judges: Judges) -> None:
    import resource

    from correctness.session.child import die_with

    die_with(parent)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    names = [name for name in sys.modules if name.partition(".")[0] in PROJECT]
    if operators := sys.modules.get("moe_impls.operators"):
        operators.LIBRARY._destroy()  # or those of the copy could not be registered
    for name in names:
        del sys.modules[name]
    os.chdir(folder)
    root = str(Path(__file__).parents[2])
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", root))]
    sys.dont_write_bytecode = True
    os.environ.update({"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"})
    if judges.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        check, finding = _first_finding(judges)
    connection.send(Verdict(check, " ".join(finding.split("\n  reproduce:")[0].split()), time.process_time()))
    connection.close()
    os._exit(0)  # whatever threads a mutant has left


def _first_finding(judges: Judges) -> tuple[str, str]:
    """Run the cases of the subjects and the tests until one fails: its name and what it says.

    First come cases that tell most for their time, then the tests, and last what takes longest.
    """
    from correctness.session.limits import limited

    check = "import"
    try:
        with limited(TEST_S, None, wall_s=WAITING_S):
            found = _cases(judges)
        first = dict.fromkeys(case for case in found if _tells_for_its_time(case, found[0].subject))
        for case in first:
            check = case.id
            _run(case)
        check = "tests"
        failed, finding = _first_failure(judges) if judges.tests else ("", "")
        if failed:
            return failed, finding
        for case in sorted((case for case in found if case not in first), key=_is_long):
            check = case.id
            _run(case)
        return "", ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Timeout is no Exception, and a mutant may exit
        return check, str(error) or type(error).__name__


def _run(case: Any) -> None:
    import torch

    from correctness.judging.process_state import restored, settings
    from correctness.session.limits import limited

    seconds = SEARCH_S if case.check.drawn else TEST_S
    with restored(settings(torch.float32)), limited(seconds, None, wall_s=WAITING_S):
        case.run()


def _cases(judges: Judges) -> list[Any]:
    import hypothesis

    from correctness.checks.case import cases
    from correctness.session import profiles
    from correctness.session.layer_subject import own_layers
    from correctness.session.subjects import FIND

    only = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the first problem that fails will do
    hypothesis.settings.register_profile("first", profiles.QUICK, phases=only)
    hypothesis.settings.load_profile("first")
    subjects = []
    for kind, name in judges.subjects:
        subjects += own_layers() if kind == "layers" else [FIND[kind](name, "cpu")]
    listed = [case for case in cases(subjects) if case.skip is None]
    return [case for case in listed if not (judges.interpreted and any(name in case.id for name in LARGER))]


def _is_long(case: Any) -> bool:
    return bool(case.check.drawn) or case.check.name == "unusual_numbers"


def _tells_for_its_time(case: Any, first: Any) -> bool:
    """Tell whether a case is one of all options on a small problem, or the first of its check elsewhere.

    first: the subject whose cases they are, if it is no implementation.
    """
    check, problem = case.check, case.problem
    if case.subject.kind.name == "implementation":
        if check.name not in ("exact", "values"):
            return False
        return problem.T * problem.K <= 256 and max(problem.D, problem.F, problem.O, problem.E) <= 64
    is_slow = _is_long(case) or check.needs in ("fullgraph", "exports")
    return case.subject == first and problem in (None, check.problems[0]) and not is_slow


def _first_failure(judges: Judges) -> tuple[str, str]:
    """Run the tests until one fails: its name and what it says."""
    import pytest

    class First:
        check = finding = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.check:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.check, self.finding = report.nodeid, crash.message if crash else report.longreprtext

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and not self.check:
                self.check, self.finding = report.nodeid, report.longreprtext

    first = First()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--timeout={WAITING_S}"]
    tests = [*(f"tests/moe_impls/{name}" for name in judges.tests), "-k", judges.named]
    status = pytest.main([*options, *tests], plugins=[first])
    return (
        (first.check, first.finding)
        if first.check or not status
        else ("tests", f"pytest ended with {status!r}")
    )
