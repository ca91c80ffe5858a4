"""The contract between a router, an implementation and the suite that checks them.

The layer is cut after routing: a router decides once which experts each token visits and with which
weights, and an implementation is a pure function of that decision::

    forward(x, routing, experts, *, combine="sum") -> y

It neither modifies its arguments, which may be strided and may share memory, nor any setting of the process,
and depends on nothing but what they hold in that call: not on earlier calls, other graphs that still wait for
their backward, the thread, calls of other threads at the same time, or the process's default dtype. (A weight
that is written to through ``.data`` keeps its address and its version.) The result belongs to the caller: no
later call changes it, and where the caller writes to it in place before the backward, the gradients are right
all the same or autograd raises its error. A backward with ``retain_graph=True`` may be repeated, and may run
in another thread than its forward. NaN or infinity in the x, the gates or the incoming gradient of a token
stays in its rows of y and of the gradients of x and the gates; a row of y that depends on one is not finite.

Notation, here and everywhere: T tokens, D input features (d_model), H hidden features of an expert,
O output features, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "swiglu_clamped", "geglu_tanh")
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh", "relu2", *GATED_ACTIVATIONS)
OUTPUT_ACTIVATIONS = ("none", "relu")
COMBINES = ("sum", "logsumexp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def check_choice(argument: str, value: object, valid: tuple) -> None:
    """Raise ValueError unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise ValueError(f"{argument} is {value!r}; valid are {', '.join(map(str, valid))}")


def check_positive(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int (bool is not), ValueError unless it is at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r}; it must be an int")
    if value < 1:
        raise ValueError(f"{argument} is {value}; it must be at least 1")


def check_declared(name: str, declared: object, valid: tuple) -> None:
    """Raise TypeError unless ``declared`` is a tuple, not empty, and ValueError unless all of it is valid."""
    if not isinstance(declared, tuple) or not declared:
        raise TypeError(f"{name} is {declared!r}; it must be a tuple of {valid}, not empty")
    for value in declared:
        check_choice(name, value, valid)


Forward = Callable[..., Tensor]  # forward(x, routing, experts, *, combine="sum") -> y
Prepared = Callable[..., Tensor]  # f(x, routing, *, combine="sum") -> y, without gradients


class Clamp(NamedTuple):
    """The numbers of the activation swiglu_clamped, which no other reads.

    gate = min(gate, limit), up = clamp(up, -limit, limit), gate * sigmoid(alpha * gate) * (up + offset).

    gpt-oss and MiniMax-M3 have (7, 1.702, 1); DeepSeek-V4, GLM-5 and HY-V4 (10, 1, 0), the SiLU of a gate
    that has a limit. A limit of infinity is none.
    """

    limit: float = 7.0
    alpha: float = 1.702
    offset: float = 1.0


CLAMPED = "swiglu_clamped"


def check_clamp(argument: str, clamp: object, activation: str = CLAMPED) -> None:
    """Raise TypeError or ValueError unless ``clamp`` is a `Clamp` that the activation can have."""
    numbers = isinstance(clamp, Clamp) and all(isinstance(n, int | float) for n in clamp)
    if not isinstance(clamp, Clamp) or not numbers:
        raise TypeError(f"{argument} is {clamp!r}; it must be a Clamp(limit, alpha, offset) of three numbers")
    if not clamp.limit > 0 or not math.isfinite(clamp.alpha) or not math.isfinite(clamp.offset):
        raise ValueError(f"{argument} is {clamp}; its limit must be above 0, alpha and offset finite")
    if activation != CLAMPED and clamp != Clamp():
        raise ValueError(f"{argument} is {clamp}; activation {activation!r} reads none, only {CLAMPED!r}")


class Routing(NamedTuple):
    """Which experts each token visits, and the weight of each visit.

    expert_ids: [T, K] int64 in [0, E), distinct within a row, in any order.
    gates: [T, K] combine weights, float32 or the dtype of x; any sign and size, and a row need not sum
        to one. A gate of exactly zero still has a gradient.
    """

    expert_ids: Tensor
    gates: Tensor


