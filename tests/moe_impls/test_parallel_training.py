"""A layer on a mesh inside what trains models: DDP, FSDP2, a data mesh, checkpointing, optimisers.

The rule that all rest on: experts' gradients are sums over the tokens of all ranks, the router's of the
rank's own. FSDP2 takes no rank without experts: E = 7 on 4 ranks is 2, 2, 2 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from correctness.judging.budget import eps, require_close
from correctness.ranks import rank
from correctness.ranks.pool import RanksFailed, shared
from moe_impls import MoE
from moe_impls.interface import DTYPES

T, D, O, E = 6, 5, 3, 7  # tokens of each rank, of which there are four
EPS = 64 * eps(torch.float64)  # of what several steps are sums of
EXPERTS = {"w_in", "b_in", "w_out", "b_out"}
EVERY = {number: (number,) for number in range(4)}


def tokens(step: int = 0) -> Tensor:
    return torch.randn(4 * T, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def layer(mesh: Any = None, **options: Any) -> MoE:
    torch.manual_seed(3)
    options = {"noisy_gating": False, "dtype": torch.float64, "output_activation": "none", **options}
    options = {"num_experts": E, "hidden_size": 7, "k": 2, "activation": "gelu", **options}
    return MoE(D, O, mesh=mesh, **options)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """The sum of a loss of each token, and the balance loss of all tokens."""
    y, balance = model(x, 1.0)
    return y.square().sum() + balance


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def of_one_process() -> dict[str, Tensor]:
    model = layer()
    loss_of(model, tokens()).backward()
    return gradients(model)


def require_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() == {"w_gate", *EXPERTS}
    for name, tensor in want.items():
        require_close(name, got[name], tensor, EPS)


def ddp_refuses(number: int) -> None:
    DistributedDataParallel(layer(rank.mesh_of(4), num_experts=8))


def test_ddp_refuses_the_experts_parameters() -> None:
    with pytest.raises(RanksFailed, match="DTensor"):
        shared().call(ddp_refuses, EVERY)


class Block(nn.Module):
    """A model around the layer, since DDP ignores no parameter of the outermost module."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, loss_coef: float) -> tuple[Tensor, Tensor]:
        return self.moe(x, loss_coef)


