"""How a run behaves: what it says of subjects that raise, hang, crash or are missing, and its last lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from correctness.checks import layers, routers
from correctness.checks.case import Case, Check, cases
from correctness.checks.table import CHECKS, implementation
from correctness.checks.values import gradcheck
from correctness.judging import blame
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.layers import LayerProblem
from correctness.session import isolation, limits
from correctness.session.layer_subject import resolve_layer
from correctness.session.summary import Facts, Result, render
from moe_impls.registry import ResolveError, load_function, resolve
from reporting.provenance import ROOT

pytest_plugins = "pytester"

VALUES = next(check for check in CHECKS if check.name == "values")

SUBJECTS = """
import ctypes
import os
import unittest

import pytest
import torch

from moe_impls.sorted_dispatch import forward as right


def raises(x, routing, experts, *, combine):
    return helper(x)


def helper(x):
    raise KeyError("weights")  # line 16


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise ZeroDivisionError("in the backward")  # line 26


def raises_in_backward(x, routing, experts, *, combine):
    return right(Backward.apply(x), routing, experts, combine=combine)


def changes_what_backward_needs(x, routing, experts, *, combine):
    y = right(x, routing, experts, combine=combine)
    z = y.exp()
    z.add_(1)
    return z


def skips(x, routing, experts, *, combine):
    pytest.skip("not today")


def skips_by_unittest(x, routing, experts, *, combine):
    raise unittest.SkipTest("not today")


def leaves(x, routing, experts, *, combine):
    raise SystemExit(0)


def leaves_at_once(x, routing, experts, *, combine):
    os._exit(0)


def ends_the_run(x, routing, experts, *, combine):
    pytest.exit("enough", returncode=0)


class Unreadable(Exception):
    def __str__(self):
        raise ValueError


def raises_unreadably(x, routing, experts, *, combine):
    raise Unreadable


def returns_a_list(x, routing, experts, *, combine):
    return right(x, routing, experts, combine=combine).tolist()


def returns_another_shape(x, routing, experts, *, combine):
    return right(x, routing, experts, combine=combine)[:, :-1]


def returns_another_dtype(x, routing, experts, *, combine):
    return right(x, routing, experts, combine=combine).bfloat16()


def returns_another_device(x, routing, experts, *, combine):
    return right(x, routing, experts, combine=combine).to("meta")


def changes_a_setting(x, routing, experts, *, combine):
    with open(__file__ + ".found", "a") as found:
        print(torch.get_float32_matmul_precision(), file=found)
    torch.set_float32_matmul_precision("high")
    return right(x, routing, experts, combine=combine)


def hangs(x, routing, experts, *, combine):
    while True:
        len(x)


def segmentation_fault(x, routing, experts, *, combine):
    if len(x) == 33:
        ctypes.string_at(0)
    return right(x, routing, experts, combine=combine)


def route(logits, spec, *, selection_bias=None):
    return helper(logits)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Parameter(torch.zeros(4, 6))
        self.w_in, self.w_out = (torch.nn.Parameter(torch.zeros(4, 6, 6)) for _ in range(2))

    def forward(self, x):
        return helper(x)


def read(layer):
    from moe_impls import Experts, LayerWeights, RouterSpec

    return LayerWeights(Experts(layer.w_in, None, layer.w_out, None, "silu"), RouterSpec(2), layer.router)
"""

SAYS = {
    "raises": ("KeyError: 'weights'", "subjects.py:16 in helper: raise KeyError"),
    "raises_in_backward": ("ZeroDivisionError: in the backward", "subjects.py:26 in backward: raise Zero"),
    "changes_what_backward_needs": ("RuntimeError: one of the variables needed", "outside its own lines, at"),
    "skips": ("Skipped: not today", "in skips: pytest.skip"),
    "skips_by_unittest": ("SkipTest: not today", "in skips_by_unittest: raise"),
    "leaves": ("SystemExit: 0", "in leaves: raise SystemExit(0)"),
    "leaves_at_once": ("SystemExit: os._exit(0)", "in leaves_at_once: os._exit(0)"),
    "ends_the_run": ("Exit: enough", "in ends_the_run: pytest.exit"),
    "raises_unreadably": ("Unreadable: its message cannot be read", "in raises_unreadably: raise Unreadable"),
    "returns_a_list": ("the result is a list; it must be a plain tensor", ""),
    "returns_another_shape": ("the result has shape (33, 5); it must have (33, 6)", ""),
    "returns_another_dtype": ("the result has dtype torch.bfloat16; it must have torch.float32", ""),
    "returns_another_device": ("the result has device meta; it must have cpu", ""),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that holds all subjects."""
    path = tmp_path / "subjects.py"
    path.write_text(SUBJECTS.lstrip(), encoding="utf-8")
    return path


