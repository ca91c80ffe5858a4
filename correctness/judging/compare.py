"""What is right for a problem, and the judgement of an implementation's results against it.

Error is measured row by row, relative to a scale that the oracle derives (see ``judging.budget``). A row
whose scale is zero, such as the gradient of an expert without tokens, must be exactly right. Results of
exact problems must be right to the bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from correctness.judging import hints
from correctness.judging.budget import allowed_error, row_errors, worst
from correctness.judging.calling import run_both_ways
from correctness.judging.finding import CheckFailed, what
from correctness.judging.hints import Wrong
from correctness.oracle.experts import Evaluation, evaluate
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Implementation, dtype_name

# Above this size the weight gradients of a sample of experts are compared, to bound memory.
MAX_COMPARED_WEIGHTS = 2**26
SAMPLED_EXPERTS = 8
WEIGHTS = ("w_in", "b_in", "w_out", "b_out")


@dataclass(frozen=True)
class Reference:
    """What is right for one problem on its inputs, and how far a result may be off.

    oracle: the results by name, in float64; of an exact problem as every right implementation returns them.
    budget: for each tensor the error allowed in a row, a multiple of its scale; 0 for exact problems.
    is_whole: whether oracle and inputs are all that a hint computes with; not those of one rank of several.
    """

    problem: Problem
    inputs: Inputs
    oracle: Evaluation
    budget: dict[str, float]
    is_whole: bool = True


@functools.singledispatch
@functools.lru_cache(maxsize=160)  # as many as a search draws, which draws the same for the next
def reference(problem: Problem) -> Reference:
    """Return what is right for a problem; kept for the next implementation that meets it."""
    return make_reference(problem, make_inputs(problem))


def make_reference(problem: Problem, inputs: Inputs, gradients: bool = True) -> Reference:
    """Return what is right for inputs made elsewhere; ``problem`` gives combine and dtype."""
    x, (ids, gates), experts, dy = inputs
    arguments = (x, ids, gates, experts, dy if gradients else None, problem.combine)
    if problem.exact:
        oracle = evaluate(*arguments, scales=False)
        returned = {n: v.to(gates.dtype if n == "gates" else problem.dtype) for n, v in oracle.values.items()}
        return Reference(problem, inputs, Evaluation(returned, {}, oracle.kept), dict.fromkeys(returned, 0.0))
    kept = _compared_experts(problem, ids)
    oracle = evaluate(*arguments, keep=kept)
    # float64 has no wider dtype to show what it loses.
    plain_dtype = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    plain = evaluate(*arguments, dtype=plain_dtype, wide=torch.float32, keep=kept, scales=False)
    budget = {}
    for name, want in oracle.values.items():
        lost = row_errors(plain.values[name], want, oracle.scale[name], name)
        budget[name] = allowed_error(lost, plain_dtype, problem.dtype)
    return Reference(problem, inputs, oracle, budget)


def _compared_experts(problem: Problem, ids: Tensor) -> list[int] | None:
    """Return the experts whose weight gradients are compared; None for all."""
    if problem.E * problem.F * problem.D <= MAX_COMPARED_WEIGHTS:
        return None
    counts = ids.flatten().bincount(minlength=problem.E)
    by_load = counts.argsort(stable=True).tolist()  # the emptiest, the fullest and some between
    step = max(1, (problem.E - 1) // (SAMPLED_EXPERTS - 1))
    return sorted({*by_load[::step][: SAMPLED_EXPERTS - 1], by_load[-1]})


def fractions(results: dict[str, Tensor], ref: Reference) -> dict[str, float]:
    """Return for each tensor its worst row's error as a fraction of the budget; at most 1 is right.

    Of exact problems 0, or infinity for what is not right to the bit.
    """
    if ref.problem.exact:
        want = ref.oracle.values
        return {name: 0.0 if torch.equal(got, want[name]) else torch.inf for name, got in results.items()}
    return {name: worst(_errors(results, ref, name)) / ref.budget[name] for name in _compared(results, ref)}


def _errors(results: dict[str, Tensor], ref: Reference, name: str) -> Tensor:
    """Return the error of each row of a tensor."""
    oracle = ref.oracle
    return row_errors(_kept(results[name], name, oracle), oracle.values[name], oracle.scale[name], name)


def _kept(result: Tensor, name: str, oracle: Evaluation) -> Tensor:
    """Return the part of a result that the oracle holds: of weights' gradients, those of some experts."""
    return result[oracle.kept] if name in WEIGHTS else result


