"""What every implementation is held to, and all kinds of subjects."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from correctness.checks import autograd, cheating, layouts, memory, modes, relations, repeated_calls
from correctness.checks.balance import LOSSES
from correctness.checks.case import Case, Check, Kind, Subject
from correctness.checks.generated import generated_values
from correctness.checks.layers import LAYER
from correctness.checks.routers import ROUTER
from correctness.checks.values import exact, gradcheck, non_finite_contained, output, second_order, values
from correctness.problems import catalogue, generated, problem
from correctness.problems.problem import Problem, fit, resize, unsupported
from moe_impls.interface import ACTIVATIONS, OUTPUT_ACTIVATIONS, Implementation

_ZIPF = replace(catalogue.SMALL, name="behaviour", T=61, E=9, K=3, load="zipf")


_LOG = replace(_ZIPF, combine="logsumexp")
_LOW = replace(_ZIPF, dtype=torch.bfloat16)


_INTEGERS = catalogue.named("integers_empty")


# What a low default dtype would round.
_CANCELLING = replace(catalogue.named("integers_cancelling_pairs"), dtype=torch.bfloat16)
_RELU_OUTPUT = tuple(replace(p, output_activation="relu") for p in (_ZIPF, _LOG))
_BASIC = (_ZIPF, _LOW, _LOG, _INTEGERS)
_MANY_TOKENS = replace(_ZIPF, name="many_tokens", T=1100)  # for which some have a path of their own
# With other sizes and options, each once.
_VARIED = (
    *_BASIC,
    replace(catalogue.named("one_choice"), activation="silu", dtype=torch.float16),
    replace(_ZIPF, activation="geglu", output_activation="relu", dtype=torch.float64),
    replace(catalogue.named("half_empty"), activation="gelu", combine="logsumexp", dtype=torch.bfloat16),
    replace(catalogue.named("many_experts"), name="more_than_64_experts", T=70, E=70),
    catalogue.named("aligned"),
)
_ACTIVATIONS = tuple(
    catalogue.clamped(replace(catalogue.SMALL, activation=a, output_activation=o, bias=o == "relu"))
    for a, o in itertools.product(ACTIVATIONS, OUTPUT_ACTIVATIONS)
)
_RELATED = tuple(replace(_INTEGERS, gates="softmax", dtype=d) for d in (torch.float32, torch.bfloat16))
# Sizes at which a low-precision product keeps NaN in its row. oneDNN's does not where the length of its sums
# is odd, or more than 32 and no multiple of it: github.com/uxlfoundation/oneDNN/issues/5717.
_CONTAINED = tuple(replace(_ZIPF, D=16, H=16, O=8, E=8, dtype=d) for d in problem.LOW_PRECISION)


# What tells most about a mistake for its time comes first; the last ones take most of it.
CHECKS: tuple[Check, ...] = (
    Check(autograd.after_inference, (replace(_ZIPF, T=59),)),  # first, as a process makes its first call once
    Check(memory.inputs_unchanged, (*_VARIED, _MANY_TOKENS, *_ACTIVATIONS)),
    Check(exact, catalogue.EXACT),
    Check(values, catalogue.OPTIONS, fits=False),
    Check(output, catalogue.OUTPUT),
    Check(autograd.without_gradients, (*_VARIED, catalogue.named("zipf"))),
    Check(repeated_calls.global_state, (_ZIPF, _LOW, _INTEGERS, _CANCELLING)),
    Check(repeated_calls.deterministic, _VARIED, needs="deterministic"),
    Check(repeated_calls.every_call, (_ZIPF, _INTEGERS)),
    Check(repeated_calls.new_contents, (*_VARIED, replace(_INTEGERS, name="integers_80_experts", E=80))),
    Check(repeated_calls.one_input_changes, _BASIC),
    Check(repeated_calls.same_objects, _BASIC),
    Check(repeated_calls.prepared, _BASIC, needs="prepare"),
    Check(repeated_calls.options_change, (replace(_ZIPF, activation="geglu"),)),
    Check(repeated_calls.every_size, (replace(catalogue.named("integers"), name="integers_of_size"),)),
    Check(repeated_calls.changing_sizes, _BASIC),
    Check(layouts.strides, _VARIED),
    Check(layouts.one_strided, (_ZIPF, _INTEGERS)),
    Check(layouts.offsets, _VARIED),
    Check(layouts.expanded, _BASIC),
    Check(memory.shared_memory, (catalogue.named("aligned"), catalogue.named("aligned_all_experts"))),
    Check(memory.results_are_the_callers, _BASIC),
    Check(autograd.gradient_subsets, (*_BASIC, replace(_ZIPF, bias=False)), needs="gradients"),
    Check(autograd.inside_a_graph, _BASIC, needs="gradients"),
    Check(autograd.several_graphs, (*_BASIC, catalogue.named("aligned")), needs="gradients"),
    Check(autograd.backward_twice, _VARIED, needs="gradients"),
    Check(autograd.gradients_accumulate, _VARIED, needs="gradients"),
    Check(
        non_finite_contained,
        (_ZIPF, replace(_ZIPF, K=1, bias=False), _LOG, _INTEGERS, *_CONTAINED, _MANY_TOKENS, *_RELU_OUTPUT),
    ),
    Check(memory.within_bounds, _VARIED),
    Check(memory.dirty_memory, _VARIED),
    Check(memory.recycled_memory, _VARIED),
    Check(repeated_calls.another_thread, (_ZIPF, _INTEGERS)),
    Check(cheating.done_when_it_returns, (_ZIPF,)),
    Check(cheating.instruments_untouched, (_ZIPF,)),
    Check(cheating.no_fallback, (_ZIPF,)),
    Check(
        modes.autocast,
        (_ZIPF, _LOG, _LOW, replace(_ZIPF, bias=False), catalogue.named("integers_cancelling_pairs")),
        needs="autocast",
    ),
    Check(modes.fullgraph, (_ZIPF,), needs="fullgraph"),
    Check(modes.exports, (_ZIPF,), needs="exports"),
    Check(modes.no_host_sync, (_ZIPF,), needs="no_host_sync"),
    *(Check(relation, _RELATED) for relation in relations.RELATIONS),
    Check(values, catalogue.LARGE, fits=False),
    Check(values, catalogue.SIZES),
    Check(gradcheck, catalogue.GRADCHECK, needs="gradients", fits=False),
    Check(second_order, catalogue.SECOND_ORDER, needs="second_order", fits=False),
    Check(generated_values, drawn=generated.problems),
)


def _arguments(case: Case) -> tuple[Implementation, Problem]:
    return case.subject.tested, case.problem


def _fit(subject: Subject, check: Check, problem: Problem) -> Problem | None:
    """Fit sizes and, where the check allows, options to what an implementation declares.

    One that compiles anew for each case is tested on a selection of problems.
    """
    support = subject.support
    sized = resize(replace(problem, device=subject.device), support)
    fitted = fit(sized, support) if check.fits else sized
    is_tested = not support.compiles_per_case or catalogue.is_representative(fitted, support)
    return fitted if is_tested else None


IMPLEMENTATION = Kind("implementation", CHECKS, _arguments, _fit, unsupported)
KINDS = (IMPLEMENTATION, ROUTER, LAYER, LOSSES)


def implementation(tested: Implementation, device: str = "cpu") -> Subject:
    """Make an implementation a subject, on problems of that device."""
    return Subject(IMPLEMENTATION, tested.name, tested, tested.support, device)