def run_pytest(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    """``pytest correctness`` with these options."""
    os.chdir(ROOT)
    common = ("-p", "no:cacheprovider", f"--rootdir={ROOT}", "-q")
    return pytester.runpytest_inprocess("correctness", *common, *options)


def reproduced(line: str) -> Any:
    """What the code after ``reproduce:`` makes; a problem needs one import, a call of `rerun` none."""
    *first, last = line.removeprefix("  reproduce: ").split("; ")
    names: dict[str, object] = {}
    exec("\n".join(["from correctness.problems import *", *first]), names)
    return eval(last, names)


def test_what_is_reproduced_gives_its_inputs_by_the_same_import() -> None:
    code = f"  reproduce: make_inputs({catalogue.SMALL.code()})"
    assert torch.equal(reproduced(code).x, make_inputs(catalogue.SMALL).x)
    code = f"  reproduce: make_router_inputs({routers.PROBLEMS[0].code()}).logits.shape"
    assert reproduced(code) == (routers.PROBLEMS[0].T, routers.PROBLEMS[0].E)


@pytest.mark.parametrize("name", SAYS)
def test_whatever_an_implementation_raises_or_returns_is_a_finding(name: str, file: Path) -> None:
    problem = catalogue.named("all_experts")
    with pytest.raises(CheckFailed) as caught:
        Case(implementation(resolve(f"{file}:{name}")), VALUES, problem).run()
    first, *places, last = str(caught.value).splitlines()
    what, place = SAYS[name]
    assert first.startswith(f"{file}:{name} fails 'values': {what}")
    assert place in "\n".join(places)
    assert last == f"  reproduce: {problem.code()}"
    assert reproduced(last) == problem


def test_a_finding_is_shown_without_a_traceback_through_the_suite(
    pytester: pytest.Pytester, file: Path
) -> None:
    names = ("raises", "skips", "returns_a_list")
    options = [f"--impl={file}:{name}" for name in names]
    done = run_pytest(pytester, *options, "-q", "-k", "values-all_experts-float32-gelu-/")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert sum(line.startswith("FAILED") for line in done.outlines) == 3
    done.stdout.fnmatch_lines([f"{file}:{name} fails 'values': *" for name in names])
    done.stdout.no_fnmatch_line("*what was checked*")  # as with -qq nothing but failures is
    assert not [line for line in done.outlines if re.match(r".*correctness/(?!test_)\w+\.py:\d", line)]


def test_the_first_finding_of_several_processes_is_a_failure_and_no_interruption(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "correctness", f"--impl={file}:raises", "-n2", "-x", "-q"]
    done = subprocess.run([*command, "-k", "values-all_experts"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout


def test_what_a_subject_changes_in_one_test_is_not_found_by_the_next(
    pytester: pytest.Pytester, file: Path
) -> None:
    run_pytest(
        pytester,
        f"--impl={file}:changes_a_setting",
        "-k",
        "values-all_ones-float32 or values-all_ones-float64",
    )
    found = Path(f"{file}.found").read_text(encoding="utf-8").split()
    assert found.count("highest") == 2  # tests: the sum, and the gates in log space
    assert len(found) > 2


def test_what_a_subject_raises_inside_of_gradcheck_is_told_with_its_place(file: Path) -> None:
    check = Check(gradcheck, catalogue.GRADCHECK)
    with pytest.raises(CheckFailed) as caught:
        subject = implementation(resolve(f"{file}:raises_in_backward"))
        Case(subject, check, catalogue.GRADCHECK[0]).run()
    assert "fails 'gradcheck': ZeroDivisionError: in the backward\n" in str(caught.value)
    assert "subjects.py:26 in backward" in str(caught.value)


def test_what_a_router_raises_is_told_with_its_place_and_problem(file: Path) -> None:
    _, route = load_function(f"{file}:route")
    problem = next(p for p in routers.PROBLEMS if p.name == "mixtral_8x7b")
    with pytest.raises(CheckFailed) as caught:
        Case(routers.router("mine", route), Check(routers.values), problem).run()
    first, *places, last = str(caught.value).splitlines()
    assert first == "mine fails 'values' on mixtral_8x7b, E = 8, float32: KeyError: 'weights'"
    assert places[-1].endswith('subjects.py:16 in helper: raise KeyError("weights")  # line 16')
    assert reproduced(last) == problem


def test_what_a_layer_raises_is_told_with_its_place_and_a_line_that_runs_it_again(file: Path) -> None:
    case = Case(resolve_layer(f"{file}:Layer"), Check(layers.values), LayerProblem())
    with pytest.raises(CheckFailed) as caught:
        case.run()
    first, *places, last = str(caught.value).splitlines()
    assert first.startswith(
        f"{file}:Layer fails 'values': layer(x) with x [4, 8, 6] of float32 raises KeyError"
    )
    assert "subjects.py:16 in helper" in places[-1]
    with pytest.raises(CheckFailed, match="raises KeyError"):
        reproduced(last)


@pytest.mark.parametrize("check", ["changing_sizes", "strides", "every_size"])
def test_a_check_of_several_calls_gives_a_line_that_finds_the_same_again(check: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    source = "from moe_impls.sorted_dispatch import forward as right\n\n\ndef forward(*inputs, combine):\n"
    path.write_text(f"{source}    return right(*inputs, combine=combine) * 1.1\n", encoding="utf-8")
    case = next(c for c in cases([implementation(resolve(f"{path}:forward"))]) if c.check.name == check)
    with pytest.raises(CheckFailed) as caught:
        case.run()
    (last,) = (line for line in str(caught.value).splitlines() if "reproduce" in line)
    assert last == f"  reproduce: {case.code()}"
    assert f"rerun('implementation', '{path}:forward', '{check}', '{case.problem_id}')" in last
    with pytest.raises(CheckFailed) as again:
        reproduced(last)
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("option", "select"),
    [("--router={}:route", "values-mixtral_8x7b-float32"), ("--layer={}:Layer", "values-float32")],
)
def test_routers_and_layers_fail_in_the_same_way(
    option: str, select: str, pytester: pytest.Pytester, file: Path
) -> None:
    done = run_pytest(pytester, option.format(file), "-k", select)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            f"{file}:* fails 'values'*KeyError*",
            "  at *subjects.py:16 in helper*",
        ]
    )
    done.stdout.no_fnmatch_line("*Traceback*")


def test_ctrl_c_is_no_finding() -> None:
    with pytest.raises(KeyboardInterrupt), blame.as_finding("x", "y"):
        raise KeyboardInterrupt


def test_a_process_that_was_forked_inside_may_end(capfd: pytest.CaptureFixture[str]) -> None:
    with blame.process_kept():
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


BAD_FILES = {
    "def": "SyntaxError: invalid syntax (bad.py, line 1)",
    "import not_there": "ModuleNotFoundError: No module named 'not_there' (line 1)",
    "x = 1\nx / 0": "ZeroDivisionError: division by zero (line 2)",
    "raise SystemExit(0)": "SystemExit: 0 (line 1)",
    "import os; os._exit(0)": "SystemExit: os._exit(0) (line 1)",
    "import pytest; pytest.skip('no', allow_module_level=True)": "Skipped: no (line 1)",
    "import sys; sys.path.clear(); 1 / 0": "ZeroDivisionError: division by zero (line 1)",
    "while True: pass": "Timeout: longer than 0.2 s (--timeout)",
    "forward = 3": "'forward' is a int, not a function",
    "def other(): pass": "bad.py has no 'forward'; it has other",
    "class Layer: pass": "bad.py has no 'forward'; it has Layer",
    "from torch import nn": "bad.py has no 'forward'; it has no functions",
    "from moe_impls.functional import expert_mlp\ndef forwards(): pass": "no 'forward'; it has forwards",
    "def forward(): pass": "bad.py:forward has signature (); it must take",
}


def test_a_layer_that_is_named_as_an_implementation_is_told_which_option_it_takes(file: Path) -> None:
    with pytest.raises(ResolveError) as caught:
        resolve(f"{file}:Layer")
    assert str(caught.value) == (
        f"{file}:Layer is a class; it must be a function (x, routing, experts, *, combine). "
        f"A whole layer is verified with --layer {file}:Layer"
    )


@pytest.mark.parametrize("option", ["--impl", "--router", "--layer"])
@pytest.mark.parametrize("source", BAD_FILES)
def test_a_bad_file_is_one_line_and_exit_status_4(
    source: str, option: str, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    if option == "--layer" and source == "def forward(): pass":
        source, message = "def forward(x): pass", "bad.py:forward has signature (x); it must take ()"
    else:
        message = BAD_FILES[source]
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    done = run_pytest(pytester, f"{option}={tmp_path / 'bad.py'}:forward", "--timeout=0.2")
    (line,) = (line for line in done.errlines if line.strip())
    assert line.startswith("ERROR: ") and message in line
    assert done.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--impl=nowhere.py:forward", "nowhere.py does not exist or is no file"),
        ("--router=nowhere.py:route", "nowhere.py does not exist or is no file"),
        ("--layer=nowhere.py:Layer", "nowhere.py does not exist or is no file"),
        (f"--impl={__file__}", f"is a file; it must be path/file.py:function, such as {__file__}:forward"),
        ("--impl=not_there", "unknown implementation 'not_there'; valid are auto, dense_mask, "),
        ("--router=not_there", "'not_there' is neither package.module:function nor path/file.py:function"),
        (
            "--layer=not_there",
            "module:function or transformers:FAMILY, or one of moe_defaults",
        ),
        ("--impl=not_there:forward", "importing not_there failed: ModuleNotFoundError"),
    ],
)
def test_a_bad_name_is_one_line_and_exit_status_4(
    option: str, message: str, pytester: pytest.Pytester
) -> None:
    done = run_pytest(pytester, option)
    (line,) = (line for line in done.errlines if line.strip())
    assert line.startswith("ERROR: ") and message in line
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def test_an_implementation_that_declares_nothing_to_check_is_refused(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    source = "from moe_impls import Support\nSUPPORT = Support(devices=('cuda',))\n"
    path = tmp_path / "elsewhere.py"
    path.write_text(source + "def forward(x, routing, experts, *, combine): ...", encoding="utf-8")
    done = run_pytest(pytester, f"--impl={path}:forward")
    assert "nothing that it declares in SUPPORT can be checked here" in done.stderr.str()
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def test_a_hang_is_ended_and_told_and_after_three_the_run_ends(pytester: pytest.Pytester, file: Path) -> None:
    done = run_pytest(pytester, f"--impl={file}:hangs", "--timeout=1", "-k", "values-small")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert done.parseoutcomes()["failed"] == limits.MAX_HANGS
    done.stdout.fnmatch_lines(
        [
            f"{file}:hangs fails 'values': Timeout: longer than 1 s (--timeout)*",
            "  at *subjects.py:* in hangs: *",
            "  reproduce: Problem(name='small', *",
            f"*{file}:hangs hung in 3 tests: the run ends here*",
        ]
    )


def test_what_python_cannot_interrupt_ends_with_its_process() -> None:
    code = (
        "from correctness.session.limits import hard_limit\n"
        "import ctypes\n"
        "libc, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(128)\n"
        "with hard_limit(0.2, 2):\n"
        "    libc.pthread_mutex_lock(lock)\n"
        "    libc.pthread_mutex_lock(lock)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:00.2") and 'File "<string>", line 6' in done.stderr


def test_a_search_for_problems_is_not_gone_on_with_after_a_timeout(
    pytester: pytest.Pytester, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AGAIN_S", 1.0)
    options = (
        f"--impl={file}:hangs",
        "--timeout=1",
        "-k",
        "generated_values",
    )  # three times that for a search
    done = run_pytest(pytester, *options)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            f"{file}:hangs fails 'generated_values': Timeout: longer than 3 s (--timeout)*",
            "  at *in hangs: *",
        ]
    )


