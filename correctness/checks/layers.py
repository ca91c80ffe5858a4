"""What a whole layer is held to, from its input to the gradient of every parameter.

A layer under test is a class or function without arguments that makes an ``nn.Module`` from [..., D] to
[..., O], and beside it ``read(layer) -> LayerWeights``. Its file may also hold

    losses(layer, x, mask) -> {name: scalar}    mask [...] bool, False for padding, or None; names as LOSSES
    routing(layer, x) -> Routing                of x [T, D], with the id E + Z where a slot is dropped
    update_bias(layer)                          moves the selection bias after a training step
    SUPPORT = LayerSupport(...)

A check is given a `Bench`: a layer with tokens, and what is right for them. All parameters are drawn anew,
since a router or biases that start at zero would hide mistakes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from correctness.checks.case import Case, Check, Kind, Subject
from correctness.checks.layer_balance import BALANCE
from correctness.checks.layer_bias import selection_bias
from correctness.checks.layer_compiled import COMPILED
from correctness.checks.layer_gradients import (
    frozen,
    gradients,
    low_precision_gradients,
    router_gradient,
    sizes,
)
from correctness.checks.layer_history import HISTORY
from correctness.checks.layer_loaded import LOADED
from correctness.checks.layer_losses import losses, losses_of_many_visits
from correctness.checks.layer_modes import MODES
from correctness.checks.layer_reuse import REUSE
from correctness.checks.layer_sizes import SIZES
from correctness.checks.layer_state import (
    evaluation,
    every_parameter_counts,
    generator_goes_on,
    inputs_unchanged,
    mode_switched,
    state,
    without_gradients,
)
from correctness.checks.layer_training import TRAINING
from correctness.checks.layer_values import (
    double_precision,
    half_precision,
    leading_dimensions,
    low_precision,
    nan_contained,
    no_tokens,
    strides,
    tokens_apart,
    values,
)
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import Bench, Layer
from correctness.judging.layer_why import cause_of, is_mixed, is_unsteady, misread
from correctness.problems.histories import OF_LOGITS, History
from correctness.problems.layers import LayerProblem
from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import dtype_name
from moe_impls.layer_interface import LayerSupport
from moe_impls.registry import one_line

_FLOAT32 = (LayerProblem(),)
_BFLOAT16 = (LayerProblem(torch.bfloat16),)
_FLOAT16 = (LayerProblem(torch.float16),)

CHECKS = (
    Check(values, _FLOAT32),
    Check(gradients, (*_FLOAT32, LayerProblem(torch.float64)), needs="gradients"),
    Check(low_precision, _BFLOAT16, fits=False),
    Check(half_precision, _FLOAT16, fits=False),
    Check(double_precision, (LayerProblem(torch.float64),), fits=False),
    Check(strides, _FLOAT32),
    Check(leading_dimensions, _FLOAT32, needs="any_leading"),
    Check(no_tokens, _FLOAT32, needs="no_tokens"),
    Check(low_precision_gradients, _BFLOAT16 + _FLOAT16, needs="gradients", fits=False),
    Check(sizes, _FLOAT32, needs="gradients"),
    Check(router_gradient, _FLOAT32, needs="gradients"),
    Check(frozen, _FLOAT32, needs="gradients"),
    *TRAINING,
    Check(every_parameter_counts, _FLOAT32),
    Check(selection_bias, _FLOAT32, needs="selection_bias"),
    Check(mode_switched, _FLOAT32, needs="training"),
    Check(evaluation, _FLOAT32, needs="deterministic"),
    Check(without_gradients, _FLOAT32),
    Check(inputs_unchanged, _FLOAT32),
    Check(generator_goes_on, _FLOAT32),
    Check(tokens_apart, _FLOAT32),
    Check(nan_contained, _FLOAT32),
    Check(state, _FLOAT32),
    Check(losses, _FLOAT32, needs="losses"),
    Check(losses_of_many_visits, _BFLOAT16, needs="losses", fits=False),
    *BALANCE,
    *LOADED,
    *REUSE,
    *MODES,
    *SIZES,
    *COMPILED,
    *HISTORY,
)


def _bench(case: Case) -> tuple[Bench] | tuple[Bench, History]:
    bench = Bench.of(case.subject.tested, case.problem.dtype)
    return (bench, case.problem) if isinstance(case.problem, History) else (bench,)


def _fit(subject: Subject, check: Check, problem: LayerProblem) -> LayerProblem:
    """Take the widest dtype that is declared where a layer does not declare float32."""
    dtypes = subject.support.dtypes
    if not check.fits or problem.dtype in dtypes or problem.dtype != torch.float32:
        return problem
    return replace(problem, dtype=max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16)))


def _unsupported(support: LayerSupport, problem: LayerProblem | History) -> str | None:
    if problem.dtype not in support.dtypes:
        return f"dtype {dtype_name(problem.dtype)} not declared"
    if isinstance(problem, History) and problem.dtype in LOW_PRECISION and problem.numbers in OF_LOGITS:
        return "router_dtype float32 not declared" if support.router_dtype == "input" else None
    return None


def _explained(case: Case, failure: CheckFailed) -> CheckFailed:
    """Tell the cause of a finding; where looking for it goes wrong, the finding stands, with a note."""
    try:
        return _with_cause(case, failure)
    except Exception as error:
        return CheckFailed(f"{failure}\n  note: looking for a cause raised {one_line(error)}")


def _with_cause(case: Case, failure: CheckFailed) -> CheckFailed:
    """Tell the cause of a wrong y once, at `values`, and of other findings that it explains them.

    It does where the check passes for a layer of which `read` says what the cause is.
    """
    tested, check = case.subject.tested, case.check.function
    is_of_numbers = str(failure).startswith(("y[", "the gradient of", "routing("))
    unsteady = "two calls in eval mode on equal inputs differ"
    differs = tested.support.deterministic and check is not evaluation and is_unsteady(tested)
    if differs and check is not values:
        return CheckFailed(f"as 'evaluation' tells, {unsteady}") if is_of_numbers else failure
    cause = None if differs else cause_of(tested)
    if check is values:
        hints = [f"{unsteady}: is noise added there, too?"] * differs
        hints += [*misread(tested), *([f"y is right with {cause.text}"] if cause else [])]
        if not differs and cause is None and tested.routing is None and is_mixed(tested):
            mixed = "y of a token changes with the other tokens of the call"
            hints.append(f"{mixed}, as by a softmax over tokens")
        return CheckFailed("".join([str(failure), *(f"\n  hint: {hint}" for hint in hints)]))
    if cause is None:
        return failure
    change = cause.weights
    if change and not cause.y:
        other = replace(tested, read=lambda layer: change(tested.read(layer)))
        try:
            check(Bench.of(other, case.problem.dtype))
        except CheckFailed:
            return failure
    elif not str(failure).startswith("y["):
        return failure
    return CheckFailed(f"as 'values' tells, y is right with {cause.text}")


LAYER = Kind("layer", CHECKS, _bench, _fit, unsupported=_unsupported, explain=_explained)


def layer(name: str, tested: Layer) -> Subject:
    """Make a layer a subject."""
    return Subject(LAYER, name, tested, tested.support)
