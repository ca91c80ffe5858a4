"""A checkpoint of a layer on a mesh, by torch.distributed.checkpoint, is loaded on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from correctness.ranks import rank
from correctness.ranks.pool import shared
from moe_impls import MoE

EXPERTS = {"w_in", "b_in", "w_out", "b_out"}
D, O = 5, 3


def made(mesh: Any, num_experts: int, seed: int = 0) -> tuple[MoE, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MoE(D, O, num_experts, 7, k=2, mesh=mesh)
    named = dict(model.named_parameters())
    groups = [[p for n, p in named.items() if (n in EXPERTS) == of_experts] for of_experts in (True, False)]
    return model, torch.optim.AdamW([{"params": group} for group in groups], lr=0.01)


def step(model: MoE, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step, so that the optimiser has a state."""
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(number))
    y, loss = model(x, 1.0)
    (y.square().sum() + loss).backward()
    for parameter in (model.w_gate, model.w_noise):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()


def contents(model: MoE, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the layer and its optimiser, whole."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: Any = of_optimizer["state"]
    found = {**of_model, **{f"{p}.{name}": t for p, named in state.items() for name, t in named.items()}}
    tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().clone() for name, t in whole.items()}


def save(number: int, folder: Path, num_experts: int) -> dict[str, Tensor]:
    model, optimizer = made(rank.mesh_of(2), num_experts)
    step(model, optimizer, number)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    return contents(model, optimizer)


def load(number: int, folder: Path, num_experts: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Load on a mesh of one or two dimensions, or without any."""
    mesh: Any = None
    if len(shape) == 1:
        mesh = rank.mesh_of(shape[0])
    elif len(shape) == 2:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "expert"))["expert"]
    model, optimizer = made(mesh, num_experts, seed=1)  # other numbers
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=state["optimizer"])
    found = contents(model, optimizer)
    step(model, optimizer, number)  # which goes on
    return found


@pytest.mark.parametrize("num_experts", (8, 5))
def test_what_two_ranks_save_is_loaded_to_the_bit_by_one_two_and_four_and_a_mesh_of_both(
    num_experts: int, tmp_path: Path
) -> None:
    saved = shared().call(save, {n: (n, tmp_path, num_experts) for n in range(2)}, world=2)[0]
    assert {"w_gate", *EXPERTS, "w_in.exp_avg", "w_gate.exp_avg_sq"} <= saved.keys()
    assert saved["w_in.exp_avg"].shape == saved["w_in"].shape == (num_experts, 7, D)
    for shape in ((1,), (2,), (4,), (2, 2), ()):
        world = 4 if len(shape) == 2 else shape[0] if shape else 1
        found = shared().call(load, {n: (n, tmp_path, num_experts, shape) for n in range(world)}, world=world)
        for number, tensors in found.items():
            assert tensors.keys() == saved.keys()
            different = [name for name, t in saved.items() if not torch.equal(tensors[name], t)]
            assert different == [], (shape, number)


def save_plain(number: int, folder: Path) -> None:
    """What an implementation without DTensors would save: a tensor of this rank's experts."""
    own = torch.full((2, 3), float(number))
    state_dict_saver.save({"w_in": own}, checkpoint_id=folder)


def load_plain(number: int, folder: Path) -> Tensor:
    state = {"w_in": torch.zeros(2, 3)}
    state_dict_loader.load(state, checkpoint_id=folder)
    return state["w_in"]


def test_plain_tensors_of_one_rank_are_saved_and_loaded_without_an_error_and_wrongly(tmp_path: Path) -> None:
    """Why `MoE` refuses to be loaded from them: see test_layer_on_a_mesh.py."""
    shared().call(save_plain, {n: (n, tmp_path) for n in range(2)}, world=2)
    found = shared().call(load_plain, {n: (n, tmp_path) for n in range(2)}, world=2)
    assert torch.equal(found[0], found[1])  # both have the experts of one rank
