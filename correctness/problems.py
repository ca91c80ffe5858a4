"""Problems: everything that determines one call of an implementation, as data, and the inputs made from it.

Two kinds of numbers. Ordinary problems hold random reals of unit scale, so that results and gradients are of
unit scale too and no tolerance is larger than the signal. Exact problems (``exact=True``) hold small integers
and gates that are powers of two: every right implementation computes them without rounding, in any order of
summation, so results must be bit-equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_impls.interface import (
    ACTIVATIONS,
    COMBINES,
    DEVICES,
    DTYPES,
    GATED_ACTIVATIONS,
    OUTPUT_ACTIVATIONS,
    Experts,
    Routing,
    Support,
    check_choice,
    dtype_name,
)

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Derivatives with a jump. Where rounding differs, a unit near the jump takes the other side: the inputs keep
# away from it (see `Problem.avoids_kinks`).
KINKED_ACTIVATIONS = ("relu", "reglu", "swiglu_clamped")
# What exact problems can be made for, and the size of gate at which a smooth activation is relu to the last
# bit, derivative included: exp(-size / 2) underflows in the dtype that the activation is computed in.
EXACT_ACTIVATIONS = ("relu", "reglu", "silu", "gelu", "swiglu", "geglu")
SATURATION = dict.fromkeys((torch.float32, *LOW_PRECISION), 256.0) | {torch.float64: 2048.0}
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
        """What a gradient is taken of, by name: x, gates and the weights that are present."""
        return {"x": self.x, "gates": self.routing.gates, **self.experts.tensors}

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with ``function`` applied to each floating-point tensor."""
        ids, gates = self.routing
        return Inputs(
            function(self.x), Routing(ids, function(gates)), self.experts.map(function), function(self.dy)
        )

    def first(self, T: int) -> Inputs:
        """The same call with its first T tokens only."""
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
    exact: integers and powers of two instead of random reals, for EXACT_ACTIVATIONS with combine "sum".
    x_scale: the standard deviation of x, to reach clamps and large outputs; in exact problems the largest odd
        number in it, to use up the bits of a dtype.
    opposed: in exact problems, features and hidden units beyond NARROW cancel, one half the other, so that
        sums grow on their way beyond what a low dtype holds.
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

    @property
    def F(self) -> int:
        """Rows of w_in for each expert: 2H if the activation is gated."""
        return self.H * (1 + (self.activation in GATED_ACTIVATIONS))

    @property
    def has_kinks(self) -> bool:
        return self.activation in KINKED_ACTIVATIONS or self.output_activation == "relu"

    @property
    def avoids_kinks(self) -> bool:
        """Whether no unit of its inputs is so near to a kink that rounding may take it to the other side.

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
        parts += ["out_relu"] * (self.output_activation == "relu") + [self.combine] * (self.combine != "sum")
        parts += ["no_bias"] * (not self.bias) + ["exact"] * self.exact + ["opposed"] * self.opposed
        parts += [self.load] * (self.load != "uniform") + [f"gates_{self.gates}"] * (self.gates != "softmax")
        parts += ["low_gates"] * self.low_gates + [f"x_scale{self.x_scale:g}"] * (self.x_scale != 1)
        parts += [f"seed{self.seed}"] * (self.seed != 0)
        return "-".join(parts)

    def code(self) -> str:
        """One line of Python that makes this problem again."""
        shown = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return (
            f"Problem({', '.join(f'{name}={value!r}' for name, value, default in shown if value != default)})"
        )

    __repr__ = code


def fit(problem: Problem, support: Support) -> Problem:
    """The problem with options that ``support`` does not declare replaced by the first that it does.

    For problems whose point is not the option. What cannot be replaced stays, and is then `unsupported`.
    """
    p = problem
    activations = [a for a in support.activations if not p.exact or a in EXACT_ACTIVATIONS]
    if p.activation not in support.activations and activations:
        p = replace(p, activation=activations[0])
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
        or (p.exact and p != problem and _is_rounded(p))
    )
    return problem if impossible else p


def _is_rounded(p: Problem) -> bool:
    """Whether numbers of an exact problem with replaced options may take more bits than its dtype has."""
    squares = p.F > p.H and p.bias  # of half-integers, beside eighths
    large = p.gates == "cancelling" and p.activation not in KINKED_ACTIVATIONS  # saturated, times 256
    fine = p.x_scale > 1  # all bits of the dtype are in use
    by_dtype = {torch.bfloat16: squares or fine, torch.float16: large or fine}
    return by_dtype.get(p.dtype, False)


def resize(problem: Problem, support: Support) -> Problem:
    """The problem with D, H and O that ``support`` declares: rounded up, and O as large as D."""
    D, H, O = (
        -(-size // support.multiple_of) * support.multiple_of for size in (problem.D, problem.H, problem.O)
    )
    return replace(problem, D=D, H=H, O=D if support.same_width else O)


def unsupported(support: Support, problem: Problem) -> str | None:
    """Why an implementation does not take this problem, from its declaration alone; None if it does."""
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
    if resize(problem, support) != problem:
        limits = [f"multiples of {support.multiple_of}"] + ["O = D"] * support.same_width
        return f"sizes not declared, only {', '.join(limits)}"
    return None


# ---------------------------------------------------------------------------------------------- routing


def _by_weight(p: Problem, generator: torch.Generator, weight: Tensor) -> Tensor:
    """K distinct experts for each token, drawn with the given weights [E] (Gumbel top-k)."""
    uniform = torch.rand(p.T, p.E, generator=generator, dtype=torch.float64)
    return (weight.log() - (-uniform.log()).log()).topk(p.K, dim=1).indices


def _uniform(p: Problem, g: torch.Generator) -> Tensor:
    return _by_weight(p, g, torch.ones(p.E, dtype=torch.float64))


def _one_hot_expert(p: Problem, g: torch.Generator) -> Tensor:
    """Every token visits one and the same expert first; the other choices are uniform."""
    weight = torch.ones(p.E, dtype=torch.float64)
    weight[int(torch.randint(p.E, (), generator=g))] = 1e12
    return _by_weight(p, g, weight)


def _same_experts(p: Problem, g: torch.Generator) -> Tensor:
    """Every token visits the same K experts, the others none."""
    return torch.randperm(p.E, generator=g)[: p.K].expand(p.T, p.K).contiguous()


def _half_empty(p: Problem, g: torch.Generator) -> Tensor:
    """Half of the experts (but never fewer than K) take all tokens."""
    live = torch.randperm(p.E, generator=g)[: max(p.K, (p.E + 1) // 2)]
    return live[_uniform(replace(p, E=len(live)), g)]


def _bursts(p: Problem, g: torch.Generator) -> Tensor:
    """Runs of 16 neighbouring tokens visit the same experts, as tokens of one text do."""
    ids = _uniform(replace(p, T=(p.T + 15) // 16), g)
    return ids.repeat_interleave(16, dim=0)[: p.T]


def _router(p: Problem, g: torch.Generator) -> Tensor:
    """The top K of a random linear router, where neighbouring tokens share half of their variance."""
    features, text = 16, 64  # few features make some experts more popular than others
    topics = torch.randn((p.T + text - 1) // text, features, generator=g, dtype=torch.float64)
    own = torch.randn(p.T, features, generator=g, dtype=torch.float64)
    tokens = (topics.repeat_interleave(text, dim=0)[: p.T] + own) / 2**0.5
    return (tokens @ torch.randn(features, p.E, generator=g, dtype=torch.float64)).topk(p.K, dim=1).indices


Load = Callable[[Problem, torch.Generator], Tensor]


def _zipf_of(exponent: str) -> Load:
    """The n-th expert is visited in proportion to n to the power of minus ``exponent``."""
    power = float(exponent)
    if not 0 < power < 10:
        raise ValueError

    def zipf_of(p: Problem, g: torch.Generator) -> Tensor:
        weight = torch.arange(1, p.E + 1, dtype=torch.float64) ** -power
        return _by_weight(p, g, weight[torch.randperm(p.E, generator=g)])

    return zipf_of


LOADS: dict[str, Load] = {
    "uniform": _uniform,
    "zipf": _zipf_of("1"),
    "one_hot_expert": _one_hot_expert,
    "same_experts": _same_experts,
    "half_empty": _half_empty,
    "bursts": _bursts,
    "router": _router,
}


def _hot_experts(number: str) -> Load:
    """Every token visits as many of ``number`` hot experts as K allows; its other choices are uniform."""
    hot = int(number)
    if hot < 1:
        raise ValueError

    def hot_experts(p: Problem, g: torch.Generator) -> Tensor:
        if hot > p.E:
            raise ValueError(f"load is {p.load!r}; there are E = {p.E} experts")
        weight = torch.ones(p.E, dtype=torch.float64)
        weight[torch.randperm(p.E, generator=g)[:hot]] = 1e12
        return _by_weight(p, g, weight)

    return hot_experts


# Loads with a number in their name, such as zipf_1.2 and hot_experts_4.
FAMILIES: dict[str, Callable[[str], Load]] = {"zipf": _zipf_of, "hot_experts": _hot_experts}
LOAD_NAMES = f"{', '.join(LOADS)}, zipf_<exponent below 10> and hot_experts_<number>"


def check_device(device: str, argument: str = "device") -> None:
    """Raise ValueError unless ``device``, as cpu, cuda or cuda:1, is there."""
    kind, _, number = device.partition(":")
    check_choice(argument, kind, DEVICES)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{argument} is {device}, but torch finds no CUDA device here")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if ":" in device and not (number.isdecimal() and int(number) < there):
        raise ValueError(f"{argument} is {device}; valid are {kind}, {kind}:0 to {kind}:{there - 1}")


def load_named(name: str, argument: str = "load") -> Load:
    """The load of that name.

    Raises:
        ValueError: there is none; the message names the ``argument`` and the loads that there are.
    """
    if name in LOADS:
        return LOADS[name]
    family, _, number = name.rpartition("_")
    if family in FAMILIES:
        with contextlib.suppress(ValueError):
            return FAMILIES[family](number)
    raise ValueError(f"{argument} is {name!r}; valid are {LOAD_NAMES}")


def _softmax(p: Problem, g: torch.Generator) -> Tensor:
    return torch.randn(p.T, p.K, generator=g, dtype=torch.float64).softmax(dim=1)


def _unnormalised(p: Problem, g: torch.Generator) -> Tensor:
    """Positive, of unequal sizes from 0.1 to 2.5, and not summing to one."""
    return 0.1 + 2.4 * torch.rand(p.T, p.K, generator=g, dtype=torch.float64)


def _signed(p: Problem, g: torch.Generator) -> Tensor:
    return torch.randn(p.T, p.K, generator=g, dtype=torch.float64)


def _one_zero(p: Problem, g: torch.Generator) -> Tensor:
    """One slot of each token has a gate of exactly zero (with K = 1: of every third token)."""
    gates = _unnormalised(p, g)
    rows = torch.arange(0, p.T, 1 if p.K > 1 else 3)
    gates[rows, rows % p.K] = 0
    return gates


def _zero_rows(p: Problem, g: torch.Generator) -> Tensor:
    """All gates of every third token are zero."""
    gates = _unnormalised(p, g)
    gates[::3] = 0
    return gates


def _wide(p: Problem, g: torch.Generator) -> Tensor:
    """Positive, of sizes far apart: from 1e-25 to 1e5, or as far as sums in float16 go, from 1e-3 to 1e2."""
    least, largest = (-3, 2) if p.dtype == torch.float16 and p.combine == "sum" else (-25, 5)
    exponents = torch.rand(p.T, p.K, generator=g, dtype=torch.float64)
    return 10 ** (least + (largest - least) * exponents)


def _cancelling(p: Problem, g: torch.Generator) -> Tensor:
    """256, 1, -256: where the outer slots agree, a sum kept in bfloat16 loses the middle one."""
    return torch.tensor([256.0, 1.0, -256.0], dtype=torch.float64).repeat(p.T, p.K)[:, : p.K]


GATES: dict[str, Callable[[Problem, torch.Generator], Tensor]] = {
    "softmax": _softmax,
    "unnormalised": _unnormalised,
    "signed": _signed,
    "one_zero": _one_zero,
    "zero_rows": _zero_rows,
    "wide": _wide,
    "cancelling": _cancelling,
}

# ------------------------------------------------------------------------------------------------ inputs


def make_inputs(problem: Problem) -> Inputs:
    """The inputs of a problem: the same for the same problem on every machine, none requiring gradients.

    x is of unit scale, weights are scaled by the square root of what they are summed over, biases are of
    scale 0.5 and dy is random: nothing is small enough to hide below a tolerance.
    """
    made = _made(problem)
    ids, gates = made.routing
    return made.map(torch.clone)._replace(routing=Routing(ids.clone(), gates.clone()))


@functools.lru_cache(maxsize=4)
def _made(p: Problem) -> Inputs:
    """The inputs, kept for the next implementation that meets the problem."""
    generator = torch.Generator().manual_seed(p.seed)
    routing = Routing(load_named(p.load)(p, generator), GATES[p.gates](p, generator))
    make = _exact_numbers if p.exact else _real_numbers
    inputs = make(p, routing, generator)
    low, high = sorted((p.dtype, torch.float32), key=lambda dtype: torch.finfo(dtype).bits)
    gate_dtype = low if p.low_gates else high
    gates = inputs.routing.gates.to(gate_dtype)
    cast = inputs.map(lambda t: t.to(p.dtype))._replace(routing=Routing(routing.expert_ids, gates))
    ids = cast.routing.expert_ids.to(p.device)
    cast = cast.map(lambda t: t.to(p.device))
    return cast._replace(routing=Routing(ids, cast.routing.gates))


def _real_numbers(p: Problem, routing: Routing, generator: torch.Generator) -> Inputs:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        # Rounded to the problem's dtype at once, so that the kinks are looked for in what will be computed.
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        return (torch.randn(*shape, generator=generator, dtype=wide) * scale).to(p.dtype)

    experts = Experts(
        w_in=normal(p.E, p.F, p.D, scale=p.D**-0.5),
        b_in=normal(p.E, p.F, scale=0.5) if p.bias else None,
        w_out=normal(p.E, p.O, p.H, scale=p.H**-0.5),
        b_out=normal(p.E, p.O, scale=0.5) if p.bias else None,
        activation=p.activation,
        output_activation=p.output_activation,
    )
    x, dy = normal(p.T, p.D, scale=p.x_scale), normal(p.T, p.O)
    inputs = Inputs(x, routing, experts, dy)
    if p.has_kinks and p.avoids_kinks:
        redrawn = torch.arange(p.T)
        for _ in range(MOST_DRAWS):
            if not len(redrawn := redrawn[near_kink(p, inputs, redrawn)]):
                break
            x[redrawn] = normal(len(redrawn), p.D, scale=p.x_scale)
        else:
            raise ValueError(f"after {MOST_DRAWS} draws tokens are still near a kink in {p.code()}")
    return inputs


def near_kink(p: Problem, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Which of the tokens [N] have a selected expert within the margin of a kink: bool [N]."""
    from correctness.reference import hidden_and_output  # the oracle's own equations, float64

    near = torch.zeros(len(tokens), dtype=torch.bool)
    ids = inputs.routing.expert_ids[tokens]
    for expert in ids.unique().tolist():
        rows = (ids == expert).any(dim=1).nonzero().squeeze(1)
        h, f = hidden_and_output(inputs.x[tokens[rows]].double(), inputs.experts, expert)
        distances = []
        if p.activation == "relu":
            distances.append(h.abs())
        elif p.activation == "reglu":
            distances.append(h[:, : p.H].abs())
        elif p.activation == "swiglu_clamped":
            distances += [(h[:, : p.H] - 7).abs(), (h[:, p.H :].abs() - 7).abs()]
        if p.output_activation == "relu":
            distances.append(f.abs())
        near[rows] |= (torch.cat(distances, dim=1) < p.kink_margin).any(dim=1)
    return near


