"""`MoE` on a mesh is the layer of one process: its parameters, noise, losses and gradients, and loading."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from correctness.judging.budget import eps, require_close
from correctness.ranks import rank
from correctness.ranks.pool import RanksFailed, shared
from moe_impls import MoE, RouterSpec, expert_parallel, resolve

SIZES = [7, 0, 12, 4]  # tokens of each rank
TOKENS = torch.randn(sum(SIZES), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DY = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
EVERY = {number: (number,) for number in range(4)}
WIDE: dict[str, Any] = {"dtype": torch.float64}


def layer(**options: Any) -> MoE:
    """A layer of D = 5, O = 3, E = 6, H = 7, K = 2 with a gate that is not zero, the same on every rank."""
    torch.manual_seed(3)
    made = MoE(5, 3, 6, 7, k=2, **{"generator": torch.Generator().manual_seed(4), **WIDE, **options})
    nn.init.normal_(made.w_gate, generator=torch.Generator().manual_seed(5))
    nn.init.normal_(made.w_noise, generator=torch.Generator().manual_seed(6))
    return made


def step(made: MoE, tokens: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """One forward and backward of y and of the loss: y, the loss and all gradients."""
    x = tokens.clone().requires_grad_()
    y, loss = made(x, 1.0)
    ((y * dy).sum() + loss).backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, "loss": loss.detach()} | {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in made.named_parameters()
        if p.grad is not None
    }


def on_a_mesh(number: int, training: bool, **options: Any) -> dict[str, Tensor]:
    made = layer(mesh=rank.mesh_of(4), **options).train(training)
    return step(made, TOKENS.split(SIZES)[number], DY.split(SIZES)[number])


@pytest.mark.parametrize("training", (True, False))
def test_values_losses_and_gradients_are_those_of_one_process(training: bool) -> None:
    want = step(layer().train(training), TOKENS, DY)
    found = shared().call(on_a_mesh, {number: (number, training) for number in range(4)})
    for name, tensor in want.items():
        parts = [found[number][name] for number in range(4)]
        if name in ("y", "x"):
            got = torch.cat(parts)
        elif name in ("w_gate", "w_noise"):
            got = torch.stack(parts).sum(dim=0)  # as those of any other replicated parameter
        else:
            assert all(torch.equal(part, parts[0]) for part in parts)
            got = parts[0]
        require_close(name, got, tensor, 16 * eps(torch.float64))
    assert {"w_gate", "w_in", "b_in", "w_out", "b_out"} < want.keys()
    assert ("w_noise" in want) == training


def parameters(number: int, seed: int) -> tuple[dict[str, Tensor], list[int]]:
    torch.manual_seed(seed)
    made = MoE(5, 3, 6, 7, k=2, noisy_gating=False, mesh=rank.mesh_of(4))
    held = [len(p.to_local()) for p in made.parameters() if isinstance(p, DTensor)]
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in made.state_dict().items()}, held


def test_parameters_begin_as_on_one_process_and_a_rank_holds_its_own_experts_only() -> None:
    found = shared().call(parameters, {number: (number, 7) for number in range(4)})
    torch.manual_seed(7)
    want = MoE(5, 3, 6, 7, k=2, noisy_gating=False).state_dict()
    for state, held in found.values():
        assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
        assert len(held) == 4
    assert [found[number][1][0] for number in range(4)] == [2, 2, 2, 0]


def test_the_router_is_the_same_on_all_ranks_whatever_their_seeds() -> None:
    found = shared().call(parameters, {number: (number, number) for number in range(4)})
    assert all(torch.equal(state["w_gate"], found[0][0]["w_gate"]) for state, _ in found.values())


def loaded(number: int, how: str) -> list[bool]:
    want = layer().state_dict()
    made = MoE(5, 3, 6, 7, k=2, mesh=rank.mesh_of(4), **WIDE)
    given = dict(want)
    if how == "own part":
        given["w_in"] = want["w_in"][2 * number : 2 * number + 2]
    elif how == "another layer on the mesh":
        given = layer(mesh=rank.mesh_of(4)).state_dict()
    made.load_state_dict(given)
    return [
        torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, want[name])
        for name, p in made.state_dict().items()
    ]


@pytest.mark.parametrize("how", ("all experts", "another layer on the mesh"))
def test_a_layer_is_loaded_from_tensors_of_all_experts_or_from_dtensors(how: str) -> None:
    found = shared().call(loaded, {number: (number, how) for number in range(4)})
    assert all(all(equal) and len(equal) == 6 for equal in found.values())


def test_a_ranks_own_plain_tensors_are_refused() -> None:
    message = r"w_in is a plain tensor of 2 experts; .* is loaded from DTensors, .* or from .* all 6 experts"
    with pytest.raises(RanksFailed, match=message):
        shared().call(loaded, {number: (number, "own part") for number in range(4)})


def refused(number: int, options: dict[str, Any]) -> None:
    MoE(5, 3, **{"num_experts": 6, "hidden_size": 7, "k": 2, **options}, mesh=rank.mesh_of(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 3}, "num_experts is 3; it must be at least the ranks of the mesh, 4"),
        ({"k": 7}, "k is 7; it must be at most num_experts, 6"),
        ({"router": RouterSpec(2, groups=4)}, "groups is 4; it must divide"),
        ({"implementation": "no_such"}, "unknown implementation 'no_such'; valid are .*expert_parallel"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RanksFailed, match=f"ranks 0, 1, 2, 3 raise [A-Za-z]+: .*{message}"):
        shared().call(refused, {number: (number, options) for number in range(4)})


def even_alone(number: int, num_experts: int) -> None:
    spread = expert_parallel.around(resolve("sorted_dispatch"))
    even = replace(spread, support=replace(spread.support, even_experts=True))
    MoE(5, 3, num_experts, 7, k=2, implementation=even, mesh=rank.mesh_of(4))


def test_an_implementation_that_wants_equal_chunks_gets_no_others() -> None:
    with pytest.raises(RanksFailed, match=r"is 6; it must be a multiple of 4 ranks"):
        shared().call(functools.partial(even_alone, num_experts=6), EVERY)
    shared().call(functools.partial(even_alone, num_experts=8), EVERY)


def name_of_the_latest(number: int, implementation: str) -> str | None:
    made = layer(mesh=rank.mesh_of(4), implementation=implementation, dtype=torch.float32)
    made(TOKENS.float()[:3])
    return made.last_implementation


@pytest.mark.parametrize(
    ("given", "taken"),
    [("grouped_mm", "expert_parallel(grouped_mm)"), ("expert_parallel_merged", "expert_parallel_merged")],
)
def test_any_implementation_is_spread_and_a_distributed_one_is_taken_as_it_is(given: str, taken: str) -> None:
    call = functools.partial(name_of_the_latest, implementation=given)
    assert set(shared().call(call, EVERY).values()) == {taken}
