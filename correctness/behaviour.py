"""Checks of how an implementation behaves beyond one right result: memory, state, layouts, graphs, modes.

Each is a function of an implementation and a problem that raises ``CheckFailed``; ``correctness.checks``
lists the problems that each runs on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.utils.deterministic as torch_deterministic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness import compare
from correctness.compare import CheckFailed, Graph, calls, finish, hold, hold_calls, run, start, what
from correctness.problems import (
    EXACT_ACTIVATIONS,
    LOW_PRECISION,
    Inputs,
    Problem,
    fit,
    make_inputs,
    resize,
    unsupported,
)
from correctness.settings import require_unchanged, restored, settings
from moe_impls.interface import ACTIVATIONS, GATED_ACTIVATIONS, Experts, Implementation, Routing, Support
from moe_impls.registry import one_line

ROUTINGS = 10
REPEATS = 50
THREADS, ROUNDS = 3, 3
# Each number of tokens, experts, choices and features up to these is met once, beside sizes that differ.
MOST_TOKENS, MOST_EXPERTS, MOST_FEATURES = 67, 19, 19


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """New tensors hold NaN until they are written to, as reused memory might."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch_deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch_deterministic, "fill_uninitialized_memory", True)  # noqa: B010  # of a property
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operators without a deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(torch_deterministic, "fill_uninitialized_memory", fills)  # noqa: B010


def dirty_memory(subject: Implementation, problem: Problem) -> None:
    """Memory that nothing wrote to is never read, nor left in a result: in the first call or the second."""
    with fresh_memory_is_nan():
        for _ in range(2):
            hold_calls(subject, problem)


def recycled_memory(subject: Implementation, problem: Problem) -> None:
    """The same where the allocator hands out blocks of the results' sizes that were full of NaN, or of 7."""
    inputs = make_inputs(problem)
    shapes = [inputs.dy.shape, *(t.shape for t in inputs.tensors.values())]
    for filling in (torch.nan, 7.0):
        blocks = [
            torch.full(s, filling, dtype=d, device=problem.device)
            for s in shapes
            for d in (problem.dtype, torch.float32)
        ]
        del blocks
        hold_calls(subject, problem)


def inputs_unchanged(subject: Implementation, problem: Problem) -> None:
    """No input is written to, by forward or backward, and no result is a view of one."""
    inputs = make_inputs(problem)
    before = inputs.map(torch.clone)
    ids = inputs.routing.expert_ids.clone()
    named = {**inputs.tensors, "dy": inputs.dy, "expert_ids": inputs.routing.expert_ids}
    versions = {name: tensor._version for name, tensor in named.items()}
    kept = {**before.tensors, "dy": before.dy, "expert_ids": ids}
    for results in calls(subject, problem, inputs):
        for name, tensor in named.items():
            if not torch.equal(tensor, kept[name]):
                raise CheckFailed(f"{name} was written to")
            if tensor._version != versions[name]:
                raise CheckFailed(f"{name} was written to, and its contents restored")
            for result, value in results.items():
                if (
                    value.numel()
                    and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                ):
                    raise CheckFailed(f"{what(result)} shares its memory with the input {name}")


def new_contents(subject: Implementation, problem: Problem) -> None:
    """New numbers and a new routing at the same addresses give the new result; the old result stays.

    With gradients and without: what a kernel remembers for inference it may not remember for training.
    """
    second = replace(problem, seed=problem.seed + 1)
    for gradients in {subject.support.gradients, False}:
        inputs = make_inputs(problem)
        before = run(subject.forward, inputs, problem.combine, gradients=gradients)
        copies = {name: t.clone() for name, t in before.items()}
        inputs.overwrite(make_inputs(second))
        hold(run(subject.forward, inputs, problem.combine, gradients=gradients), second)
        for name, t in before.items():
            if not torch.equal(t, copies[name]):
                raise CheckFailed(
                    f"{what(name)} that an earlier call returned was overwritten by a later one"
                )


