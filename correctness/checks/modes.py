"""Checks of torch's modes: autocast, torch.compile, torch.export, and calls that must not wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness.judging import calling
from correctness.judging.calling import run, run_both_ways
from correctness.judging.compare import require_right
from correctness.judging.finding import CheckFailed
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import LOW_PRECISION, Inputs, Problem
from moe_impls.interface import Experts, Implementation, Routing
from moe_impls.registry import one_line

ROUTINGS = 10


def autocast(subject: Implementation, problem: Problem) -> None:
    """Keep the dtype of x under autocast, and be right to the dtype of autocast, gradients too."""
    inputs = make_inputs(problem)
    for dtype in (problem.dtype,) if problem.dtype in LOW_PRECISION else LOW_PRECISION:
        with torch.autocast(problem.device.partition(":")[0], dtype=dtype):
            both = list(run_both_ways(subject, problem, inputs))
        low = replace(problem, dtype=dtype)  # its budget is that of a computation kept in that dtype
        for results in both:
            if problem.exact:  # rounded, because float32 results may have kept more
                require_right({n: t if n == "gates" else t.to(dtype) for n, t in results.items()}, low)
            else:
                require_right(results, low, inputs)


def fullgraph(subject: Implementation, problem: Problem) -> None:
    """Compile to one graph by torch.compile that is right for ten routings without being compiled again."""
    torch.compiler.reset()
    compiled = torch.compile(subject.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = subject.support.gradients
    try:
        for seed in range(ROUTINGS):
            p = replace(problem, seed=seed)
            stance = "default" if seed == 0 else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                require_right(run(compiled, make_inputs(p), p.combine, gradients=gradients), p)
    except RuntimeError as error:  # TorchDynamoException derives from it
        raise CheckFailed(f"torch.compile: {one_line(error)[:500]}") from error
    finally:
        torch.compiler.reset()


def no_host_sync(subject: Implementation, problem: Problem) -> None:
    """Wait on the host for what a tensor holds in no call and no backward.

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
    """Make a function that does a call and its backward, and nothing else, on the same tensors each time."""
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in inputs.tensors.items()}
    arguments = calling.assemble(inputs, leaves)

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
            require_right({name: t.clone() for name, t in results.items()}, p)


class _Module(torch.nn.Module):
    """An implementation as the module that torch.export wants."""

    def __init__(self, forward: Callable[..., Tensor], experts: Experts, combine: str) -> None:
        super().__init__()
        self._forward, self._experts, self._combine = forward, experts, combine

    def forward(self, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        return self._forward(x, Routing(expert_ids, gates), self._experts, combine=self._combine)


def exports(subject: Implementation, problem: Problem) -> None:
    """Export by torch.export to a program that is right for other tokens and another routing."""
    x, (ids, gates), experts, _ = make_inputs(problem)
    module = _Module(subject.forward, experts, problem.combine)
    with torch.no_grad():
        try:
            program = torch.export.export(module, (x, ids, gates)).module()
        except RuntimeError as error:  # TorchDynamoException derives from it
            raise CheckFailed(f"torch.export: {one_line(error)[:500]}") from error
        other = make_inputs(replace(problem, seed=problem.seed + 1))._replace(experts=experts)
        y = program(other.x, *other.routing)
    require_right({"y": y}, problem, other)
