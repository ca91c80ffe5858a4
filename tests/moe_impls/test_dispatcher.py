"""SparseDispatcher brings every row to its experts and back, for any gates; sort_by_expert orders slots."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_impls import Routing, SparseDispatcher, sort_by_expert
from moe_impls.functional import combine_slots


@st.composite
def exact_gates(draw: st.DrawFn) -> Tensor:
    """Gates [T, E], many of them zero, that are multiples of 1/8, so that sums are exact."""
    T, E = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    eighths = st.sampled_from([0, 0, 0, 1, 2, 4, 8, -3])
    rows = st.lists(eighths, min_size=E, max_size=E)
    table = draw(st.lists(rows, min_size=T, max_size=T))
    return torch.tensor(table, dtype=torch.float32).reshape(T, E) / 8


def integers(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()


@given(exact_gates(), st.integers(1, 4))
def test_dispatch_gives_each_expert_its_rows_in_token_order(gates: Tensor, D: int) -> None:
    T, E = gates.shape
    x = integers(T, D)
    dispatcher = SparseDispatcher(E, gates)
    parts, weights = dispatcher.dispatch(x), dispatcher.expert_to_gates()
    assert len(parts) == len(weights) == E
    for expert in range(E):
        tokens = [t for t in range(T) if gates[t, expert] != 0]
        assert dispatcher.part_sizes[expert] == len(tokens)
        assert parts[expert].tolist() == [x[t].tolist() for t in tokens]
        assert weights[expert].tolist() == [float(gates[t, expert]) for t in tokens]


@given(exact_gates())
def test_combine_is_the_sum_of_gates_times_outputs(gates: Tensor) -> None:
    T, E = gates.shape
    x = integers(T, 3)
    dispatcher = SparseDispatcher(E, gates)
    outputs = [(expert + 1) * part for expert, part in enumerate(dispatcher.dispatch(x))]
    factors = torch.arange(1, E + 1)
    assert torch.equal(dispatcher.combine(outputs), (gates * factors).sum(1, keepdim=True) * x)
    visited = ((gates != 0) * factors).sum(1, keepdim=True)
    assert torch.equal(dispatcher.combine(outputs, multiply_by_gates=False), visited * x)


@given(exact_gates())
def test_combine_in_log_space_is_the_log_of_the_sum_of_exponentials(gates: Tensor) -> None:
    gates = gates.abs().double()
    T, E = gates.shape
    dispatcher = SparseDispatcher(E, gates)
    x = integers(T, 3).double()
    y = dispatcher.combine([part + e for e, part in enumerate(dispatcher.dispatch(x))], combine="logsumexp")
    for t in range(T):
        total = math.fsum(float(gates[t, e]) * math.exp(e) for e in range(E))
        offset = math.log(total) if total else -math.inf
        assert y[t].tolist() == pytest.approx((x[t] + offset).tolist(), rel=1e-14, abs=1e-14)


@given(st.data())
def test_a_routing_keeps_slots_whose_gate_is_zero(data: st.DataObject) -> None:
    T, E = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    ids = torch.tensor([data.draw(st.permutations(range(E)))[:K] for _ in range(T)], dtype=torch.long)
    ids = ids.reshape(T, K)
    gates = integers(T, K) % 2
    dispatcher = SparseDispatcher.from_routing(Routing(ids, gates), E)
    assert dispatcher.part_sizes == [int((ids == e).sum()) for e in range(E)]
    x = integers(T, 2)
    parts = dispatcher.dispatch(x)
    for expert, part in enumerate(parts):
        assert part.tolist() == [x[t].tolist() for t in range(T) if expert in ids[t]]
    assert torch.equal(dispatcher.combine(parts), gates.sum(1, keepdim=True) * x)


@given(st.data())
def test_sort_by_expert_is_a_stable_sort_with_counts(data: st.DataObject) -> None:
    T, K, E = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    ids = (
        torch.tensor([[data.draw(st.integers(0, E - 1)) for _ in range(K)] for _ in range(T)])
        .reshape(T, K)
        .long()
    )
    order, counts = sort_by_expert(ids, E)
    slots = ids.flatten().tolist()
    assert order.tolist() == sorted(range(T * K), key=lambda slot: slots[slot])
    assert counts.tolist() == [slots.count(e) for e in range(E)]


@pytest.mark.parametrize("combine", ("sum", "logsumexp"))
def test_gradients_reach_outputs_and_gates(combine: str) -> None:
    gates = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def round_trip(x: Tensor, gates: Tensor) -> Tensor:
        dispatcher = SparseDispatcher(3, gates)
        parts = dispatcher.dispatch(x)
        return dispatcher.combine([(e + 1) * part for e, part in enumerate(parts)], combine=combine)

    # Only gates that are not zero: a dispatcher from gates does not visit the others.
    assert torch.autograd.gradcheck(
        lambda x, values: round_trip(x, gates.masked_scatter(gates != 0, values)),
        (x.requires_grad_(), gates[gates != 0].requires_grad_()),
    )


def test_a_zero_gate_of_a_routing_has_a_gradient() -> None:
    gates = torch.tensor([[0.0, 1.0]], requires_grad=True)
    dispatcher = SparseDispatcher.from_routing(Routing(torch.tensor([[1, 0]]), gates), 2)
    (grad,) = torch.autograd.grad(
        dispatcher.combine([torch.tensor([[5.0]]), torch.tensor([[7.0]])]).sum(), gates
    )
    assert grad.tolist() == [[7.0, 5.0]]


@pytest.mark.parametrize(("above", "counted"), [(79.5, 79.5), (80.5, 80.0), (1000.0, 80.0)])
def test_a_zero_gate_has_the_gradient_of_an_output_at_most_80_above_the_others(
    above: float, counted: float
) -> None:
    gates = torch.tensor([[0.0, 1.0]], requires_grad=True)
    dispatcher = SparseDispatcher.from_routing(Routing(torch.tensor([[0, 1]]), gates), 2)
    y = dispatcher.combine([torch.tensor([[above]]), torch.tensor([[0.0]])], combine="logsumexp")
    (grad,) = torch.autograd.grad(y.sum(), gates)
    torch.testing.assert_close(grad, torch.tensor([[math.exp(counted), 1.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [-1000.0, 1000.0])
@pytest.mark.parametrize("gates", [[0.0, 0.5], [0.0, 1.0]])
def test_the_largest_output_is_that_of_a_gate_above_zero(gates: list[float], value: float) -> None:
    dispatcher = SparseDispatcher.from_routing(Routing(torch.tensor([[0, 1]]), torch.tensor([gates])), 2)
    y = dispatcher.combine([torch.tensor([[-value]]), torch.tensor([[value]])], combine="logsumexp")
    assert y.item() == pytest.approx(value + math.log(gates[1]))


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_slots_are_combined_into_the_dtype_of_outputs(combine: str) -> None:
    y = combine_slots(torch.ones(3, 2, 4, dtype=torch.bfloat16), torch.ones(3, 2), combine)
    assert y.dtype == torch.bfloat16


def test_sums_are_kept_in_float32() -> None:
    """256 + 1 - 256 is 1; in bfloat16 256 + 1 is 256."""
    dispatcher = SparseDispatcher(3, torch.ones(1, 3, dtype=torch.bfloat16))
    outputs = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, -256.0)]
    y = dispatcher.combine(outputs)
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[1.0]]


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_may_be_of_another_dtype_than_outputs(dtype: torch.dtype, combine: str) -> None:
    gates = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    outputs = [torch.tensor([[3.0]]), torch.tensor([[-2.0], [7.0]])]
    want = SparseDispatcher(2, gates).combine(outputs, combine=combine)
    y = SparseDispatcher(2, gates.to(dtype)).combine(outputs, combine=combine)
    assert y.dtype == torch.float32
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseDispatcher(0, torch.ones(2, 2)), ValueError, "num_experts is 0"),
        (
            lambda: SparseDispatcher(3, torch.ones(2, 2)),
            ValueError,
            r"gates has shape \[2, 2\]; it must be \[T, 3\]",
        ),
        (lambda: SparseDispatcher(2, torch.ones(2, 2).long()), TypeError, "gates has dtype torch.int64"),
        (
            lambda: SparseDispatcher(2, torch.ones(2, 2)).dispatch(torch.ones(3, 1)),
            ValueError,
            r"inp has shape \[3, 1\]; its first dimension must be T = 2",
        ),
        (
            lambda: SparseDispatcher(2, torch.ones(2, 2)).dispatch(torch.tensor(1.0)),
            ValueError,
            r"inp has shape \[\]; its first dimension must be T = 2",
        ),
        (
            lambda: SparseDispatcher(2, torch.eye(2)).combine([torch.ones(2, 1), torch.ones(0, 1)]),
            ValueError,
            r"expert_out has parts of \[2, 0\] rows; they must be of \[1, 1\] rows",
        ),
        (
            lambda: SparseDispatcher(2, torch.eye(2)).combine([torch.ones(1, 1)] * 2, combine="log"),
            ValueError,
            "combine is 'log'; valid are sum, logsumexp",
        ),
        (
            lambda: SparseDispatcher(2, -torch.eye(2)).combine([torch.ones(1, 1)] * 2, combine="logsumexp"),
            ValueError,
            "gates holds -1.0; combine 'logsumexp' needs gates >= 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
