"""Implementations that read the routing on the host, each as one node of a graph.

``operator(SUPPORT)`` leaves a ``forward`` of the contract's signature as it is in eager mode; torch.compile
and torch.export take it as ``torch.ops.moe_impls.<name>``, whose work depends on the routing of each call
while the graph around it does not. Where gradients are wanted that is ``<name>_training``.

What a forward saves for its backward differs with the implementation and the routing, which the outputs of
an operator may not. So ``<name>_training`` runs the implementation under autograd and returns, beside y, a
tensor that keeps autograd's graph alive, by which the backward finds it. If that tensor was copied, as where
hooks offload what is saved, or if the graph could not be held, the backward computes the forward again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportPrivateImportUsage]

from moe_impls.checking import check_shapes, check_supported
from moe_impls.functional import needs_gradients
from moe_impls.interface import Clamp, Experts, Forward, Prepared, Routing, Support

LIBRARY = torch.library.Library("moe_impls", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
TENSORS = "Tensor x, Tensor expert_ids, Tensor gates, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
OPTIONS = (
    "str activation, str output_activation, float[] clamp, str combine, ScalarType? autocast, bool lasting"
)
CALL = f"{TENSORS}, {OPTIONS}"
# What a compiled graph runs without, whatever the settings say.
UNDONE = (
    DispatchKey.AutogradFunctionality,
    DispatchKey.ADInplaceOrView,
    DispatchKey.AutocastCPU,
    DispatchKey.AutocastCUDA,
)


class _Call(NamedTuple):
    """The arguments of an operator.

    autocast: the dtype of the one that the graph was made under. lasting: the weights are where they are
    until the backward.
    """

    x: Tensor
    expert_ids: Tensor
    gates: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str
    output_activation: str
    clamp: Sequence[float]
    combine: str
    autocast: torch.dtype | None
    lasting: bool

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """Return what may have a gradient."""
        return self.x, self.gates, self.w_in, self.b_in, self.w_out, self.b_out

    def on(self, leaves: Sequence[Tensor | None]) -> _Call:
        """Make the call that has these leaves."""
        x, gates, *weights = leaves
        return _Call(*(x, self.expert_ids, gates, *weights, *self[7:]))  # pyright: ignore[reportCallIssue, reportArgumentType]

    @property
    def arguments(self) -> tuple[Tensor, Routing, Experts, str]:
        """Return x, routing, experts and combine."""
        options = self.activation, self.output_activation, Clamp(*self.clamp)
        return self.x, Routing(self.expert_ids, self.gates), Experts(*self[3:7], *options), self.combine

    def run(self, forward: Forward, gradients: bool = False) -> Tensor:
        """Compute y [T, O], contiguous, under the autocast that the graph was made under and no other."""
        x, routing, experts, combine = self.arguments
        with torch.set_grad_enabled(gradients), _restored(x.device.type, self.autocast, gradients):
            return forward(x, routing, experts, combine=combine).contiguous()


def _restored(
    device: str, autocast: torch.dtype | None, gradients: bool
) -> contextlib.AbstractContextManager[None]:
    """Let autograd and autocast work inside an operator; mostly there is nothing to do."""
    if gradients or autocast or torch.is_autocast_enabled(device):
        return _restoring(device, autocast)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _restoring(device: str, autocast: torch.dtype | None) -> Iterator[None]:
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in UNDONE:
        excluded = excluded.remove(key)
    under = torch.autocast(device, autocast, enabled=autocast is not None)
    with torch._C._ForceDispatchKeyGuard(included, excluded), under:
        yield


class _Memory(bytearray):
    """The memory of a tensor, and a Python object that lives as long."""

    content: Any


_memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()  # by address


def hold(content: object) -> Tensor:
    """Make a tensor, of eight bytes, that keeps an object alive."""
    memory = _Memory(8)
    memory.content = content
    holder = torch.frombuffer(memory, dtype=torch.uint8)
    _memories[holder.data_ptr()] = memory
    return holder


def held_by(holder: Tensor) -> Any:
    """Return what a tensor keeps alive, None for another tensor, such as a copy."""
    memory = _memories.get(holder.data_ptr())
    return None if memory is None else memory.content


class _Graph(NamedTuple):
    """What a backward goes through: y [T, O], and the leaves whose gradients are wanted."""

    y: Tensor
    leaves: list[Tensor]
    wanted: list[bool]

    @classmethod
    def of(cls, forward: Forward, call: _Call, wanted: list[bool]) -> _Graph:
        """Run a forward under autograd, on leaves of its own."""
        leaves = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(call.leaves, wanted, strict=True)
        ]
        y = call.on(leaves).run(forward, gradients=True)
        return cls(y, [t for t in leaves if t is not None and t.requires_grad], wanted)

    def gradients(self, dy: Tensor) -> list[Tensor]:
        """Go back to the leaves; more than once, if it is asked for."""
        with _restored(dy.device.type, None, gradients=True):  # a backward may use autograd itself
            found = torch.autograd.grad(self.y, self.leaves, dy, retain_graph=True, materialize_grads=True)
        return [gradient.contiguous() for gradient in found]


def operator(support: Support, name: str = "") -> Callable[[Forward], Forward]:
    """Make a decorator for the ``forward`` of a module that declares ``support``.

    name: of the operator, that of the module unless given.
    """

    def decorate(forward: Forward) -> Forward:
        compute = _define_operators(name or forward.__module__.rpartition(".")[2], support, forward)

        @functools.wraps(forward)
        def either(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
            if not torch.compiler.is_compiling():
                return forward(x, routing, experts, combine=combine)
            weights, device = (experts.w_in, experts.b_in, experts.w_out, experts.b_out), x.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            clamp = [float(number) for number in experts.clamp]
            options = experts.activation, experts.output_activation, clamp, combine, autocast
            # Memory of what a graph computes is used again inside it; that of parameters lasts.
            lasting = all(w is None or isinstance(w, nn.Parameter) for w in weights)
            return compute(x, *routing, *weights, *options, lasting)

        return either

    return decorate


def _define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Register an operator: what it computes, and of which shape that is."""
    LIBRARY.define(name + schema, tags=TAGS)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_impls::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.moe_impls, name).default


