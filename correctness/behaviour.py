"""Checks of how an implementation behaves beyond one right result: memory, state, layouts, graphs, modes.

Each is a function of an implementation and a problem that raises ``CheckFailed``; ``correctness.checks``
lists the problems that each runs on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.utils.deterministic as torch_deterministic
from torch import Tensor

from correctness import compare
from correctness.compare import CheckFailed, call, finish, hold, run, start
from correctness.problems import Inputs, Problem, make_inputs
from moe_impls.interface import Experts, Implementation, Routing
from moe_impls.registry import one_line

ROUTINGS = 10
REPEATS = 50


@contextlib.contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
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
    inputs = make_inputs(problem)
    with _fresh_memory_is_nan():
        for _ in range(2):
            hold(call(subject, problem, inputs), problem)


def recycled_memory(subject: Implementation, problem: Problem) -> None:
    """The same where the allocator hands out blocks of the results' sizes that were full of NaN, or of 7."""
    inputs = make_inputs(problem)
    shapes = [inputs.dy.shape, *(t.shape for t in inputs.tensors.values())]
    for filling in (torch.nan, 7.0):
        blocks = [torch.full(s, filling, dtype=d) for s in shapes for d in (problem.dtype, torch.float32)]
        del blocks
        hold(call(subject, problem, inputs), problem)


def inputs_unchanged(subject: Implementation, problem: Problem) -> None:
    """No input is written to, by forward or backward, and the result is not a view of one."""
    inputs = make_inputs(problem)
    before = inputs.map(torch.clone)
    ids = inputs.routing.expert_ids.clone()
    results = call(subject, problem, inputs)
    for name, tensor in {**inputs.tensors, "dy": inputs.dy}.items():
        if not torch.equal(tensor, {**before.tensors, "dy": before.dy}[name]):
            raise CheckFailed(f"{name} was written to")
        for result, value in results.items():
            if value.numel() and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                raise CheckFailed(f"{result} shares its memory with the input {name}")
    if not torch.equal(ids, inputs.routing.expert_ids):
        raise CheckFailed("expert_ids was written to")


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
                raise CheckFailed(f"the {name} returned by an earlier call was overwritten by a later one")


def one_input_changes(subject: Implementation, problem: Problem) -> None:
    """One tensor in place gets new contents, the others keep theirs: each must be read again in each call."""
    inputs, other = make_inputs(problem), make_inputs(replace(problem, seed=problem.seed + 1))
    call(subject, problem, inputs)
    changes = {name: (t, other.tensors[name]) for name, t in inputs.tensors.items()}
    changes["expert_ids"] = (inputs.routing.expert_ids, other.routing.expert_ids)
    for target, source in changes.values():
        target.copy_(source)
        hold(call(subject, problem, inputs), problem, inputs)


