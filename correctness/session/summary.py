"""The last lines of a run: what was checked of each subject, and how near to its budget it came."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import pytest
from rich.console import Console
from rich.table import Table

from correctness.checks.case import Case
from moe_impls.interface import DTYPES, dtype_name

TENSORS = ("y", "x", "gates", "w_in", "b_in", "w_out", "b_out")


class Facts(TypedDict):
    """Say what one test checks, in plain values, since a report may come from another process."""

    kind: str  # implementation | router | layer | losses
    name: str
    check: str
    problem: str  # of a check that makes its own, how: generated or its_own
    dtype: str
    exact: bool
    code: str  # one line of Python that makes the problem again


def facts(item: pytest.Item) -> Facts | None:
    """Read what a test checks from its case; None if it has none."""
    case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    if not isinstance(case, Case):
        return None
    dtype = getattr(case.problem, "dtype", None)
    return Facts(
        kind=case.subject.kind.name,
        name=case.subject.name,
        check=case.check.name,
        problem=case.problem_id or ("generated" if case.check.drawn else "its_own"),
        dtype="" if dtype is None else dtype_name(dtype),
        exact=getattr(case.problem, "exact", False),
        code=case.code(),
    )


@dataclass(frozen=True)
class Result:
    """How one test of a subject ended."""

    facts: Facts
    outcome: str  # passed | failed | skipped
    fractions: dict[str, float]  # the worst error of each tensor, 1 is its budget
    reason: str  # of a skip
    finding: str = ""  # of a failure


def result(report: pytest.TestReport) -> Result | None:
    """How the test of a report ended; None if it has no subject or has not ended."""
    properties: dict[str, Any] = dict(report.user_properties)
    if "subject" not in properties or (report.when != "call" and report.passed):
        return None
    reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    finding = str(report.longrepr) if report.failed else ""
    return Result(properties["subject"], report.outcome, properties.get("fractions", {}), reason, finding)


class Summary:
    """The pytest plugin that gathers the reports of tests with a subject and tells what they come to."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if ended := result(report):
            self.results.append(ended)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> Iterator[None]:
        yield
        if self.results and config.option.verbose > -2:
            terminalreporter.section("what was checked")
            terminalreporter.write(render(self.results))


def render(results: list[Result]) -> str:
    """Write the summary of these results."""
    by_name: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_name.setdefault((result.facts["kind"], result.facts["name"]), []).append(result)
    lines = [line for (kind, name), own in by_name.items() for line in _counts(f"{kind} {name}", own)]
    measured = {name: own for (_, name), own in by_name.items() if any(r.fractions for r in own)}
    return "\n".join(lines) + "\n" + (_worst_errors(measured) if measured else "")


def _counts(subject: str, results: list[Result]) -> Iterator[str]:
    run = [r for r in results if r.outcome != "skipped"]
    exact = [r for r in run if r.facts["exact"]]
    outcomes = Counter(r.outcome for r in results)
    line = f"{subject}: " + ", ".join(f"{outcomes[o]} {o}" for o in ("passed", "failed", "skipped"))
    checks, problems = ({r.facts[what] for r in run} for what in ("check", "problem"))
    line += f"; checks: {len(checks)}, problems: {len(problems)}"
    if exact:
        line += f"; bit-equal on exact problems: {sum(r.outcome == 'passed' for r in exact)} of {len(exact)}"
    yield line
    if outcomes["failed"]:
        per_check = Counter(r.facts["check"] for r in run)
        failed = Counter(r.facts["check"] for r in run if r.outcome == "failed")
        yield f"  failed: {', '.join(f'{check} {n} of {per_check[check]}' for check, n in failed.items())}"
    if outcomes["skipped"]:
        reasons = Counter(r.reason for r in results if r.outcome == "skipped")
        yield f"  skipped: {', '.join(f'{reason} {n}' for reason, n in reasons.items())}"


def _worst_errors(by_name: dict[str, list[Result]]) -> str:
    """Tabulate worst errors: for one subject a row for each tensor, for several a row for each of them."""
    alone = len(by_name) == 1
    dtypes = list(map(dtype_name, DTYPES))
    table = Table("" if alone else "implementation", box=None, pad_edge=False)
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    table.add_column("its worst problem")
    rows = {name: (own, TENSORS) for name, own in by_name.items()}
    if alone:
        (own,) = by_name.values()
        rows = {tensor: (own, (tensor,)) for tensor in TENSORS}
    for label, (own, tensors) in rows.items():
        found = [
            (r.fractions[tensor], r.facts["dtype"], tensor, r.facts["problem"])
            for r in own
            if not r.facts["exact"]
            for tensor in tensors
            if tensor in r.fractions
        ]
        worst = {dtype: max((f for f in found if f[1] == dtype), default=None) for dtype in dtypes}
        cells = ["-" if w is None else f"{w[0]:.2g}" for w in worst.values()]
        place = max((w for w in worst.values() if w), default=None)
        where = "-" if place is None else place[3] if alone else f"{place[2]} in {place[3]}"
        table.add_row(label, *cells, where)
    stream = io.StringIO()
    Console(file=stream, width=1000, no_color=True, highlight=False).print(table)
    text = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
    return f"worst error of each result, as a fraction of its budget (at most 1 is right):\n{text}\n"
