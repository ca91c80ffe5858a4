"""One check of one subject on one problem: the records that all kinds of subjects share, and the one loop.

A check is a function that raises ``CheckFailed`` with its finding. The same checks judge the project's own
subjects, a stranger's, and the deliberately wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis.strategies import SearchStrategy

from correctness.checks.search import search
from correctness.judging.blame import as_finding
from correctness.judging.finding import CheckFailed
from moe_impls.interface import Support

# Checks that a single call on the problem shows; where several calls tell, the check has to run again.
OF_ONE_CALL = ("values", "exact", "output", "gradients", "gradcheck")


@dataclass(frozen=True)
class Check:
    """What subjects of one kind are held to.

    function: the check; the first line of its docstring says what a subject must do.
    problems: those that it runs on; None stands for a check that makes its own.
    needs: a declaration without which it does not apply: a field of Support that must be true, or what the
        subject must have, such as "prepare" or "losses"; several are joined by " and ".
    fits: options of the problems that a subject does not declare may be replaced by others that it does.
    drawn: in place of listed problems, Hypothesis' way to make some up for what is declared.
    share: of the examples of Hypothesis' profile, how many are drawn.
    """

    function: Callable[..., dict[str, float] | None]
    problems: tuple[Any, ...] = (None,)
    needs: str = ""
    fits: bool = True
    drawn: Callable[[Any], SearchStrategy[Any]] | None = None
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.function.__name__


def _as_it_is(subject: Subject, check: Check, problem: Any) -> Any:
    return problem


def _everything(support: Any, problem: Any) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Kind:
    """What is particular to one kind of subject.

    name: implementation, router, layer or losses.
    checks: what each subject of the kind is held to; what tells most comes first.
    arguments: what a check's function is called with in a case.
    fit: makes a problem one that the subject takes, where it can; None if it is not tested on it.
    unsupported: why a declaration takes a problem out; None if it does not.
    where: what a finding says of its problem before anything else.
    explain: makes of a case's finding one that tells the cause.
    variant: what those of a name are, of which other subjects of that name are not.
    """

    name: str
    checks: tuple[Check, ...]
    arguments: Callable[[Case], tuple[Any, ...]]
    fit: Callable[[Subject, Check, Any], Any] = _as_it_is
    unsupported: Callable[[Any, Any], str | None] = _everything
    where: Callable[[Any], str] = lambda problem: ""
    explain: Callable[[Case, CheckFailed], CheckFailed] = lambda case, failure: failure
    variant: str = ""


@dataclass(frozen=True)
class Subject:
    """What is under test.

    tested: an Implementation, a router's function, a Layer, or a module with balance losses.
    support: what it declares, a Support or LayerSupport; nothing else is skipped.
    share: of the examples of a check whose problems are drawn, how many are tried: several subjects may be
        one piece of code.
    """

    kind: Kind
    name: str
    tested: Any
    support: Any = Support()
    device: str = "cpu"
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    """One check of one subject on one problem."""

    subject: Subject
    check: Check
    problem: Any = None

    @property
    def problem_id(self) -> str:
        """A short name of the problem; empty for a check that makes its own."""
        return "" if self.problem is None else self.problem.id

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.check.name, self.problem_id, self.subject.name)))

    @property
    def skip(self) -> str | None:
        """Why the subject's declaration takes this case out; None if it is to be run."""
        tested, support = self.subject.tested, self.subject.support
        for needs in self.check.needs.split(" and ") if self.check.needs else ():
            if not (getattr(support, needs, False) or getattr(tested, needs, None)):
                return f"{needs} not declared"
        if self.check.drawn and "cpu" not in getattr(support, "devices", ("cpu",)):
            return "device cpu not declared"
        return None if self.problem is None else self.subject.kind.unsupported(support, self.problem)

    def code(self) -> str:
        """Write one line of Python that makes the problem, where one call on it tells, or runs the case."""
        is_of_one_call = self.check.drawn or self.check.name in OF_ONE_CALL
        if is_of_one_call and hasattr(self.problem, "code"):
            return self.problem.code()
        words = (self.subject.kind.name, self.subject.name, self.check.name, self.problem_id)
        arguments = [repr(word) for word in words if word]
        if self.subject.device != "cpu":
            arguments.append(f"device={self.subject.device!r}")
        return f"from moe_impls.testing import rerun; rerun({', '.join(arguments)})"

    def run(self) -> dict[str, float]:
        """Return the worst error of each tensor as a fraction of its budget, where the check measures that.

        Raises:
            CheckFailed: the subject fails; a check whose problems are drawn fails for the smallest of them.
        """
        check, kind = self.check, self.subject.kind
        if check.drawn and self.problem is None:
            drawn, share = check.drawn(self.subject.support), check.share * self.subject.share
            search(lambda problem: replace(self, problem=problem).run(), drawn, share)
            return {}
        where = "" if self.problem is None else kind.where(self.problem)
        with as_finding(f"{self.subject.name} fails {check.name!r}{where}", self.code()):
            try:
                return check.function(*kind.arguments(self)) or {}
            except CheckFailed as failure:
                raise kind.explain(self, failure) from failure.__cause__


def cases(subjects: Iterable[Subject], checks: Iterable[Check] | None = None) -> list[Case]:
    """List every case of these subjects, in an order in which a wrong one is found soon.

    The first problem of each check comes first, then the others, and problems that are drawn last. Subjects
    of a kind take turns on each problem, whose oracle is then made once.

    Args:
        checks: those of each subject's kind by default.
    """
    subjects = list(subjects)
    found: dict[Case, None] = {}
    for kind in dict.fromkeys(subject.kind for subject in subjects):
        own = [subject for subject in subjects if subject.kind is kind]
        pairs = [(c, p) for c in (kind.checks if checks is None else checks) for p in c.problems]
        for check, problem in sorted(pairs, key=lambda pair: _turn(*pair)):
            for subject in own:
                fitted = None if problem is None else kind.fit(subject, check, problem)
                if problem is None or fitted is not None:
                    found[Case(subject, check, fitted)] = None
    return list(found)


def _turn(check: Check, problem: Any) -> int:
    return 2 if check.drawn else int(problem != check.problems[0])
