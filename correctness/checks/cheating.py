"""Checks that the work was done: by the implementation that is named, before it returned, on a true clock."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
import time
import types
from typing import Any

import torch

from correctness.judging.calling import check_output, run_both_ways
from correctness.judging.finding import CheckFailed
from correctness.judging.process_state import _INSTRUMENTS
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls.interface import Implementation
from moe_impls.registry import IMPLEMENTATIONS, PREPARED

LATER_S = 0.1  # how long a result is watched for changes after it was returned

WARM_UPS = 20  # calls in which a pool may start its threads
# How a program looks something up, or ends a loop: no work that failed.
ORDINARY = (StopIteration, GeneratorExit, LookupError)


def instruments_untouched(subject: Implementation, problem: Problem) -> None:
    """Replace no clock and no function that compares results."""
    next(run_both_ways(subject, problem))
    changed = [
        f"{o.__name__}.{name}" for (o, name), value in _INSTRUMENTS.items() if getattr(o, name) is not value
    ]
    if changed:
        raise CheckFailed(f"a call replaces {', '.join(changed)}")


def no_fallback(subject: Implementation, problem: Problem) -> None:
    """Leave no work to another implementation of this project after an exception in code of its own."""
    own = getattr(inspect.unwrap(subject.prepare or subject.forward), "__code__", None)
    if own is None:  # no Python function: what it runs has no lines to follow
        return
    modules = {
        name: importlib.import_module(f"moe_impls.{name.removesuffix(PREPARED)}") for name in IMPLEMENTATIONS
    }
    others = {
        str(module.__file__): name for name, module in modules.items() if module.__file__ != own.co_filename
    }
    raised: list[str] = []
    replaced: list[str] = []

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file == own.co_filename:
            if event == "exception" and not issubclass(argument[0], ORDINARY):
                raised.append(f"{argument[0].__name__} in line {frame.f_lineno}")
            return trace
        if raised and file in others and frame.f_code.co_name in ("forward", "prepare"):
            replaced.append(f"after {raised[0]} of its own code {others[file]} did the work")
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        next(run_both_ways(subject, problem))
    finally:
        sys.settrace(before)
    if replaced:
        raise CheckFailed(replaced[0])


def done_when_it_returns(subject: Implementation, problem: Problem) -> None:
    """Return a finished result: no thread that was started goes on, and nothing changes afterwards."""
    inputs = make_inputs(problem)
    with torch.no_grad():
        before: set[threading.Thread] = set()
        for _ in range(WARM_UPS):  # they may import modules and start the threads of a pool, one by one
            subject.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
            earlier, before = before, set(threading.enumerate())
            if before == earlier:
                break
        y = subject.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
        check_output(y, inputs)
        returned = y.clone()
        left = [thread.name for thread in threading.enumerate() if thread not in before]
        time.sleep(LATER_S)
    if left:
        raise CheckFailed(f"a call leaves {', '.join(left)} running")
    if not torch.equal(y, returned):
        raise CheckFailed("y changes after it was returned")
