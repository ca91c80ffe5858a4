"""What goes wrong inside a subject becomes a finding about it: the one way for all that is under test."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from correctness.judging.finding import CheckFailed, Timeout
from correctness.judging.process_state import instruments_kept
from moe_impls.registry import one_line

SHOWN_LINES = 6
SHOWN_CHARACTERS = 1000
REPRODUCE = "\n  reproduce: "
_SUITE = Path(__file__).parents[1]
_RAISING = {
    __file__,
    str(_SUITE / "session" / "limits.py"),
}  # where exits and timeouts are raised
_PYTHON = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
_TORCH = (Path(torch.__file__).parent,)
_PACKAGES = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))


@contextlib.contextmanager
def as_finding(verdict: str, code: str) -> Iterator[None]:
    """Turn whatever is raised inside into a finding about the subject: an exception, a skip, an exit.

    Args:
        verdict: the beginning of the message, such as "name fails 'values'".
        code: one line of Python that makes the problem or the finding again, in place of the finding's own.

    Raises:
        CheckFailed: verdict, what was raised, the lines of the subject that were running, and ``code``.
        Timeout: likewise, where the subject took too long.
    """
    try:
        with process_kept(), instruments_kept():
            yield
    except KeyboardInterrupt:
        raise
    except CheckFailed as failure:
        finding = str(failure).partition(REPRODUCE)[0]
        lines = lines_of(failure)
        message = f"{verdict}: {finding}{lines}{REPRODUCE}{code}"
        raise CheckFailed(message, failure.fractions) from failure
    except BaseException as error:
        lines = lines_of(error) or _outside(error)
        message = f"{verdict}: {one_line(error)[:SHOWN_CHARACTERS]}{lines}{REPRODUCE}{code}"
        raise (Timeout if isinstance(error, Timeout) else CheckFailed)(message) from error


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Make ``os._exit`` raise in this process: a subject that calls it would end the run, and as passed."""
    exit_at_once, process = os._exit, os.getpid()
    modules = (os, sys.modules[os.name])  # posix, from which os has it

    def refuse(status: int) -> NoReturn:
        if os.getpid() == process:
            raise SystemExit(f"os._exit({status})")
        exit_at_once(status)  # of a process that was forked inside

    for module in modules:
        setattr(module, "_exit", refuse)  # noqa: B010  # whose type is that it never returns
    try:
        yield
    finally:
        for module in modules:
            setattr(module, "_exit", exit_at_once)  # noqa: B010


def lines_of(error: BaseException) -> str:
    """List the subject's lines where an exception, or else what caused it, was raised, outermost first."""
    told: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
    while told:
        if own := own_frames(told.stack):
            shown = own if len(own) <= SHOWN_LINES else [own[0], *own[1 - SHOWN_LINES :]]
            return "".join(f"\n  at {_render(frame)}" for frame in shown)
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
    return ""


def _outside(error: BaseException) -> str:
    """Name the line of the suite that was running if none of the subject was, as when a backward starts."""
    suite = [f for f in traceback.extract_tb(error.__traceback__) if _is_suite(f.filename)]
    return f"\n  raised outside its own lines, at {_render(suite[-1])}" if suite else ""


def _render(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")


def own_frames(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Pick what the suite called, without the insides of Python, PyTorch and, if more is left, packages."""
    last = max((i for i, frame in enumerate(stack) if _is_suite(frame.filename)), default=-1)
    called = [f for f in stack[last + 1 :] if f.filename not in _RAISING and not f.filename.startswith("<")]
    called = [f for f in called if not _is_within(f, _TORCH)]
    installed = [f for f in called if _is_within(f, _PACKAGES)]
    return [f for f in called if not _is_within(f, _PACKAGES + _PYTHON)] or installed


def _is_suite(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(_SUITE) and file not in _RAISING and not path.name.startswith("test_")


def _is_within(frame: traceback.FrameSummary, places: tuple[Path, ...]) -> bool:
    return any(Path(frame.filename).is_relative_to(place) for place in places)
