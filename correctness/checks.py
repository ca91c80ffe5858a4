"""What every implementation is held to: a table of checks and the one loop over (implementation, problem).

A check is a function of an implementation and a problem that raises ``CheckFailed`` with its finding. The
same table judges the project's implementations, a stranger's (``--impl``) and the deliberately wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from correctness import compare, problems
from correctness.compare import CheckFailed
from correctness.problems import Inputs, Problem, make_inputs, unsupported
from moe_impls.interface import Implementation, Support


def values(subject: Implementation, problem: Problem) -> None:
    """The output and each gradient apart stay within the rounding budget of the float64 oracle."""
    gradients = subject.support.gradients
    results = compare.run(subject.forward, make_inputs(problem), problem.combine, gradients=gradients)
    compare.require(results, compare.reference(problem))


def exact(subject: Implementation, problem: Problem) -> None:
    """Integers come out bit-equal in every order of summation, output and gradients."""
    gradients = subject.support.gradients
    results = compare.run(subject.forward, make_inputs(problem), problem.combine, gradients=gradients)
    for name, want in compare.exact_reference(problem).items():
        if name in results and not torch.equal(results[name], want):
            got = results[name]
            if got.dtype != want.dtype:
                raise CheckFailed(f"the gradient of {name} is {got.dtype}; it must be {want.dtype}")
            where = (got != want).nonzero()
            first = tuple(where[0].tolist())
            raise CheckFailed(
                f"{name}{list(first)} is {got[first].item()!r}, exactly {want[first].item()!r} is right; "
                f"{len(where)} of {want.numel()} entries differ\n  reproduce: {problem.code()}"
            )


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
    except RuntimeError as error:  # GradcheckError derives from it
        raise CheckFailed(f"{error}\n  reproduce: {problem.code()}") from error


def inputs_unchanged(subject: Implementation, problem: Problem) -> None:
    """No input is written to, by forward or backward."""
    inputs = make_inputs(problem)
    before = inputs.map(torch.clone)
    ids = inputs.routing.expert_ids.clone()
    compare.run(subject.forward, inputs, problem.combine, gradients=subject.support.gradients)
    for name, tensor in {**inputs.tensors, "dy": inputs.dy}.items():
        if not torch.equal(tensor, {**before.tensors, "dy": before.dy}[name]):
            raise CheckFailed(f"{name} was written to")
    if not torch.equal(ids, inputs.routing.expert_ids):
        raise CheckFailed("expert_ids was written to")


def strides(subject: Implementation, problem: Problem) -> None:
    """Inputs need not be contiguous: transposed and offset memory gives the same results."""

    def scattered(t: Tensor) -> Tensor:
        padded = torch.full([*(2 * s + 1 for s in t.shape)], torch.nan, dtype=t.dtype, device=t.device).mT
        view = padded[tuple(slice(1, None, 2) for _ in t.shape)].mT if t.dim() == 2 else None
        if view is None:
            padded = torch.full([*(2 * s + 1 for s in t.shape)], torch.nan, dtype=t.dtype, device=t.device)
            view = padded[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)

    plain = make_inputs(problem)
    inputs = plain.map(lambda t: scattered(t) if t.dim() > 1 else t)
    ids = plain.routing.expert_ids.mT.contiguous().mT
    inputs = inputs._replace(routing=inputs.routing._replace(expert_ids=ids))
    results = compare.run(subject.forward, inputs, problem.combine, gradients=subject.support.gradients)
    compare.require(results, compare.reference(problem))


def new_contents(subject: Implementation, problem: Problem) -> None:
    """New numbers and a new routing at the same addresses give the new result; the old result stays."""
    first, second = make_inputs(problem), replace(problem, seed=problem.seed + 1)
    gradients = subject.support.gradients
    before = compare.run(subject.forward, first, problem.combine, gradients=gradients)
    copies = {name: t.clone() for name, t in before.items()}
    _overwrite(first, make_inputs(second))
    after = compare.run(subject.forward, first, problem.combine, gradients=gradients)
    compare.require(after, compare.reference(second))
    for name, t in before.items():
        if not torch.equal(t, copies[name]):
            raise CheckFailed(f"the {name} returned by an earlier call was overwritten by a later one")


def _overwrite(target: Inputs, source: Inputs) -> None:
    for name, tensor in target.tensors.items():
        tensor.copy_(source.tensors[name])
    target.routing.expert_ids.copy_(source.routing.expert_ids)
    target.dy.copy_(source.dy)


def without_gradients(subject: Implementation, problem: Problem) -> None:
    """Under no_grad and inference_mode the numbers are right and nothing is recorded."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = compare.run(subject.forward, make_inputs(problem), problem.combine, gradients=False)
        compare.require(results, compare.reference(problem))


def deterministic(subject: Implementation, problem: Problem) -> None:
    """Ten calls on equal inputs are bit-equal, output and gradients, where that is declared."""
    inputs = make_inputs(problem)
    gradients = subject.support.gradients
    first = compare.run(subject.forward, inputs, problem.combine, gradients=gradients)
    for repeat in range(1, 10):
        again = compare.run(subject.forward, inputs, problem.combine, gradients=gradients)
        for name, want in first.items():
            if not torch.equal(again[name], want):
                raise CheckFailed(f"{name} differs between call 1 and call {repeat + 1} on equal inputs")


@dataclass(frozen=True)
class Check:
    """A check, the problems that it runs on, and the declaration without which it does not apply."""

    function: Callable[[Implementation, Problem], None]
    problems: tuple[Problem, ...]
    needs: str = ""  # a field of Support that must be true

    @property
    def name(self) -> str:
        return self.function.__name__


_ZIPF = replace(problems.SMALL, name="behaviour", T=61, E=9, K=3, load="zipf")
_BEHAVIOUR = (_ZIPF, replace(_ZIPF, dtype=torch.bfloat16), replace(_ZIPF, combine="logsumexp"))

CHECKS = (
    Check(values, problems.OPTIONS + problems.SIZES),
    Check(exact, problems.EXACT),
    Check(gradcheck, problems.GRADCHECK, needs="gradients"),
    Check(second_order, problems.GRADCHECK, needs="second_order"),
    Check(inputs_unchanged, _BEHAVIOUR),
    Check(strides, _BEHAVIOUR),
    Check(new_contents, _BEHAVIOUR),
    Check(without_gradients, _BEHAVIOUR),
    Check(deterministic, _BEHAVIOUR, needs="deterministic"),
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
        if self.check.needs and not getattr(support, self.check.needs):
            return f"{self.check.needs} not declared"
        return unsupported(support, self.problem)

    def run(self) -> None:
        try:
            self.check.function(self.subject, self.problem)
        except CheckFailed as failure:
            raise CheckFailed(f"{self.subject.name} fails {self.check.name!r}: {failure}") from failure


def cases(
    subjects: Iterable[Implementation], checks: Iterable[Check] = CHECKS, device: str = "cpu"
) -> list[Case]:
    """The loop over implementations and problems. Problems come outermost: their oracle is then made once."""
    subjects = list(subjects)
    return [
        Case(subject, check, replace(problem, device=device))
        for check in checks
        for problem in check.problems
        for subject in subjects
        if not subject.support.compiles_per_case or problems.is_representative(problem)
    ]
