"""The arithmetic that every implementation shares: one expert, and the combine of a token's slots.

What an implementation adds is how tokens reach their experts and come back. A *slot* is one of the T * K
(token, choice) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.interface import CLAMPED, GATED_ACTIVATIONS, Clamp


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over tokens and over K are kept: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _relu2(h: Tensor) -> Tensor:
    return F.relu(h).square()


def _gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


FUNCTIONS = {"relu": F.relu, "relu2": _relu2, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}
OF_GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": _gelu_tanh, "reglu": F.relu}


def activate(h: Tensor, activation: str, clamp: Clamp = Clamp()) -> Tensor:
    """Apply the activation of an expert's hidden layer: [..., F] -> [..., H].

    Gated activations read the first half of the last dimension as the gate and the second as the value
    that it multiplies (Shazeer 2020, arXiv:2002.05202); relu2 is that of So et al. 2021 (arXiv:2109.08668).
    ``clamp`` holds the numbers of swiglu_clamped: pass on those of the experts.
    """
    if activation not in GATED_ACTIVATIONS:
        return FUNCTIONS[activation](h)
    gate, up = h.chunk(2, dim=-1)
    if activation == CLAMPED:
        limit, alpha, offset = clamp
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + offset)
    return OF_GATES[activation](gate) * up


def expert_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    output_activation: str,
    clamp: Clamp = Clamp(),
) -> Tensor:
    """Compute one expert on its rows: x [N, D], w_in [F, D], b_in [F], w_out [O, H], b_out [O] -> [N, O]."""
    out = F.linear(activate(F.linear(x, w_in, b_in), activation, clamp), w_out, b_out)
    return F.relu(out) if output_activation == "relu" else out


def combine_slots(outputs: Tensor, gates: Tensor, combine: str) -> Tensor:
    """Combine the expert outputs of each token over its slots, in at least float32.

    outputs [T, K, O], gates [T, K] -> [T, O] in the dtype of outputs.

    sum: Σ_k gates[t,k] * outputs[t,k] (Shazeer et al. 2017, arXiv:1701.06538, equation 1).
    logsumexp: log Σ_k gates[t,k] * exp(outputs[t,k]), stable for outputs of any size. A slot whose gate is
        zero contributes nothing; a token whose gates are all zero gives -inf, the log of an empty sum.
    """
    dtype = accumulation_dtype(outputs.dtype)
    values, weights = outputs.to(dtype), gates.to(dtype).unsqueeze(-1)
    if combine == "sum":
        return (weights * values).sum(dim=1).to(outputs.dtype)
    largest = values.detach().masked_fill(weights == 0, -torch.inf).amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    # Only a slot with gate zero can exceed `largest`; the clamp keeps its exp finite, since 0 * inf is NaN.
    total = (weights * (values - largest).clamp(max=80.0).exp()).sum(dim=1)
    return (largest.squeeze(1) + total.log()).to(outputs.dtype)


def needs_gradients(*leaves: Tensor | None) -> bool:
    """Tell whether a call of these arguments is recorded for a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Let torch.compile call a function once, while it traces, and keep what it returns.

    As torch.compiler.assume_constant_result does, which imports torch's compiler: seconds of every process.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