def test_isolated_subjects_that_crash_fail_their_test_and_the_others_go_on(
    pytester: pytest.Pytester, file: Path
) -> None:
    os.chdir(ROOT)
    done = pytester.runpytest_inprocess(
        "correctness",
        "-q",
        *("-p", "no:cacheprovider", f"--rootdir={ROOT}", "--isolate"),
        *(f"--impl={file}:segmentation_fault", f"--layer={file}:Layer", "--router=moe_impls.router:route"),
        *("-k", "values-all_experts-float32-gelu-/ or values-aligned-float32 or evaluation or values-switch"),
    )
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(failed=2, passed=5)
    done.stdout.fnmatch_lines_random(
        [
            f"{file}:segmentation_fault fails 'values': it ended its process by SIGSEGV",
            "  at *subjects.py:* in segmentation_fault",
            "  reproduce: Problem(name='all_experts', *",
            f"{file}:Layer fails 'evaluation': *KeyError*",
            f"implementation {file}:segmentation_fault: 1 passed, 1 failed, 0 skipped; *",
            "  failed: values 1 of 2",
            "router moe_impls.router:route: 4 passed, 0 failed, 0 skipped; checks: 1, problems: 4",
        ]
    )


def test_an_import_that_ends_its_process_is_refused() -> None:
    with pytest.raises(ResolveError, match="importing x ended its process with exit status 7"):
        isolation.try_in_child("importing x", os._exit, 7)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (0, "ended its process with exit status 0"),
        (-signal.SIGABRT, "ended its process by SIGABRT"),
        (-signal.SIGKILL, "ended its process by SIGKILL, as when memory runs out"),
        (None, "closed its connection"),
    ],
)
def test_the_ending_of_a_process_is_named(status: int | None, told: str) -> None:
    assert isolation.ending(status) == told


