"""Memory that is kept for the next result of the same size: taken again only when nobody uses it any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from correctness.checks.case import Check, cases
from correctness.checks.table import CHECKS, implementation
from moe_impls import kept_memory
from moe_impls.registry import resolve

SHAPE = (3, 2**20)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    kept_memory.release()
    yield
    kept_memory.release()


def take(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return kept_memory.take(shape, torch.float32)


def test_memory_that_nobody_uses_is_taken_again_by_the_next_of_its_size_whatever_its_shape() -> None:
    address = take().data_ptr()
    again = kept_memory.take((2**20, 6), torch.bfloat16)
    assert again.data_ptr() == address
    assert again.shape == (2**20, 6) and again.dtype == torch.bfloat16 and again.is_contiguous()


@pytest.mark.parametrize("keep", [
    lambda t: t,
    lambda t: t[1, 5:],
    lambda t: t.detach().view(-1),
    lambda t: t.numpy(),
    lambda t: t.untyped_storage(),
    lambda t: t.__dlpack__(),
    lambda t: (t.requires_grad_() * t).grad_fn,
], ids=["tensor", "slice", "view", "numpy", "storage", "dlpack", "graph"])  # fmt: skip
def test_memory_that_somebody_uses_is_not_taken(keep: Callable[[Tensor], object]) -> None:
    first = take()
    address, kept = first.data_ptr(), keep(first)
    del first
    assert take().data_ptr() != address
    del kept
    assert address in {take().data_ptr(), *(block.storage.data_ptr() for block in kept_memory._kept)}


def test_memory_that_another_process_may_see_is_not_taken() -> None:
    address = take().share_memory_().data_ptr()
    assert take().data_ptr() != address


def test_what_is_free_and_of_another_size_is_given_back() -> None:
    used, _ = take(), take((5, 2**20))
    del _
    take((7, 2**20))
    assert [block.storage.nbytes() for block in kept_memory._kept] == [used.nbytes, 7 * 2**22]


@pytest.mark.parametrize(
    "limit, value", [("LEAST_BYTES", 2**24), ("MOST_BYTES", 2**23), ("MOST_BYTES", 2**24)]
)
def test_neither_little_nor_too_much_is_kept(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(kept_memory, limit, value)
    used = take(), take()
    assert sum(block.storage.nbytes() for block in kept_memory._kept) <= kept_memory.MOST_BYTES
    assert len(kept_memory._kept) == (limit == "MOST_BYTES" and value > used[0].nbytes)


def test_memory_in_use_outlives_its_release() -> None:
    used = take().fill_(3)
    kept_memory.release()
    assert take().data_ptr() != used.data_ptr()
    assert bool((used == 3).all())


def test_the_gradients_of_a_parameter_are_taken_again_once_they_are_dropped() -> None:
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    weight.grad = take()
    address = weight.grad.data_ptr()
    assert take().data_ptr() != address
    weight.grad = None
    assert take().data_ptr() == address


def test_the_gradients_of_all_layers_are_taken_again_in_the_next_step() -> None:
    shapes = [(3, 2**20), (2, 2**20)] * 4
    first = [take(shape) for shape in shapes]
    addresses = {t.data_ptr() for t in first}
    del first
    assert {t.data_ptr() for t in [take(shape) for shape in shapes]} == addresses


def test_what_is_kept_is_bounded_by_the_memory_of_the_process() -> None:
    assert 0 < 4 * kept_memory.MOST_BYTES <= kept_memory.memory_of_process()


@pytest.mark.parametrize("check", {c: 0 for c in CHECKS if not c.drawn}, ids=lambda c: c.name)
def test_recompute_is_right_where_every_gradient_takes_kept_memory(
    monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    monkeypatch.setattr(kept_memory, "LEAST_BYTES", 0)
    for case in cases([implementation(resolve("recompute"))], [check]):
        if case.skip is None and case.problem.T <= 100:
            case.run()
