"""A layer on the bench: its parameters drawn anew, tokens, and what is right for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from correctness.judging.budget import entry_budgets, relative_errors
from correctness.judging.finding import CheckFailed
from correctness.oracle import layer as oracle
from correctness.problems.inputs import near_kink
from correctness.problems.problem import LOW_PRECISION, Inputs, Problem
from moe_impls.interface import (
    Experts,
    LayerWeights,
    RouterSpec,
    Routing,
    Support,
    check_inputs,
    dtype_name,
)
from moe_impls.registry import one_line
from moe_impls.router import check_logits, route

B, S = 4, 8  # leading dimensions of the input: T = B * S tokens
T = B * S
ROUNDS = 50  # of drawing tokens until enough of them have a clear choice
SIGNS = 64  # patterns of signs of errors
COPIES = 163  # of each token in a call with many: more than 4096 tokens, and no multiple of a usual tile


@dataclass(frozen=True)
class Layer:
    """A way to make a layer, how to read it, and what it declares."""

    make: Callable[[], nn.Module]
    read: Callable[[Any], LayerWeights]
    losses: Callable[[Any, Tensor, Tensor | None], dict[str, Tensor]] | None = None
    support: Support = Support()


def check_weights(weights: object, layer: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``weights`` is a LayerWeights whose parts fit together."""
    if not isinstance(weights, LayerWeights):
        raise TypeError(f"the result is a {type(weights).__name__}; it must be a moe_impls.LayerWeights")
    for name, valid in (
        ("experts", Experts),
        ("router", RouterSpec),
        ("router_weight", Tensor),
        ("router_bias", Tensor | None),
        ("selection_bias", Tensor | None),
        ("shared", Experts | None),
        ("shared_gate", Tensor | None),
    ):
        value = getattr(weights, name)
        if not isinstance(value, valid):
            what = getattr(valid, "__name__", str(valid))
            raise TypeError(f"{name} is a {type(value).__name__}; it must be {what}")
    experts, router_weight = weights.experts, weights.router_weight
    if not isinstance(experts.w_in, Tensor) or experts.w_in.ndim != 3:
        raise ValueError("w_in must be a tensor [E, F, D]")
    E, _, D = experts.w_in.shape
    x = experts.w_in.new_empty(0, D)
    for part, combine in ((experts, weights.combine), (weights.shared, "sum")):
        if part is not None:
            ids = torch.zeros(0, 1, dtype=torch.int64, device=x.device)
            check_inputs(x, Routing(ids, x.new_zeros(0, 1)), part, combine)
    wanted: dict[str, tuple[int, ...]] = {"router_weight": (E, D), "router_bias": (E,)}
    if weights.shared is not None:
        wanted["shared_gate"] = (len(weights.shared.w_in), D)
        O = experts.w_out.shape[1]
        if weights.shared.w_out.shape[1] != O:
            raise ValueError(f"shared.w_out has {weights.shared.w_out.shape[1]} rows; experts.w_out has {O}")
    elif weights.shared_gate is not None:
        raise ValueError("shared_gate is given; without shared experts it must be None")
    for name, shape in wanted.items():
        tensor = getattr(weights, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    check_logits(router_weight.new_empty(0, E), weights.router, weights.selection_bias)
    names = dict(layer.named_parameters())
    for name in weights.training_only:
        if name not in names:
            raise ValueError(f"training_only holds {name!r}; the parameters are {', '.join(names)}")


def build(subject: Layer, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Make a new layer in eval mode, with parameters and the buffers that are read drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = subject.make()
    layer = layer.eval().to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(parameter, generator))
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                old, before = buffer.clone(), copies_of(subject, layer)
                buffer.add_(1)
                after = copies_of(subject, layer)
                is_read = any(not torch.equal(before[name], after[name]) for name in before)
                # Small next to scores between 0 and 1, so that it decides some choices but not all.
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator) if is_read else old)
    return layer.to(dtype)