def _compared(results: dict[str, Tensor], ref: Reference) -> list[str]:
    """Name the tensors that a rounding budget can judge.

    A right implementation may round a pre-activation to the other side of a kink that is near; then the
    gradients that flow through that unit differ by their full size, and are not judged.
    """
    through_kinks = {"x", "w_in", "b_in"}
    if ref.problem.output_activation == "relu":
        through_kinks |= {"w_out", "b_out"}
    judged = ref.problem.avoids_kinks or not ref.problem.has_kinks
    return [n for n in results if n in ref.oracle.values and (judged or n not in through_kinks)]


def require_within(results: dict[str, Tensor], ref: Reference) -> dict[str, float]:
    """Return the `fractions` of results, or raise CheckFailed for the first tensor over its budget."""
    found = fractions(results, ref)
    for name, fraction in found.items():
        if not fraction <= 1:
            raise CheckFailed(_describe(results, ref, name), found)
    return found


def require_right(
    results: dict[str, Tensor], problem: Problem, inputs: Inputs | None = None
) -> dict[str, float]:
    """Require that results are right: within the budget, or to the bit for an exact problem.

    Args:
        inputs: what the results were computed from, if not ``make_inputs(problem)``.

    Returns:
        The worst error of each tensor as a fraction of its budget.

    Raises:
        CheckFailed: for the first tensor that is not right.
    """
    return require_within(results, _reference_on(problem, inputs, gradients=results.keys() != {"y"}))


def require_right_calls(
    subject: Implementation, problem: Problem, inputs: Inputs | None = None
) -> dict[str, float]:
    """Require that a subject is right with gradients and without: the worst of both, by tensor.

    What is right is made once, and after the calls: while they run there is nothing to copy it from.
    """
    found = list(run_both_ways(subject, problem, inputs))
    ref = _reference_on(problem, inputs, subject.support.gradients)
    largest: dict[str, float] = {}
    for results in found:
        for name, fraction in require_within(results, ref).items():
            largest[name] = max(fraction, largest.get(name, 0.0))
    return largest


def _reference_on(problem: Problem, inputs: Inputs | None, gradients: bool) -> Reference:
    """Return what is right on inputs, or on the problem's own."""
    return reference(problem) if inputs is None else make_reference(problem, inputs, gradients)


def _describe(results: dict[str, Tensor], ref: Reference, name: str) -> str:
    """Say what is wrong with one tensor: where, how much, what it looks like, how to see it again."""
    oracle, problem = ref.oracle, ref.problem
    got, want = _kept(results[name], name, oracle), oracle.values[name]
    if problem.exact:
        different = (got != want).nonzero()
        first = tuple(different[0].tolist())
        finding = (
            f"{what(name)} at {list(first)} is {got[first].item()!r}, exactly {want[first].item()!r} is "
            f"right; {len(different)} of {want.numel()} entries differ"
        )
    else:
        rows, budget = _errors(results, ref, name), ref.budget[name]
        over = rows > budget
        finding = (
            f"{what(name)} is wrong at {_place(name, rows, oracle)}: error {worst(rows):.3g} of the row's "
            f"scale, budget {budget:.3g} ({dtype_name(problem.dtype)}); "
            f"{int(over.sum())} of {over.numel()} rows are over it"
        )
    if not ref.is_whole:
        return f"{finding}\n  reproduce: {problem.code()}"
    wrong = Wrong(
        name=name,
        got=got,
        want=want.double() if problem.exact else want,
        scale=torch.ones_like(want, dtype=torch.float64) if problem.exact else oracle.scale[name],
        budget=ref.budget[name],
        inputs=ref.inputs,
        combine=problem.combine,
        kept=oracle.kept,
    )
    hint = f"\n  hint: {text}" if (text := hints.hint(wrong)) else ""
    return f"{finding}{hint}\n  reproduce: {problem.code()}"


def _place(name: str, rows: Tensor, oracle: Evaluation) -> str:
    """Say which row is the worst."""
    index = (rows == worst(rows)).nonzero()[0].tolist()
    if name in ("y", "x"):
        return f"token {index[0]}"
    if name == "gates":
        return f"token {index[0]}, slot {index[1]}"
    return f"expert {oracle.kept[index[0]]}, row {index[1]}"