def _exact_numbers(p: Problem, routing: Routing, generator: torch.Generator) -> Inputs:
    """Integers (biases: half-integers) so small that no intermediate of any right computation is rounded.

    Hidden pre-activations are never zero: with biases they are half-integers; without, they are odd, since
    one feature of x and its weights are odd and all other weights even. So no derivative is taken at a kink.
    Smooth activations get gates so large that they and their derivatives are those of relu to the last bit.
    """
    if p.activation not in EXACT_ACTIVATIONS or p.combine != "sum":
        raise ValueError(
            f"exact problems need {' or '.join(EXACT_ACTIVATIONS)} and combine 'sum', "
            f"not {p.activation}, {p.combine}"
        )
    if p.output_activation == "relu" and not p.bias:
        raise ValueError("exact problems with an output relu need biases, which keep outputs off its kink")
    wide = p
    if p.opposed:
        p = replace(p, D=min(p.D, NARROW), H=min(p.H, NARROW))

    def sparse(*shape: int, nonzeros: int, values: tuple[float, ...]) -> Tensor:
        """About ``nonzeros`` random entries of the last dimension take one of ``values``."""
        pick = torch.rand(*shape, generator=generator) < nonzeros / shape[-1]
        drawn = torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
        return torch.where(pick, drawn, 0.0).double()

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).double() * 2 - 1

    halves = (-1.5, -0.5, 0.5, 1.5)
    x = sparse(p.T, p.D, nonzeros=4, values=(-1, 1))
    x[:, 0] = signs(p.T)
    if p.x_scale > 1:
        x[:, 0] *= 2 * torch.randint(int(p.x_scale + 1) // 2, (p.T,), generator=generator) + 1
    w_in = sparse(p.E, p.F, p.D, nonzeros=3, values=(-2, 2))
    w_in[..., 0] = signs(p.E, p.F)
    b_in = sparse(p.E, p.F, nonzeros=p.F, values=halves)
    b_out = sparse(p.E, p.O, nonzeros=p.O, values=(-0.125, 0.125))
    w_in[:, : p.H] *= _gate_scale(p)
    b_in[:, : p.H] *= _gate_scale(p)
    b_out *= _gate_scale(p)
    experts = Experts(
        w_in=w_in,
        b_in=b_in if p.bias else None,
        w_out=sparse(p.E, p.O, p.H, nonzeros=3, values=(-1, 1)),
        b_out=b_out if p.bias else None,
        activation=p.activation,
        output_activation=p.output_activation,
    )
    powers = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    gates = powers[torch.randint(3, (p.T, p.K), generator=generator)] * signs(p.T, p.K)
    if p.gates == "cancelling":
        gates = routing.gates
    elif p.gates == "one_zero":
        gates = torch.where(routing.gates == 0, 0, gates)
    dy = sparse(p.T, p.O, nonzeros=3, values=(-1, 1))
    if wide.opposed:
        x, experts = _opposed(wide, x, experts)
    return Inputs(x, Routing(routing.expert_ids, gates), experts, dy)


def _opposed(p: Problem, x: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """The same with more features and units, to D and H, the second half of which takes back the first.

    More features are the first one again, in w_in twice as large; more units see the first feature alone.
    """
    more_features, more_units = (torch.ones(max(0, size - NARROW)) for size in (p.D, p.H))
    for more in (more_features, more_units):
        more[len(more) // 2 :] = -1
        more[len(more) // 2 * 2 :] = 0  # one that has no opposite
    x = torch.cat([x, x[:, :1] * more_features], dim=1)
    w_in = torch.cat([experts.w_in, 2 * experts.w_in[..., :1] * more_features.abs()], dim=2)
    row = torch.zeros(p.E, len(more_units), w_in.shape[2])
    row[..., 0] = 1
    scales = (_gate_scale(p), 1)[: p.F // p.H]  # of gate rows and up rows

    def longer(t: Tensor, more: Tensor) -> Tensor:
        parts = zip(t.chunk(len(scales), dim=1), scales, strict=True)
        return torch.cat([piece for part, scale in parts for piece in (part, scale * more)], dim=1)

    return x, replace(
        experts,
        w_in=longer(w_in, row),
        b_in=None if experts.b_in is None else longer(experts.b_in, 1.5 * row[..., 0]),  # 0.5 or 2.5 in all
        w_out=torch.cat([experts.w_out, 2 * more_units.expand(p.E, p.O, -1)], dim=2),
    )


def _gate_scale(p: Problem) -> float:
    """How much larger gates are than with relu, so that a smooth activation is relu to the last bit."""
    return 1.0 if p.activation in KINKED_ACTIVATIONS else SATURATION[p.dtype]


# -------------------------------------------------------------------------------------- the suite's lists

SMALL = Problem("small", T=37, D=12, H=10, O=7, E=5, K=2, gates="unnormalised")

# Every combination of options, on one small problem.
OPTIONS = tuple(
    replace(SMALL, activation=a, output_activation=o, combine=c, bias=b, dtype=d)
    for a, o, c, b, d in itertools.product(ACTIVATIONS, OUTPUT_ACTIVATIONS, COMBINES, (True, False), DTYPES)
)

# Inputs that reach the clamps of swiglu_clamped on every side, and outputs whose exp overflows float32.
LARGE = (
    *(replace(SMALL, activation="swiglu_clamped", x_scale=8.0, dtype=d) for d in DTYPES),
    *(replace(SMALL, activation="swiglu_clamped", x_scale=60.0, dtype=d) for d in DTYPES[:2]),
) + tuple(
    replace(SMALL, activation=a, combine="logsumexp", x_scale=300.0, dtype=d)
    for a in ("silu", "relu", "gelu")
    for d in (torch.float64, torch.float32, torch.bfloat16)
)

# Sizes and loads at which indices, tails and empty groups go wrong, with smooth activations.
_SIZES = (
    Problem("all_ones", T=1, D=1, H=1, O=1, E=1, K=1, activation="gelu"),
    Problem("no_tokens", T=0, D=5, H=3, O=4, E=3, K=2),
    Problem("one_token", T=1, D=9, H=6, O=5, E=7, K=3),
    Problem("one_feature", T=21, D=1, H=4, O=1, E=3, K=2, activation="silu", gates="unnormalised"),
    Problem("one_expert", T=65, D=8, H=17, O=9, E=1, K=1, activation="geglu", gates="unnormalised"),
    Problem("one_choice", T=130, D=17, H=8, O=11, E=9, K=1, bias=False, gates="unnormalised"),
    Problem("all_experts", T=33, D=10, H=14, O=6, E=4, K=4, activation="gelu"),
    Problem("zero_gates", T=70, D=11, H=9, O=13, E=6, K=3, gates="one_zero"),
    Problem("one_hot_expert", T=1000, D=20, H=12, O=24, E=10, K=2, load="one_hot_expert"),
    Problem("same_experts", T=257, D=16, H=32, O=15, E=12, K=2, activation="silu", load="same_experts"),
    Problem("half_empty", T=96, D=24, H=16, O=20, E=16, K=4, bias=False, load="half_empty"),
    Problem("zipf", T=513, D=33, H=31, O=29, E=17, K=3, activation="geglu", load="zipf"),
    Problem("many_experts", T=300, D=19, H=10, O=23, E=129, K=8, load="zipf"),
    Problem("more_than_512_experts", T=700, D=8, H=6, O=10, E=521, K=8, activation="gelu", load="bursts"),
    # Sizes that tiles divide, and D = H = O, where transposed or aliased tensors have the right shape.
    Problem("aligned", T=256, D=64, H=64, O=64, E=16, K=4, gates="unnormalised"),
    Problem("aligned_one_choice", T=128, D=32, H=32, O=32, E=8, K=1, bias=False, gates="unnormalised"),
    Problem("aligned_all_experts", T=64, D=16, H=16, O=16, E=8, K=8, activation="gelu", load="zipf"),
    Problem("wide", T=40, D=521, H=263, O=519, E=3, K=2),
    Problem("thousands", T=4500, D=48, H=40, O=56, E=11, K=2, load="zipf", seed=1),
)
# At sizes that kernels split into tiles.
_LARGER = (
    Problem("larger", T=150, D=40, H=36, O=44, E=12, K=3, load="zipf", gates="unnormalised"),
    Problem("larger_still", T=1100, D=130, H=70, O=100, E=9, K=2, load="router"),
)
# For kernels that have a path for one token, for many, and for sizes that their tiles divide.
_PATHS = (
    Problem("decode", T=1, D=19, H=16, O=15, E=7, K=3),
    Problem("prefill", T=3_001, D=15, H=14, O=13, E=4, K=2),
    Problem("all_128", T=40, D=128, H=128, O=128, E=3, K=2),
    Problem("tiles_of_64", T=40, D=192, H=128, O=256, E=3, K=2),
)


def _with_each_activation(
    problems: tuple[Problem, ...], others: Callable[[int, int], dict]
) -> Iterator[Problem]:
    """Each problem with each activation, the output activation in turn, and ``others`` by their numbers."""
    for (i, activation), (j, p) in itertools.product(enumerate(ACTIVATIONS), enumerate(problems)):
        output_activation = OUTPUT_ACTIVATIONS[(i + j) % len(OUTPUT_ACTIVATIONS)]
        yield replace(p, activation=activation, output_activation=output_activation, **others(i, j))


_LOW_GATES = Problem("low_gates", T=90, D=14, H=18, O=13, E=8, K=3, gates="unnormalised", low_gates=True)
# log Σ g exp(f) is -inf where all gates of a token are zero, so one_zero needs K > 1 there; see zero_gates.
SIZES = tuple(replace(p, combine=c, dtype=d) for p in _SIZES for c in COMBINES for d in DTYPES) + (
    Problem("signed_gates", T=90, D=14, H=18, O=13, E=8, K=3, gates="signed"),
    *(replace(SMALL, name="wide_gates", gates="wide", combine=c, dtype=d) for c in COMBINES for d in DTYPES),
    *(replace(_LOW_GATES, gates="signed", dtype=d) for d in LOW_PRECISION),
    *(replace(_LOW_GATES, combine="logsumexp", dtype=d) for d in LOW_PRECISION),
    *_with_each_activation(
        _LARGER,
        lambda i, j: {"combine": COMBINES[i // 2 % len(COMBINES)], "dtype": DTYPES[(i + j) % len(DTYPES)]},
    ),
    *_with_each_activation(
        _PATHS,
        lambda i, j: {"combine": COMBINES[(i + j) // 2 % len(COMBINES)], "bias": (i + j) % 3 > 0},
    ),
)

_INTEGERS = Problem("integers", T=41, D=13, H=9, O=11, E=6, K=2, activation="relu", exact=True)
_EXACT = (
    _INTEGERS,
    replace(_INTEGERS, name="integers_out_relu", output_activation="relu"),
    replace(_INTEGERS, name="integers_gated", K=3, activation="reglu", bias=False, seed=1),
    replace(_INTEGERS, name="integers_silu", activation="silu"),
    replace(_INTEGERS, name="integers_gelu", activation="gelu", bias=False),
    replace(_INTEGERS, name="integers_swiglu", K=3, activation="swiglu", bias=False),
    replace(_INTEGERS, name="integers_geglu", K=3, activation="geglu", bias=False),
    replace(_INTEGERS, name="integers_hot", T=1025, D=16, H=8, O=24, E=7, K=4, load="one_hot_expert"),
    replace(
        _INTEGERS,
        name="integers_empty",
        T=130,
        D=24,
        H=16,
        O=9,
        E=32,
        K=3,
        load="half_empty",
        gates="one_zero",
    ),
    replace(_INTEGERS, name="integers_cancelling", T=24, D=6, H=5, O=16, E=5, K=3, gates="cancelling"),
    replace(_INTEGERS, name="integers_cancelling_pairs", T=60, D=6, H=5, O=16, E=7, K=6, gates="cancelling"),
    replace(_INTEGERS, name="integers_12_choices", T=30, D=6, H=5, O=16, E=13, K=12, gates="cancelling"),
    replace(_INTEGERS, name="integers_many", T=600, D=10, H=6, O=7, E=300, K=2, bias=False, load="zipf"),
)
# Sizes beyond the tiles, counters and grids of most kernels. Sums over so many tokens need float32.
_BEYOND = tuple(
    replace(_INTEGERS, name=f"integers_{name}", **sizes)
    for name, sizes in {
        "20000_tokens": {"T": 20_011, "D": 5, "H": 4, "O": 6, "E": 5},
        "33000_tokens": {"T": 33_001, "D": 3, "H": 3, "O": 4, "E": 16, "K": 1},  # beyond 15 bits
        "66000_slots": {"T": 16_501, "D": 3, "H": 3, "O": 4, "E": 16, "K": 4},  # beyond 16 bits
        "10000_rows": {"T": 10_007, "D": 4, "H": 3, "O": 5, "E": 3, "K": 1, "load": "same_experts"},
        "1000_experts": {"T": 2_311, "D": 6, "H": 5, "O": 7, "E": 1_031, "K": 3},
        "40_choices": {"T": 150, "D": 7, "H": 6, "O": 5, "E": 48, "K": 40},
        "wide_input": {"T": 70, "D": 2_111, "H": 6, "O": 7},
        "wide_hidden": {"T": 70, "D": 6, "H": 2_111, "O": 7},
        "wide_output": {"T": 70, "D": 6, "H": 7, "O": 2_111},
        "7168_input": {"T": 9, "D": 7_168, "H": 6, "O": 7},  # of DeepSeek-V3
        "7168_hidden": {"T": 9, "D": 6, "H": 7_168, "O": 7},
        "7168_output": {"T": 9, "D": 6, "H": 7, "O": 7_168},
        "aligned": {"T": 2_048, "D": 16, "H": 16, "O": 16, "E": 64, "K": 8},
    }.items()
)
# The (E, K) of released models, for which kernels have branches of their own.
_RELEASED = tuple(
    replace(_INTEGERS, name=f"integers_{E}_experts_{K}", T=70, E=E, K=K)
    for E, K in (
        (8, 2), (16, 1), (16, 4), (32, 4), (32, 8), (60, 4), (64, 6), (64, 8), (128, 1), (128, 4), (128, 8),
        (160, 6), (160, 8), (256, 6), (256, 8), (384, 8), (512, 10),
    )
)  # fmt: skip
# Sums along D and along H, of y and of dx, that a product in parts keeps in float32 only.
_OPPOSED = tuple(
    replace(_INTEGERS, name=f"integers_opposed_{name}", T=20, opposed=True, dtype=d, **{name: 2_212})
    for name in ("D", "H")
    for d in DTYPES
)
# Numbers that float16 holds and bfloat16, with three bits less, does not; at most one token for each expert.
_FINE = replace(
    _INTEGERS, name="integers_fine", T=8, E=60, K=1, bias=False, dtype=torch.float16, x_scale=383.0, seed=0
)
EXACT = (
    *(replace(p, dtype=d) for p in _EXACT for d in DTYPES),
    _FINE,
    *_OPPOSED,
    replace(_INTEGERS, low_gates=True, dtype=torch.float64),
    *_BEYOND,
    *_RELEASED,
)

# Where y is defined and gradients are not, or cannot be held to the budget: tokens whose gates are all zero;
# gates of zero beside outputs beyond what exp can hold; float32 gates of a float64 layer.
OUTPUT = (
    *(replace(SMALL, T=61, combine="logsumexp", gates="zero_rows", dtype=d) for d in DTYPES),
    replace(SMALL, activation="silu", combine="logsumexp", gates="one_zero", x_scale=100.0),
    *(replace(SMALL, combine=c, low_gates=True, dtype=torch.float64) for c in COMBINES),
)


def named(name: str) -> Problem:
    """The first problem of that name among EXACT and SIZES."""
    return next(p for p in (*EXACT, *SIZES) if p.name == name and p.dtype == torch.float32)


GRADCHECK = tuple(
    Problem("gradcheck", T=4, D=3, H=3, O=2, E=4, K=2, activation=a, output_activation=o, combine=c,
            dtype=torch.float64, gates="unnormalised", load="half_empty")
    for a, o, c in itertools.product(ACTIVATIONS, OUTPUT_ACTIVATIONS, COMBINES)
)  # fmt: skip

# What an implementation that compiles anew for each case is tested on: every dtype, activation, combine,
# output activation and bias setting; with the first of these all sizes, loads and gates; and exact sums in
# float16, since Triton's interpreter cuts bfloat16 off where GPUs round it.
REPRESENTATIVE = (
    ("swiglu", "none", "sum", True, torch.float32),
    ("relu", "none", "sum", True, torch.float16),
    ("gelu", "none", "logsumexp", True, torch.float64),
    ("geglu", "none", "logsumexp", False, torch.bfloat16),
    ("silu", "relu", "sum", False, torch.float32),
    ("reglu", "none", "sum", False, torch.bfloat16),
    ("swiglu_clamped", "none", "sum", True, torch.float32),
)


@functools.cache
def representatives(support: Support) -> tuple[tuple, ...]:
    """REPRESENTATIVE with what ``support`` does not declare replaced as in every problem."""
    names = ("activation", "output_activation", "combine", "bias", "dtype")
    fitted = (fit(replace(SMALL, **dict(zip(names, o, strict=True))), support) for o in REPRESENTATIVE)
    return tuple(dict.fromkeys(map(_options, fitted)))


def is_representative(problem: Problem, support: Support) -> bool:
    """Whether an implementation that compiles for each case is tested on this problem."""
    if problem.low_gates or _options(problem) not in representatives(support):
        return False
    return not _is_degenerate(problem) or _is_first(problem, support)


def is_plain(problem: Problem, support: Support) -> bool:
    """Whether such an implementation is tested on this problem without gradients, too."""
    return _is_first(problem, support) and not _is_degenerate(problem)


def _is_first(problem: Problem, support: Support) -> bool:
    return _options(problem) == representatives(support)[0]


def _options(p: Problem) -> tuple:
    return p.activation, p.output_activation, p.combine, p.bias, p.dtype


def _is_degenerate(p: Problem) -> bool:
    """Whether it has a size that compilers specialise."""
    return min(p.T, p.D, p.H, p.O, p.E, p.K) < 2
