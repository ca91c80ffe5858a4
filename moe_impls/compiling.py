"""``torch.compile`` for functions of the contract's signature: any sizes and layouts, one graph each."""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as symbolic_shapes

from moe_impls.interface import CLAMPED, Experts, Forward, Routing

# A compiled backward may take over the buffers that it was given, and then refuses to run a second time
# (retain_graph=True, as in gradcheck). torch reads this switch when it compiles *and* when it runs the
# backward, so it cannot be set around a call alone.
functorch_config.donated_buffer = False


@functools.cache
def _compiled(function: types.FunctionType, kind: tuple) -> Forward:
    """Make a compiled copy of ``function`` for one kind of call.

    Each kind has a code object of its own: torch.compile counts recompilations per code object and gives up
    at eight, which all options of one process together would exceed.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, fullgraph=True, dynamic=True)


def _kind(x: Tensor, routing: Routing, experts: Experts, combine: str) -> tuple:
    tensors = {"x": x, "ids": routing.expert_ids, "gates": routing.gates, **experts.tensors}
    return (
        combine,
        experts.activation,
        experts.clamp if experts.activation == CLAMPED else None,
        experts.output_activation,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((n, t.dtype, t.device, t.requires_grad, *(min(s, 2) for s in t.shape)) for n, t in tensors.items()),
    )


def run_compiled(
    function: Forward, x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum"
) -> Tensor:
    """Run ``function(x, routing, experts, combine=combine)`` as one compiled graph.

    A new T, E or K compiles nothing anew. What does (10 to 30 s on a small CPU) is another kind of call:
    other options, dtypes, gradients wanted, or a size of 0 or 1, which the compiler specialises.
    """
    assert isinstance(function, types.FunctionType)
    # Each layout of memory would be compiled anew, up to a limit, beyond which torch.compile raises.
    x, routing = x.contiguous(), Routing(*(t.contiguous() for t in routing))
    experts = experts.map(torch.Tensor.contiguous)
    # Two sizes that are equal by chance in the first call must not be taken for one size ever after.
    with symbolic_shapes.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        kind = _kind(x, routing, experts, combine)
        return _compiled(function, kind)(x, routing, experts, combine=combine)
