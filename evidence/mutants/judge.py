"""Which checks reject a mutant, and whether the one meant to does so for the reason stated."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import NamedTuple

from correctness.checks import balance, layers, routers, table
from correctness.checks.case import Subject, cases
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import Layer
from correctness.ranks import checks as ranks
from evidence.mutants.mutant import Mutant, run
from moe_impls.interface import Implementation
from moe_impls.layer_interface import LayerSupport


class Trial(NamedTuple):
    """One check of a module on one problem."""

    check: str
    problem: str
    run: Callable[[], object]


# What this room knows of the checks: those of each kind, and how a module becomes their subject.
CHECKS = {
    "experts": table.CHECKS,
    "router": routers.CHECKS,
    "layer": layers.CHECKS,
    "loss": balance.CHECKS,
    "ranks": ranks.CHECKS,
}


def _subject(kind: str, name: str, module: types.ModuleType) -> Subject:
    if kind == "loss":
        return balance.losses(name, module)
    if kind == "router":
        return routers.router(name, module.route)
    if kind == "layer":
        support = LayerSupport.of(getattr(module, "SUPPORT", LayerSupport()))
        routing = getattr(module, "routing", None)
        return layers.layer(name, Layer(module.Layer, module.read, support=support, routing=routing))
    if kind == "ranks":
        text = getattr(module, "TEXT", None) or inspect.getsource(module)
        return ranks.distributed(name, module.SUPPORT, from_text, name, text)
    return table.implementation(Implementation(name, module.forward, module.SUPPORT))


def from_text(name: str, text: str) -> Implementation:
    """Run the text of a module: the implementation that it holds, in another process than the module's."""
    module = run(text, types.ModuleType(name), f"<{name}>")
    return Implementation(name, module.forward, module.SUPPORT)


def trials(kind: str, name: str, module: types.ModuleType) -> list[Trial]:
    """List everything that a right module of a kind is held to, but for problems that are drawn."""
    return [
        Trial(case.check.name, case.problem_id, case.run)
        for case in cases([_subject(kind, name, module)])
        if case.skip is None and not case.check.drawn
    ]


def check_names(kind: str) -> list[str]:
    """List the names of the checks of a kind, in the order of the suite."""
    return list(dict.fromkeys(check.name for check in CHECKS[kind] if not check.drawn))


def finding(trial: Trial) -> str | None:
    """Run a check: what it finds, or None if it passes."""
    try:
        trial.run()
    except CheckFailed as failure:
        return str(failure)
    except Exception as error:  # a mutant may raise where a right module does not
        return f"{type(error).__name__}: {error}"
    return None


def judge(mutant: Mutant, check: str) -> str | None:
    """Run a check on a mutant: what it finds first, or None if the mutant passes.

    The check that is meant to reject the mutant runs on the problems that are meant to show it only. A check
    begins with a module that has not been called before.
    """
    on = mutant.on if check == mutant.killed_by else ""
    found = (
        finding(trial)
        for trial in trials(mutant.kind, mutant.name, mutant.load())
        if trial.check == check and on in trial.problem
    )
    return next((text for text in found if text is not None), None)


def verdicts(mutant: Mutant) -> dict[str, str | None]:
    """Run each check that applies to a mutant: what it finds first, or None for one that is passed."""
    names = dict.fromkeys(trial.check for trial in trials(mutant.kind, mutant.name, mutant.load()))
    return {name: judge(mutant, name) for name in names}


KILLED, SURVIVED, OTHERWISE = "killed", "survived", "killed for another reason"


def verdict(mutant: Mutant, finding: str | None) -> str:
    """Say what ``finding``, of the check meant to reject it, makes of a mutant."""
    if finding is None:
        return SURVIVED
    return KILLED if re.search(mutant.finding, finding) else OTHERWISE


def require_killed(mutant: Mutant, finding: str | None) -> None:
    """Raise AssertionError unless the check meant to reject a mutant does, for the reason stated."""
    found = verdict(mutant, finding)
    if found != KILLED:
        meant = f"{mutant.killed_by!r}{' on ' + mutant.on if mutant.on else ''} must say {mutant.finding!r}"
        edit = "\n".join(["", *mutant.edit])
        raise AssertionError(f"mutant {mutant.name} {found}: {meant}, it says {finding!r}{edit}")
