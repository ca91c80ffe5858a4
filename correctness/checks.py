"""What every implementation is held to: a table of checks and the one loop over (implementation, problem).

A check is a function of an implementation and a problem that raises ``CheckFailed`` with its finding. The
same table judges the project's implementations, a stranger's (``--impl``) and the deliberately wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from correctness import behaviour, compare, honesty, metamorphic, problems
from correctness.blame import blamed
from correctness.compare import CheckFailed, hold
from correctness.problems import Problem, fit, make_inputs, resize, unsupported
from moe_impls.interface import Implementation, Support


def values(subject: Implementation, problem: Problem) -> dict[str, float]:
    """The output, with gradients and without, and each gradient stay within the oracle's rounding budget."""
    return compare.hold_calls(subject, problem)


def exact(subject: Implementation, problem: Problem) -> dict[str, float]:
    """Integers come out bit-equal in every order of summation, output and gradients."""
    return values(subject, problem)


def output(subject: Implementation, problem: Problem) -> dict[str, float]:
    """The output alone is right where gradients are undefined, or of a dtype too low for the budget."""
    worst = 0.0
    for results in compare.calls(subject, problem):
        worst = max(worst, hold({"y": results["y"]}, problem)["y"])
    return {"y": worst}


def gradcheck(subject: Implementation, problem: Problem) -> None:
    """Analytic gradients in float64 agree with finite differences, in every tensor at once."""
    _finite_differences(torch.autograd.gradcheck, subject, problem)


def second_order(subject: Implementation, problem: Problem) -> None:
    """Gradients of gradients in float64 agree with finite differences, where they are declared."""
    _finite_differences(torch.autograd.gradgradcheck, subject, problem)


def _finite_differences(check: Callable[..., bool], subject: Implementation, problem: Problem) -> None:
    inputs = make_inputs(problem)
    names = list(inputs.tensors)

    def call(*tensors: Tensor) -> Tensor:
        arguments = compare.assemble(inputs, dict(zip(names, tensors, strict=True)))
        return subject.forward(*arguments, combine=problem.combine)

    leaves = [t.clone().requires_grad_() for t in inputs.tensors.values()]
    try:
        check(call, leaves)
    except GradcheckError as error:
        raise CheckFailed(f"{error}\n  reproduce: {problem.code()}") from error


@dataclass(frozen=True)
class Check:
    """A check, the problems that it runs on, and the declaration without which it does not apply.

    fits: options of the problems that a subject does not declare may be replaced by others that it does.
    """

    function: Callable[[Implementation, Problem], dict[str, float] | None]
    problems: tuple[Problem, ...]
    needs: str = ""  # a field of Support that must be true, or "prepare", a function that must be there
    fits: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


_ZIPF = replace(problems.SMALL, name="behaviour", T=61, E=9, K=3, load="zipf")
_LOG = replace(_ZIPF, combine="logsumexp")
_LOW = replace(_ZIPF, dtype=torch.bfloat16)
_INTEGERS = problems.named("integers_empty")
_BASIC = (_ZIPF, _LOW, _LOG, _INTEGERS)
_MANY_TOKENS = replace(_ZIPF, name="many_tokens", T=1100)  # for which some have a path of their own
# With other sizes and options, each once.
_VARIED = (
    *_BASIC,
    replace(problems.named("one_choice"), activation="silu", dtype=torch.float16),
    replace(_ZIPF, activation="geglu", output_activation="relu", dtype=torch.float64),
    replace(problems.named("half_empty"), activation="gelu", combine="logsumexp", dtype=torch.bfloat16),
    replace(problems.named("many_experts"), name="more_than_64_experts", T=70, E=70),
    problems.named("aligned"),
)
_ACTIVATIONS = tuple(
    p
    for p in problems.OPTIONS
    if p.dtype == torch.float32 and p.combine == "sum" and p.bias == (p.output_activation == "relu")
)
_RELATED = tuple(replace(_INTEGERS, gates="softmax", dtype=d) for d in (torch.float32, torch.bfloat16))
# Sizes at which a low-precision product keeps NaN in its row. oneDNN's does not where the length of its sums
# is odd, or more than 32 and no multiple of it: github.com/uxlfoundation/oneDNN/issues/5717.
_CONTAINED = tuple(replace(_ZIPF, D=16, H=16, O=8, E=8, dtype=d) for d in problems.LOW_PRECISION)

