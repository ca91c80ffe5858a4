"""What a whole layer is held to when it is used again: with new tokens in old memory, and more backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import B, Bench, S, T, trained
from correctness.judging.layer_steps import held, in_sequences, is_noisy, put_back, require_gradients, step
from correctness.problems.layers import LayerProblem
from moe_impls.registry import one_line


def new_tokens(bench: Bench) -> None:
    """Be right for new tokens where others lay in memory, in training too, with gradients and without."""
    support, memory = bench.subject.support, bench.x
    start = held(bench.layer)
    for training in (False, True)[: 1 + support.training]:
        bench.layer.train(training)
        if training and is_noisy(bench):
            return
        ways = (True, False)[not support.gradients :]
        for call, gradients in enumerate(ways * 3):  # by turns: one way may keep what the other then takes
            rows = torch.arange(T).roll(5 * call)
            memory.copy_(bench.x[rows])
            mode = "training" if training else "eval"
            how = "with gradients" if gradients else "without gradients"
            where = f" in call {call + 1}, {how}, in {mode} mode with x at one address"
            put_back(bench.layer, start)
            _require_right(bench, _at_the_address_of(memory), rows, gradients, where)


def _at_the_address_of(memory: Tensor) -> Tensor:
    """Make a tensor [B, S, D] of its own, with a version of its own."""
    like = memory.unflatten(0, (B, S))
    return memory.new_empty(0).set_(memory.untyped_storage(), 0, like.shape, like.stride())


def _require_right(bench: Bench, x: Tensor, rows: Tensor, gradients: bool, where: str) -> None:
    if not gradients:
        with torch.no_grad():
            bench.require_y(bench.call(x).flatten(0, 1), rows, where)
        return
    found = step(bench, x, bench.expected.dy[rows], x_wanted=False, call=lambda _: bench.call(x))
    bench.require_y(found.y.flatten(0, 1), rows, where)
    if bench.subject.routing is None:  # which would drop others in this order
        require_gradients(bench, found.grads, where)


def gradients_accumulate(bench: Bench) -> None:
    """Add up the gradients of two calls, and of two backwards through one call or refuse the second one."""
    bench = bench.dropping()
    dy, parameters = in_sequences(bench.expected.dy.to(bench.device)), trained(bench.layer)
    for calls, how in ((2, "two calls"), (1, "two backwards through one call")):
        leaves = {"x": bench.x.requires_grad_(), **parameters}
        for leaf in leaves.values():
            leaf.grad = None
        ys = [bench.call(in_sequences(leaves["x"] * 1)) for _ in range(calls)]
        with during(f"the first of {how}"):
            ys[0].backward(dy, retain_graph=calls == 1)
        try:
            ys[-1].backward(dy)
        except RuntimeError as error:
            if calls == 1:
                return
            raise CheckFailed(f"the backward of a second call raises {one_line(error)}") from error
        found = {name: None if leaf.grad is None else leaf.grad / 2 for name, leaf in leaves.items()}
        require_gradients(bench, found, f", half of the sum over {how}")


def every_gradient(bench: Bench) -> None:
    """Give every parameter a gradient: zeros where no token reaches it, also where there are no tokens."""
    support = bench.subject.support
    for tokens in (1, 0)[: 1 + support.no_tokens]:
        dy = bench.expected.dy[:tokens].unsqueeze(0)
        with during(f"a call with {tokens} tokens"):
            grads = step(bench, bench.x[:tokens].unsqueeze(0), dy).grads
        for name, grad in grads.items():
            if grad is None and name != "x":
                raise CheckFailed(
                    f"{name} has no gradient, not even zeros, after a call with {tokens} tokens"
                )
            if not tokens and grad is not None and bool(grad.any()):
                raise CheckFailed(f"the gradient of {name} is not 0 though there are no tokens")


_FLOAT32 = (LayerProblem(),)

REUSE = (
    Check(new_tokens, _FLOAT32),
    Check(gradients_accumulate, _FLOAT32, needs="gradients"),
    Check(every_gradient, _FLOAT32, needs="gradients and every_gradient"),
)