def changing_sizes(subject: Implementation, problem: Problem) -> None:
    """Batches of other sizes between each other, with the same weights: nothing is left of the larger one."""
    inputs = make_inputs(problem)
    for T in (problem.T, 1, problem.T // 2, 0, problem.T // 3, problem.T):
        part = Inputs(inputs.x[:T], Routing(*(t[:T] for t in inputs.routing)), inputs.experts, inputs.dy[:T])
        results = call(subject, problem, part)
        hold(results, replace(problem, T=T), part)


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


def strides(subject: Implementation, problem: Problem) -> None:
    """Inputs, and the gradient that flows in, need not be contiguous: the numbers alone decide."""
    plain = make_inputs(problem)
    for layout in (_scattered, _transposed, _padded):
        inputs = plain.map(layout)
        ids = layout(plain.routing.expert_ids)
        inputs = inputs._replace(routing=inputs.routing._replace(expert_ids=ids))
        hold(call(subject, problem, inputs), problem)


def offsets(subject: Implementation, problem: Problem) -> None:
    """Inputs may be contiguous pieces out of the middle of a larger tensor."""

    def piece(t: Tensor) -> Tensor:
        return _filled([t.numel() + 7], t)[3 : 3 + t.numel()].view(t.shape).copy_(t)

    inputs = make_inputs(problem).map(piece)
    inputs = inputs._replace(routing=Routing(piece(inputs.routing.expert_ids), inputs.routing.gates))
    hold(call(subject, problem, inputs), problem)


def expanded(subject: Implementation, problem: Problem) -> None:
    """Inputs may repeat one row by a stride of zero: tokens, gates, weights, or dy as y.sum() gives it."""
    plain = make_inputs(problem)
    x, (ids, gates), experts, dy = plain
    for inputs in (
        plain._replace(x=x[:1].expand(x.shape)),
        plain._replace(routing=Routing(ids, gates[:1].expand(gates.shape))),
        plain._replace(routing=Routing(ids[:1].expand(ids.shape), gates)),
        plain._replace(experts=experts.map(lambda w: w[:1].expand(w.shape))),
        plain._replace(dy=dy.flatten()[:1].expand(dy.shape)),
    ):
        hold(call(subject, problem, inputs), problem, inputs)


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
    """Any part of the tensors may require gradients: one, all but one, inputs, experts, matrices, biases."""
    inputs = make_inputs(problem)
    names = list(inputs.tensors)
    groups = [["x", "gates"], ["w_in", "w_out"], ["b_in", "b_out"], ["w_in", "b_in"], ["w_out", "b_out"]]
    subsets = [[name] for name in names] + [[n for n in names if n != name] for name in names]
    for group in groups:
        subsets += [[n for n in names if n in group], [n for n in names if n not in group]]
    if subject.support.compiles_per_case:  # each subset is compiled anew
        subsets = [["x"], ["gates"], ["w_in", "w_out"]]
    for wanted in subsets:
        if wanted:
            hold(run(subject.forward, inputs, problem.combine, wanted=wanted), problem)


def two_graphs(subject: Implementation, problem: Problem) -> None:
    """Forward, forward, backward, backward: a second call leaves what the first has saved alone."""
    second = replace(problem, seed=problem.seed + 1)
    inputs = [make_inputs(p) for p in (problem, second)]
    graphs = [start(subject.forward, i, problem.combine) for i in inputs]
    for p, i, graph in zip((problem, second), inputs, graphs, strict=True):
        hold(finish(graph, i.dy), p)


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
    """NaN or infinity in a token or its gates stays in its row of y and of the gradients of x and gates."""
    plain = make_inputs(problem)
    reached = slice(problem.T // 3, problem.T // 3 + 3)
    others = [t for t in range(problem.T) if not reached.start <= t < reached.stop]
    for value in (torch.nan, torch.inf):
        x = plain.x.clone()
        x[reached.start, 0] = value
        x[reached.start + 1] = -value
        gates = plain.routing.gates.clone()
        gates[reached.start + 2] = torch.nan
        inputs = plain._replace(x=x, routing=plain.routing._replace(gates=gates))
        results = call(subject, problem, inputs)
        if bool(results["y"][reached].isfinite().all(dim=1).any()):
            raise CheckFailed(f"the row of a token with {value} is finite: its input is not read")
        rows = {}
        for name, want in compare.oracle_values(problem).items():
            if name in results and name in ("y", "x", "gates"):
                rows[name] = want.to(results[name].dtype, copy=True)
                rows[name][others] = results[name][others]  # the reached rows are right by definition
        hold(rows, problem)


def deterministic(subject: Implementation, problem: Problem) -> None:
    """Ten calls on equal inputs are bit-equal, output and gradients, where that is declared."""
    inputs = make_inputs(problem)
    first = call(subject, problem, inputs)
    for repeat in range(1, 10):
        again = call(subject, problem, inputs)
        for name, want in first.items():
            if not torch.equal(again[name], want):
                raise CheckFailed(f"{name} differs between call 1 and call {repeat + 1} on equal inputs")


def every_call(subject: Implementation, problem: Problem) -> None:
    """Not only the first call is right: fifty calls with gradients and fifty without, each compared."""
    inputs = make_inputs(problem)
    for gradients in (subject.support.gradients, False):
        for _ in range(REPEATS):
            hold(run(subject.forward, inputs, problem.combine, gradients=gradients), problem)


def global_state_now() -> dict[str, Any]:
    """What a call must leave as it is, by a name for messages."""
    return {
        "the random generator": torch.get_rng_state().tolist(),
        "the default dtype": torch.get_default_dtype(),
        "the gradient mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "anomaly detection": torch.is_anomaly_enabled(),
    }


def global_state(subject: Implementation, problem: Problem) -> None:
    """Random numbers, default dtype, gradient mode, autocast and threads are as before the call."""
    before = global_state_now()
    try:
        call(subject, problem)
        after = global_state_now()
    finally:
        torch.set_default_dtype(before["the default dtype"])
        torch.set_grad_enabled(before["the gradient mode"])
        torch.set_autocast_enabled("cpu", before["autocast"])
        torch.set_num_threads(before["the number of threads"])
    if changed := [name for name in before if after[name] != before[name]]:
        raise CheckFailed(f"a call changes {', '.join(changed)}")


def autocast(subject: Implementation, problem: Problem) -> None:
    """Under autocast to bfloat16 the result keeps the dtype of x and is right to bfloat16, gradients too."""
    inputs = make_inputs(problem)
    with torch.autocast(problem.device.partition(":")[0], dtype=torch.bfloat16):
        results = call(subject, problem, inputs)
    # The budget is that of a computation kept in bfloat16, on the same numbers.
    low = compare.make_reference(replace(problem, dtype=torch.bfloat16), inputs)
    compare.require(results, low)


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
