"""What a mutant is: a right module changed in a line or two, and the check that must reject it."""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from correctness.checks import balance, routers, table
from correctness.checks.case import cases
from correctness.judging.finding import CheckFailed
from moe_impls.interface import Implementation


@dataclass(frozen=True)
class Mutant:
    """A right module, edited until it is wrong.

    edit: lines of the base, each after "- ", and those that take their place, after "+ ". Neither holds the
        base's indentation nor its comments; a line to be replaced occurs in the base exactly once. ``KEPT``
        is an empty dict, for what a mutant remembers between calls.
    killed_by: the check that must reject it; ``finding``: a regular expression that its message matches.
    base: the module that is edited.
    on: part of the ids of the problems where that shows; empty: any problem of the check may show it.
    source: a public report of the same mistake, as owner/repository#number or @commit.
    """

    name: str
    edit: str
    killed_by: str
    finding: str
    family: str
    base: str
    on: str = ""
    source: str = ""

    @property
    def kind(self) -> str:
        """What it is a wrong form of: experts (a ``forward``), router or loss."""
        if self.killed_by in {check.name for check in balance.CHECKS}:
            return "loss"
        return "router" if self.base == "moe_impls.router" else "experts"

    def load(self) -> types.ModuleType:
        """The edited module, run anew: no two share any state.

        Raises:
            ValueError: a line to be replaced does not occur in the base exactly once.
        """
        lines = inspect.getsource(importlib.import_module(self.base)).splitlines()
        for old, new in _changes(self.edit):
            found = [i for i in range(len(lines)) if [_code(line) for line in lines[i : i + len(old)]] == old]
            if len(found) != 1:
                raise ValueError(f"{self.name}: {old} occurs {len(found)} times in {self.base}, not once")
            indent = " " * (len(lines[found[0]]) - len(lines[found[0]].lstrip()))
            lines[found[0] : found[0] + len(old)] = [indent + line for line in new]
        text = "\n".join(lines) + "\n"
        module = types.ModuleType(f"mutant_{self.name}")
        module.__dict__["KEPT"] = {}
        filename = f"<{self.name}, a mutant of {self.base}>"
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        exec(compile(text, filename, "exec"), module.__dict__)
        return module


def _code(line: str) -> str:
    """A line without indentation and comment."""
    return line.strip().partition("  #")[0]


def _changes(edit: str) -> list[tuple[list[str], list[str]]]:
    """The lines to be replaced and those that replace them, for each change of an edit."""
    changes: list[tuple[list[str], list[str]]] = []
    before = ""
    for sign, line in ((line[0], line[2:]) for line in textwrap.dedent(edit).strip().splitlines()):
        if sign == "-" and before != "-":
            changes.append(([], []))
        changes[-1][sign == "+"].append(line.strip() if sign == "-" else line)
        before = sign
    return changes


class Trial(NamedTuple):
    """One check of a mutant on one problem."""

    check: str
    problem: str
    run: Callable[[], object]


def trials(mutant: Mutant) -> list[Trial]:
    """Everything that a right module in the mutant's place would be held to."""
    module = mutant.load()
    if mutant.kind == "loss":
        subject = balance.losses(mutant.name, module)
    elif mutant.kind == "router":
        subject = routers.router(mutant.name, module.route)
    else:
        subject = table.implementation(Implementation(mutant.name, module.forward, module.SUPPORT))
    return [
        Trial(case.check.name, case.problem_id, case.run)
        for case in cases([subject])
        if case.skip is None and not case.check.drawn
    ]


def judge(mutant: Mutant, check: str) -> str | None:
    """What a check finds first in a mutant; None if it passes.

    The check that is meant to reject the mutant runs on the problems that are meant to show it only. A check
    begins with a module that has not been called before.
    """
    on = mutant.on if check == mutant.killed_by else ""
    for trial in trials(mutant):
        if trial.check == check and on in trial.problem:
            try:
                trial.run()
            except CheckFailed as failure:
                return str(failure)
            except Exception as error:  # a mutant may raise where a right module does not
                return f"{type(error).__name__}: {error}"
    return None


def verdicts(mutant: Mutant) -> dict[str, str | None]:
    """What each check that applies to a mutant finds in it first; None for a check that it passes."""
    names = dict.fromkeys(trial.check for trial in trials(mutant))
    return {name: judge(mutant, name) for name in names}


KILLED, SURVIVED, OTHERWISE = "killed", "survived", "killed for another reason"


def verdict(mutant: Mutant, finding: str | None) -> str:
    """What ``finding``, of the check meant to reject it, makes of a mutant."""
    if finding is None:
        return SURVIVED
    return KILLED if re.search(mutant.finding, finding) else OTHERWISE


def require_killed(mutant: Mutant, finding: str | None) -> None:
    """Raise AssertionError unless the check meant to reject a mutant does, for the reason stated."""
    found = verdict(mutant, finding)
    if found != KILLED:
        meant = f"{mutant.killed_by!r}{' on ' + mutant.on if mutant.on else ''} must say {mutant.finding!r}"
        raise AssertionError(f"mutant {mutant.name} {found}: {meant}, it says {finding!r}{mutant.edit}")
