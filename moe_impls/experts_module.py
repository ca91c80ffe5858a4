"""Read the experts module of a Hugging Face transformers model: what its weights mean, as ``Experts``.

Layout, biases and gate are told by the flags that transformers' own backends go by (``is_transposed``,
``is_concatenated``, ``has_bias``, ``has_gate``, ``has_post_expert_norm``), the activation by running it, so
no list of families is needed. transformers itself is not imported.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_impls.activation_probe import UnknownActivation, activation_of
from moe_impls.interface import DTYPES, Clamp, Experts

ARGUMENTS = 4  # of forward: self, hidden_states [T, D], ids [T, K], gates [T, K]


class Refused(ValueError):
    """An experts module, or a model, that cannot be computed by the contract; the message says why."""


class Form(NamedTuple):
    """What the weights of an experts module mean."""

    activation: str
    clamp: Clamp
    gated: bool
    transposed: bool  # [E, D, F] and [E, H, O], not [E, F, D] and [E, O, H]
    interleaved: bool  # gate, up, gate, up, not all gates first
    bias: bool

    @property
    def names(self) -> dict[str, str]:
        """Name the parameter that holds each tensor of an ``Experts``."""
        first = "gate_up_proj" if self.gated else "up_proj"
        biases = {"b_in": f"{first}_bias", "b_out": "down_proj_bias"} if self.bias else {}
        return {"w_in": first, "w_out": "down_proj", **biases}

    @property
    def moves(self) -> bool:
        """Whether an ``Experts`` of contiguous weights is a copy."""
        return self.transposed or self.interleaved

    def experts(self, tensors: dict[str, Tensor]) -> Experts:
        """Arrange the parameters, by field of ``Experts``: views, or copies where gates and ups alternate."""
        w_in, b_in, w_out = tensors["w_in"], tensors.get("b_in"), tensors["w_out"]
        if self.interleaved and b_in is not None:
            b_in = b_in.unflatten(1, (-1, 2)).mT.flatten(1)
        if self.interleaved and self.transposed:
            w_in = w_in.unflatten(2, (-1, 2)).mT.flatten(2)  # [E, D, 2H], gates first
        elif self.interleaved:
            w_in = w_in.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        if self.transposed:
            w_in, w_out = w_in.mT, w_out.mT
        return Experts(w_in, b_in, w_out, tensors.get("b_out"), self.activation, clamp=self.clamp)


def experts_of(module: nn.Module) -> Experts:
    """Read the experts of a module: views of its parameters, or copies that gradients flow through.

    Raises:
        Refused: what it computes cannot be said in an ``Experts``; the message says why.
    """
    form = form_of(module)
    return form.experts({field: getattr(module, name) for field, name in form.names.items()})


def form_of(module: Any) -> Form:
    """Tell what the weights of an experts module mean, by its flags and by running its activation.

    Raises:
        Refused: as ``experts_of``.
    """
    try:
        _check_kind(module)
        gated = bool(getattr(module, "has_gate", hasattr(module, "gate_up_proj")))
        first = "gate_up_proj" if gated else "up_proj"
        form = Form(
            activation="",
            clamp=Clamp(),
            gated=gated,
            transposed=bool(getattr(module, "is_transposed", False)),
            interleaved=gated and not getattr(module, "is_concatenated", True),
            bias=bool(getattr(module, "has_bias", hasattr(module, f"{first}_bias"))),
        )
        _check_weights(module, form)
        activation, clamp = activation_of(
            _apply_gate(module) if gated else module.act_fn,
            gated=gated,
            interleaved=form.interleaved,
            numbers=[v for v in vars(module).values() if isinstance(v, int | float)],
            device=getattr(module, first).device,
        )
    except UnknownActivation as error:
        reason = f"its activation is none of the contract's: {error}"
        raise Refused(f"{type(module).__name__}: {reason}") from error
    except Refused as error:
        raise Refused(f"{type(module).__name__}: {error}") from None
    return form._replace(activation=activation, clamp=clamp)


def _apply_gate(module: Any) -> Any:
    """Return the function of gate and up that a module has, or transformers' default around its act_fn."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate

    def default(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return default


def _check_kind(module: Any) -> None:
    """Raise Refused where the contract has no words for what can be seen on a module."""
    if getattr(module, "has_post_expert_norm", False):
        raise Refused("it normalises the output of each expert (post_expert_norm) before the gates")
    if hasattr(module, "identity_expert"):
        raise Refused("it has identity experts, which return their input (as LongCat-Flash)")
    first = hasattr(module, "gate_up_proj") or hasattr(module, "up_proj")
    if not first or not hasattr(module, "down_proj"):
        raise Refused("it has no gate_up_proj or up_proj, and down_proj: it is no stack of experts")
    if len(inspect.signature(inspect.unwrap(type(module).forward)).parameters) < ARGUMENTS:
        raise Refused("its forward takes no gates: they multiply the input of the experts (as in Llama-4)")


def _check_weights(module: Any, form: Form) -> None:
    """Raise Refused unless the parameters are plain floating-point tensors of fitting shapes."""
    for name in form.names.values():
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            raise Refused(f"{name} is a {type(weight).__name__}, no tensor")
        if weight.device.type == "meta":
            raise Refused(f"{name} is on the meta device: it is offloaded or was never loaded")
        if weight.dtype not in DTYPES:
            raise Refused(f"{name} has dtype {weight.dtype}: it is quantised")
        if type(weight) not in (Tensor, nn.Parameter):
            raise Refused(f"{name} is a {type(weight).__name__}: it is quantised or distributed")
    first, last = form.names["w_in"], form.names["w_out"]
    shapes = [list(getattr(module, name).shape) for name in (first, last)]
    if any(len(shape) != 3 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise Refused(f"{first} {shapes[0]} and {last} {shapes[1]} are no stacks of as many experts")
    (F, D), (O, H) = (shape[:0:-1] if form.transposed else shape[1:] for shape in shapes)
    if (2 * H if form.gated else H) != F or O != D:
        layout = "transposed" if form.transposed else "not transposed"
        raise Refused(f"{first} {shapes[0]} and {last} {shapes[1]} do not fit together, if {layout}")