def one_input_changes(subject: Implementation, problem: Problem) -> None:
    """One tensor in place gets new contents, then two of its rows trade places: each is read in each call.

    Rows that trade places leave the first and last entries, the sum and every other statistic as they were.
    """
    inputs, other = make_inputs(problem), make_inputs(replace(problem, seed=problem.seed + 1))
    hold_calls(subject, problem, inputs)
    changes = {name: (t, other.tensors[name]) for name, t in inputs.tensors.items()}
    changes["expert_ids"] = (inputs.routing.expert_ids, other.routing.expert_ids)
    for target, source in changes.values():
        target.copy_(source)
        hold_calls(subject, problem, inputs)
        target[[1, 2]] = target[[2, 1]]
        hold_calls(subject, problem, inputs)


def _by_copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():  # as an optimiser does
        target.copy_(source)


def _by_data(target: Tensor, source: Tensor) -> None:
    target.data.copy_(source)  # leaves the version of the tensor as it was


def _by_new_data(target: Tensor, source: Tensor) -> None:
    target.data = source.clone()


def _rewritten(problem: Problem, leaves: dict[str, Tensor]) -> Iterator[tuple[tuple, Problem, Inputs]]:
    """The arguments that ``leaves`` are, whose contents are changed each time, and what they then hold."""
    arguments = compare.assemble(make_inputs(problem), leaves)
    for number, change in enumerate((_by_copy, _by_copy, _by_data, _by_new_data)):
        now = replace(problem, seed=problem.seed + number)
        new = make_inputs(now)
        for name, leaf in leaves.items():
            change(leaf, new.tensors[name])
        change(arguments[1].expert_ids, new.routing.expert_ids)
        yield arguments, now, new


def same_objects(subject: Implementation, problem: Problem) -> None:
    """One x, one routing and nn.Parameter objects that live on: each call reads what they hold now.

    They change as an optimiser changes them, through ``.data`` without a new version, and by a new ``.data``.
    """
    tensors = make_inputs(problem).tensors
    leaves: dict[str, Tensor] = {n: torch.nn.Parameter(t.clone()) for n, t in tensors.items()}
    for arguments, now, new in _rewritten(problem, leaves):
        for gradients in (False, subject.support.gradients):
            with torch.set_grad_enabled(gradients):
                y = subject.forward(*arguments, combine=problem.combine)
            compare.check_output(y, new)
            graph = Graph(y, leaves if gradients else {})
            hold(finish(graph, new.dy) if gradients else {"y": y.detach()}, now)
    if not subject.support.compiles_per_case:  # each mode is compiled anew
        for mode in (torch.no_grad, torch.inference_mode):
            _same_frozen_objects(subject, problem, mode)


def _same_frozen_objects(subject: Implementation, problem: Problem, mode: Callable[[], Any]) -> None:
    """The same without gradients, of tensors that want none; earlier results stay what they are."""
    leaves = {n: t.clone() for n, t in make_inputs(problem).tensors.items()}
    earlier: list[tuple[Tensor, Problem]] = []
    for arguments, now, new in _rewritten(problem, leaves):
        with mode():
            y = subject.forward(*arguments, combine=problem.combine)
        compare.check_output(y, new)
        earlier.append((y, now))
        for result, of in earlier:
            hold({"y": result}, of)


def prepared(subject: Implementation, problem: Problem) -> None:
    """What ``prepare`` lays out serves all later tokens; once a weight has changed it raises or is right."""
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
        hold_calls(ready, problem, tokens._replace(experts=inputs.experts))
    for name, weight in inputs.experts.tensors.items():
        weight.copy_(other.experts.tensors[name])
        with contextlib.suppress(RuntimeError):  # that the weights have changed
            hold_calls(ready, problem, inputs)
            continue
        ready = lay_out()
        hold_calls(ready, problem, inputs)


def options_change(subject: Implementation, problem: Problem) -> None:
    """The same tensors under another activation or combine, or without a bias, give the result of that."""
    inputs = make_inputs(problem)
    hold_calls(subject, problem, inputs)
    if problem.combine == "sum":

        def by_default(*arguments: Any, combine: str) -> Tensor:
            return subject.forward(*arguments)

        hold_calls(replace(subject, forward=by_default), problem, inputs)
    experts, support = inputs.experts, subject.support
    alike = {"swiglu": "geglu", "geglu": "swiglu", "silu": "gelu", "gelu": "silu"}.get(problem.activation)
    if alike in support.activations:
        other = inputs._replace(experts=replace(experts, activation=alike))
        hold_calls(subject, replace(problem, activation=alike), other)
    if "logsumexp" in support.combines:
        hold_calls(subject, replace(problem, combine="logsumexp"), inputs)
    if set(support.biases) == {True, False}:
        for without in ({"b_in": None}, {"b_out": None}, {"b_in": None, "b_out": None}):
            hold_calls(subject, problem, inputs._replace(experts=replace(experts, **without)))


