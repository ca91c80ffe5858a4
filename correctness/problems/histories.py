"""Histories of a whole layer that nobody thought of: calls and changes between them, drawn by Hypothesis.

A failing history shrinks to few steps and to the plainest calls: what is left of it is what makes it fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import dtype_name
from moe_impls.layer_interface import LayerSupport

# What parameters and tokens are like; `correctness.judging.layer_numbers` says what each means.
NUMBERS = (
    "usual",
    "large tokens",
    "small tokens",
    "large hidden values",
    "large logits",
    "logits below zero",
    "logits above zero",
    "tokens alike",
)
TOKENS = (32, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 33, 64, 65, 128, 255, 257, 512, 1000, 2049)
ROWS = ("in turn", "backwards", "one token", "mostly one token")
SHAPES = ("one sequence", "one token a sequence", "two sequences", "no sequence", "three leading dimensions")
MEMORY = ("new", "old", "shifted")
WAYS = ("no_grad", "inference_mode", "with a graph", "backward", "backward without x", "checkpoint")
CHANGES = (
    "new numbers in place",
    "new numbers in one parameter",
    "new .data",
    "a state dict",
    "an assigned state dict",
    "a deepcopy",
    "a new layer that loads its state dict",
    "half of the parameters frozen",
    "all parameters trained",
    "float64 and back",
    "merge() and unmerge()",
)


@dataclass(frozen=True)
class Call:
    """A call with x of so many ``tokens``.

    rows: which of the distinct tokens they are. shape: the leading dimensions of x. memory: new, old (where
    the tokens of the last call lay) or shifted (in a larger tensor, from its second number on). way: how
    autograd sees the call. training: the mode of the layer.
    """

    tokens: int = 32
    rows: str = "in turn"
    shape: str = "one sequence"
    memory: str = "new"
    way: str = "no_grad"
    training: bool = False

    def __str__(self) -> str:
        mode = "training" if self.training else "eval"
        return (
            f"{self.tokens} tokens ({self.rows}; {self.shape}; {self.memory} memory), {self.way}, {mode} mode"
        )


@dataclass(frozen=True)
class History:
    """What is done to a layer: steps, each a call or the name of a change."""

    dtype: torch.dtype = torch.float32
    numbers: str = "usual"
    steps: tuple[Call | str, ...] = (Call(),)
    name: str = ""  # of one that was not drawn

    @property
    def id(self) -> str:
        """A short name for test ids and messages; none for one that is drawn again by a run of its check."""
        return f"{self.name}-{dtype_name(self.dtype)}" if self.name else ""

    def __str__(self) -> str:
        steps = "; ".join(f"{n}. {step}" for n, step in enumerate(self.steps, 1))
        numbers = self.numbers + " numbers" * (self.numbers == "usual")
        return f"{dtype_name(self.dtype)}, {numbers}: {steps}"


# Of logits, of which a router that works in 16 bits loses more than its budget knows.
OF_LOGITS = ("large logits", "logits below zero", "logits above zero")

# Each of NUMBERS in few and in many tokens, forwards and back, in eval and in training mode.
_CALLS = (
    Call(way="backward"),
    Call(2049, "mostly one token"),
    Call(1),
    Call(257, way="backward", training=True),
    Call(2049, training=True),
)
LISTED = tuple(
    History(dtype, numbers, _CALLS, numbers.replace(" ", "_"))
    for numbers in NUMBERS[1:]
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
)


@st.composite
def histories(draw: st.DrawFn, support: LayerSupport) -> History:
    """Draw any history that a layer declares to take."""

    def choose(name: str, options: tuple[Any, ...], step: int = 0) -> Any:
        """Draw one of the options, of which the first is the plainest.

        Name and step keep choices apart: Hypothesis copies what was drawn to wherever equal values are drawn.
        """
        return draw(st.sampled_from([(name, step, option) for option in options]))[2]

    ways = WAYS if support.gradients else WAYS[:2]
    shapes = SHAPES if support.any_leading else SHAPES[:3]
    dtypes = tuple(sorted(support.dtypes, key=lambda dtype: dtype != torch.float32))
    dtype = choose("dtype", dtypes)
    is_low = dtype in LOW_PRECISION and support.router_dtype == "input"
    numbers = [name for name in NUMBERS[1:] if not (is_low and name in OF_LOGITS)]
    numbers = choose("numbers", ("usual",) * len(numbers) + (*numbers,))
    steps: list[Call | str] = []
    for n in range(choose("calls", (1, 2, 3, 4, 5))):
        if change := choose("change", ("", "", *CHANGES), n):
            steps.append(change)
        calls = [step for step in steps if isinstance(step, Call)]
        if calls and choose("again", (True, False), n):  # what was kept of one may be taken for the other
            steps.append(calls[-1])
            continue
        call = Call(
            choose("tokens", TOKENS, n),
            choose("rows", ROWS, n),
            choose("shape", shapes, n),
            choose("memory", MEMORY, n),
            choose("way", ways, n),
            choose("training", (False, True), n) if support.training else False,
        )
        steps.append(call)
    return History(dtype, numbers, tuple(steps))
