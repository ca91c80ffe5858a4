"""Experts over the ranks of a mesh: bits of one process, what travels, and one error for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from correctness.judging.calling import run
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from correctness.ranks import rank
from correctness.ranks.pool import RanksFailed, shared
from correctness.ranks.problems import Spread
from moe_impls import Implementation, MoE, Support, expert_parallel, resolve
from moe_impls.registry import DISTRIBUTED, ResolveError

EVERY = {number: (number,) for number in range(4)}
# Rows of 64 bytes, so that a product of the same rows is the same wherever in memory they lie.
ALIGNED = Problem("aligned", T=60, D=16, H=16, O=16, E=8, K=3, gates="unnormalised", load="zipf")


def part(number: int, name: str, spread: Spread) -> dict[str, Tensor]:
    """What one rank of four gets of a call and its backward."""
    mesh = rank.mesh_of(spread.ranks)
    subject = resolve(name, distributed=True)

    def forward(*arguments: Any, combine: str) -> Tensor:
        return subject.forward(*arguments, combine=combine, mesh=mesh, num_experts=spread.problem.E)

    return run(forward, spread.part(make_inputs(spread.problem), number), spread.problem.combine)


@pytest.mark.parametrize("combine", ("sum", "logsumexp"))
@pytest.mark.parametrize("ranks", (1, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_bits_are_those_of_one_process(combine: str, ranks: int, dtype: torch.dtype) -> None:
    problem = Problem(**{**vars(ALIGNED), "combine": combine, "dtype": dtype})
    spread = Spread(problem, ranks)
    given = {member: (number, "expert_parallel", spread) for number, member in enumerate(rank.MEMBERS[ranks])}
    found = shared().call(part, given)
    want = run(resolve("sorted_dispatch").forward, make_inputs(problem), combine)
    for name, tensor in want.items():
        assert torch.equal(torch.cat([found[member][name] for member in rank.MEMBERS[ranks]]), tensor), name


def travelled(number: int, name: str) -> list[tuple[str, int]]:
    """The collectives of a forward and backward on one of two ranks: names, and rows of what is sent."""
    sent: list[tuple[str, int]] = []
    plain = dist.all_to_all_single

    def recorded(output: Tensor, given: Tensor, *splits: Any, **options: Any) -> Any:
        sent.append(("rows" if splits else "message", given.numel() * given.element_size()))
        return plain(output, given, *splits, **options)

    dist.all_to_all_single = recorded
    try:
        part(number, name, Spread(Problem("rows", T=400, D=64, H=4, O=64, E=32, K=4), 2, "equal"))
    finally:
        dist.all_to_all_single = plain
    return sent


def test_a_call_takes_three_collectives_and_its_backward_two() -> None:
    found = shared().call(travelled, {1: (0, "expert_parallel"), 3: (1, "expert_parallel")})
    for sent in found.values():
        assert [what for what, _ in sent] == ["message", "rows", "rows", "rows", "rows"]


def test_merged_rows_are_half_of_the_bytes_between_two_ranks() -> None:
    by_name = {name: shared().call(travelled, {1: (0, name), 3: (1, name)}) for name in DISTRIBUTED}
    plain, merged = (
        sum(bytes for sent in by_name[name].values() for what, bytes in sent if what == "rows")
        for name in DISTRIBUTED
    )
    # 0.475 of the rows are expected, and beside each a gate and a number for every slot.
    assert 0.45 < merged / plain < 0.53


def call_with(number: int, change: Callable[[dict[str, Any]], None], alone: bool) -> None:
    """Call on four ranks with arguments that one of them, or each, changes before."""
    mesh = rank.mesh_of(4)
    w_in, w_out = torch.randn(2, 6, 5), torch.randn(2, 3, 6)
    given: dict[str, Any] = {
        "x": torch.randn(4, 5), "ids": torch.tensor([[0, 5]] * 4), "gates": torch.rand(4, 2), "w_in": w_in,
        "w_out": w_out, "mesh": mesh, "num_experts": 8, "inner": "sorted_dispatch", "combine": "sum",
    }  # fmt: skip
    if number == 2 or not alone:
        change(given)
    from moe_impls import Experts, Routing

    inner = resolve(given["inner"])
    if given.get("without_gradients"):
        inner = Implementation(inner.name, inner.forward, Support(gradients=False))
    expert_parallel.around(inner).forward(
        given["x"],
        Routing(given["ids"], given["gates"]),
        Experts(given["w_in"], None, given["w_out"], None),
        combine=given["combine"],
        mesh=given["mesh"],
        num_experts=given["num_experts"],
    )


def narrower(given: dict[str, Any]) -> None:
    given.update(x=given["x"][:, :4], w_in=given["w_in"][..., :4])


def doubled(given: dict[str, Any]) -> None:
    given.update({name: given[name].double() for name in ("x", "w_in", "w_out")})


def one_choice(given: dict[str, Any]) -> None:
    given.update(ids=given["ids"][:, :1], gates=given["gates"][:, :1])


def out_of_range(given: dict[str, Any]) -> None:
    given["ids"] = given["ids"] + 3


def fewer_experts(given: dict[str, Any]) -> None:
    given.update(w_in=given["w_in"][:1], w_out=given["w_out"][:1])


def other_number(given: dict[str, Any]) -> None:
    given["num_experts"] = 7


def too_few(given: dict[str, Any]) -> None:
    given["num_experts"] = 3


def no_number(given: dict[str, Any]) -> None:
    given["num_experts"] = None


def no_tensor(given: dict[str, Any]) -> None:
    given["x"] = [1.0]


def logarithm(given: dict[str, Any]) -> None:
    given["combine"] = "logsumexp"


def trained(given: dict[str, Any]) -> None:
    given["x"].requires_grad_()


def trained_without_gradients(given: dict[str, Any]) -> None:
    given["x"].requires_grad_()
    given["without_gradients"] = True


def elsewhere(given: dict[str, Any]) -> None:
    given.update({name: t.to("meta") for name, t in given.items() if isinstance(t, Tensor)})


def no_mesh(given: dict[str, Any]) -> None:
    given["mesh"] = None


def two_dimensions(given: dict[str, Any]) -> None:
    given["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))


@pytest.mark.parametrize(
    ("change", "alone", "message"),
    [
        (
            narrower,
            True,
            "D, the width of x, is 5 on rank 0 of the mesh and 4 on rank 2; it must be the same",
        ),
        (doubled, True, "the dtype of x is torch.float32 on rank 0 of the mesh and torch.float64 on rank 2"),
        (one_choice, True, "K is 2 on rank 0 of the mesh and 1 on rank 2"),
        (out_of_range, True, r"rank 2 of the mesh: expert_ids holds 8; ids must be in \[0, 8\)"),
        (fewer_experts, True, "rank 2 of the mesh: w_in holds 1 experts; it must hold the rank's 2 of 8"),
        (other_number, True, "num_experts is 8 on rank 0 of the mesh and 7 on rank 2"),
        (too_few, False, "num_experts is 3; it must be at least the ranks of the mesh, 4"),
        (no_number, True, "rank 2 of the mesh: num_experts is None; it must be an int"),
        (no_tensor, True, r"rank 2 of the mesh: x is a list; it must be a tensor of shape \[T, D\]"),
        (logarithm, True, "combine is 'sum' on rank 0 of the mesh and 'logsumexp' on rank 2"),
        (trained, True, "what requires a gradient is nothing on rank 0 of the mesh and x on rank 2"),
        (trained_without_gradients, False, "implementation 'sorted_dispatch' has no gradients"),
        (elsewhere, True, "rank 2 of the mesh: x is on meta; the mesh is of cpu with backend gloo"),
        (no_mesh, False, "mesh is None; it must be a torch.distributed.device_mesh.DeviceMesh"),
        (two_dimensions, False, r"mesh has the dimensions \('data', 'expert'\); it must have one"),
    ],
)
def test_what_is_wrong_on_one_rank_is_the_same_error_on_all(change: Any, alone: bool, message: str) -> None:
    with pytest.raises(RanksFailed, match=f"ranks 0, 1, 2, 3 raise [A-Za-z]+: .*{message}"):
        shared().call(call_with, {number: (number, change, alone) for number in range(4)})


def test_without_a_process_group_the_error_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="there is no process group; run under torchrun"):
        MoE(5, 3, 6, 7, mesh=object())  # pyright: ignore[reportArgumentType]


def test_a_distributed_implementation_needs_a_mesh() -> None:
    with pytest.raises(ValueError, match="mesh is None; implementation 'expert_parallel' needs a DeviceMesh"):
        MoE(5, 3, 6, 7, implementation="expert_parallel")
    with pytest.raises(ResolveError, match="expert_parallel is distributed: the ranks of a mesh compute it"):
        resolve("expert_parallel")


def test_only_what_is_distributed_can_want_equal_ranks() -> None:
    with pytest.raises(ValueError, match="equal_tokens of Support is True; that needs distributed=True"):
        Support(equal_tokens=True)


def test_a_distributed_implementation_is_not_spread_again() -> None:
    with pytest.raises(
        ValueError, match="implementation is 'expert_parallel'; on a mesh it must be one that"
    ):
        expert_parallel.around(resolve("expert_parallel", distributed=True))