def every_size(subject: Implementation, problem: Problem) -> None:
    """No number of tokens, experts, choices or features is special: all small ones are right."""
    for sized in _small_sizes(problem):
        p = fit(resize(sized, subject.support), subject.support)
        hold_calls(subject, p)


def _small_sizes(problem: Problem) -> list[Problem]:
    """Problems in which each size takes each of its small values, beside other sizes that are varied, too."""
    found = []
    for T in range(2, MOST_TOKENS + 1):
        E = 1 + T % MOST_EXPERTS
        features = {name: 1 + (T * step) % MOST_FEATURES for name, step in (("D", 3), ("H", 5), ("O", 7))}
        found.append(replace(problem, name=f"{problem.name}_{T}", T=T, E=E, K=1 + T % E, seed=T, **features))
    return found


def changing_sizes(subject: Implementation, problem: Problem) -> None:
    """Batches of other sizes with the same weights: nothing is left of the larger one, no result is lost."""
    inputs = make_inputs(problem)
    returned = []
    for T in (problem.T, 1, problem.T // 2, 0, problem.T // 3, problem.T):
        part = inputs.first(T)
        smaller = replace(problem, T=T)
        for results in calls(subject, smaller, part):
            hold(results, smaller, part)
            returned += [(T, name, t, t.clone()) for name, t in results.items()]
    for T, name, t, copy in returned:
        if not torch.equal(t, copy):
            raise CheckFailed(
                f"{what(name)} that a call with {T} tokens returned was overwritten by a later one"
            )


def _filled(shape: list[int], like: Tensor) -> Tensor:
    return torch.full(
        shape, torch.nan if like.is_floating_point() else -1, dtype=like.dtype, device=like.device
    )


def _scattered(t: Tensor) -> Tensor:
    """The same numbers as every second entry of a larger tensor of NaN, the last dimension outermost."""
    padded = _filled([2 * s + 1 for s in reversed(t.shape)], t)
    return padded.permute(*reversed(range(t.dim())))[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """The same numbers, dense, with the last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _padded(t: Tensor) -> Tensor:
    """The same numbers as the leading columns of wider rows."""
    return _filled([*t.shape[:-1], t.shape[-1] + 3], t)[..., :-3].copy_(t)


def _sliced(t: Tensor) -> Tensor:
    """The same numbers as the first rows of each matrix of a taller tensor, as w_in of a fused one."""
    return _filled([*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]], t)[..., :-3, :].copy_(t)


LAYOUTS = (_scattered, _transposed, _padded, _sliced)


def strides(subject: Implementation, problem: Problem) -> None:
    """Inputs, and the gradient that flows in, need not be contiguous: the numbers alone decide."""
    plain = make_inputs(problem)
    for layout in LAYOUTS:
        inputs = plain.map(layout)
        ids = layout(plain.routing.expert_ids)
        inputs = inputs._replace(routing=inputs.routing._replace(expert_ids=ids))
        for results in calls(subject, problem, inputs):
            hold(results, problem)


def one_strided(subject: Implementation, problem: Problem) -> None:
    """One input at a time that is not contiguous, among others that are."""
    plain = make_inputs(problem)
    for name, tensor in plain.tensors.items():
        arguments = compare.assemble(plain, plain.tensors | {name: _scattered(tensor)})
        for results in calls(subject, problem, Inputs(*arguments, plain.dy)):
            hold(results, problem)


def offsets(subject: Implementation, problem: Problem) -> None:
    """Inputs may be contiguous pieces out of the middle of a larger tensor."""

    def piece(t: Tensor) -> Tensor:
        return _filled([t.numel() + 7], t)[3 : 3 + t.numel()].view(t.shape).copy_(t)

    inputs = make_inputs(problem).map(piece)
    inputs = inputs._replace(routing=Routing(piece(inputs.routing.expert_ids), inputs.routing.gates))
    for results in calls(subject, problem, inputs):
        hold(results, problem)


def expanded(subject: Implementation, problem: Problem) -> None:
    """Inputs may repeat one row by a stride of zero: tokens, gates, weights, or dy as y.sum() gives it.

    Rows of x may also overlap, as windows of a signal do, or be all zeros, as padding is.
    """
    plain = make_inputs(problem)
    x, (ids, gates), experts, dy = plain
    T, D = x.shape
    for inputs in (
        plain._replace(x=x.flatten()[: T + D - 1].unfold(0, D, 1)),
        plain._replace(x=x * (torch.arange(T, device=x.device) % 3 > 0).unsqueeze(1)),
        plain._replace(x=x[:1].expand(x.shape)),
        plain._replace(routing=Routing(ids, gates[:1].expand(gates.shape))),
        plain._replace(routing=Routing(ids[:1].expand(ids.shape), gates)),
        plain._replace(experts=experts.map(lambda w: w[:1].expand(w.shape))),
        plain._replace(dy=dy.flatten()[:1].expand(dy.shape)),
    ):
        hold_calls(subject, problem, inputs)


def shared_memory(subject: Implementation, problem: Problem) -> None:
    """Inputs of one shape may be one and the same memory: w_in and w_out, b_in and b_out, x and dy."""
    inputs = make_inputs(problem)
    experts = inputs.experts
    if experts.w_in.shape == experts.w_out.shape:
        experts = replace(experts, w_out=experts.w_in, b_out=experts.b_in)
    hold_calls(subject, problem, inputs._replace(experts=experts, dy=inputs.x))


def after_inference(subject: Implementation, problem: Problem) -> None:
    """A first call under inference_mode keeps nothing that training cannot use, as tensors made there are."""
    with torch.inference_mode():
        x, routing, experts, _ = make_inputs(problem)
        subject.forward(x, routing, experts, combine=problem.combine)
    hold_calls(subject, problem)


def without_gradients(subject: Implementation, problem: Problem) -> None:
    """Under no_grad and inference_mode, and where nothing requires a gradient, the numbers are right."""
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            inputs = make_inputs(problem)
            y = subject.forward(inputs.x, inputs.routing, inputs.experts, combine=problem.combine)
            compare.check_output(y, inputs)
            if y.requires_grad:
                raise CheckFailed("y requires a gradient, and no input does")
            hold({"y": y}, problem)
    # In training, weights that require gradients and a call under no_grad (evaluation) are common.
    inputs = make_inputs(problem)
    x, routing, experts = compare.assemble(
        inputs, {n: t.requires_grad_(subject.support.gradients) for n, t in inputs.tensors.items()}
    )
    with torch.no_grad():
        y = subject.forward(x, routing, experts, combine=problem.combine)
    if y.requires_grad:
        raise CheckFailed("y requires a gradient under no_grad")
    hold({"y": y}, problem)


def gradient_subsets(subject: Implementation, problem: Problem) -> None:
    """Any part of the tensors may require gradients: each set of them that there is."""
    inputs = make_inputs(problem)
    names = list(inputs.tensors)
    subsets = [
        list(wanted) for size in range(1, len(names)) for wanted in itertools.combinations(names, size)
    ]
    if subject.support.compiles_per_case:  # each subset is compiled anew
        subsets = [["x"], ["gates"], ["w_in", "w_out"]]
    for wanted in subsets:
        hold(run(subject.forward, inputs, problem.combine, wanted=wanted), problem)


def inside_a_graph(subject: Implementation, problem: Problem) -> None:
    """Inputs may be results of other operations, and weights may be nn.Parameter: gradients pass through."""
    inputs = make_inputs(problem)
    for parameters in (False, True):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.tensors.items()}
        tensors = {n: leaf * 1 for n, leaf in leaves.items()}
        if parameters:
            weights = {n: torch.nn.Parameter(leaves[n].detach()) for n in inputs.experts.tensors}
            leaves, tensors = leaves | weights, tensors | weights
        x, routing, experts = compare.assemble(inputs, tensors)
        y = subject.forward(x, routing, experts, combine=problem.combine)
        compare.check_output(y, inputs)
        if not y.requires_grad:
            raise CheckFailed("y does not require a gradient where its inputs are results of operations")
        hold(finish(Graph(y, leaves), inputs.dy), problem)
        if not subject.support.compiles_per_case:
            with torch.no_grad():
                hold({"y": subject.forward(x, routing, experts, combine=problem.combine)}, problem)


def several_graphs(subject: Implementation, problem: Problem) -> None:
    """Forwards, one without gradients, and their backwards in either order: each keeps what is its own.

    The last of them differ in their options, too.
    """
    support = subject.support
    graphs_of = [replace(problem, seed=problem.seed + i) for i in range(3)]
    if not support.compiles_per_case:
        graphs_of += _other_options(graphs_of[0], support)
    inputs = [make_inputs(p) for p in graphs_of]
    for step in (1, -1):
        graphs = [start(subject.forward, i, p.combine) for p, i in zip(graphs_of, inputs, strict=True)]
        evaluated = run(subject.forward, inputs[2], problem.combine, gradients=False)
        for p, i, graph in list(zip(graphs_of, inputs, graphs, strict=True))[::step]:
            hold(finish(graph, i.dy), p)
        hold(evaluated, graphs_of[2])


def _other_options(problem: Problem, support: Support) -> list[Problem]:
    """The problem with one option at a time replaced by another that is declared, of the same shapes."""
    p = problem
    alike = [
        a
        for a in (EXACT_ACTIVATIONS if p.exact else ACTIVATIONS)
        if (a in GATED_ACTIVATIONS) == (p.activation in GATED_ACTIVATIONS)
    ]
    others = []
    for option, values in (
        ("activation", alike),
        ("output_activation", support.output_activations if p.bias else ()),
        ("combine", () if p.exact else support.combines),
    ):
        others += [replace(p, **{option: value}) for value in values if value != getattr(p, option)][:1]
    return [p for p in others if unsupported(support, p) is None]


def backward_twice(subject: Implementation, problem: Problem) -> None:
    """With retain_graph=True a second backward of a graph, of another dy, is right; the first stays.

    In exact problems it gives to the bit what the first gave, times the same power of two or zero.
    """
    inputs = make_inputs(problem)
    graph = start(subject.forward, inputs, problem.combine)
    first = finish(graph, inputs.dy, retain_graph=True)
    if problem.exact:
        power = 40 if torch.finfo(problem.dtype).max > 1e30 else 2
        for factor in (2.0**-power, 2.0**power, 0.0):
            scaled = finish(graph, inputs.dy * factor, retain_graph=True)
            for name in graph.leaves:
                if not torch.equal(scaled[name], first[name] * factor):
                    raise CheckFailed(f"dy times {factor:.3g} does not give {what(name)} times that")
    again = finish(graph, 2 * inputs.dy)
    hold(first, problem)
    hold({name: t if name == "y" else t / 2 for name, t in again.items()}, problem)


def results_are_the_callers(subject: Implementation, problem: Problem) -> None:
    """What a caller writes into y and gradients spoils no gradient in silence, and reaches no later call."""
    inputs = make_inputs(problem)
    if subject.support.gradients:
        graph = start(subject.forward, inputs, problem.combine)
        try:
            graph.y.add_(1)
            results = finish(graph, inputs.dy)
        except RuntimeError as error:  # autograd may refuse, as it does for its own sigmoid
            if "inplace" not in str(error):
                raise
        else:
            hold({name: t for name, t in results.items() if name != "y"}, problem)
    x, (ids, gates), _, _ = inputs
    one_token = inputs._replace(
        x=x[:1].expand(x.shape), routing=Routing(*(t[:1].expand(t.shape) for t in (ids, gates)))
    )
    for given in (one_token, inputs):
        for results in calls(subject, problem, given):
            for name, t in results.items():
                if name == "y" or 0 not in t.stride():  # autograd itself makes gradients that repeat a row
                    try:
                        t.add_(torch.nan)
                    except RuntimeError as error:
                        raise CheckFailed(f"{what(name)} cannot be written to: {one_line(error)}") from error
    hold_calls(subject, problem, inputs)


def another_thread(subject: Implementation, problem: Problem) -> None:
    """Threads that never called it before get the right results and gradients: one alone, several at once.

    A backward may run in another thread than its forward. Threads that call at once have inputs of their
    own, of one shape, and begin each round together.
    """
    with ThreadPoolExecutor(1) as pool:
        for results in pool.submit(lambda: list(calls(subject, problem))).result():
            hold(results, problem)
    if subject.support.gradients:
        inputs = make_inputs(problem)
        graph = start(subject.forward, inputs, problem.combine)
        with ThreadPoolExecutor(1) as pool:
            hold(pool.submit(finish, graph, inputs.dy).result(), problem)
    own = [replace(problem, seed=problem.seed + 1 + number) for number in range(THREADS)]
    inputs = [make_inputs(p) for p in own]
    together = threading.Barrier(THREADS)

    def call_in_rounds(number: int) -> list[dict[str, Tensor]]:
        found = []
        for _ in range(ROUNDS):
            together.wait()
            found += calls(subject, own[number], inputs[number])
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
            hold(results, p)


def gradients_accumulate(subject: Implementation, problem: Problem) -> None:
    """Two backwards into the same .grad give the sum, and the first gradient is not overwritten."""
    inputs = make_inputs(problem)
    y, leaves = start(subject.forward, inputs, problem.combine)
    x, routing, experts = compare.assemble(inputs, leaves)
    y.backward(inputs.dy)
    subject.forward(x, routing, experts, combine=problem.combine).backward(inputs.dy)
    sums = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if missing := leaves.keys() - sums.keys():
        raise CheckFailed(f"no gradient reached {', '.join(sorted(missing))}")
    hold({name: grad / 2 for name, grad in sums.items()}, problem)


def non_finite_contained(subject: Implementation, problem: Problem) -> None:
    """NaN or infinity in the x, gates or dy of a token stays in its rows of y, dx and dgates."""
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
        for results in calls(subject, problem, inputs):
            if bool(results["y"][reached[:3]].isfinite().all(dim=1).any()):
                raise CheckFailed(f"the row of a token with {value} is finite: its input is not read")
            rows = {}
            for name, want in compare.oracle_values(problem).items():
                if name in results and name in ("y", "x", "gates"):
                    rows[name] = results[name].clone()
                    # The reached rows are right by definition.
                    rows[name][reached] = want[reached].to(rows[name].dtype)
            hold(rows, problem)


def deterministic(subject: Implementation, problem: Problem) -> None:
    """Ten calls on equal inputs are bit-equal, output and gradients, where that is declared."""
    inputs = make_inputs(problem)
    first = list(calls(subject, problem, inputs))
    for repeat in range(1, 10):
        for before, again in zip(first, calls(subject, problem, inputs), strict=True):
            for name, want in before.items():
                if not torch.equal(again[name], want):
                    raise CheckFailed(
                        f"{what(name)} differs between call 1 and call {repeat + 1} on equal inputs: with "
                        "threads the backward of x[index] adds in any order, where that of index_select does "
                        "not; or declare deterministic=False in SUPPORT"
                    )


def every_call(subject: Implementation, problem: Problem) -> None:
    """Not only the first call is right: fifty with gradients and fifty without are; all results stay."""
    inputs = make_inputs(problem)
    for gradients in (subject.support.gradients, False):
        found = [run(subject.forward, inputs, problem.combine, gradients=gradients) for _ in range(REPEATS)]
        places: set[int] = set()
        for results in found:
            hold(results, problem)
            own = {t.untyped_storage().data_ptr() for t in results.values()}
            if own & places:
                raise CheckFailed(f"two of {REPEATS} calls return their results in the same memory")
            places |= own


def global_state(subject: Implementation, problem: Problem) -> None:
    """Random generators, modes, threads and other settings are after forward and backward as before them."""
    inputs = make_inputs(problem)

    def forward_and_backward(gradients: bool) -> None:
        leaves = {n: t.detach().requires_grad_(gradients) for n, t in inputs.tensors.items()}
        x, routing, experts = compare.assemble(inputs, leaves)
        y = subject.forward(x, routing, experts, combine=problem.combine)
        if gradients:
            torch.autograd.grad(y, list(leaves.values()), inputs.dy)

    for results in calls(subject, problem, inputs):  # what the first call imports is no setting
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
                found = list(calls(subject, problem, inputs))
            for results in found:
                hold(results, problem)


def autocast(subject: Implementation, problem: Problem) -> None:
    """Under autocast the result keeps the dtype of x and is right to the dtype of autocast, gradients too."""
    inputs = make_inputs(problem)
    for dtype in (problem.dtype,) if problem.dtype in LOW_PRECISION else LOW_PRECISION:
        with torch.autocast(problem.device.partition(":")[0], dtype=dtype):
            both = list(calls(subject, problem, inputs))
        low = replace(problem, dtype=dtype)  # its budget is that of a computation kept in that dtype
        ref = None if problem.exact else compare.make_reference(low, inputs)
        for results in both:
            if ref is not None:
                compare.require(results, ref)
            else:  # rounded, because float32 results may have kept more
                hold({n: t if n == "gates" else t.to(dtype) for n, t in results.items()}, low)


def fullgraph(subject: Implementation, problem: Problem) -> None:
    """torch.compile makes one graph of it, which serves ten routings without a recompile, and is right."""
    torch.compiler.reset()
    compiled = torch.compile(subject.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = subject.support.gradients
    try:
        for seed in range(ROUTINGS):
            p = replace(problem, seed=seed)
            stance = "default" if seed == 0 else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                hold(run(compiled, make_inputs(p), p.combine, gradients=gradients), p)
    except RuntimeError as error:  # TorchDynamoException derives from it
        raise CheckFailed(f"torch.compile: {one_line(error)[:500]}") from error
    finally:
        torch.compiler.reset()


def no_host_sync(subject: Implementation, problem: Problem) -> None:
    """No call and no backward waits on the host for what a tensor holds.

    On a CPU: they take tensors that hold nothing. On CUDA: they run where waiting is an error, and one CUDA
    graph of them is right for ten routings.
    """
    for gradients in {subject.support.gradients, False}:
        check = _one_cuda_graph if problem.device.startswith("cuda") else _without_contents
        try:
            check(subject, problem, gradients)
        except RuntimeError as error:
            which = "the call or its backward" if gradients else "the call without gradients"
            raise CheckFailed(f"{which} needs a value on the host: {one_line(error)[:500]}") from error


def _bare_call(
    subject: Implementation, problem: Problem, inputs: Inputs, gradients: bool
) -> Callable[[], dict[str, Tensor]]:
    """The call, and its backward, and nothing beside it; each time on the same tensors."""
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in inputs.tensors.items()}
    arguments = compare.assemble(inputs, leaves)

    def call() -> dict[str, Tensor]:
        with torch.set_grad_enabled(gradients):
            y = subject.forward(*arguments, combine=problem.combine)
        found = torch.autograd.grad(y, list(leaves.values()), inputs.dy) if gradients else ()
        return {"y": y.detach(), **dict(zip(leaves, found, strict=False))}

    return call


def _without_contents(subject: Implementation, problem: Problem, gradients: bool) -> None:
    """Raise RuntimeError where a call on the CPU looks at what a tensor holds."""
    inputs = make_inputs(problem)
    with FakeTensorMode() as mode:
        ids = mode.from_tensor(inputs.routing.expert_ids)
        fake = inputs.map(mode.from_tensor)
        fake = fake._replace(routing=fake.routing._replace(expert_ids=ids))
        _bare_call(subject, problem, fake, gradients)()


def _one_cuda_graph(subject: Implementation, problem: Problem, gradients: bool) -> None:
    """Raise RuntimeError where a call waits for the GPU, CheckFailed where a graph of it goes wrong."""
    inputs = make_inputs(problem)
    call = _bare_call(subject, problem, inputs, gradients)
    with torch.cuda.device(problem.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled or allocated once may wait
                call()
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        for seed in range(ROUTINGS):
            p = replace(problem, seed=seed)
            inputs.overwrite(make_inputs(p))
            graph.replay()
            hold({name: t.clone() for name, t in results.items()}, p)


class _Module(torch.nn.Module):
    """An implementation as the module that torch.export wants."""

    def __init__(self, forward: Callable[..., Tensor], experts: Experts, combine: str) -> None:
        super().__init__()
        self._forward, self._experts, self._combine = forward, experts, combine

    def forward(self, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        return self._forward(x, Routing(expert_ids, gates), self._experts, combine=self._combine)


def exports(subject: Implementation, problem: Problem) -> None:
    """torch.export takes it, and the program is right for other tokens and another routing."""
    x, (ids, gates), experts, _ = make_inputs(problem)
    module = _Module(subject.forward, experts, problem.combine)
    with torch.no_grad():
        try:
            program = torch.export.export(module, (x, ids, gates)).module()
        except RuntimeError as error:  # TorchDynamoException derives from it
            raise CheckFailed(f"torch.export: {one_line(error)[:500]}") from error
        other = make_inputs(replace(problem, seed=problem.seed + 1))._replace(experts=experts)
        y = program(other.x, *other.routing)
    hold({"y": y}, problem, other)
