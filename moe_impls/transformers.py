"""The experts of Hugging Face transformers models by the implementations of this project.

``use(model, "auto")`` sets them for a model that is there. After ``register()`` the names ``moe_impls:auto``,
``moe_impls:native``, ... are valid as ``experts_implementation=`` of ``from_config``, ``from_pretrained`` and
``set_experts_implementation``. Nothing of transformers is changed beside these names.

Weights that are transposed or whose gate and up rows alternate (gpt-oss, Aria) are laid out once for calls
that need no gradient of them: a second copy in memory, made again when the weights change. On a CPU that is
noticed by version counters and by a sample of the numbers; a write through ``.data`` that misses the sample,
or on a GPU, needs ``refresh(model)``. A compiled graph and calls that need their gradients arrange gates and
ups anew.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_impls import registry
from moe_impls.experts_module import Form, Refused, experts_of, form_of
from moe_impls.functional import constant_in_graphs, needs_gradients
from moe_impls.interface import Experts, Forward, Implementation, Routing
from moe_impls.kept_layout import KeptLayout
from moe_impls.router import without_sentinels

__all__ = ["Refused", "Report", "calls", "experts_of", "refresh", "register", "unuse", "use"]

PREFIX = "moe_impls:"
TESTED = "5.23."  # versions of transformers
TWICE = "an expert appears twice in a row of the routing"
STATE = "_moe_impls"  # the attribute of an experts module that holds its _State

_resolve = functools.cache(registry.resolve)


@dataclass
class _State:
    """What is known of an experts module, beside its parameters."""

    form: Form | None  # None if it has none in the contract
    previous: str | None = None  # what the module's configuration said before `use`
    refused: bool = False
    kept: KeptLayout = field(default_factory=KeptLayout)
    calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Report:
    """What ``use`` did.

    name: the implementation.
    taken: the experts modules that it computes now, by their names in the model, with their activations.
    refused: those that are computed as before, with the reasons.
    kept_bytes: what copies of weights in another layout will take, besides the weights.
    """

    name: str
    taken: dict[str, str]
    refused: dict[str, str]
    kept_bytes: int

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} experts modules by {PREFIX}{self.name}, {len(self.refused)} as before"]
        if self.kept_bytes:
            lines.append(f"weights in another layout take {self.kept_bytes / 2**20:.0f} MiB more")
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.refused.items()])


@functools.cache
def register() -> None:
    """Make the names ``moe_impls:<implementation>`` known to transformers, in this process."""
    from transformers.integrations.moe import ExpertsInterface  # pyright: ignore[reportMissingImports]

    version = importlib.metadata.version("transformers")
    if not version.startswith(TESTED):
        warnings.warn(f"transformers {version} was not tested; {TESTED}x was", stacklevel=3)
    for name in registry.IMPLEMENTATIONS:
        ExpertsInterface.register(PREFIX + name, functools.partial(_forward, _resolve(name)))


def use(model: nn.Module, name: str = "auto") -> Report:
    """Compute the experts of a transformers model by an implementation of this project.

    Args:
        model: of transformers, or a module that holds one, such as a PEFT model. It is changed in place:
            ``unuse`` puts it back.
        name: one of ``moe_impls.IMPLEMENTATIONS``.

    Raises:
        Refused: no experts module of the model can be taken; the message says why, for each.
        ResolveError: no such implementation.
        TypeError: model is no module, such as a config or a path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be an nn.Module of transformers")
    register()
    if name not in registry.IMPLEMENTATIONS:
        raise registry.ResolveError(f"name is {name!r}; valid are {', '.join(registry.IMPLEMENTATIONS)}")
    implementation = _resolve(name)
    if not implementation.is_available():
        raise Refused(f"{name} is not available here: {implementation.missing()}")
    taken: dict[str, str] = {}
    refused: dict[str, str] = {}
    states: list[tuple[Any, _State]] = []
    kept_bytes = 0
    for place, module in _experts_modules(model):
        form = None
        try:
            form = form_of(module)
            if not _is_on_interface(module):
                raise Refused(f"{type(module).__name__} is not on transformers' experts interface")
            _check_supported(implementation, module, form)
            taken[place] = form.activation
            if form.moves or implementation.prepare:
                kept_bytes += sum(w.nbytes for w in _weights(module, form).values())
        except Refused as error:
            refused[place] = str(error)
        if _is_on_interface(module) and (place in taken or not str(_previous(module)).startswith(PREFIX)):
            states.append((module, _State(form, _previous(module), refused=place in refused)))
    if not taken:
        reasons = "; ".join(f"{place}: {reason}" for place, reason in refused.items())
        reasons = reasons or "it has no experts modules: it is dense"
        raise Refused(f"nothing of {type(model).__name__} was taken: {reasons}")
    for module, state in states:
        setattr(module, STATE, state)
        module.config._experts_implementation_internal = PREFIX + name
    return Report(name, taken, refused, kept_bytes)


def unuse(model: nn.Module) -> None:
    """Put back what ``use`` changed of a model, and free the memory of copies."""
    for _, module in _experts_modules(model):
        state: _State | None = module.__dict__.pop(STATE, None)
        if state and state.previous:
            module.config._experts_implementation_internal = state.previous


def refresh(model: nn.Module) -> None:
    """Forget copies of weights in another layout: after writes through ``.data`` to single numbers."""
    for _, module in _experts_modules(model):
        if STATE in module.__dict__:
            module.__dict__[STATE].kept.clear()


