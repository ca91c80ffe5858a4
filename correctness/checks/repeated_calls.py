"""Checks of what a call leaves behind: for the next call, other threads, earlier results and the process."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from correctness.judging import calling
from correctness.judging.calling import Graph, finish, run, run_both_ways, start
from correctness.judging.compare import require_right, require_right_calls
from correctness.judging.finding import CheckFailed, during, what
from correctness.judging.process_state import require_unchanged, restored, settings
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem, fit, resize
from moe_impls.interface import GATED_ACTIVATIONS, Implementation

REPEATS = 50
THREADS, ROUNDS = 3, 20
FEW_ROUNDS = 3  # of one whose calls may take seconds, since it compiles anew for each case
# Each number of tokens, experts, choices and features up to these is met once, beside sizes that differ.
MOST_TOKENS, MOST_EXPERTS, MOST_FEATURES = 67, 19, 19


def new_contents(subject: Implementation, problem: Problem) -> None:
    """Give the new result for new numbers and routing at the same addresses, and keep the old result.

    With gradients and without: what a kernel remembers for inference it may not remember for training.
    """
    second = replace(problem, seed=problem.seed + 1)
    for gradients in {subject.support.gradients, False}:
        inputs = make_inputs(problem)
        before = run(subject.forward, inputs, problem.combine, gradients=gradients)
        copies = {name: t.clone() for name, t in before.items()}
        inputs.overwrite(make_inputs(second))
        require_right(run(subject.forward, inputs, problem.combine, gradients=gradients), second)
        for name, t in before.items():
            if not torch.equal(t, copies[name]):
                raise CheckFailed(
                    f"{what(name)} that an earlier call returned was overwritten by a later one"
                )


def one_input_changes(subject: Implementation, problem: Problem) -> None:
    """Read each input anew in each call: one at a time is rewritten, then two of its rows trade places.

    Rows that trade places leave the first and last entries, the sum and every other statistic as they were.
    """
    inputs, other = make_inputs(problem), make_inputs(replace(problem, seed=problem.seed + 1))
    require_right_calls(subject, problem, inputs)
    changes = {name: (t, other.tensors[name]) for name, t in inputs.tensors.items()}
    changes["expert_ids"] = (inputs.routing.expert_ids, other.routing.expert_ids)
    for target, source in changes.values():
        target.copy_(source)
        require_right_calls(subject, problem, inputs)
        target[[1, 2]] = target[[2, 1]]
        require_right_calls(subject, problem, inputs)


def _by_copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():  # as an optimiser does
        target.copy_(source)


def _by_data(target: Tensor, source: Tensor) -> None:
    target.data.copy_(source)  # leaves the version of the tensor as it was


def _by_new_data(target: Tensor, source: Tensor) -> None:
    target.data = source.clone()


def _rewritten(problem: Problem, leaves: dict[str, Tensor]) -> Iterator[tuple[tuple, Problem, Inputs]]:
    """Yield arguments made of ``leaves``, whose contents are changed each time, and what they then hold."""
    arguments = calling.assemble(make_inputs(problem), leaves)
    for number, change in enumerate((_by_copy, _by_copy, _by_data, _by_new_data)):
        now = replace(problem, seed=problem.seed + number)
        new = make_inputs(now)
        for name, leaf in leaves.items():
            change(leaf, new.tensors[name])
        change(arguments[1].expert_ids, new.routing.expert_ids)
        yield arguments, now, new


def same_objects(subject: Implementation, problem: Problem) -> None:
    """Read what x, routing and nn.Parameter objects that live on hold now, in each call.

    They change as an optimiser changes them, through ``.data`` without a new version, and by a new ``.data``.
    """
    tensors = make_inputs(problem).tensors
    leaves: dict[str, Tensor] = {n: torch.nn.Parameter(t.clone()) for n, t in tensors.items()}
    for arguments, now, new in _rewritten(problem, leaves):
        for gradients in (False, subject.support.gradients):
            with torch.set_grad_enabled(gradients):
                y = subject.forward(*arguments, combine=problem.combine)
            calling.check_output(y, new)
            graph = Graph(y, leaves if gradients else {})
            require_right(finish(graph, new.dy) if gradients else {"y": y.detach()}, now)
    if not subject.support.compiles_per_case:  # each mode is compiled anew
        for mode in (torch.no_grad, torch.inference_mode):
            _same_frozen_objects(subject, problem, mode)


def _same_frozen_objects(subject: Implementation, problem: Problem, mode: Callable[[], Any]) -> None:
    """Do so without gradients, with tensors that want none; earlier results stay what they are."""
    leaves = {n: t.clone() for n, t in make_inputs(problem).tensors.items()}
    earlier: list[tuple[Tensor, Problem]] = []
    for arguments, now, new in _rewritten(problem, leaves):
        with mode():
            y = subject.forward(*arguments, combine=problem.combine)
        calling.check_output(y, new)
        earlier.append((y, now))
        for result, of in earlier:
            require_right({"y": result}, of)


def prepared(subject: Implementation, problem: Problem) -> None:
    """Serve all later tokens with what ``prepare`` made; once a weight has changed, raise or be right."""
    inputs, other = make_inputs(problem), make_inputs(replace(problem, seed=problem.seed + 1))

    def lay_out() -> Implementation:
        return replace(subject, forward=subject.ready(inputs.experts))

    ready = lay_out()
    another = subject.ready(other.experts)  # of another layer
    first = ready.forward(*inputs[:3], combine=problem.combine)
    before = first.clone()
    another(*other[:3], combine=problem.combine)
    ready.forward(other.x, other.routing, inputs.experts, combine=problem.combine)
    if not torch.equal(first, before):
        raise CheckFailed("a later call of what prepare made, for these experts or others, changed a result")
    for number in range(3):
        tokens = make_inputs(replace(problem, seed=problem.seed + number, T=problem.T + number // 2))
        require_right_calls(ready, problem, tokens._replace(experts=inputs.experts))
    for name, weight in inputs.experts.tensors.items():
        weight.copy_(other.experts.tensors[name])
        with (
            during(f"a call of what prepare made, after {name} was written to"),
            contextlib.suppress(RuntimeError),  # that the weights have changed
        ):
            require_right_calls(ready, problem, inputs)
            continue
        ready = lay_out()
        require_right_calls(ready, problem, inputs)


def options_change(subject: Implementation, problem: Problem) -> None:
    """Follow the activation, combine and biases of the call where the tensors are those of an earlier one."""
    inputs = make_inputs(problem)
    require_right_calls(subject, problem, inputs)
    if problem.combine == "sum":

        def by_default(*arguments: Any, combine: str) -> Tensor:
            return subject.forward(*arguments)

        require_right_calls(replace(subject, forward=by_default), problem, inputs)
    experts, support = inputs.experts, subject.support
    gated = problem.activation in GATED_ACTIVATIONS
    others = (a for a in support.activations if a != problem.activation)
    alike = next((a for a in others if (a in GATED_ACTIVATIONS) == gated), None)
    if alike:
        other = inputs._replace(experts=replace(experts, activation=alike))
        require_right_calls(subject, replace(problem, activation=alike), other)
    if "logsumexp" in support.combines:
        require_right_calls(subject, replace(problem, combine="logsumexp"), inputs)
    if set(support.biases) == {True, False}:
        for without in ({"b_in": None}, {"b_out": None}, {"b_in": None, "b_out": None}):
            require_right_calls(subject, problem, inputs._replace(experts=replace(experts, **without)))


def every_size(subject: Implementation, problem: Problem) -> None:
    """Be right for every small number of tokens, experts, choices and features."""
    for sized in _small_sizes(problem):
        p = fit(resize(sized, subject.support), subject.support)
        require_right_calls(subject, p)


def _small_sizes(problem: Problem) -> list[Problem]:
    """Make problems in which each size takes each of its small values, beside others that are varied, too."""
    found = []
    for T in range(2, MOST_TOKENS + 1):
        E = 1 + T % MOST_EXPERTS
        features = {name: 1 + (T * step) % MOST_FEATURES for name, step in (("D", 3), ("H", 5), ("O", 7))}
        found.append(replace(problem, name=f"{problem.name}_{T}", T=T, E=E, K=1 + T % E, seed=T, **features))
    return found


def changing_sizes(subject: Implementation, problem: Problem) -> None:
    """Be right for batches of changing size with the same weights, and keep every earlier result."""
    inputs = make_inputs(problem)
    returned = []
    for T in (problem.T, 1, problem.T // 2, 0, problem.T // 3, problem.T):
        part = inputs.first(T)
        smaller = replace(problem, T=T)
        for results in run_both_ways(subject, smaller, part):
            require_right(results, smaller, part)
            returned += [(T, name, t, t.clone()) for name, t in results.items()]
    for T, name, t, copy in returned:
        if not torch.equal(t, copy):
            raise CheckFailed(
                f"{what(name)} that a call with {T} tokens returned was overwritten by a later one"
            )


def thread_alone(subject: Implementation, problem: Problem) -> None:
    """Give the right results in a thread that never called before, and in one that has only the backward."""
    with ThreadPoolExecutor(1) as pool:
        for results in pool.submit(lambda: list(run_both_ways(subject, problem))).result():
            require_right(results, problem)
    if subject.support.gradients:
        inputs = make_inputs(problem)
        graph = start(subject.forward, inputs, problem.combine)
        with ThreadPoolExecutor(1) as pool:
            require_right(pool.submit(finish, graph, inputs.dy).result(), problem)


def another_thread(subject: Implementation, problem: Problem) -> None:
    """Give threads that never called before the right results and gradients, one alone and several at once.

    A backward may run in another thread than its forward. Threads that call at once have inputs of their
    own, of one shape, and begin each round together.
    """
    thread_alone(subject, problem)
    own = [replace(problem, seed=problem.seed + 1 + number) for number in range(THREADS)]
    inputs = [make_inputs(p) for p in own]
    together = threading.Barrier(THREADS)

    def call_in_rounds(number: int) -> list[dict[str, Tensor]]:
        found = []
        for _ in range(FEW_ROUNDS if subject.support.compiles_per_case else ROUNDS):
            together.wait()
            found += run_both_ways(subject, own[number], inputs[number])
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(call_in_rounds, number) for number in range(THREADS)]
        for future in waiting:
            future.add_done_callback(lambda done: together.abort() if done.exception() else None)
        failures = [e for e in (future.exception() for future in waiting) if e is not None]
        for failure in failures:
            if not isinstance(failure, threading.BrokenBarrierError):
                raise failure
    for p, future in zip(own, waiting, strict=True):
        for results in future.result():
            require_right(results, p)


def deterministic(subject: Implementation, problem: Problem) -> None:
    """Return bit-equal output and gradients in ten calls on equal inputs, where that is declared."""
    inputs = make_inputs(problem)
    first = list(run_both_ways(subject, problem, inputs))
    for repeat in range(1, 10):
        for before, again in zip(first, run_both_ways(subject, problem, inputs), strict=True):
            for name, want in before.items():
                if not torch.equal(again[name], want):
                    raise CheckFailed(
                        f"{what(name)} differs between call 1 and call {repeat + 1} on equal inputs: with "
                        "threads the backward of x[index] adds in any order, where that of index_select does "
                        "not; or declare deterministic=False in SUPPORT"
                    )


def every_call(subject: Implementation, problem: Problem) -> None:
    """Be right in fifty calls with gradients and fifty without, each with results in memory of its own."""
    inputs = make_inputs(problem)
    for gradients in (subject.support.gradients, False):
        found = [run(subject.forward, inputs, problem.combine, gradients=gradients) for _ in range(REPEATS)]
        places: set[int] = set()
        for results in found:
            require_right(results, problem)
            own = {t.untyped_storage().data_ptr() for t in results.values()}
            if own & places:
                raise CheckFailed(f"two of {REPEATS} calls return their results in the same memory")
            places |= own


def global_state(subject: Implementation, problem: Problem) -> None:
    """Leave random generators, modes, threads and other settings of the process as they were."""
    inputs = make_inputs(problem)

    def forward_and_backward(gradients: bool) -> None:
        leaves = {n: t.detach().requires_grad_(gradients) for n, t in inputs.tensors.items()}
        x, routing, experts = calling.assemble(inputs, leaves)
        y = subject.forward(x, routing, experts, combine=problem.combine)
        if gradients:
            torch.autograd.grad(y, list(leaves.values()), inputs.dy)

    for results in run_both_ways(subject, problem, inputs):  # what the first call imports is no setting
        gradients = len(results) > 1
        with torch.set_grad_enabled(gradients):
            require_unchanged(
                functools.partial(forward_and_backward, gradients),
                problem.dtype,
                vary=not subject.support.compiles_per_case,  # each setting is compiled anew
            )
    if not subject.support.compiles_per_case:
        for dtype in (torch.bfloat16, torch.float64):
            with restored(settings(problem.dtype)):
                torch.set_default_dtype(dtype)
                found = list(run_both_ways(subject, problem, inputs))
            for results in found:
                require_right(results, problem)