# What tells most about a mistake comes first.
CHECKS = (
    Check(
        behaviour.after_inference, (replace(_ZIPF, T=59),)
    ),  # first, as a process makes its first call once
    Check(behaviour.inputs_unchanged, (*_VARIED, _MANY_TOKENS, *_ACTIVATIONS)),
    Check(values, problems.OPTIONS, fits=False),
    Check(values, problems.LARGE, fits=False),
    Check(values, problems.SIZES),
    Check(exact, problems.EXACT),
    Check(output, problems.OUTPUT),
    Check(behaviour.without_gradients, (*_VARIED, problems.named("zipf"))),
    Check(behaviour.global_state, (_ZIPF, _LOW, _INTEGERS)),
    Check(behaviour.deterministic, _VARIED, needs="deterministic"),
    Check(behaviour.every_call, (_ZIPF, _INTEGERS)),
    Check(behaviour.new_contents, (*_VARIED, replace(_INTEGERS, name="integers_80_experts", E=80))),
    Check(behaviour.one_input_changes, _BASIC),
    Check(behaviour.same_objects, _BASIC),
    Check(behaviour.prepared, _BASIC, needs="prepare"),
    Check(behaviour.options_change, (replace(_ZIPF, activation="geglu"),)),
    Check(behaviour.every_size, (replace(problems.named("integers"), name="integers_of_size"),)),
    Check(behaviour.changing_sizes, _BASIC),
    Check(behaviour.strides, _VARIED),
    Check(behaviour.one_strided, (_ZIPF, _INTEGERS)),
    Check(behaviour.offsets, _VARIED),
    Check(behaviour.expanded, _BASIC),
    Check(behaviour.shared_memory, (problems.named("aligned"), problems.named("aligned_all_experts"))),
    Check(behaviour.results_are_the_callers, _BASIC),
    Check(behaviour.gradient_subsets, (*_BASIC, replace(_ZIPF, bias=False)), needs="gradients"),
    Check(behaviour.inside_a_graph, _BASIC, needs="gradients"),
    Check(behaviour.several_graphs, (*_BASIC, problems.named("aligned")), needs="gradients"),
    Check(behaviour.backward_twice, _VARIED, needs="gradients"),
    Check(behaviour.gradients_accumulate, _VARIED, needs="gradients"),
    Check(
        behaviour.non_finite_contained,
        (_ZIPF, replace(_ZIPF, K=1, bias=False), _LOG, _INTEGERS, *_CONTAINED, _MANY_TOKENS),
    ),
    Check(behaviour.dirty_memory, _VARIED),
    Check(behaviour.recycled_memory, _VARIED),
    Check(behaviour.another_thread, (_ZIPF, _INTEGERS)),
    Check(honesty.done_when_it_returns, (_ZIPF,)),
    Check(honesty.instruments_untouched, (_ZIPF,)),
    Check(honesty.no_fallback, (_ZIPF,)),
    Check(gradcheck, problems.GRADCHECK, needs="gradients", fits=False),
    Check(second_order, problems.GRADCHECK, needs="second_order", fits=False),
    Check(
        behaviour.autocast,
        (_ZIPF, _LOG, _LOW, problems.named("integers_cancelling_pairs")),
        needs="autocast",
    ),
    Check(behaviour.fullgraph, (_ZIPF,), needs="fullgraph"),
    Check(behaviour.exports, (_ZIPF,), needs="exports"),
    Check(behaviour.no_host_sync, (_ZIPF,), needs="no_host_sync"),
    *(Check(relation, _RELATED) for relation in metamorphic.RELATIONS),
)


@dataclass(frozen=True)
class Case:
    """One check of one implementation on one problem."""

    subject: Implementation
    check: Check
    problem: Problem

    @property
    def id(self) -> str:
        return f"{self.check.name}-{self.problem.id}-{self.subject.name}"

    @property
    def skip(self) -> str | None:
        """Why the implementation's declaration takes this case out; None if it is to be run."""
        support: Support = self.subject.support
        needs = self.check.needs
        if needs and not (self.subject.prepare if needs == "prepare" else getattr(support, needs)):
            return f"{needs} not declared"
        return unsupported(support, self.problem)

    def run(self) -> dict[str, float]:
        """The worst error of each tensor as a fraction of its budget, where the check measures that."""
        with blamed(f"{self.subject.name} fails {self.check.name!r}", self.problem.code()):
            return self.check.function(self.subject, self.problem) or {}


def cases(
    subjects: Iterable[Implementation], checks: Iterable[Check] = CHECKS, device: str = "cpu"
) -> list[Case]:
    """The loop over implementations and problems. Problems come outermost: their oracle is then made once."""
    subjects = list(subjects)
    found = (
        Case(subject, check, fit(sized, subject.support) if check.fits else sized)
        for check in checks
        for problem in check.problems
        for subject in subjects
        for sized in [resize(replace(problem, device=device), subject.support)]
    )
    return list(
        dict.fromkeys(
            case
            for case in found
            if not (support := case.subject.support).compiles_per_case
            or problems.is_representative(case.problem, support)
        )
    )
