"""What a whole layer is held to in histories that nobody thought of: calls of all kinds, changes between."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from correctness.checks.case import Check
from correctness.judging.finding import CannotTell, during
from correctness.judging.layer_bench import Bench, Layer, T, build, call_of, copies_of
from correctness.judging.layer_numbers import as_it_is_with, set_numbers
from correctness.judging.layer_steps import erase, is_noisy, require_gradient, same, step
from correctness.problems.histories import LISTED, Call, History, histories
from correctness.problems.problem import LOW_PRECISION

FORWARD = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "with a graph": torch.enable_grad,
}
HAS_A_GRAPH = "support the deepcopy protocol"  # torch says of a tensor that it refuses to copy for that
SHARE = 0.6  # of the examples of a generated check of implementations: each has several calls


def any_history(bench: Bench, history: History) -> None:
    """Be right in each call of a history of calls and changes that nobody thought of."""
    if not bench.subject.merge:
        steps = tuple(step for step in history.steps if step != "merge() and unmerge()")
        history = replace(history, steps=steps)
    run = _Run(bench, history)
    for number, event in enumerate(history.steps, 1):
        so_far = replace(history, steps=history.steps[:number])
        with during(f"step {number} of {so_far}"):
            try:
                run.call(event) if isinstance(event, Call) else run.change(event, number)
            except CannotTell:
                if history.numbers == "usual":
                    raise
                return


def unusual_numbers(bench: Bench, history: History) -> None:
    """Be right for tokens and weights of unusual sizes, and logits of one sign, in every mode."""
    any_history(bench, history)


class _Run:
    """A layer on its way through a history, with the memory of its last tokens."""

    def __init__(self, bench: Bench, history: History) -> None:
        self.bench, self.numbers = bench, history.numbers
        self.memory = bench.x.new_empty(2 + bench.x.shape[1] * max(map(_tokens, history.steps)))
        self.known: dict[str, Tensor] = {}  # what `read` returned when what is right was made
        self.with_gradients = False
        set_numbers(bench, self.numbers)

    def call(self, call: Call) -> None:
        """Make a call and judge what it returns."""
        goes_back = call.way not in FORWARD
        self._make_right(goes_back)
        bench, rows = self.bench, _rows(call)
        noisy = call.training and _is_noisy(bench.subject, bench.dtype)
        bench.layer.train(call.training and not noisy)
        x = self._laid_out(bench.x[rows], call)
        every = torch.arange(len(rows))
        places = every if bench.subject.routing is None else every[:: -(-len(every) // T)]
        if goes_back:
            self._back(call, x, rows, places)
            return
        with FORWARD[call.way]():
            y = bench.call(x)
            bench.require_y(_flat(y), rows, only=places)

    def _back(self, call: Call, x: Tensor, rows: Tensor, places: Tensor) -> None:
        """Go back from a gradient that flows into one of each token."""
        bench, layer = self.bench, self.bench.layer
        judged = bench.subject.routing is None
        if not judged and call.rows == "in turn" and len(rows) >= T:
            bench, judged = bench.dropping(len(rows)), True
        right = bench.expected
        one = {int(row): place for place, row in enumerate(rows.tolist())}  # the last place of each token
        if call.rows == "in turn":  # where `dropping` judges them
            one = dict(enumerate(call_of(T, len(rows))[1].tolist())) if len(rows) >= T else one
        some, where = torch.tensor([*one]), torch.tensor([*one.values()])
        dy = torch.zeros(len(rows), right.dy.shape[1], dtype=right.dy.dtype)
        dy[where] = right.dy[some]
        is_recomputed = call.way == "checkpoint" and not layer.training
        through = functools.partial(_recomputed, layer) if is_recomputed else None
        wanted = call.way != "backward without x"
        shaped = dy.to(bench.device).reshape(*x.shape[:-1], -1)
        found = step(bench, x, shaped, x_wanted=wanted, call=through)
        self.bench.require_y(_flat(found.y), rows, only=places)
        if not judged:
            return
        for name, got in found.grads.items():
            if name == "x" and got is not None and name in right.want:
                want, allowed = right.want["x"][some], right.allowed["x"][some]
                bench.require("the gradient of x", _flat(got)[where.to(got.device)], want, allowed)
            elif name in right.want and len(one) == T:
                require_gradient(bench, name, got)

    def _make_right(self, gradients: bool = False) -> None:
        """Make what is right for what the layer holds now, unless it is known."""
        now = copies_of(self.bench.subject, self.bench.layer)
        known = now.keys() == self.known.keys() and all(same(now[n], self.known[n]) for n in now)
        if not known or (gradients and not self.with_gradients):
            self.bench = as_it_is_with(self.bench, self.numbers, gradients)
            self.known, self.with_gradients = {n: tensor.detach() for n, tensor in now.items()}, gradients

    def _laid_out(self, x: Tensor, call: Call) -> Tensor:
        """Put tokens [N, D] where the call says, in the shape that it says."""
        if call.memory != "new":
            start = int(call.memory == "shifted")
            place = self.memory[start : start + x.numel()]
            x = place.copy_(x.flatten()).view(x.shape)
            if call.memory == "old":  # at the same address, with a version of its own
                x = x.new_empty(0).set_(x.untyped_storage(), 0, x.shape, x.stride())
        N, D = x.shape
        two = (2, N // 2) if N % 2 == 0 else (1, N)
        shapes = {
            "one sequence": (1, N),
            "one token a sequence": (N, 1),
            "two sequences": two,
            "no sequence": (N,),
            "three leading dimensions": (1, *two),
        }
        return x.view(*shapes[call.shape], D)

    def change(self, what: str, number: int) -> None:
        """Make a change."""
        bench = self.bench
        if what == "merge() and unmerge()":
            self._merge()
        elif what.startswith("new numbers") or what == "new .data":
            self._draw(what, number)
        elif what == "a deepcopy":
            try:
                self.bench = replace(bench, layer=copy.deepcopy(bench.layer))
            except RuntimeError as error:
                if HAS_A_GRAPH not in str(error):
                    raise
                return
            erase(bench.layer)
        elif what == "a new layer that loads its state dict":
            self.bench = self._other(number)
            self.bench.layer.load_state_dict(bench.layer.state_dict())
            erase(bench.layer)
        elif what in ("a state dict", "an assigned state dict"):
            saved = self._other(number).layer.state_dict()
            bench.layer.load_state_dict(saved, assign=what != "a state dict")
        elif what == "float64 and back":
            bench.layer.to(torch.float64).to(bench.dtype)
        else:
            training_only = bench.subject.read(bench.layer).training_only
            for n, (name, parameter) in enumerate(bench.layer.named_parameters()):
                is_trained = what == "all parameters trained" or n % 2 == number % 2
                parameter.requires_grad_(is_trained or name in training_only)

    def _merge(self) -> None:
        """Merge, be right to the precision of a wide dtype, and unmerge."""
        layer: Any = self.bench.layer
        self._make_right()
        with torch.no_grad():
            layer.merge()
            y = _flat(self.bench.call(self.bench.x.unsqueeze(0)))
            if self.bench.dtype not in LOW_PRECISION:
                self.bench.require_y(y, context=" merged")
            layer.unmerge()

    def _other(self, number: int) -> Bench:
        """Make another layer, with other numbers of the same kind, that was used."""
        other = replace(self.bench, layer=build(self.bench.subject, self.bench.dtype, seed=number))
        set_numbers(other, self.numbers)
        with torch.no_grad():
            other.call(self.bench.x.unsqueeze(0))
        return other

    def _draw(self, what: str, number: int) -> None:
        """Draw parameters anew: all of them or one, in place or as new tensors."""
        drawn = dict(self._other(number).layer.named_parameters())
        one = [*drawn][number % len(drawn)]
        with torch.no_grad():
            for name, parameter in self.bench.layer.named_parameters():
                if what == "new .data":
                    parameter.data = drawn[name].detach()
                elif name == one or "one" not in what:
                    parameter.copy_(drawn[name])


def _tokens(event: Call | str) -> int:
    return event.tokens if isinstance(event, Call) else 0


def _rows(call: Call) -> Tensor:
    """Say which distinct token stands where: [N]."""
    N = call.tokens
    turns = call_of(T, N)[0][:N]
    every: dict[str, Callable[[], Tensor]] = {
        "in turn": lambda: turns,
        "backwards": lambda: turns.flip(0),
        "one token": lambda: torch.full((N,), 5),
        "mostly one token": lambda: torch.where(torch.arange(N) % 11 == 0, turns, 5),
    }
    return every[call.rows]()


def _recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer under torch.utils.checkpoint."""
    result = checkpoint(layer, x, use_reentrant=False)
    return result[0] if isinstance(result, tuple) else result


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, -2)


@functools.lru_cache(maxsize=64)
def _is_noisy(subject: Layer, dtype: torch.dtype) -> bool:
    bench = Bench.of(subject, dtype)
    bench.layer.train()
    return is_noisy(bench)


HISTORY = (
    Check(unusual_numbers, LISTED, fits=False),
    Check(any_history, drawn=histories, share=SHARE),
)
