"""What ``--verdict`` writes of a run: complete, failed, refused, interrupted or killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from correctness.session import verdict, verdict_page
from correctness.session.summary import Facts, Result
from reporting.provenance import ROOT

pytest_plugins = "pytester"

SCHEMA = json.loads((ROOT / "correctness/session/verdict.schema.json").read_text(encoding="utf-8"))
SUBJECTS = """
import ctypes
import os
import signal

from moe_impls.sorted_dispatch import forward as right


def wrong_by_a_tenth(x, routing, experts, *, combine):
    return right(x, routing, experts, combine=combine) * 1.1


def interrupted(x, routing, experts, *, combine):
    if len(x) != 33:
        raise KeyboardInterrupt
    return right(x, routing, experts, combine=combine)


def terminated(x, routing, experts, *, combine):
    if len(x) != 33:
        os.kill(os.getpid(), signal.SIGTERM)
    return right(x, routing, experts, combine=combine)


def crashes(x, routing, experts, *, combine):
    if len(x) != 33:
        ctypes.string_at(0)
    return right(x, routing, experts, combine=combine)
"""
# The problems before the last have 33 tokens.
SOME = "values-aligned-float32 or values-all_experts-float32-gelu-/ or values-all_experts-float32-silu-/"


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """A file that holds all subjects, in a folder of its own."""
    path = tmp_path / "subjects.py"
    path.write_text(SUBJECTS.lstrip(), encoding="utf-8")
    return path


def run(pytester: pytest.Pytester, name: str, *options: str, select: str = SOME) -> pytest.RunResult:
    """``pytest correctness`` with a verdict, on the tests that ``select`` selects."""
    os.chdir(ROOT)
    file = Path(name.partition(":")[0]).with_name("verdict.json")
    common = ("-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--verdict={file}", "-k", select)
    return pytester.runpytest_inprocess("correctness", f"--impl={name}", *common, *options)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """The verdict in a folder, which keeps the schema, and its page."""
    found = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    return found, (folder / "verdict.md").read_text(encoding="utf-8")


def facts_of(found: dict[str, Any]) -> dict[str, Any]:
    """A verdict without what time and machine decide."""
    return {name: value for name, value in found.items() if name not in ("run", "machine")}


def test_a_right_subject_is_right_and_two_runs_say_the_same(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text("from moe_impls.sorted_dispatch import forward\n", encoding="utf-8")
    found = []
    for _ in range(2):
        done = run(pytester, f"{kernel}:forward", select=f"{SOME} or exports")
        assert done.ret == 0
        assert any(line.startswith("verdict: ") for line in done.outlines)
        found.append(read(tmp_path))
    (first, page), (second, _) = found
    assert facts_of(first) == facts_of(second)
    assert (first["outcome"], first["complete"], first["reason"]) == ("right", True, "")
    (subject,) = first["subjects"]
    assert subject["source"]["sha256"] == hashlib.sha256(kernel.read_bytes()).hexdigest()
    assert 0 < subject["worst_errors"]["y"]["float32"]["fraction"] <= 1
    assert subject["skipped"] == [{"reason": "exports not declared", "tests": 1}]
    assert page.startswith(f"# `{kernel}:forward`: right\n")
    assert "A part of the checks alone was selected: `-k" in page
    assert "Skipped, as declared: exports not declared (1)." in page


def test_a_finding_is_told_with_the_line_that_makes_its_problem_again(
    pytester: pytest.Pytester, subjects: Path
) -> None:
    assert run(pytester, f"{subjects}:wrong_by_a_tenth").ret == 1
    found, page = read(subjects.parent)
    assert (found["outcome"], found["complete"]) == ("wrong", True)
    (subject,) = found["subjects"]
    assert subject["tests"]["failed"] == len(subject["findings"]) >= 2
    first = subject["findings"][0]
    assert first["check"] == "values"
    assert first["reproduce"].startswith("Problem(name=")
    assert f"reproduce: {first['reproduce']}" in page
    assert page.startswith(f"# `{subjects}:wrong_by_a_tenth`: **wrong**\n")


def test_a_run_that_ends_early_says_why(pytester: pytest.Pytester, subjects: Path) -> None:
    assert run(pytester, f"{subjects}:wrong_by_a_tenth", "-x").ret == 1
    found, page = read(subjects.parent)
    assert (found["outcome"], found["complete"]) == ("wrong", False)
    assert found["reason"] == "stopping after 1 failures"
    assert "The run is **incomplete**: stopping after 1 failures." in page


@pytest.mark.parametrize(
    ("name", "reason"), [("interrupted", "it was interrupted"), ("terminated", "SIGTERM ended the run")]
)
def test_a_run_that_is_interrupted_says_so_and_keeps_what_it_found(
    name: str, reason: str, pytester: pytest.Pytester, subjects: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(pytester, f"{subjects}:{name}")
    found, page = read(subjects.parent)
    assert (found["outcome"], found["complete"], found["reason"]) == ("incomplete", False, reason)
    assert found["subjects"][0]["tests"]["passed"] >= 1
    assert found["planned"] > sum(found["subjects"][0]["tests"].values())
    assert page.startswith(f"# `{subjects}:{name}`: not known\n")


def test_a_run_that_is_killed_leaves_a_verdict_that_says_so(subjects: Path) -> None:
    arguments = (f"--impl={subjects}:crashes", f"--verdict={subjects.parent / 'verdict.json'}", "-k", SOME)
    command = [sys.executable, "-m", "pytest", "correctness", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode < 0
    found, _ = read(subjects.parent)
    assert (found["outcome"], found["complete"], found["reason"]) == ("incomplete", False, verdict.KILLED)


def test_a_subject_that_is_refused_has_a_verdict_in_the_place_of_an_older_one(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    (tmp_path / "verdict.json").write_text("an older one", encoding="utf-8")
    assert run(pytester, f"{tmp_path / 'nowhere.py'}:forward").ret == pytest.ExitCode.USAGE_ERROR
    found, _ = read(tmp_path)
    assert (found["outcome"], found["complete"]) == ("incomplete", False)
    assert found["reason"] == f"{tmp_path / 'nowhere.py'} does not exist or is no file"
    assert found["subjects"][0]["source"] is None


@pytest.mark.parametrize("folder", ["a_file", "a_file/below"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(
    folder: str, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    (tmp_path / "a_file").write_text("")
    file = tmp_path / folder / "verdict.json"
    done = pytester.runpytest_inprocess(str(ROOT / "correctness"), f"--rootdir={ROOT}", f"--verdict={file}")
    (line,) = (line for line in done.errlines if line.strip())
    assert line == f"ERROR: --verdict: {file} cannot be written: Not a directory"
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def test_a_verdict_that_can_no_longer_be_written_fails_the_run(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    source = f"import os\nos.rename({str(tmp_path / 'out')!r}, {str(tmp_path / 'gone')!r})\n"
    source += f"open({str(tmp_path / 'out')!r}, 'w').close()\nfrom moe_impls.index_add import forward\n"
    (tmp_path / "kernel.py").write_text(source, encoding="utf-8")
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "verdict.json"
    done = run(pytester, f"{tmp_path / 'kernel.py'}:forward", f"--verdict={file}")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert done.outlines[-1].startswith(f"verdict: {file} cannot be written: ")
    assert json.loads((tmp_path / "gone" / "verdict.json").read_text())["reason"] == verdict.KILLED


def test_another_suffix_is_refused(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_inprocess(str(ROOT / "correctness"), f"--rootdir={ROOT}", "--verdict=x.md")
    assert "ERROR: --verdict is x.md; it must end in .json" in done.errlines
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def result(check: str, outcome: str = "passed", **fractions: float) -> Result:
    facts = Facts(
        kind="implementation", name="mine", check=check, problem="p", dtype="float32", exact=False, code="P()"
    )
    finding = f"mine fails {check!r}: y is wrong\n  reproduce: Q()" if outcome == "failed" else ""
    return Result(facts, outcome, fractions, "", finding)


def test_the_worst_error_is_the_largest_and_null_where_it_is_not_finite() -> None:
    results = [result("values", y=0.25, x=math.inf), result("values", y=0.5, x=0.5, gates=math.nan)]
    worst = {
        tensor: by_dtype["float32"]["fraction"] for tensor, by_dtype in verdict.worst_errors(results).items()
    }
    assert worst == {"y": 0.5, "x": None, "gates": None}


def test_the_page_shows_the_first_findings_of_each_check_and_counts_the_others() -> None:
    results = [*(result("values", "failed") for _ in range(5)), result("exact", "failed"), result("strides")]
    about = {"kind": "implementation", "name": "mine", "source": None, **verdict.of(results)}
    lines = verdict_page._about(about)
    assert sum(line.startswith("mine fails 'values'") for line in lines) == verdict_page.SHOWN_FINDINGS
    assert "And 2 more of `values`." in lines
    assert sum(line.startswith("mine fails 'exact'") for line in lines) == 1
    assert "| strides | 1 | 1 | 0 | 0 |" in lines


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("implementation", "packed+prepared", "packed.py"),
        ("implementation", "transformers.eager", "transformers.py"),
        ("implementation", "moe_impls.index_add:forward", "index_add.py"),
        ("router", "moe_impls.router:route", "router.py"),
        ("layer", "moe_defaults", "layer.py"),
    ],
)
def test_the_source_of_a_name_is_found_without_importing_it(kind: str, name: str, file: str) -> None:
    found = verdict.source(kind, name)
    assert found and found["file"] == file


@pytest.mark.parametrize("name", ["nowhere.py:forward", "not_there.at_all:forward", "moe_impls.not_there:f"])
def test_a_name_without_a_file_has_no_source(name: str) -> None:
    assert verdict.source("implementation", name) is None
