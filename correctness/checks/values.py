"""Checks of values: output and gradients against the oracle, to the bit, and by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from correctness.judging import calling, compare
from correctness.judging.calling import run_both_ways
from correctness.judging.compare import require_right
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls.interface import Implementation


def non_finite_contained(subject: Implementation, problem: Problem) -> None:
    """Keep NaN or infinity in the x, gates or dy of a token in its own rows of y, dx and dgates."""
    plain = make_inputs(problem)
    first = problem.T // 3
    reached = list(range(first, first + 4))
    for value in (torch.nan, torch.inf):
        x, gates, dy = plain.x.clone(), plain.routing.gates.clone(), plain.dy.clone()
        x[first, 0] = value
        x[first + 1] = -value
        gates[first + 2] = torch.nan
        dy[first + 3, 0] = value
        inputs = plain._replace(x=x, routing=plain.routing._replace(gates=gates), dy=dy)
        for results in run_both_ways(subject, problem, inputs):
            if bool(results["y"][reached[:3]].isfinite().all(dim=1).any()):
                raise CheckFailed(f"the row of a token with {value} is finite: its input is not read")
            rows = {}
            for name, want in compare.reference(problem).oracle.values.items():
                if name in results and name in ("y", "x", "gates"):
                    rows[name] = results[name].clone()
                    # The reached rows are right by definition.
                    rows[name][reached] = want[reached].to(rows[name].dtype)
            require_right(rows, problem)


def values(subject: Implementation, problem: Problem) -> dict[str, float]:
    """Return output and gradients within the oracle's rounding budget, in training and in inference."""
    return compare.require_right_calls(subject, problem)


def exact(subject: Implementation, problem: Problem) -> dict[str, float]:
    """Return exactly the right numbers, output and gradients, where no order of summation rounds."""
    return values(subject, problem)


def output(subject: Implementation, problem: Problem) -> dict[str, float]:
    """Return the right output where gradients are undefined, or of a dtype too low for the budget."""
    worst = 0.0
    for results in calling.run_both_ways(subject, problem):
        worst = max(worst, require_right({"y": results["y"]}, problem)["y"])
    return {"y": worst}


def gradcheck(subject: Implementation, problem: Problem) -> None:
    """Give gradients in float64 that agree with finite differences, in every tensor at once."""
    _finite_differences(torch.autograd.gradcheck, subject, problem)


def second_order(subject: Implementation, problem: Problem) -> None:
    """Give gradients of gradients in float64 that agree with finite differences, where they are declared."""
    _finite_differences(torch.autograd.gradgradcheck, subject, problem)


def _finite_differences(check: Callable[..., bool], subject: Implementation, problem: Problem) -> None:
    inputs = make_inputs(problem)
    names = list(inputs.tensors)

    def call(*tensors: Tensor) -> Tensor:
        arguments = calling.assemble(inputs, dict(zip(names, tensors, strict=True)))
        return subject.forward(*arguments, combine=problem.combine)

    leaves = [t.clone().requires_grad_() for t in inputs.tensors.values()]
    try:
        check(call, leaves)
    except GradcheckError as error:
        of = f"activation {problem.activation}, outputs {problem.output_activation}, {problem.combine}"
        inputs_are = ", ".join(f"{n} {name}" for n, name in enumerate(names))
        raise CheckFailed(
            f"gradients differ from finite differences with {of}: {error}\n"
            f"  inputs: {inputs_are}\n  reproduce: {problem.code()}"
        ) from error
