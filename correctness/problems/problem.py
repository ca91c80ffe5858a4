"""Problems: everything that determines one call of an implementation, as data, and the inputs made from it.

Two kinds of numbers. Ordinary problems hold random reals of unit scale, so that results and gradients are of
unit scale too and no tolerance is larger than the signal. Exact problems (``exact=True``) hold small integers
and gates that are powers of two: every right implementation computes them without rounding, in any order of
summation, so results must be bit-equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from correctness.oracle.experts import FORMS
from moe_impls.interface import (
    CLAMPED,
    DEVICES,
    GATED_ACTIVATIONS,
    Clamp,
    Experts,
    Routing,
    Support,
    check_choice,
    dtype_name,
)

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Derivatives with a jump. Where rounding differs, a unit near the jump takes the other side: the inputs keep
# away from it (see `Problem.avoids_kinks`).
KINKED_ACTIVATIONS = tuple(name for name, form in FORMS.items() if form.kinked or form.clamped)
# The size of gate at which a smooth activation is relu to the last bit, derivative included: exp(-size / 2)
# underflows in the dtype that the activation is computed in.
SATURATION = dict.fromkeys((torch.float32, *LOW_PRECISION), 256.0) | {torch.float64: 2048.0}
# With an alpha of that size a clamped activation saturates by itself. Its limit is no half-integer and not
# odd, so that no gate or value of an exact problem lies on it.
EXACT_CLAMP = Clamp(4.0, SATURATION[torch.float64], 2.0)
KINK_MARGIN = 1e-4  # relative to the unit scale of hidden and output values
LOW_KINK_MARGIN = 8  # the same in low precision, in units of its eps
LEAST_LOW_TERMS = 8  # of which one with small weights is not near to its kink whatever x is
NARROW = 12  # features and units of an opposed problem that have no opposite
MOST_DRAWS = 2000  # of a token, until no unit is near a kink
MOST_LOW_UNITS = 60  # so many units of a token at most can all be away from kinks by so much


class Inputs(NamedTuple):
    """The arguments of one call, and ``dy`` [T, O], the random gradient that flows into its result."""

    x: Tensor
    routing: Routing
    experts: Experts
    dy: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name what a gradient is taken of: x, gates and the weights that are present."""
        return {"x": self.x, "gates": self.routing.gates, **self.experts.tensors}

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply ``function`` to each floating-point tensor of the call."""
        ids, gates = self.routing
        return Inputs(
            function(self.x), Routing(ids, function(gates)), self.experts.map(function), function(self.dy)
        )

    def first(self, T: int) -> Inputs:
        """Cut the call to its first T tokens."""
        routing = Routing(*(t[:T] for t in self.routing))
        return self._replace(x=self.x[:T], routing=routing, dy=self.dy[:T])

    def overwrite(self, source: Inputs) -> None:
        """Copy the contents of ``source`` to the addresses of this call."""
        for name, tensor in self.tensors.items():
            tensor.copy_(source.tensors[name])
        self.routing.expert_ids.copy_(source.routing.expert_ids)
        self.dy.copy_(source.dy)


@dataclass(frozen=True)
class Problem:
    """One call. Sizes as everywhere: tokens T, features D -> H -> O, experts E, experts per token K.

    load: how tokens spread over experts, a name of `load_named`. gates: their values, a key of GATES.
    low_gates: gates in the lower of the two dtypes that they may have, float32 and that of x.
    exact: integers and powers of two instead of random reals, with combine "sum".
    x_scale: the standard deviation of x, to reach clamps and large outputs; in exact problems the largest odd
        number in it, to use up the bits of a dtype.
    opposed: in exact problems, features and hidden units beyond NARROW cancel, one half the other, so that
        sums grow on their way beyond what a low dtype holds.
    clamp: the numbers of swiglu_clamped; in exact problems EXACT_CLAMP.
    """

    name: str
    T: int
    D: int
    H: int
    O: int
    E: int
    K: int
    activation: str = "swiglu"
    output_activation: str = "none"
    combine: str = "sum"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    load: str = "uniform"
    gates: str = "softmax"
    low_gates: bool = False
    seed: int = 0
    exact: bool = False
    x_scale: float = 1.0
    opposed: bool = False
    clamp: Clamp = Clamp()

    @property
    def F(self) -> int:
        """Rows of w_in for each expert: 2H if the activation is gated."""
        return self.H * (1 + (self.activation in GATED_ACTIVATIONS))

    @property
    def has_kinks(self) -> bool:
        return self.activation in KINKED_ACTIVATIONS or self.output_activation == "relu"

    @property
    def avoids_kinks(self) -> bool:
        """Tell whether no unit is so near to a kink that rounding may take it to the other side.

        In low precision that is so where few units are at stake, each the sum of several terms, and outputs
        are of unit scale if they have a kink; elsewhere gradients are compared in exact problems alone.
        """
        if self.dtype not in LOW_PRECISION:
            return True
        outputs_are_of_unit_scale = self.output_activation == "none" or self.x_scale == 1
        few_units = self.K * (self.F + self.O) <= MOST_LOW_UNITS
        return few_units and outputs_are_of_unit_scale and min(self.D, self.H) >= LEAST_LOW_TERMS

    @property
    def kink_margin(self) -> float:
        """How near is near, in units of x."""
        low = LOW_KINK_MARGIN * torch.finfo(self.dtype).eps * max(1.0, self.x_scale)
        return low if self.dtype in LOW_PRECISION else KINK_MARGIN

    @property
    def id(self) -> str:
        """A short name that tells what differs from the defaults, for test ids and messages."""
        parts = [self.name, dtype_name(self.dtype), self.activation]
        if self.activation == CLAMPED and self.clamp != Clamp():
            parts.append("clamp" + "_".join(f"{number:g}" for number in self.clamp))
        parts += ["out_relu"] * (self.output_activation == "relu") + [self.combine] * (self.combine != "sum")
        parts += ["no_bias"] * (not self.bias) + ["exact"] * self.exact + ["opposed"] * self.opposed
        parts += [self.load] * (self.load != "uniform") + [f"gates_{self.gates}"] * (self.gates != "softmax")
        parts += ["low_gates"] * self.low_gates + [f"x_scale{self.x_scale:g}"] * (self.x_scale != 1)
        parts += [f"seed{self.seed}"] * (self.seed != 0)
        return "-".join(parts)

    def code(self) -> str:
        """Write one line of Python that makes this problem again."""
        shown = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return (
            f"Problem({', '.join(f'{name}={value!r}' for name, value, default in shown if value != default)})"
        )

    __repr__ = code


def gate_scale(p: Problem) -> float:
    """Tell how much larger gates are in exact problems than those of relu."""
    form = FORMS[p.activation]
    return SATURATION[p.dtype] if form.smooth and not form.clamped else 1.0


def with_activation(p: Problem, activation: str) -> Problem:
    """Replace the activation, in exact problems with numbers that round nothing."""
    clamp = EXACT_CLAMP if p.exact and activation == CLAMPED else p.clamp
    return replace(p, activation=activation, clamp=clamp)


def exact_activations(support: Support) -> list[str]:
    """List the declared activations that exact problems can be made for."""
    return [a for a in support.activations if support.takes_clamp(a, EXACT_CLAMP)]


def fit(problem: Problem, support: Support) -> Problem:
    """Replace options of a problem that ``support`` does not declare by the first that it does.

    For problems whose point is not the option. What cannot be replaced stays, and is then `unsupported`.
    """
    p = problem
    activations = exact_activations(support) if p.exact else support.activations
    if p.activation not in activations and activations:
        p = with_activation(p, activations[0])
    if not p.exact and support.clamps and not support.takes_clamp(p.activation, p.clamp):
        p = replace(p, clamp=support.clamps[0])
    for name, declared in (
        ("output_activation", support.output_activations),
        ("bias", support.biases),
        ("dtype", support.dtypes),
        ("combine", support.combines),
    ):
        if getattr(p, name) not in declared and declared and not (p.exact and name == "combine"):
            p = replace(p, **{name: declared[0]})
    if p.dtype != problem.dtype:
        p = replace(p, low_gates=False)  # beside float64 their gradient is out of reach of its budget
    # What the replaced options cannot be combined with: the problem stays as it was, and is then skipped.
    impossible = (
        (p.exact and p.output_activation == "relu" and not p.bias)
        or (p.combine == "logsumexp" and p.gates in ("signed", "cancelling"))
        or (p != problem and is_rounded(p))
    )
    return problem if impossible else p


def is_rounded(p: Problem) -> bool:
    """Tell whether an exact problem with replaced options may take more bits than its dtype has."""
    if not p.exact:
        return False
    squares = (p.F > p.H or p.activation == "relu2") and p.bias  # of half-integers, beside eighths
    large = p.gates == "cancelling" and gate_scale(p) > 1  # saturated, times 256
    fine = p.x_scale > 1  # all bits of the dtype are in use
    by_dtype = {torch.bfloat16: squares or fine, torch.float16: large or fine}
    return by_dtype.get(p.dtype, False)


def resize(problem: Problem, support: Support) -> Problem:
    """Round D, H and O up to what ``support`` declares, and make O as large as D where it must be."""
    D, H, O = (
        -(-size // support.multiple_of) * support.multiple_of for size in (problem.D, problem.H, problem.O)
    )
    return replace(problem, D=D, H=H, O=D if support.same_width else O)


def unsupported(support: Support, problem: Problem) -> str | None:
    """Say why an implementation does not take a problem, from its declaration alone; None if it does."""
    claims = (
        ("device", problem.device.partition(":")[0], support.devices),
        ("dtype", problem.dtype, support.dtypes),
        ("activation", problem.activation, support.activations),
        ("output_activation", problem.output_activation, support.output_activations),
        ("combine", problem.combine, support.combines),
        ("bias", problem.bias, support.biases),
    )
    for what, value, claimed in claims:
        if value not in claimed:
            return f"{what} {dtype_name(value) if isinstance(value, torch.dtype) else value} not declared"
    if not support.takes_clamp(problem.activation, problem.clamp):
        return f"clamp {tuple(problem.clamp)} not declared"
    if resize(problem, support) != problem:
        limits = [f"multiples of {support.multiple_of}"] + ["O = D"] * support.same_width
        return f"sizes not declared, only {', '.join(limits)}"
    return None


def check_device(device: str, argument: str = "device") -> None:
    """Raise ValueError unless ``device``, as cpu, cuda or cuda:1, is there."""
    kind, _, number = device.partition(":")
    check_choice(argument, kind, DEVICES)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{argument} is {device}, but torch finds no CUDA device here")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if ":" in device and not (number.isdecimal() and int(number) < there):
        raise ValueError(f"{argument} is {device}; valid are {kind}, {kind}:0 to {kind}:{there - 1}")


# Without biases, experts smaller than this may have units that no input takes off their kink.
LEAST_WITHOUT_BIAS = 8


def possible(problem: Problem) -> bool:
    """Tell whether inputs can be made for a problem, and whether its right result is a number.

    Exact problems have conditions (see `problems.make_inputs`). In log space gates may not be negative, and
    a token whose gates are all zero has the result -inf.
    """
    p = problem
    if p.T < 0 or min(p.D, p.H, p.O, p.K) < 1 or p.K > p.E:
        return False
    if p.exact and (p.combine != "sum" or (p.activation == CLAMPED and p.clamp != EXACT_CLAMP)):
        return False
    if p.exact and p.output_activation == "relu" and not p.bias:
        return False
    if p.combine == "logsumexp" and (
        p.gates in ("signed", "cancelling") or (p.gates == "one_zero" and p.K == 1)
    ):
        return False
    redrawn = p.has_kinks and not p.exact and p.dtype not in LOW_PRECISION
    return p.bias or not redrawn or min(p.D, p.H) >= LEAST_WITHOUT_BIAS
