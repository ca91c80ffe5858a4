"""The one place that measures error and says how much of it is allowed.

Error is measured row by row, relative to a scale that the oracle derives from the terms of each sum:

    y, x        a row is a token
    gates       a row is a slot (token, choice)
    weights     a row is one row of one expert's gradient

The error of a row is its largest |result - oracle| / scale. A row whose scale is zero (the gradient of
an expert without tokens) must be exactly right. The budget of a tensor is FACTOR times what a plain
computation in the same dtype loses in its worst row, never less than FACTOR * eps. Right implementations in
other summation orders stay below 6 times the plain one; wrong ones are 30 to 40,000,000 times off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from correctness.judging import hints
from correctness.judging.calling import calls, run
from correctness.judging.finding import CheckFailed, what
from correctness.judging.hints import Wrong
from correctness.oracle.experts import Evaluation, evaluate
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import Forward, Implementation, dtype_name

FACTOR = 8.0
# Above this size the weight gradients of a sample of experts are compared, to bound memory.
MAX_COMPARED_WEIGHTS = 2**26
SAMPLED_EXPERTS = 8


@dataclass(frozen=True)
class Reference:
    """The oracle's results for one problem, and each tensor's allowed error as a multiple of scale."""

    problem: Problem
    inputs: Inputs
    oracle: Evaluation
    budget: dict[str, float]


@functools.lru_cache(maxsize=16)
def reference(problem: Problem, gradients: bool = True) -> Reference:
    """The oracle and the budgets of a problem; kept for the next implementation that meets it."""
    return make_reference(problem, make_inputs(problem), gradients)


def make_reference(problem: Problem, inputs: Inputs, gradients: bool = True) -> Reference:
    """The same for inputs made elsewhere; ``problem`` gives combine and dtype."""
    x, (ids, gates), experts, dy = inputs
    arguments = (x, ids, gates, experts, dy if gradients else None, problem.combine)
    kept = _compared_experts(problem, ids)
    oracle = evaluate(*arguments, keep=kept)
    # float64 has no wider dtype to show what it loses: rounding errors are proportional to eps.
    plain_dtype = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    plain = evaluate(*arguments, dtype=plain_dtype, wide=torch.float32, keep=kept, scales=False)
    eps = torch.finfo(problem.dtype).eps
    ratio = eps / torch.finfo(plain_dtype).eps
    budget = {
        name: FACTOR * max(eps, ratio * _worst(row_errors(plain.values[name], oracle, name)))
        for name in oracle.values
    }
    return Reference(problem, inputs, oracle, budget)


def _compared_experts(problem: Problem, ids: Tensor) -> list[int] | None:
    if problem.E * problem.F * problem.D <= MAX_COMPARED_WEIGHTS:
        return None
    counts = ids.flatten().bincount(minlength=problem.E)
    by_load = counts.argsort(stable=True).tolist()  # the emptiest, the fullest and some between
    step = max(1, (problem.E - 1) // (SAMPLED_EXPERTS - 1))
    return sorted({*by_load[::step][: SAMPLED_EXPERTS - 1], by_load[-1]})


def row_errors(result: Tensor, oracle: Evaluation, name: str) -> Tensor:
    """Error of each row over its scale: [T] for y and x, [T, K] for gates, [experts, rows] for weights."""
    want, scale = oracle.values[name], oracle.scale[name]
    got = result.to(want.dtype)
    # Equal infinities agree; NaN never does.
    error = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
    if name in ("y", "x"):
        scale = scale.unsqueeze(-1)
    # Anything but zero over a scale of zero, or of NaN, is infinite.
    error = torch.where(error == 0, 0.0, error / scale).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if error.dim() == 1 or name in ("gates", "b_in", "b_out"):
        return error  # every entry is a row
    return error.amax(dim=-1) if error.shape[-1] else error.new_zeros(error.shape[:-1])


def _worst(rows: Tensor) -> float:
    """The largest row error."""
    return float(rows.max()) if rows.numel() else 0.0


def fractions(results: dict[str, Tensor], ref: Reference) -> dict[str, float]:
    """For each tensor its worst row's error as a fraction of the budget; at most 1 is right."""
    return {name: _worst(errors(results, ref, name)) / ref.budget[name] for name in compared(results, ref)}


def errors(results: dict[str, Tensor], ref: Reference, name: str) -> Tensor:
    return row_errors(_kept(results[name], name, ref.oracle), ref.oracle, name)


def _kept(result: Tensor, name: str, oracle: Evaluation) -> Tensor:
    """The part of a result that the oracle holds: of weights' gradients, those of some experts."""
    return result[oracle.kept] if name in ("w_in", "b_in", "w_out", "b_out") else result


def compared(results: dict[str, Tensor], ref: Reference) -> list[str]:
    """The tensors that a rounding budget can judge.

    A right implementation may round a pre-activation to the other side of a kink that is near; then the
    gradients that flow through that unit differ by their full size, and are not judged.
    """
    through_kinks = {"x", "w_in", "b_in"}
    if ref.problem.output_activation == "relu":
        through_kinks |= {"w_out", "b_out"}
    judged = ref.problem.avoids_kinks or not ref.problem.has_kinks
    return [n for n in results if n in ref.oracle.values and (judged or n not in through_kinks)]


def require(results: dict[str, Tensor], ref: Reference) -> dict[str, float]:
    """``fractions``, or CheckFailed for the first tensor over its budget."""
    found = fractions(results, ref)
    judge(found, results, ref)
    return found


