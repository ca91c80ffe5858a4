"""State dicts of the notebook's layer, with one module for each expert, to those of `MoE` and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Names of the notebook's layer: one module for each expert, and two buffers of its Normal distribution.
_NOTEBOOK_EXPERT = re.compile(r"experts\.(\d+)\.(fc1|fc2)\.(weight|bias)")
_NOTEBOOK_BUFFERS = {"mean": 0.0, "std": 1.0}
_STACKED = {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"}


def from_notebook_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the state dict of `MoE` from that of a layer with one module for each expert.

    Args:
        state: w_gate, w_noise, experts.{i}.fc1.weight [H, D] and .bias [H], experts.{i}.fc2.weight [O, H]
            and .bias [O]; the buffers mean and std are left out.

    Raises:
        ValueError: a key is unknown or missing; the message names it.
    """
    known = {"w_gate", "w_noise", *_NOTEBOOK_BUFFERS}
    found = {name: int(match[1]) for name in state if (match := _NOTEBOOK_EXPERT.fullmatch(name))}
    if unknown := state.keys() - known - found.keys():
        raise ValueError(f"state has unknown keys {', '.join(sorted(unknown))}")
    num_experts = 1 + max(found.values(), default=0)
    wanted = {f"experts.{i}.{layer}" for i in range(num_experts) for layer in _STACKED.values()}
    if missing := (wanted | {"w_gate", "w_noise"}) - state.keys():
        raise ValueError(f"state lacks the keys {', '.join(sorted(missing))}")
    stacked = {
        name: torch.stack([state[f"experts.{i}.{layer}"] for i in range(num_experts)])
        for name, layer in _STACKED.items()
    }
    return {"w_gate": state["w_gate"], "w_noise": state["w_noise"], **stacked}


def to_notebook_state_dict(state: Mapping[str, Tensor], *, buffers: bool = True) -> dict[str, Tensor]:
    """Invert `from_notebook_state_dict`, for an `MoE` with biases.

    Args:
        buffers: add mean [1] and std [1], the parameters of the standard Normal that the notebook's layer
            keeps as buffers.

    Raises:
        ValueError: a key is unknown or missing; the message names it.
    """
    wanted = {"w_gate", "w_noise", *_STACKED}
    if wrong := wanted ^ state.keys():
        raise ValueError(
            f"state lacks or should not have {', '.join(sorted(wrong))}; it must have {sorted(wanted)}"
        )
    plain = {"w_gate": state["w_gate"], "w_noise": state["w_noise"]}
    if buffers:
        plain |= {name: state["w_gate"].new_tensor([value]) for name, value in _NOTEBOOK_BUFFERS.items()}
    for name, layer in _STACKED.items():
        plain |= {f"experts.{i}.{layer}": weight.clone() for i, weight in enumerate(state[name])}
    return plain