def by_ddp(number: int) -> dict[str, Tensor]:
    model = Block(layer(rank.mesh_of(4)))
    # w_noise gets no gradient without noise, and DDP averages none while it waits for one.
    ignored = [f"moe.{name}" for name in (*EXPERTS, "w_noise")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    averaging = DistributedDataParallel(model)  # until the backward has ended
    loss_of(averaging, tokens().split(T)[number]).backward()
    return gradients(model.moe)


def test_ddp_averages_the_router_while_experts_which_it_ignores_keep_their_sums() -> None:
    want = of_one_process()
    for got in shared().call(by_ddp, EVERY).values():
        averaged = {name: tensor if name in EXPERTS else 4 * tensor for name, tensor in got.items()}
        require_equal(averaged, want)


def by_fsdp(number: int, data: int, divided: bool) -> dict[str, Tensor]:
    """Experts over one dimension of a mesh, and everything sharded over the other."""
    mesh = init_device_mesh("cpu", (data, 4 // data), mesh_dim_names=("data", "expert"))
    model = layer(mesh["expert"])
    sharded: Any = fully_shard(model, mesh=mesh["data"])
    assert isinstance(sharded, FSDPModule)
    if not divided:
        sharded.set_gradient_divide_factor(1.0)
    y, _ = model(tokens().split(T)[number])
    y.square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.grad, DTensor):
            found[name] = parameter.grad.full_tensor()
            if name not in EXPERTS:  # sharded over data alone
                dist.all_reduce(found[name], group=mesh["expert"].get_group())
    return found


@pytest.mark.parametrize("data", (1, 2))
def test_fsdp_with_a_divide_factor_of_one_sums_over_data_and_experts(data: int) -> None:
    model = layer()
    model(tokens())[0].square().sum().backward()
    want = gradients(model)
    for got in shared().call(by_fsdp, {n: (n, data, False) for n in range(4)}).values():
        require_equal(got, want)


def test_fsdp_by_default_averages_over_data_and_not_over_experts() -> None:
    model = layer()
    model(tokens())[0].square().sum().backward()
    want = gradients(model)
    for got in shared().call(by_fsdp, {n: (n, 2, True) for n in range(4)}).values():
        require_equal({name: 2 * tensor for name, tensor in got.items()}, want)


def divided_by_two(number: int, dtype: torch.dtype, data: int) -> float:
    """A gradient of 1, summed over the ranks of data and divided by a factor of two."""
    mesh = init_device_mesh("cpu", (data, 4 // data), mesh_dim_names=("data", "expert"))
    model: Any = fully_shard(nn.Linear(2, 2, bias=False, dtype=dtype), mesh=mesh["data"])
    model.set_gradient_divide_factor(2.0)
    model(torch.ones(1, 2, dtype=dtype)).sum().backward()
    return float(whole(model.weight.grad)[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fsdp_divides_once_by_a_factor_where_several_ranks_are_sharded_over(dtype: torch.dtype) -> None:
    """Over one rank torch 2.13 divides twice in float64 and float16: the factor 1 is the same in any case."""
    calls = {number: (number, dtype, 2) for number in range(4)}
    assert set(shared().call(divided_by_two, calls).values()) == {1.0}


def recomputed(number: int, recompute: bool) -> dict[str, Tensor]:
    model = layer(rank.mesh_of(4), noisy_gating=True)
    nn.init.normal_(model.w_gate, generator=torch.Generator().manual_seed(1))
    x = tokens().split(T)[number].requires_grad_()
    torch.manual_seed(0)
    y, balance = checkpoint(model, x, 1.0, use_reentrant=False) if recompute else model(x, 1.0)
    (y.square().sum() + balance).backward()
    assert x.grad is not None
    return {**gradients(model), "x": x.grad}


def test_activation_checkpointing_gives_the_same_bits_with_the_same_noise() -> None:
    want = shared().call(recomputed, {n: (n, False) for n in range(4)})
    got = shared().call(recomputed, {n: (n, True) for n in range(4)})
    for number in range(4):
        assert {"x", "w_gate", "w_noise", *EXPERTS} == want[number].keys() == got[number].keys()
        assert all(torch.equal(got[number][name], tensor) for name, tensor in want[number].items())


def adam(model: MoE) -> torch.optim.Optimizer:
    """AdamW with plain parameters and DTensors in groups of their own, since they cannot be in one."""
    of_router = [p for n, p in model.named_parameters() if n not in EXPERTS]
    of_experts = [p for n, p in model.named_parameters() if n in EXPERTS]
    return torch.optim.AdamW([{"params": of_router}, {"params": of_experts}], lr=0.01)


def sgd(model: MoE) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=False)


def trained(
    number: int | None, make: Callable[[MoE], torch.optim.Optimizer], steps: int = 5
) -> dict[str, Tensor]:
    """Parameters after five steps: on a rank of four, or on one process."""
    model = layer(None if number is None else rank.mesh_of(4))
    optimizer = make(model)
    for step in range(steps):
        optimizer.zero_grad()
        x = tokens(step)
        loss_of(model, x if number is None else x.split(T)[number]).backward()
        if number is not None:
            assert model.w_gate.grad is not None
            dist.all_reduce(model.w_gate.grad)  # a replicated parameter
        optimizer.step()
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", (adam, sgd))
def test_five_steps_are_those_of_one_process(make: Callable[[MoE], torch.optim.Optimizer]) -> None:
    want, begun = trained(None, make), layer().state_dict()
    assert all(not torch.equal(want[name], begun[name]) for name in ("w_gate", *EXPERTS))
    for got in shared().call(trained, {n: (n, make) for n in range(4)}).values():
        for name, tensor in want.items():
            # Adam divides by roots of squared gradients, some of which are near zero.
            require_close(name, got[name], tensor, EPS if make is sgd else 1e5 * EPS)