def judge(found: dict[str, float], results: dict[str, Tensor], ref: Reference) -> None:
    """Raise CheckFailed for the first tensor whose fraction of the budget exceeds 1."""
    for name, fraction in found.items():
        if not fraction <= 1:
            raise CheckFailed(describe(results, ref, name), found)


def describe(results: dict[str, Tensor], ref: Reference, name: str) -> str:
    """What is wrong with one tensor: where, how much, what it looks like, how to see it again."""
    rows, budget = errors(results, ref, name), ref.budget[name]
    error = _worst(rows)
    index = (rows == error).nonzero()[0].tolist()
    if name in ("y", "x"):
        place = f"token {index[0]}"
    elif name == "gates":
        place = f"token {index[0]}, slot {index[1]}"
    else:
        place = f"expert {ref.oracle.kept[index[0]]}, row {index[1]}"
    bad = rows > budget
    oracle, problem = ref.oracle, ref.problem
    wrong = Wrong(
        name=name,
        got=_kept(results[name], name, oracle),
        want=oracle.values[name],
        scale=oracle.scale[name],
        budget=budget,
        inputs=ref.inputs,
        combine=problem.combine,
        kept=oracle.kept,
    )
    return (
        f"{what(name)} is wrong at {place}: error {error:.3g} of the row's scale, budget {budget:.3g} "
        f"({dtype_name(problem.dtype)}); {int(bad.sum())} of {bad.numel()} rows are over it"
        f"{_hint(wrong)}\n  reproduce: {problem.code()}"
    )


def _hint(wrong: Wrong) -> str:
    return f"\n  hint: {text}" if (text := hints.hint(wrong)) else ""


def hold(results: dict[str, Tensor], problem: Problem, inputs: Inputs | None = None) -> dict[str, float]:
    """Require that results are right: within the budget, or bit-equal for an exact problem.

    Args:
        inputs: what the results were computed from, if not ``make_inputs(problem)``.

    Returns:
        The worst error of each tensor as a fraction of its budget; exact problems have 0.

    Raises:
        CheckFailed: for the first tensor that is not right.
    """
    with_gradients = len(results) > 1 or "y" not in results
    return _held_to(problem, inputs, with_gradients)(results)


def hold_calls(subject: Implementation, problem: Problem, inputs: Inputs | None = None) -> dict[str, float]:
    """``hold`` for all ``calls`` of a subject: the worst of them, by tensor.

    What is right is made once, and after the calls: while they run there is nothing to copy it from.
    """
    found = list(calls(subject, problem, inputs))
    require_right = _held_to(problem, inputs, subject.support.gradients)
    worst: dict[str, float] = {}
    for results in found:
        for name, fraction in require_right(results).items():
            worst[name] = max(fraction, worst.get(name, 0.0))
    return worst


def _held_to(
    problem: Problem, inputs: Inputs | None, gradients: bool
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """What `hold` does with results of one problem on one set of inputs."""
    if not problem.exact:
        ref = reference(problem) if inputs is None else make_reference(problem, inputs, gradients)
        return lambda results: require(results, ref)
    want = oracle_values(problem) if inputs is None else _exact_values(problem, inputs)

    def require_equal(results: dict[str, Tensor]) -> dict[str, float]:
        for name, got in results.items():
            if not torch.equal(got, want[name]):
                used = make_inputs(problem) if inputs is None else inputs
                raise CheckFailed(_describe_exact(name, got, want[name], problem, used))
        return dict.fromkeys(results, 0.0)

    return require_equal


def _describe_exact(name: str, got: Tensor, want: Tensor, problem: Problem, inputs: Inputs) -> str:
    where = (got != want).nonzero()
    first = tuple(where[0].tolist())
    wrong = Wrong(
        name=name,
        got=got,
        want=want.double(),
        scale=torch.ones_like(want, dtype=torch.float64),
        budget=0.0,
        inputs=inputs,
        combine=problem.combine,
        kept=list(range(problem.E)),
    )
    return (
        f"{what(name)} at {list(first)} is {got[first].item()!r}, exactly {want[first].item()!r} is right; "
        f"{len(where)} of {want.numel()} entries differ{_hint(wrong)}\n  reproduce: {problem.code()}"
    )


def verify(
    forward: Forward,
    problem: Problem,
    *,
    gradients: bool = True,
    runner: Callable[..., dict[str, Tensor]] = run,
) -> dict[str, float]:
    """Run an implementation on a problem and compare: worst error as a fraction of the budget, by tensor.

    At most 1 is right. Exact problems give 0 or infinity.
    """
    results = runner(forward, make_inputs(problem), problem.combine, gradients=gradients)
    if problem.exact:
        ref = exact_reference(problem)
        return {n: 0.0 if torch.equal(got, ref[n]) else torch.inf for n, got in results.items()}
    return fractions(results, reference(problem))


@functools.lru_cache(maxsize=16)
def exact_reference(problem: Problem) -> dict[str, Tensor]:
    """What every right implementation returns for an exact problem, to the bit, in the dtypes it returns."""
    return _exact_values(problem, make_inputs(problem))


def _exact_values(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    x, (ids, gates), experts, dy = inputs
    oracle = evaluate(x, ids, gates, experts, dy, problem.combine)
    return {n: v.to(gates.dtype if n == "gates" else problem.dtype) for n, v in oracle.values.items()}


def oracle_values(problem: Problem) -> dict[str, Tensor]:
    """What is right for a problem, by name: exactly, or in float64."""
    return exact_reference(problem) if problem.exact else reference(problem).oracle.values
