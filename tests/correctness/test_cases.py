"""Cases: who is judged by default, in which order, under which names, and how a case is run again."""

from __future__ import annotations

import os
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import moe_impls
from correctness.checks.balance import CHECKS as LOSS_CHECKS
from correctness.checks.balance import losses
from correctness.checks.case import Case, cases
from correctness.checks.routers import router
from correctness.checks.table import CHECKS, KINDS, implementation
from correctness.judging.finding import CheckFailed
from correctness.session.subjects import find_subjects, rerun
from moe_impls.registry import DISTRIBUTED, IMPLEMENTATIONS, resolve
from moe_impls.router_interface import RouterSpec
from reporting.provenance import ROOT
from tests.correctness.findings import findings

pytest_plugins = "pytester"


def test_the_projects_own_implementations_router_layers_and_losses_are_judged() -> None:
    found = find_subjects(None, None, None, seconds=0)
    assert [s.name for s in found if s.kind.name == "implementation"] == [
        *IMPLEMENTATIONS,
        *DISTRIBUTED,
    ]
    counts = Counter(subject.kind.name for subject in found)
    assert set(counts) == {kind.name for kind in KINDS}
    assert counts["router"] == counts["losses"] == 1 and counts["layer"] > 3


def test_a_run_collects_what_judges_subjects_and_nothing_else(pytester: pytest.Pytester) -> None:
    os.chdir(ROOT)
    options = ("-p", "no:cacheprovider", f"--rootdir={ROOT}", "--collect-only", "-q", "-n0")
    done = pytester.runpytest_inprocess("correctness", *options)
    tests = [line for line in done.outlines if "::" in line]
    assert len(tests) == len(cases(find_subjects(None, None, None, seconds=0)))
    assert {line.partition("[")[0] for line in tests} == {"correctness/test_subjects.py::test_subject"}


def test_only_subjects_that_are_named_are_judged() -> None:
    found = find_subjects(["index_add"], ["moe_impls.router:route"], ["moe_qwen"], seconds=0)
    assert [s.name for s in found] == ["index_add", "moe_impls.router:route", "moe_qwen"]


def test_an_id_is_the_check_the_problem_and_the_subject() -> None:
    ids = [case.id for case in cases([implementation(resolve("index_add"))])]
    assert len(set(ids)) == len(ids)
    assert "values-all_experts-float32-gelu-index_add" in ids
    assert ids[-1] == "generated_values-index_add"


def test_a_look_at_every_check_comes_first_and_generated_problems_last() -> None:
    listed = [case for case in cases([implementation(resolve("index_add"))]) if not case.check.drawn]
    checks = {check.name for check in CHECKS if not check.drawn}
    assert {case.check.name for case in listed[: len(checks) + 5]} == checks
    assert listed[0].check.name == "after_inference"


def module_with(z_loss: Callable[..., Tensor]) -> types.ModuleType:
    module = types.ModuleType("mine")
    vars(module)["z_loss"] = z_loss
    return module


def test_losses_that_a_module_does_not_hold_are_skipped_by_name() -> None:
    subject = losses("mine", module_with(moe_impls.z_loss))
    skips = {case.check.name: case.skip for case in cases([subject])}
    assert {name for name, skip in skips.items() if skip is None} == {"z_loss_values"}
    assert skips["counts_visits"] == "count_load not declared"


def test_a_wrong_loss_is_a_finding_about_its_module() -> None:
    module = module_with(lambda logits, mask=None: 2 * moe_impls.z_loss(logits, mask=mask))
    found = findings(losses("mine", module), LOSS_CHECKS)
    assert list(found) == ["z_loss_values"]
    assert found["z_loss_values"].startswith("mine fails 'z_loss_values': the loss is ")


@pytest.mark.parametrize(
    "words",
    [
        ("implementation", "index_add", "exact", "integers-float32-relu-exact"),
        ("router", "moe_impls.router:route", "ties", "mixtral_8x7b-float32"),
        ("layer", "moe_qwen", "evaluation", "float32"),
        ("losses", "moe_impls", "counts_visits"),
    ],
)
def test_a_case_is_run_again_by_the_words_of_its_finding(words: tuple[str, ...]) -> None:
    rerun(*words)


def test_a_case_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="layer moe_qwen has no check 'ties' on problem 'float32'"):
        rerun("layer", "moe_qwen", "ties", "float32")


def returns_nothing(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Any: ...


def test_a_search_that_ended_its_process_is_run_again_by_its_words() -> None:
    subject = router("mine.py:route", returns_nothing)
    (search,) = (case for case in cases([subject]) if case.check.drawn)
    words = ("router", "mine.py:route", "generated_routing")
    assert search.code() == f"from moe_impls.testing import rerun; rerun{words!r}"
    with pytest.raises(CheckFailed, match="'generated_routing' on generated, .*the result is a NoneType"):
        Case(subject, search.check).run()
