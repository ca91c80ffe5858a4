"""What a router is held to beside its numbers: other calls, modes, threads, memory and numbers of tokens."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from correctness.checks.case import Check
from correctness.checks.layouts import LAYOUTS
from correctness.judging.budget import by_logarithm, eps, relative_errors, roundings, storing
from correctness.judging.finding import CheckFailed
from correctness.judging.process_state import require_unchanged
from correctness.judging.router_calls import (
    Router,
    call,
    computed_in,
    require,
    require_gates,
    require_gradient,
)
from correctness.problems.routers import KINDS, RouterProblem, make_router_inputs
from moe_impls.interface import Routing

THREADS, ROUNDS = 3, 20
MANY = (*(2**n for n in range(5, 14)), 65_536 + 11)  # tokens


def inputs_unchanged(route: Router, problem: RouterProblem) -> None:
    """Write to neither logits nor bias, with gradients or without."""
    logits, bias, dgates = make_router_inputs(problem)
    before = make_router_inputs(problem)
    for gradients in {route.support.gradients, False}:
        leaf = logits.detach().requires_grad_(gradients)
        gates = call(route, leaf, problem.spec, bias).gates
        if gradients:
            torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))
        for name, got, want in zip(before._fields, (logits, bias, dgates), before, strict=True):
            if got is not None and want is not None and not torch.equal(got, want):
                raise CheckFailed(f"{name} was written to")


def strides(route: Router, problem: RouterProblem) -> None:
    """Accept logits, a bias and a gradient that are not contiguous: the numbers alone decide."""
    logits, bias, dgates = make_router_inputs(problem)
    for layout in LAYOUTS:
        leaf = layout(logits).requires_grad_(route.support.gradients)
        spread = None if bias is None else bias.repeat_interleave(2)[::2]
        routing = call(route, leaf, problem.spec, spread)
        require(routing, problem)
        if route.support.gradients:
            (got,) = torch.autograd.grad(routing.gates, leaf, layout(dgates.to(routing.gates.dtype)))
            require_gradient(got, routing, problem)


def tokens_apart(route: Router, problem: RouterProblem) -> None:
    """Route each token without regard to the others: the batch comes in two parts, in reverse order."""
    logits, bias, _ = make_router_inputs(problem)
    whole = call(route, logits, problem.spec, bias)
    for part in (slice(0, 1), slice(1, None)):
        rows = torch.arange(problem.T)[part].flip(0)
        routing = call(route, logits[rows], problem.spec, bias)
        if not torch.equal(routing.expert_ids, whole.expert_ids[rows]):
            raise CheckFailed("the experts of a token depend on the other tokens")
        require_gates(routing, logits[rows], problem.spec)


def many_tokens(route: Router, problem: RouterProblem) -> None:
    """Route each of many tokens as it routes few: of whole tiles and chunks, and of more than 65,536."""
    logits, bias, _ = make_router_inputs(problem)
    few = call(route, logits, problem.spec, bias)
    require(few, problem)
    want_ids, order = few.expert_ids.sort(dim=1)
    want = few.gates.detach().gather(1, order)
    computed = computed_in(few.gates)
    allowed = roundings(eps(computed)) + storing(want.dtype) + 2 * by_logarithm(want, computed)
    for tokens in MANY:
        rows = torch.arange(tokens) % problem.T
        with torch.no_grad():
            ids, gates = call(route, logits[rows], problem.spec, bias)
        ids, order = ids.sort(dim=1)
        wrong = (ids != want_ids[rows]).any(dim=1)
        if not bool(wrong.any()):
            wrong = (relative_errors(gates.gather(1, order), want[rows], want[rows]) > allowed[rows]).any(
                dim=1
            )
        if bool(wrong.any()):
            t = int(wrong.nonzero()[0])
            raise CheckFailed(
                f"{int(wrong.sum())} of {tokens} tokens, the first of them {t}, have other experts or gates "
                f"than among {problem.T} tokens"
            )


def state(route: Router, problem: RouterProblem) -> None:
    """Depend on no earlier call, and overwrite no earlier result."""
    logits, bias, _ = make_router_inputs(problem)
    first = call(route, logits, problem.spec, bias)
    kept = Routing(first.expert_ids.clone(), first.gates.detach().clone())
    second = replace(problem, seed=problem.seed + 1)
    others = make_router_inputs(second)
    logits.copy_(others.logits)  # new contents at the same address
    if bias is not None and others.selection_bias is not None:
        bias.copy_(others.selection_bias)
    for repeat in range(30):
        try:
            require(call(route, logits, problem.spec, bias), second)
        except CheckFailed as failure:
            raise CheckFailed(f"in call {repeat + 2}: {failure}") from failure
    for number, mode in enumerate((torch.no_grad, torch.inference_mode, torch.inference_mode)):
        now = replace(problem, seed=problem.seed + 2 + number)
        new = make_router_inputs(now)
        logits.data.copy_(new.logits)  # without a new version
        if bias is not None and new.selection_bias is not None:
            bias.data.copy_(new.selection_bias)
        with mode():
            require(call(route, logits, problem.spec, bias), now)
    if route.support.num_experts is None:  # the same spec for another number of experts
        more = replace(problem, E=2 * problem.E)
        logits, bias, _ = make_router_inputs(more)
        require(call(route, logits, more.spec, bias), more)
    if not all(torch.equal(a, b.detach()) for a, b in zip(kept, first, strict=True)):
        raise CheckFailed("the routing returned by an earlier call was overwritten by a later one")


def several_threads(route: Router, problem: RouterProblem) -> None:
    """Give threads that route tokens of their own at the same time their own routing."""
    own = [replace(problem, seed=problem.seed + number) for number in range(THREADS)]
    inputs = [make_router_inputs(p) for p in own]
    want = [call(route, logits, problem.spec, bias) for logits, bias, _ in inputs]
    together = threading.Barrier(THREADS)

    def route_in_rounds(number: int) -> bool:
        logits, bias, _ = inputs[number]
        same = True
        for _ in range(ROUNDS):
            together.wait()
            got = call(route, logits, problem.spec, bias)
            same &= torch.equal(got.expert_ids, want[number].expert_ids)
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        if not all(pool.map(route_in_rounds, range(THREADS))):
            raise CheckFailed("a token gets other experts where another thread routes at the same time")


def global_state(route: Router, problem: RouterProblem) -> None:
    """Leave random generators, modes, threads and other settings of the process as they were."""
    logits, bias, dgates = make_router_inputs(problem)

    def forward_and_backward(gradients: bool) -> None:
        leaf = logits.detach().requires_grad_(gradients)
        _, gates = call(route, leaf, problem.spec, bias)
        if gradients:
            torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))

    for gradients in {route.support.gradients, False}:
        forward_and_backward(gradients)  # what the first call imports is no setting
        with torch.set_grad_enabled(gradients):
            require_unchanged(functools.partial(forward_and_backward, gradients), problem.dtype)


def modes(route: Router, problem: RouterProblem) -> None:
    """Return the same routing under no_grad, inference_mode and autocast, and for a bias of another dtype."""
    logits, bias, _ = make_router_inputs(problem)
    want = call(route, logits, problem.spec, bias)
    modes = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast(logits.device.type, dtype=torch.bfloat16),
    }
    for name, mode in modes.items():
        with mode:
            got = call(route, logits, problem.spec, bias)
            if not torch.equal(got.expert_ids, want.expert_ids):
                raise CheckFailed(f"the experts change under {name}")
            require_gates(got, logits, problem.spec)
    if bias is not None:
        in_float64 = call(route, logits, problem.spec, bias.double())
        if not torch.equal(in_float64.expert_ids, want.expert_ids):
            raise CheckFailed("the experts change with a float64 selection_bias of the same values")
        low = bias.bfloat16()
        ids = [call(route, logits, problem.spec, b).expert_ids for b in (low, low.float())]
        if not torch.equal(*ids):
            raise CheckFailed("the experts change with a bfloat16 selection_bias of the same values")


MODES = (
    Check(strides, KINDS),
    Check(tokens_apart, KINDS),
    Check(many_tokens, KINDS[:3:2]),
    Check(state, KINDS),
    Check(several_threads, tuple(replace(p, T=300) for p in KINDS)),
    Check(global_state, KINDS),
    Check(modes, KINDS),
)