def draw(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Draw numbers that keep results of unit scale: weights by their inputs, vectors of scale 0.5."""
    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
    return scale * torch.randn(parameter.shape, generator=generator)


def copies_of(subject: Layer, layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in oracle.tensors(subject.read(layer)).items()}


def weights_of(subject: Layer, twin: nn.Module) -> LayerWeights:
    """Read the layer's twin in float64, without its graph."""
    return oracle.map_tensors(subject.read(twin), lambda t: t.detach().double().clone())


@dataclass(frozen=True)
class Expected:
    """What is right for tokens x [T, D] and dy [T, O], and how far each entry may be off, by name.

    The names are y, x and those of the layer's parameters. A parameter that `read` does not read is not
    among them. is_swayed: tokens, bool [T], that go to other experts by logits rounded to the dtype of x.
    """

    x: Tensor
    ids: Tensor
    is_swayed: Tensor
    dy: Tensor
    want: dict[str, Tensor]
    allowed: dict[str, Tensor]


@functools.lru_cache(maxsize=64)
def expected(subject: Layer, dtype: torch.dtype) -> Expected:
    """Return the oracle's answer for a layer as `build` makes it."""
    twin = build(subject, dtype).to("cpu", torch.float64)
    weights = weights_of(subject, twin)
    x, ids = _tokens(weights, dtype)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(T, weights.experts.w_out.shape[1], generator=generator).to(dtype)
    gradients = subject.support.gradients and _comparable(weights, dtype)
    want, allowed = judged(x, ids, weights, dy if gradients else None, dtype)
    parameters = onto_parameters(subject, twin, want, allowed) if gradients else {}
    return Expected(
        x,
        ids,
        _is_swayed(x, weights),
        dy,
        {n: want[n] for n in ("y", "x") if n in want} | {n: v for n, (v, _) in parameters.items()},
        {n: allowed[n] for n in ("y", "x") if n in want} | {n: a for n, (_, a) in parameters.items()},
    )


def _comparable(weights: LayerWeights, dtype: torch.dtype) -> bool:
    """Tell whether tokens can be away from all kinks, so that gradients can be compared."""
    parts = ((weights.experts, weights.router.top_k), (weights.shared, None))
    problems = [_problem(experts, K, dtype) for experts, K in parts if experts is not None]
    return all(p.avoids_kinks or not p.has_kinks for p in problems)


def _problem(experts: Experts, K: int | None, dtype: torch.dtype) -> Problem:
    """Describe a layer's experts, of which a token visits K, or all, as a Problem."""
    E, O, H = experts.w_out.shape
    D = experts.w_in.shape[2]
    options = (experts.activation, experts.output_activation)
    return Problem("layer", T, D, H, O, E, E if K is None else K, *options, dtype=dtype)


def judged(
    x: Tensor, ids: Tensor, weights: LayerWeights, dy: Tensor | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the oracle's results, and the budget of each entry."""
    right = oracle.evaluate_layer(x, ids, weights, dy)
    plain = oracle.evaluate_layer(x, ids, weights, dy, dtype=dtype, wide=torch.float32)
    return right.values, entry_budgets(right, plain, dtype)


def onto_parameters(
    subject: Layer, twin: nn.Module, values: dict[str, Tensor], allowed: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Push the gradients of what `read` returned, and their budgets, through `read` onto the parameters."""
    named = {n: t for n, t in oracle.tensors(subject.read(twin)).items() if t.requires_grad and n in values}
    parameters = trained(twin)
    if not named or not parameters:
        return {}

    def push(terms: dict[str, Tensor]) -> dict[str, Tensor]:
        along = [terms[name].to(tensor) for name, tensor in named.items()]
        pushed = torch.autograd.grad(
            list(named.values()), list(parameters.values()), along, retain_graph=True, allow_unused=True
        )
        return {n: t for n, t in zip(parameters, pushed, strict=True) if t is not None}

    # Where `read` adds up, errors of either sign add up: their root mean square over random signs.
    generator = torch.Generator().manual_seed(5)
    errors = [
        push({n: a * (2 * torch.randint(2, a.shape, generator=generator) - 1) for n, a in allowed.items()})
        for _ in range(SIGNS)
    ]
    return {
        name: (value, torch.stack([e[name] for e in errors]).square().mean(dim=0).sqrt())
        for name, value in push(values).items()
    }


def _tokens(weights: LayerWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw T tokens [T, D], and choose their experts [T, K].

    The choice of each is clear and, where gradients are compared, none is near a kink. In low precision up to
    half of them are such that logits rounded to that precision lead to other experts.
    """
    generator = torch.Generator().manual_seed(1)
    low = dtype in LOW_PRECISION
    xs, ids = [], []
    for _ in range(ROUNDS):
        x = torch.randn(128 * T if low else 2 * T, weights.router_weight.shape[1], generator=generator).to(
            dtype
        )
        if low:
            x = torch.cat([x[_is_swayed(x, weights)][: T // 2], x[:T]])
        chosen, good = oracle.choose(x, weights)
        if _comparable(weights, dtype):
            good &= ~_kinked(x, chosen, weights)
        xs.append(x[good])
        ids.append(chosen[good])
        if sum(map(len, xs)) >= T:
            return torch.cat(xs)[:T], torch.cat(ids)[:T]
    raise CheckFailed(
        f"only {sum(map(len, xs))} of {2 * T * ROUNDS} random tokens have a clear choice of experts: "
        "read(layer).router_weight may be zero or equal for several experts"
    )


def _is_swayed(x: Tensor, weights: LayerWeights) -> Tensor:
    """Tell which tokens go to other experts where logits are rounded to the dtype of x: bool [T]."""
    z = oracle.logits(x.double(), weights)
    exact, rounded = (
        route(v, weights.router, selection_bias=weights.selection_bias).expert_ids.sort().values
        for v in (z, z.to(x.dtype))
    )
    return (exact != rounded).any(dim=1)


def _kinked(x: Tensor, ids: Tensor, weights: LayerWeights) -> Tensor:
    """Tell which tokens are so near a jump of a derivative that rounding decides their gradient: bool [T]."""
    near = torch.zeros(len(x), dtype=torch.bool)
    for experts in (weights.experts, weights.shared):
        if experts is None:
            continue
        E, O, _ = experts.w_out.shape
        visited = ids if experts is weights.experts else torch.arange(E).expand(len(x), E)
        problem = _problem(experts, visited.shape[1], x.dtype)
        if problem.has_kinks:
            inputs = Inputs(x, Routing(visited, x.new_ones(visited.shape)), experts, x.new_zeros(len(x), O))
            near |= near_kink(problem, inputs, torch.arange(len(x)))
    return near


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def reached(layer: nn.Module, tensor: Tensor) -> dict[str, Tensor]:
    """Find the parameters that a tensor of `read` is made of, with the derivative of the tensor's sum."""
    parameters = trained(layer)
    if not parameters or not tensor.requires_grad:
        return {}
    leaves = list(parameters.values())  # what `read` returns may share a graph
    derivatives = torch.autograd.grad(tensor.sum(), leaves, retain_graph=True, allow_unused=True)
    return {name: d for name, d in zip(parameters, derivatives, strict=True) if d is not None}


@dataclass(frozen=True)
class Bench:
    """One layer on the bench: a fresh layer, and what is right for it."""

    subject: Layer
    dtype: torch.dtype
    layer: nn.Module
    expected: Expected

    @property
    def x(self) -> Tensor:
        """Tokens [T, D] on the layer's device; a copy."""
        return self.expected.x.clone().to(self.device)

    @property
    def device(self) -> torch.device:
        return self.subject.read(self.layer).router_weight.device

    def call(self, x: Tensor) -> Tensor:
        """Call the layer: return its y, or raise CheckFailed unless it is a tensor [..., O] like x."""
        what = f"layer(x) with x {list(x.shape)} of {dtype_name(x.dtype)}"
        try:
            result = self.layer(x)
        except Exception as error:
            raise CheckFailed(f"{what} raises {one_line(error)}") from error
        y = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(y, Tensor):
            raise CheckFailed(f"{what} returns a {type(y).__name__}; it must be y or (y, ...)")
        O = self.expected.dy.shape[1]
        for fact, got, want in (
            ("shape", tuple(y.shape), (*x.shape[:-1], O)),
            ("dtype", y.dtype, x.dtype),
            ("device", y.device, x.device),
        ):
            if got != want:
                raise CheckFailed(f"{what} returns y of {fact} {got}; it must be {want}")
        return y

    def require(self, name: str, got: Tensor, want: Tensor, allowed: Tensor, context: str = "") -> None:
        """Raise CheckFailed unless each entry is within its budget."""
        ratio = relative_errors(got.detach().cpu(), want, allowed)
        if not ratio.numel() or float(ratio.max()) <= 1:
            return
        index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise CheckFailed(
            f"{name}{list(index) if index else ''} is {got[index].item():.6g}, right is "
            f"{want[index].item():.6g}{context}; error {float(ratio.max()):.3g} times its budget, "
            f"{int((ratio > 1).sum())} of {ratio.numel()} entries are over theirs ({dtype_name(self.dtype)})"
        )

    def require_y(self, y: Tensor, rows: Tensor | slice = slice(None), context: str = "") -> None:
        """Raise CheckFailed unless the outputs [N, O] are right for the tokens ``rows``."""
        self.require("y", y, self.expected.want["y"][rows], self.expected.allowed["y"][rows], context)