def _define_operators(name: str, support: Support, forward: Forward) -> Callable:
    """Register the operators of an implementation; return that of y, which takes the others for gradients."""

    def run(*call: Any) -> Tensor:
        return _Call(*call).run(forward)

    def fake(*call: Any) -> Tensor:
        x, routing, experts, combine = _Call(*call).arguments
        check_shapes(x, routing, experts, combine)
        check_supported(name, support, experts, combine)
        return x.new_empty(x.shape[0], experts.w_out.shape[1])

    compute = _define(name, f"({CALL}) -> Tensor", run, fake)
    if not support.gradients:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return compute
    training = _define_training(name, forward, fake)

    def with_gradients(*call: Any) -> Tensor:
        leaves = _Call(*call).leaves
        if needs_gradients(*leaves):
            return training(*call, [t is not None and t.requires_grad for t in leaves])[0]
        with torch._C._AutoDispatchBelowAutograd():
            return compute(*call)

    LIBRARY.impl(name, with_gradients, "Autograd")
    return compute


def _define_training(name: str, forward: Forward, fake_y: Callable) -> Callable:
    """Register the operator that computes y and what its backward needs, and that backward."""

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        *call, wanted = arguments
        call = _Call(*call)
        if not call.lasting:
            return call.run(forward), hold(None)
        copies = {name: getattr(call, name).clone() for name in ("x", "expert_ids", "gates")}
        graph = _Graph.of(forward, call._replace(**copies), wanted)
        return graph.y.detach().clone(), hold(graph)

    def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
        return fake_y(*arguments[:-1]), torch.empty(8, dtype=torch.uint8, device="cpu")

    def run_backward(dy: Tensor, holder: Tensor, *arguments: Any) -> list[Tensor]:
        *call, wanted = arguments
        graph = held_by(holder)
        if graph is None or graph.wanted != wanted:
            graph = _Graph.of(forward, _Call(*call), wanted)
        return graph.gradients(dy)

    def fake_backward(dy: Tensor, holder: Tensor, *arguments: Any) -> list[Tensor]:
        *call, wanted = arguments
        leaves = [t for t, want in zip(_Call(*call).leaves, wanted, strict=True) if t is not None and want]
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in leaves]

    backward = _define(
        f"{name}_backward", f"(Tensor dy, Tensor holder, {CALL}, bool[] wanted) -> Tensor[]",
        run_backward, fake_backward,
    )  # fmt: skip

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[:7])
        ctx.options = inputs[7:-1]

    def gradients(ctx: Any, dy: Tensor | None, of_holder: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients without a graph would be taken for constants
            raise RuntimeError(f"{name!r} has no gradients of gradients (create_graph=True) in a graph")
        of_x, _, *others = ctx.needs_input_grad[:7]
        wanted = [of_x, *others]
        found = iter(() if dy is None else backward(dy, *ctx.saved_tensors, *ctx.options, wanted))
        dx, *rest = (next(found, None) if want else None for want in wanted)
        return dx, None, *rest, *[None] * (len(ctx.options) + 1)

    training = _define(f"{name}_training", f"({CALL}, bool[] wanted) -> (Tensor, Tensor)", run, fake)
    torch.library.register_autograd(f"moe_impls::{name}_training", gradients, setup_context=save, lib=LIBRARY)
    return training


def as_one_node(prepared: Prepared, O: int) -> Prepared:
    """Return what ``prepare`` made as a function that a graph takes as one node: x [T, D] -> y [T, O]."""
    holder = hold(prepared)

    @functools.wraps(prepared)
    def either(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        if not torch.compiler.is_compiling():
            return prepared(x, routing, combine=combine)
        with torch.no_grad():
            return _prepared(holder, x, *routing, O, combine)

    return either


def _run_prepared(holder: Tensor, x: Tensor, ids: Tensor, gates: Tensor, O: int, combine: str) -> Tensor:
    prepared = held_by(holder)
    if prepared is None:
        raise RuntimeError("what `prepare` made is not in this process: prepare and compile again")
    return prepared(x, Routing(ids, gates), combine=combine).contiguous()


_prepared = _define(
    "prepared",
    "(Tensor holder, Tensor x, Tensor expert_ids, Tensor gates, int O, str combine) -> Tensor",
    _run_prepared,
    lambda holder, x, ids, gates, O, combine: x.new_empty(x.shape[0], O),
)