def calls(model: nn.Module) -> Counter[str]:
    """Count the calls of the experts modules of a model, by the implementation that ran.

    What runs inside a compiled graph is not counted.
    """
    counts: Counter[str] = Counter()
    for _, module in _experts_modules(model):
        if STATE in module.__dict__:
            counts += module.__dict__[STATE].calls
    return counts


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that are experts, or are called so, each with its name in the model."""
    inside = None
    for place, module in model.named_modules():
        if inside is not None and place.startswith(inside):
            continue
        if _is_on_interface(module) or (
            "Experts" in type(module).__name__ and next(module.parameters(), None) is not None
        ):
            inside = f"{place}." if place else ""
            yield place, module


def _is_on_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "has_post_expert_norm")


def _previous(module: Any) -> str | None:
    """Return what the configuration of a module says, before ``use`` if that changed it."""
    says = module.config._experts_implementation
    before: _State | None = module.__dict__.get(STATE)
    return before.previous if before and str(says).startswith(PREFIX) else says


def _weights(module: Any, form: Form) -> dict[str, Tensor]:
    return {name: getattr(module, attribute) for name, attribute in form.names.items()}


def _check_supported(implementation: Implementation, module: Any, form: Form) -> None:
    """Raise Refused unless an implementation declares what a module needs."""
    support, w = implementation.support, _weights(module, form)["w_in"]
    lacks = [
        f"{what} {value}"
        for what, value, declared in (
            ("activation", form.activation, support.activations),
            ("dtype", w.dtype, support.dtypes),
            ("device", w.device.type, support.devices),
            ("biases", form.bias, support.biases),
            ("combine", "sum", support.combines),
        )
        if value not in declared
    ]
    if not support.takes_clamp(form.activation, form.clamp):
        lacks.append(f"the numbers {form.clamp}")
    if lacks:
        raise Refused(f"{type(module).__name__}: {implementation.name} does not take {', '.join(lacks)}")


def _forward(
    implementation: Implementation,
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute an experts module: hidden_states [T, D], ids and gates [T, K] -> [T, D].

    This is what transformers calls where its configuration says ``moe_impls:<name>``.

    Raises:
        Refused: the module, or this call of it, cannot be computed so.
    """
    state: _State | None = module.__dict__.get(STATE)
    if state is None:  # the name was set without `use`
        state = _first_state(module, implementation)
    if state.form is None or state.refused:
        return _as_before(module, state)(module, hidden_states, top_k_index, top_k_weights)
    routing = _valid(Routing(top_k_index.long(), top_k_weights), module)
    return _compute(implementation, state, module, hidden_states, routing).to(hidden_states.dtype)


@constant_in_graphs
def _first_state(module: Any, implementation: Implementation) -> _State:
    form = form_of(module)
    _check_supported(implementation, module, form)
    state = _State(form)
    setattr(module, STATE, state)
    return state


def _as_before(module: Any, state: _State) -> Any:
    """Return what computed a module that was refused, before ``use``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # pyright: ignore[reportMissingImports]

    eager = inspect.unwrap(type(module).forward)
    return ALL_EXPERTS_FUNCTIONS.get_interface(str(state.previous), eager)


def _valid(routing: Routing, module: Any) -> Routing:
    """Bring a routing to what the contract asks, without the slots of experts that are on other ranks.

    Raises:
        Refused: an expert appears twice in a row. Not looked for in a compiled graph.
    """
    if module._is_expert_parallel:
        routing = without_sentinels(routing, module.num_experts)
    if routing.expert_ids.shape[1] > 1 and not torch.compiler.is_compiling():
        ordered = routing.expert_ids.sort(dim=1).values
        distinct = (ordered[:, 1:] != ordered[:, :-1]).all()
        if not distinct.is_cpu:
            torch._assert_async(distinct, TWICE)  # pyright: ignore[reportPrivateImportUsage]
        elif not distinct:
            raise Refused(f"{type(module).__name__}: {TWICE}")
    return routing


def _compute(
    implementation: Implementation, state: _State, module: Any, x: Tensor, routing: Routing
) -> Tensor:
    """Run an implementation on the weights of a module, in their dtype, or in that of autocast."""
    compiling, device = torch.compiler.is_compiling(), x.device.type
    experts, forward = _experts(implementation, state, module)
    dtype, by_hand = experts.w_in.dtype, False
    if torch.is_autocast_enabled(device) and not implementation.support.autocast:
        dtype, by_hand = torch.get_autocast_dtype(device), True
        experts, forward = experts.map(lambda w: w.to(dtype)), implementation.forward
    gates = routing.gates
    x, routing = x.to(dtype), routing._replace(gates=gates if gates.dtype == dtype else gates.float())
    if needs_gradients(x, gates, *experts.tensors.values()) and not implementation.support.gradients:
        raise Refused(f"{implementation.name} has no gradients: call the model under torch.no_grad()")
    if implementation.choose and not compiling:
        implementation = implementation.choose(x, routing, experts)
        forward = implementation.forward
    if not compiling:
        state.calls[implementation.name] += 1
    with torch.autocast(device, enabled=False) if by_hand else contextlib.nullcontext():
        return forward(x, routing, experts)


def _experts(implementation: Implementation, state: _State, module: Any) -> tuple[Experts, Forward]:
    """Arrange the weights of a module, as views or as a copy that is kept, and what computes on them."""
    form = cast("Form", state.form)
    weights = _weights(module, form)
    own = all(name in module._parameters for name in form.names.values())  # not made for this call
    traced = torch.compiler.is_compiling() or needs_gradients(*weights.values())
    if traced or not own or not (form.moves or implementation.prepare):
        return form.experts(weights), implementation.forward

    def make() -> tuple[Experts, Forward]:
        experts = form.experts(weights).map(Tensor.contiguous)
        return experts, implementation.ready(experts)

    return state.kept.get(implementation.name, list(weights.values()), make)
