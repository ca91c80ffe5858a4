"""Every check rejects what it is there for, and every problem the plainest mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from correctness.checks.case import Check, Kind, cases
from correctness.checks.table import CHECKS, KINDS, implementation
from correctness.judging.calling import run
from correctness.judging.compare import fractions, reference
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import LOW_PRECISION, Problem
from moe_impls import sorted_dispatch
from moe_impls.interface import Implementation, Support
from tests.correctness.wrong import BUGS, NULL_IMPLEMENTATIONS, no_gate


def is_trivial_for(wrong: Callable, problem: Problem) -> bool:
    """Whether this mistake does not change the problem's answer, so that nothing can notice it."""
    if problem.T == 0:
        return True
    # softmax over one choice is a gate of one
    return wrong is no_gate and problem.K == 1 and problem.gates == "softmax"


@pytest.mark.parametrize("problem", catalogue.OPTIONS + catalogue.SIZES, ids=lambda p: p.id)
def test_every_value_problem_rejects_the_null_implementations(problem: Problem) -> None:
    for wrong in NULL_IMPLEMENTATIONS:
        if is_trivial_for(wrong, problem):
            assert problem.name in ("no_tokens", "all_ones")
        else:
            results = run(wrong, make_inputs(problem), problem.combine, gradients=False)
            assert fractions(results, reference(problem))["y"] > 1, wrong.__name__


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_every_check_rejects_what_it_is_there_for(check: Check) -> None:
    """Checks that compare reject all null implementations, and each check the mistakes that it looks for."""
    for wrong in BUGS.get(check.name, NULL_IMPLEMENTATIONS):
        prepare = getattr(wrong, "prepare", None)
        subject = Implementation(wrong.__name__, wrong, Support(second_order=True), prepare)
        with pytest.raises(CheckFailed):
            for case in cases([implementation(subject)], [check]):
                case.run()


@pytest.mark.parametrize(
    "support",
    [
        Support(),
        Support(biases=(False,)),
        Support(dtypes=LOW_PRECISION, combines=("sum",), output_activations=("none",)),
        Support(activations=("silu", "swiglu_clamped"), dtypes=(torch.float16,), biases=(True,)),
    ],
)
def test_every_option_is_tested_of_one_that_compiles_for_each_case(support: Support) -> None:
    support = replace(support, compiles_per_case=True)
    subject = Implementation("compiled", sorted_dispatch.forward, support)
    tested = [case.problem for case in cases([implementation(subject)]) if case.skip is None and case.problem]
    assert {p.activation for p in tested} == set(support.activations)
    assert {p.output_activation for p in tested} == set(support.output_activations)
    assert {p.combine for p in tested} == set(support.combines)
    assert {p.bias for p in tested} == set(support.biases)
    assert {p.dtype for p in tested} == set(support.dtypes)
    assert any(p.exact and p.dtype in LOW_PRECISION for p in tested)  # where sums in less than float32 show


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_check_says_in_one_plain_line_what_a_subject_must_do(kind: Kind) -> None:
    for check in kind.checks:
        first = (check.function.__doc__ or "").splitlines()[0]
        assert re.fullmatch(r"[A-Z].*\.", first) and not first.startswith(("The ", "Of ")), check.name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_generated_problems_come_last(kind: Kind) -> None:
    drawn = [check.drawn is not None for check in kind.checks]
    assert drawn == sorted(drawn)
