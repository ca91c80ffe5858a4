"""Read a block in the terms of the suite: experts, router and shared experts, each as executed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from correctness.families.probe import NotInTheContract, Router, Trace, experts_name, find_router, named
from moe_impls.activation_probe import UnknownActivation, activation_of
from moe_impls.interface import Clamp, Experts
from moe_impls.layer_interface import LayerWeights
from moe_impls.transformers import Refused, experts_of

FIT = 1e-5  # of the root mean square of y: what is not explained may be rounding of float32


@dataclass(frozen=True)
class Perceptron:
    """A shared expert: the names of its linear layers, the last of them the output, and its activation."""

    name: str
    inner: tuple[str, ...]
    outer: str
    activation: str
    clamp: Clamp
    factor: float = 1.0
    gate: str = ""

    def read(self, block: nn.Module) -> Experts:
        """Read it as experts with E = 1."""
        module = block.get_submodule(self.name)
        layers = [module.get_submodule(name) for name in self.inner]
        outer = module.get_submodule(self.outer)
        assert all(isinstance(layer.weight, Tensor) for layer in (*layers, outer))
        w_in = torch.cat([layer.weight for layer in layers]).unsqueeze(0)  # pyright: ignore[reportArgumentType]
        biases = [layer.bias for layer in layers]
        b_in = None if biases[0] is None else torch.cat(biases).unsqueeze(0)  # pyright: ignore[reportArgumentType, reportCallIssue]
        w_out, b_out = (
            None if t is None else self.factor * t.unsqueeze(0)  # pyright: ignore[reportCallIssue]
            for t in (outer.weight, outer.bias)
        )
        assert w_out is not None
        return Experts(w_in, b_in, w_out, b_out, self.activation, clamp=self.clamp)


@dataclass(frozen=True)
class Reading:
    """Where everything is in a block; `read` makes the suite's terms of it."""

    experts: str
    router: Router
    shared: Perceptron | None = None

    def read(self, block: nn.Module) -> LayerWeights:
        """Read the weights of a block of the kind that this was made of."""
        tensors, router, shared = named(block), self.router, self.shared
        return LayerWeights(
            experts_of(block.get_submodule(self.experts)),
            router.spec,
            tensors[router.weight],
            shared=shared.read(block) if shared else None,
            shared_gate=tensors[shared.gate] if shared and shared.gate else None,
            router_norm=router.norm_scale * tensors[router.norm] if router.norm else None,
            router_norm_epsilon=router.norm_epsilon,
            router_bias=router.vector(block, "router_bias"),
            selection_bias=router.vector(block, "selection_bias"),
            expert_scale=router.vector(block, "expert_scale"),
        )


def reading_of(block: nn.Module) -> Reading:
    """Find out, by running it, how to read a block with drawn parameters.

    Raises:
        NotInTheContract: with the reason.
    """
    experts = experts_name(block)
    router, seen = find_router(block, experts)
    if not torch.equal(seen.experts_x, seen.x):
        raise NotInTheContract("its experts are given something else than x")
    try:
        experts_of(block.get_submodule(experts))
    except Refused as refused:
        raise NotInTheContract(str(refused)) from refused
    scale, shared = _shared(block, seen)
    router = replace(router, spec=replace(router.spec, scale=_tidy(router.spec.scale * scale)))
    return Reading(experts, router, shared)


def _tidy(number: float) -> float:
    return next(
        r for d in range(1, 8) if abs((r := float(f"{number:.{d}g}")) - number) <= FIT / 2 * abs(number)
    )


@torch.no_grad()
def _shared(block: nn.Module, seen: Trace) -> tuple[float, Perceptron | None]:
    """Explain y as a multiple of what the experts return plus, perhaps, a shared expert.

    Returns:
        the factor of the routed experts, and the shared expert.
    """
    children = {n: out for n, out in seen.outputs.items() if list(block.get_submodule(n).parameters())}
    y, routed = seen.y.double().flatten(), seen.routed.double().flatten()
    size = FIT * y.square().mean().sqrt()

    def fit(*parts: Tensor) -> list[float] | None:
        columns = torch.stack([routed, *parts], dim=1)
        found = torch.linalg.lstsq(columns, y).solution
        return found.tolist() if bool(((columns @ found - y).abs() <= 8 * size).all()) else None

    if found := fit():
        return _tidy(found[0]), None
    gates = [n for n, t in named(block).items() if t.shape == (1, seen.x.shape[1])]
    for name, out in children.items():
        if sum(isinstance(m, nn.Linear) for m in block.get_submodule(name).modules()) < 2:
            continue
        for gate in ("", *gates):
            share = torch.sigmoid(seen.x @ named(block)[gate].T) if gate else 1.0
            if found := fit((share * out).double().flatten()):
                perceptron = replace(perceptron_of(block, name), factor=_tidy(found[1]), gate=gate)
                return _tidy(found[0]), perceptron
    raise NotInTheContract(
        "y is no sum of its experts' output and that of a shared expert"
        + (f"; there are {', '.join(children)}, too" if children else "")
    )


class _Reached(Exception):
    """The output layer of a perceptron has been reached."""


def perceptron_of(block: nn.Module, name: str) -> Perceptron:
    """Tell what a module of linear layers computes, by running it.

    Raises:
        NotInTheContract: it is no two-layer perceptron with an activation of the contract.
    """
    module = copy.deepcopy(block.get_submodule(name)).double()
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    called: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, n=n: called.append(n)) for n, m in linear.items()]
    width = next(iter(linear.values())).in_features
    module(torch.zeros(1, 1, width, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    *inner, outer = called
    gated = len(inner) == 2 or linear[inner[0]].out_features == 2 * linear[outer].in_features
    reasons = []
    for order in (inner, inner[::-1]) if len(inner) == 2 else (inner,):
        try:
            activation, clamp = activation_of(
                _between(module, linear, order, outer, width), gated=gated, numbers=_numbers(module)
            )
            return Perceptron(name, tuple(order), outer, activation, clamp)
        except UnknownActivation as error:
            reasons.append(str(error))
    raise NotInTheContract(f"the activation of {name}: {reasons[0]}")


def _numbers(module: nn.Module) -> list[float]:
    return [v for v in vars(module).values() if isinstance(v, float)]


def _between(
    module: nn.Module, linear: dict[str, nn.Linear], inner: list[str], outer: str, width: int
) -> Callable[[Tensor], Tensor]:
    """Make a function of what lies between the linear layers: h [N, F] -> [N, H]."""

    def function(h: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def reached(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        parts = h.chunk(len(inner), dim=-1)
        hooks = [
            linear[n].register_forward_hook(lambda *_, part=part: part)
            for n, part in zip(inner, parts, strict=True)
        ]
        hooks.append(linear[outer].register_forward_pre_hook(reached))
        try:
            module(h.new_zeros(len(h), width))
        except _Reached:
            return seen[0]
        finally:
            for hook in hooks:
                hook.remove()
        raise UnknownActivation("its output layer is not reached")

    return function
