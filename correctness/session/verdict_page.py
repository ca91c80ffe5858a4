"""A verdict as a page of markdown, fit for a pull request."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from moe_impls.interface import DTYPES, dtype_name

SHOWN_FINDINGS = 3  # of a check


def page(found: dict[str, Any]) -> str:
    """The verdict as markdown."""
    versions, machine, run = found["versions"], found["machine"], found["run"]
    names = ", ".join(f"`{s['name']}`" for s in found["subjects"]) or "nothing"
    titles = {"right": "right", "wrong": "**wrong**", "incomplete": "not known"}
    lines = [f"# {names}: {titles[found['outcome']]}", ""]
    if not found["complete"]:
        lines += [f"The run is **incomplete**: {found['reason']}.", ""]
    if found["selection"]:
        lines += [f"A part of the checks alone was selected: `{' '.join(found['selection'])}`.", ""]
    for subject in found["subjects"]:
        lines += [*_about(subject), ""]
    libraries = ", ".join(
        f"{name} {v}" for name, v in versions.items() if name not in ("moe-impls", "commit")
    )
    on = ", ".join(dict.fromkeys((machine["device"], machine["device_name"], machine["processor"])))
    lines += [
        f"Checked by moe-impls {versions['moe-impls']}, commit {versions['commit']}, with {libraries}, "
        f"on {on}, threads: {machine['threads']} ({machine['platform']}), "
        f"in {run['seconds']:g} s from {run['begin']}: `{shlex.join(run['arguments'])}`",
    ]
    return "\n".join(lines) + "\n"


def _about(subject: dict[str, Any]) -> list[str]:
    tests, exact = subject["tests"], subject["bit_equal"]
    lines = [f"## {subject['kind']} `{subject['name']}`", ""]
    if subject["source"]:
        lines += [f"Source: `{subject['source']['file']}`, sha256 `{subject['source']['sha256']}`", ""]
    told = (
        f"{tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} skipped by declaration"
    )
    run = sum(check["passed"] + check["failed"] > 0 for check in subject["checks"])
    told += f": {run} checks on {subject['problems']} problems"
    if exact["run"]:
        told += f"; bit-equal on {exact['passed']} of {exact['run']} exact ones"
    lines += [told + "."]
    if subject["findings"]:
        lines += ["", *_findings(subject["findings"])]
    if subject["worst_errors"]:
        lines += ["", "Worst error as a fraction of its budget, at most 1 is right:", ""]
        lines += _errors(subject["worst_errors"])
    if subject["skipped"]:
        reasons = (f"{skip['reason']} ({skip['tests']})" for skip in subject["skipped"])
        lines += ["", f"Skipped, as declared: {', '.join(reasons)}."]
    if subject["checks"]:
        lines += ["", "<details><summary>What was checked</summary>", ""]
        lines += ["| check | problems | passed | failed | skipped |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| {c['name']} | {c['problems']} | {c['passed']} | {c['failed']} | {c['skipped']} |"
            for c in subject["checks"]
        ]
        lines += ["", "</details>"]
    return lines


def _findings(findings: list[dict[str, str]]) -> list[str]:
    """The first findings of each check, in the order in which they were checked."""
    counts = Counter(finding["check"] for finding in findings)
    shown: Counter[str] = Counter()
    lines = []
    for finding in findings:
        check = finding["check"]
        shown[check] += 1
        if shown[check] <= SHOWN_FINDINGS:
            lines += [*(["```text", *finding["message"].rstrip().split("\n"), "```"]), ""]
        elif shown[check] == counts[check]:
            lines += [f"And {counts[check] - SHOWN_FINDINGS} more of `{check}`.", ""]
    return lines[:-1]


def _errors(worst: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    dtypes = [dtype for dtype in map(dtype_name, DTYPES) if any(dtype in of for of in worst.values())]
    lines = [f"| | {' | '.join(dtypes)} |", "|---|" + "---:|" * len(dtypes)]
    for tensor, by_dtype in worst.items():
        cells = []
        for dtype in dtypes:
            entry = by_dtype.get(dtype)
            cells.append(
                "-" if entry is None else "∞" if entry["fraction"] is None else f"{entry['fraction']:.2g}"
            )
        lines.append(f"| {tensor} | {' | '.join(cells)} |")
    return lines
