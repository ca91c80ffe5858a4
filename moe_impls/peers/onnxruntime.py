"""The operator com.microsoft.MoE of ONNX Runtime on a CPU, in a model of one node that is made in memory.

The weights are inputs of the model and stay where they are; only gated ones are laid out anew by ``prepare``,
since the operator wants gates and ups in turn. It routes by a softmax over logits of all experts: those of a
routing are the logarithms of its gates, minus infinity elsewhere, and the result is multiplied by their sum.
Slots with negative gates are a second call.
"""

from __future__ import annotations

import functools
import importlib
import struct
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_impls.checking import watch_writes
from moe_impls.interface import CLAMPED, Clamp, Experts, Prepared, Routing, Support

onnxruntime: Any = importlib.import_module("onnxruntime")  # which a type checker takes this file for
# What the operator calls our activations; the clamped one has numbers.
ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu", "swiglu": "swiglu", CLAMPED: "swiglu"}
SWIGLU = Clamp(float("inf"), 1.0, 0.0)
INPUTS = ("x", "logits", "w_in", "b_in", "w_out", "b_out")
ELEMENTS = {torch.float32: 1, torch.float16: 10}  # as ONNX numbers them
SUPPORT = Support(
    devices=("cpu",),
    dtypes=tuple(ELEMENTS),
    activations=tuple(ACTIVATIONS),
    output_activations=("none",),
    combines=("sum",),
    gradients=False,
    same_width=True,
)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """Write a field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _attribute(name: str, value: int | float | str) -> bytes:
    """Write an AttributeProto: a float has the type 1 and stands in field 2, an int in 3, a string in 4."""
    kind = (float, int, str).index(type(value)) + 1
    return _field(5, _field(1, name) + _field(kind + 1, value) + _field(20, kind))


def _model(activation: str, clamp: Clamp, K: int, dtype: torch.dtype, absent: frozenset[str]) -> bytes:
    """Write the ModelProto of one node, by the numbers of onnx.proto."""

    def tensor(number: int, name: str) -> bytes:
        return _field(number, _field(1, name) + _field(2, _field(1, _field(1, ELEMENTS[dtype]))))

    attributes: dict[str, int | float | str] = {"k": K, "activation_type": ACTIVATIONS[activation]}
    if ACTIVATIONS[activation] == "swiglu":
        attributes |= {"swiglu_fusion": 1, "swiglu_limit": float(clamp.limit)}
        attributes |= {"activation_alpha": float(clamp.alpha), "activation_beta": float(clamp.offset)}
    node = b"".join(_field(1, "" if name in absent else name) for name in INPUTS)
    node += _field(2, "y") + _field(4, "MoE") + _field(7, "com.microsoft")
    node += b"".join(_attribute(name, value) for name, value in attributes.items())
    graph = _field(1, node) + _field(2, "moe") + tensor(12, "y")
    graph += b"".join(tensor(11, name) for name in INPUTS if name not in absent)
    opsets = {"": 17, "com.microsoft": 1}
    versions = b"".join(_field(8, _field(1, domain) + _field(2, n)) for domain, n in opsets.items())
    return _field(1, 8) + _field(7, graph) + versions


@functools.lru_cache(maxsize=64)
def _session(threads: int, *kind: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(_model(*kind), options, ["CPUExecutionProvider"])


def _in_turn(weight: Tensor) -> Tensor:
    """Lay out [E, 2H, ...], gates first, as gate, up, gate, up."""
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def prepare(experts: Experts) -> Prepared:
    """Lay gated weights out for ``f(x, routing, *, combine="sum") -> y``; others stay where they are.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    clamp = experts.clamp if experts.activation == CLAMPED else SWIGLU
    if ACTIVATIONS[experts.activation] == "swiglu":
        b_in = None if experts.b_in is None else _in_turn(experts.b_in)
        experts = replace(experts, w_in=_in_turn(experts.w_in), b_in=b_in)
    weights = {
        name: t.detach().contiguous() for name, t in experts.map(torch.Tensor.contiguous).tensors.items()
    }
    absent, E = frozenset(set(INPUTS[2:]) - weights.keys()), len(experts.w_in)

    def computed(x: Tensor, routing: Routing, gates: Tensor) -> Tensor:
        """Compute y [T, O] for gates [T, K] that are not negative."""
        total, y = gates.sum(1, keepdim=True), torch.empty_like(x)
        logits = gates.new_full((len(x), E), -torch.inf).scatter_(1, routing.expert_ids, gates.log())
        logits = torch.where(total == 0, 0, logits).to(x.dtype)
        kind = experts.activation, clamp, gates.shape[1], x.dtype, absent
        session, element = _session(torch.get_num_threads(), *kind), ELEMENTS[x.dtype]
        binding = session.io_binding()
        for name, t in {"x": x, "logits": logits, **weights}.items():
            binding.bind_input(name, "cpu", 0, element, list(t.shape), t.data_ptr())
        binding.bind_output("y", "cpu", 0, element, list(y.shape), y.data_ptr())
        session.run_with_iobinding(binding)
        return y * total

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        if len(x) == 0:
            return torch.empty_like(x)
        rows, gates = x.contiguous(), routing.gates.float()
        y = computed(rows, routing, gates.clamp(min=0))
        if bool((gates < 0).any()):  # no softmax has those
            y = y - computed(rows, routing, (-gates).clamp(min=0))
        return y.to(x.dtype)

    return f


def moe(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return prepare(experts)(x, routing, combine=combine)


BACKENDS = {"moe": (moe, SUPPORT, prepare)}
