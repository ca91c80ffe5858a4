"""What the contract asks of the arguments of a call, and what an implementation declares of them.

Shapes, dtypes and options are checked of tensors that hold nothing, too, as where a graph is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_impls.interface import (
    ACTIVATIONS,
    COMBINES,
    DTYPES,
    GATED_ACTIVATIONS,
    OUTPUT_ACTIVATIONS,
    Experts,
    Routing,
    Support,
    check_choice,
    check_clamp,
)


def _check_tensor(name: str, value: object, shape: tuple[object, ...], like: Tensor) -> None:
    wanted = ", ".join(map(str, shape))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor of shape [{wanted}]")
    fits = len(value.shape) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [{wanted}]")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on the device of x, {like.device}")


def check_shapes(x: Tensor, routing: Routing, experts: Experts, combine: str = "sum") -> None:
    """Check what the contract asks of the arguments of ``forward`` but for the values of the routing.

    Raises:
        TypeError, ValueError: as `check_inputs`.
    """
    check_choice("activation", experts.activation, ACTIVATIONS)
    check_choice("output_activation", experts.output_activation, OUTPUT_ACTIVATIONS)
    check_choice("combine", combine, COMBINES)
    check_clamp("clamp", experts.clamp, experts.activation)

    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor of shape [T, D]")
    _check_tensor("x", x, ("T", "D"), x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; valid are {', '.join(map(str, DTYPES))}")
    T, D = x.shape

    expert_ids, gates = routing
    _check_tensor("w_in", experts.w_in, ("E", "F", D), x)
    E, F, _ = experts.w_in.shape
    gated = experts.activation in GATED_ACTIVATIONS
    if gated and F % 2:
        raise ValueError(f"w_in has {F} rows; activation {experts.activation!r} needs an even number, 2H")
    H = F // 2 if gated else F
    _check_tensor("w_out", experts.w_out, (E, "O", H), x)
    if experts.b_in is not None:
        _check_tensor("b_in", experts.b_in, (E, F), x)
    if experts.b_out is not None:
        _check_tensor("b_out", experts.b_out, (E, experts.w_out.shape[1]), x)
    for name, weight in experts.tensors.items():
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {weight.dtype}; it must have the dtype of x, {x.dtype}")

    _check_tensor("expert_ids", expert_ids, (T, "K"), x)
    if expert_ids.dtype != torch.int64:
        raise TypeError(f"expert_ids has dtype {expert_ids.dtype}; it must be torch.int64")
    K = expert_ids.shape[1]
    if not 1 <= K <= E:
        raise ValueError(f"K, the second dimension of expert_ids, is {K}; it must be from 1 to E = {E}")
    _check_tensor("gates", gates, (T, K), x)
    if gates.dtype not in (torch.float32, x.dtype):
        raise TypeError(
            f"gates has dtype {gates.dtype}; it must be torch.float32 or the dtype of x, {x.dtype}"
        )


def check_inputs(x: Tensor, routing: Routing, experts: Experts, combine: str = "sum") -> None:
    """Check everything the contract asks of the arguments of ``forward``.

    Called by the layer and by the suite, not on the hot path of each implementation. It reads the values
    of ``expert_ids`` and so synchronises with the device.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that the contract does not allow.
        ValueError: a shape, device, id, activation or combine is not valid; the message names the
            argument, its value and what is valid.
    """
    check_shapes(x, routing, experts, combine)
    (expert_ids, gates), E = routing, len(experts.w_in)
    if len(x):
        low, high = (int(v) for v in expert_ids.aminmax())
        check_ids(low, high, E)
        ordered = expert_ids.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
        if repeated.any():
            row = int(repeated.nonzero()[0])
            raise ValueError(
                f"expert_ids[{row}] is {expert_ids[row].tolist()}; the ids of a row must be distinct"
            )
    if combine == "logsumexp" and bool((gates < 0).any()):
        raise ValueError(f"gates holds {float(gates.min())}; combine 'logsumexp' needs gates >= 0")


def check_ids(low: int, high: int, num_experts: int) -> None:
    """Raise ValueError unless the least and the largest expert id are in [0, num_experts)."""
    E = num_experts
    if low < 0 or high >= E:
        dropped = (
            "; moe_impls.router.without_sentinels takes out slots of id E" if low >= 0 and high == E else ""
        )
        raise ValueError(f"expert_ids holds {low if low < 0 else high}; ids must be in [0, {E}){dropped}")


def check_supported(name: str, support: Support, experts: Experts, combine: str) -> None:
    """Raise ValueError unless an implementation declares the dtype of these experts and their options."""
    of = f"of implementation {name}"
    check_choice(f"dtype {of}", experts.w_in.dtype, support.dtypes)
    check_choice(f"activation {of}", experts.activation, support.activations)
    if not support.takes_clamp(experts.activation, experts.clamp):
        check_choice(f"clamp {of}", experts.clamp, support.clamps or ())
    check_choice(f"output_activation {of}", experts.output_activation, support.output_activations)
    check_choice(f"combine {of}", combine, support.combines)
    check_choice(f"bias {of}", experts.b_in is not None, support.biases)


def watch_writes(experts: Experts) -> Callable[[], None]:
    """Return a function that refuses weights that were written to since, for what ``prepare`` made of them.

    Writes that no version counter sees are not noticed: through ``.data``, and to tensors of inference mode.

    Raises:
        RuntimeError: by that function; the message names the weight.
    """
    written = [(name, t, t._version) for name, t in experts.tensors.items() if not t.is_inference()]

    def check() -> None:
        for name, t, version in written:
            if t._version != version:
                raise RuntimeError(f"{name} was written to after prepare(experts): call prepare again")

    return check