@dataclass(frozen=True)
class Experts:
    """E two-layer perceptrons with stacked weights.

    w_in: [E, F, D]. F = H, or 2H for a gated activation: first the H gate rows, then the H up rows.
    b_in: [E, F] or None.
    w_out: [E, O, H].
    b_out: [E, O] or None.
    activation: relu | relu2 (its square) | gelu (erf) | gelu_tanh (approximated by tanh) | silu, or gated:
        swiglu | geglu | geglu_tanh | reglu | swiglu_clamped.
    output_activation: none | relu, applied to the output of each expert before the combine.
    clamp: the numbers of swiglu_clamped.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str = "relu"
    output_activation: str = "none"
    clamp: Clamp = Clamp()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that are present, by field name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def unbind(self) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
        """List each expert's (w_in [F, D], b_in [F], w_out [O, H], b_out [O]).

        The backward of one unbind writes one gradient for each weight; that of ``w[e]`` in a loop writes a
        full-size gradient for every expert.
        """
        absent = [None] * len(self.w_in)
        b_in = absent if self.b_in is None else self.b_in.unbind(0)
        b_out = absent if self.b_out is None else self.b_out.unbind(0)
        return list(zip(self.w_in.unbind(0), b_in, self.w_out.unbind(0), b_out, strict=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Experts:
        """Apply ``function`` to each weight tensor: experts of the same form."""
        return replace(self, **{name: function(value) for name, value in self.tensors.items()})


@dataclass(frozen=True)
class Support:
    """What an implementation declares that it can do. The suite tests all of it and nothing else.

    An implementation's file may hold ``SUPPORT = Support(...)`` beside its ``forward``; without one,
    every default below is claimed.

    gradients: of x, the gates and every weight; without them the forward alone is tested.
    second_order: gradients of gradients.
    deterministic: equal inputs give bit-equal results and gradients.
    autocast: under torch.autocast the result keeps the dtype of x and is right to the autocast dtype.
    fullgraph: torch.compile takes it as one graph and does not compile again for a new routing.
    exports: torch.export takes it.
    no_host_sync: no call reads on the host what a tensor holds, so that it neither waits for a GPU nor does a
        CUDA graph of it go wrong with a new routing; but for a first call of its sizes, which may compile and
        try kernels. On a CPU it is called with fake tensors, for which
        operators of its own need fake implementations (torch.library.register_fake).
    distributed: it is a collective call on the ranks of a mesh, of which each holds some of the experts::

            forward(x, routing, experts, *, combine="sum", mesh, num_experts) -> y

        All ranks of ``mesh``, a one-dimensional DeviceMesh, call it in the same order, and the same of their
        inputs require gradients; T may differ, and be 0. ``experts`` is the rank's chunk of num_experts as
        DTensor's Shard(0) cuts them (5 on 4 ranks: 2, 2, 1 and 0), and expert_ids are those of all. y and the
        gradients of x and the gates are those of the rank's own tokens; the gradients of its weights are the
        sums over the tokens of all ranks, not divided by anything.
    even_experts: of one that is distributed: num_experts must be a multiple of the ranks.
    equal_tokens: likewise: T must be the same on every rank.
    clamps: of the activation swiglu_clamped; None: any numbers.
    multiple_of: D, H and O must be multiples of it.
    same_width: O must equal D.
    compiles_per_case: each new combination of dtype and options costs a compilation (torch.compile);
        the suite then takes the representative subset of options in ``correctness.problems``.
    """

    devices: tuple[str, ...] = DEVICES
    dtypes: tuple[torch.dtype, ...] = DTYPES
    activations: tuple[str, ...] = ACTIVATIONS
    output_activations: tuple[str, ...] = OUTPUT_ACTIVATIONS
    combines: tuple[str, ...] = COMBINES
    biases: tuple[bool, ...] = (True, False)
    gradients: bool = True
    second_order: bool = False
    deterministic: bool = True
    autocast: bool = False
    fullgraph: bool = False
    exports: bool = False
    no_host_sync: bool = False
    distributed: bool = False
    even_experts: bool = False
    equal_tokens: bool = False
    compiles_per_case: bool = False
    multiple_of: int = 1
    same_width: bool = False
    clamps: tuple[Clamp, ...] | None = None

    def __post_init__(self) -> None:
        if self.clamps is not None and (not isinstance(self.clamps, tuple) or not self.clamps):
            raise TypeError(
                f"clamps of Support is {self.clamps!r}; it must be a tuple of Clamp, or None for any"
            )
        for clamp in self.clamps or ():
            check_clamp("clamps of Support", clamp)
        for name in ("even_experts", "equal_tokens"):
            if getattr(self, name) and not self.distributed:
                raise ValueError(f"{name} of Support is True; that needs distributed=True")
        check_positive("multiple_of of Support", self.multiple_of)
        for name, valid in (
            ("devices", DEVICES),
            ("dtypes", DTYPES),
            ("activations", ACTIVATIONS),
            ("output_activations", OUTPUT_ACTIVATIONS),
            ("combines", COMBINES),
            ("biases", (True, False)),
        ):
            check_declared(f"{name} of Support", getattr(self, name), valid)

    def takes_clamp(self, activation: str, clamp: Clamp) -> bool:
        """Tell whether the numbers of an activation are declared; without numbers they are."""
        return activation != CLAMPED or self.clamps is None or clamp in self.clamps


def _needs_nothing_more() -> bool:
    return True


def _needs_what_is_not_installed() -> str:
    return "it needs what is not installed"


@dataclass(frozen=True)
class Implementation:
    """A named ``forward`` and what it declares; ``moe_impls.registry.resolve`` makes them.

    prepare: of an implementation named ``...+prepared``: ``prepare(experts) -> f`` for weights in another
        layout. f is valid until a weight changes and then raises, or gives the new result; ``forward``
        prepares anew in each call.
    choose: of one that leaves the work to others: the one that it takes for the arguments of ``forward``.
    is_available: whether what it needs beyond torch is installed, such as a compiler.
    missing: says what is not there where it is not available.
    tuning_seconds: of one that tries several forms of its kernels in a first call: the seconds that all such
        trials of this process took.
    """

    name: str
    forward: Forward
    support: Support = Support()
    prepare: Callable[[Experts], Prepared] | None = None
    choose: Callable[..., Implementation] | None = None
    is_available: Callable[[], bool] = _needs_nothing_more
    missing: Callable[[], str] = _needs_what_is_not_installed
    tuning_seconds: Callable[[], float] | None = None

    def ready(self, experts: Experts) -> Forward:
        """Return ``forward``; or, with ``prepare``, what that made of these experts, under its signature."""
        if self.prepare is None:
            return self.forward
        f = self.prepare(experts)
        return lambda x, routing, experts, *, combine="sum": f(x, routing, combine=combine)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