def result(check: str, outcome: str = "passed", reason: str = "", **fractions: float) -> Result:
    facts = Facts(
        kind="implementation",
        name="mine",
        check=check,
        problem=f"{check}-1",
        dtype="bfloat16",
        exact=check == "exact",
        code=f"Problem({check!r})",
    )
    return Result(facts, outcome, fractions, reason)


def test_the_summary_counts_tests_checks_problems_and_reasons() -> None:
    results = [
        result("values", y=0.25, x=0.5),
        result("values", "failed", y=3.0, x=0.125),
        result("exact", y=0.0),
        result("exact", "failed"),
        result("strides", "failed"),
        result("exports", "skipped", "exports not declared"),
        result("autocast", "skipped", "autocast not declared"),
    ]
    lines = render(results).splitlines()
    assert lines[:3] == [
        "implementation mine: 2 passed, 3 failed, 2 skipped; checks: 3, problems: 3; "
        "bit-equal on exact problems: 1 of 2",
        "  failed: values 1 of 2, exact 1 of 2, strides 1 of 1",
        "  skipped: exports not declared 1, autocast not declared 1",
    ]
    assert [line.split() for line in lines[4:7]] == [
        ["float64", "float32", "bfloat16", "float16", "its", "worst", "problem"],
        ["y", "-", "-", "3", "-", "values-1"],
        ["x", "-", "-", "0.5", "-", "values-1"],
    ]


def test_of_several_implementations_the_summary_has_a_line_each() -> None:
    other = result("values", x=0.75)
    other.facts["name"] = "other"
    lines = render([result("values", y=0.25), other]).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["mine", "-", "-", "0.25", "-", "y", "in", "values-1"],
        ["other", "-", "-", "0.75", "-", "x", "in", "values-1"],
    ]


def test_a_run_ends_with_what_was_checked_and_how_near_to_its_budget_it_came(
    pytester: pytest.Pytester,
) -> None:
    select = ("-k", "values-aligned-float32 or exact-integers_empty-float32")
    done = run_pytest(pytester, "--impl=index_add", *select)
    assert done.ret == 0
    tail = done.outlines[done.outlines.index(next(x for x in done.outlines if "what was checked" in x)) :]
    assert tail[1].startswith("implementation index_add: ")
    assert "bit-equal on exact problems: " in tail[1]
    rows = [line.split() for line in tail[4:11]]
    assert [row[0] for row in rows] == ["y", "x", "gates", "w_in", "b_in", "w_out", "b_out"]
    assert all(0 < float(row[2]) <= 1 and row[5].startswith("aligned-float32") for row in rows)
    assert " passed" in tail[11]
