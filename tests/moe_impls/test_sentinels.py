"""Slots that a router dropped, of id E, are taken out before the call, one way for all implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from moe_impls.checking import check_inputs
from moe_impls.interface import Routing
from moe_impls.registry import resolve
from moe_impls.router import without_sentinels

E = 6
IDS = torch.tensor([[4, 0, 2], [E, 1, E], [E, E, E], [3, E, 5], [0, 1, E]])
GATES = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, 1.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.0], [2.0, 4.0, 8.0]])


def test_a_dropped_slot_gets_an_expert_that_its_token_does_not_visit_and_the_gate_0() -> None:
    ids, gates = without_sentinels(Routing(IDS, GATES), E)
    kept = IDS < E
    assert torch.equal(ids[kept], IDS[kept]) and torch.equal(gates[kept], GATES[kept])
    assert not gates[~kept].any() and gates.dtype == GATES.dtype
    assert all(len(set(row)) == 3 and set(row) <= set(range(E)) for row in ids.tolist())


def test_a_routing_without_dropped_slots_stays_as_it_is() -> None:
    ids, gates = without_sentinels(Routing(IDS[:1], GATES[:1]), E)
    assert torch.equal(ids, IDS[:1]) and torch.equal(gates, GATES[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_gradient_flows_into_the_gate_of_a_dropped_slot(dtype: torch.dtype) -> None:
    gates = GATES.to(dtype).requires_grad_()
    found = without_sentinels(Routing(IDS, gates), E).gates
    assert found.dtype == dtype
    found.backward(torch.full_like(gates, torch.nan))
    assert gates.grad is not None and torch.equal(gates.grad.isnan(), IDS < E)
    assert not gates.grad[IDS == E].any()


@pytest.mark.parametrize(
    "name", ["sorted_dispatch", "index_add", "dense_mask", "padded", "grouped_mm", "recompute"]
)
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_the_result_is_that_of_the_slots_that_are_kept(name: str, combine: str) -> None:
    implementation = resolve(name)
    if combine not in implementation.support.combines:
        combine = "sum"
    problem = replace(catalogue.named("integers_empty"), E=E, K=3, gates="softmax", T=9)
    x, (ids, gates), experts, _ = make_inputs(problem)
    gates = gates.abs()
    dropped = torch.arange(9) % 3 == 1  # the second choice of every third token
    given = ids.clone()
    given[dropped, 1] = E
    routing = without_sentinels(Routing(given, gates), E)
    check_inputs(x, routing, experts, combine)
    y = implementation.forward(x, routing, experts, combine=combine)
    two = Routing(ids[:, ::2], gates[:, ::2])
    want = implementation.forward(x, two, experts, combine=combine)
    torch.testing.assert_close(y[dropped], want[dropped], rtol=0, atol=0 if combine == "sum" else 1e-5)
    plain = implementation.forward(x, Routing(ids, gates), experts, combine=combine)
    assert torch.equal(y[~dropped], plain[~dropped])


def test_dropped_slots_spread_over_the_experts() -> None:
    T, K = 600, 2
    ids = torch.full((T, K), E)
    ids[:, 0] = torch.arange(T) // 100
    found = without_sentinels(Routing(ids, torch.ones(T, K)), E).expert_ids
    assert found[:, 1].bincount(minlength=E).max() <= 1.3 * T / E


def test_the_expert_of_a_dropped_slot_is_the_first_after_the_number_of_its_token() -> None:
    ids, _ = without_sentinels(Routing(torch.full((8, 1), E), torch.ones(8, 1)), E)
    assert ids.flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_no_tokens_and_every_expert_chosen_are_taken() -> None:
    ids, gates = without_sentinels(Routing(IDS[:0], GATES[:0]), E)
    assert ids.shape == gates.shape == (0, 3)
    ids, _ = without_sentinels(Routing(torch.full((2, 4), 4), torch.ones(2, 4)), 4)
    assert ids.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 2


def test_no_value_is_read_on_the_host() -> None:
    with FakeTensorMode():
        ids, _ = without_sentinels(Routing(torch.zeros(7, 3, dtype=torch.int64), torch.ones(7, 3)), E)
    assert ids.shape == (7, 3)


def test_an_id_of_e_is_refused_with_what_takes_it_out() -> None:
    x, (ids, gates), experts, _ = make_inputs(catalogue.SMALL)
    ids[3, 1] = catalogue.SMALL.E
    message = (
        r"expert_ids holds 5; ids must be in \[0, 5\); moe_impls.router.without_sentinels takes out slots"
    )
    with pytest.raises(ValueError, match=message):
        check_inputs(x, Routing(ids, gates), experts)
    check_inputs(x, without_sentinels(Routing(ids, gates), 5), experts)
    ids[3, 1] = 7
    with pytest.raises(ValueError, match=r"expert_ids holds 7; ids must be in \[0, 5\)$"):
        check_inputs(x, Routing(ids, gates), experts)


@pytest.mark.parametrize(
    ("ids", "num_experts", "error", "message"),
    [
        (IDS, 2, ValueError, "num_experts is 2; it must be at least K, 3"),
        (IDS, 0, ValueError, "num_experts is 0; it must be at least 1"),
        (IDS, 6.0, TypeError, "num_experts is 6.0; it must be an int"),
        (IDS.int(), 6, TypeError, "expert_ids has dtype torch.int32; it must be torch.int64"),
    ],
)
def test_bad_input_is_refused(
    ids: torch.Tensor, num_experts: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        without_sentinels(Routing(ids, GATES), num_experts)
