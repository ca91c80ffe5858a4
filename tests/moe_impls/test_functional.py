"""What implementations share beside arithmetic, which their own checks judge."""

from __future__ import annotations

import pytest
import torch

from moe_impls.functional import combine_slots, needs_gradients
from moe_impls.interface import COMBINES, DTYPES


def test_a_call_needs_gradients_where_one_of_its_tensors_does_and_they_are_recorded() -> None:
    plain, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert needs_gradients(plain, None, trained)
    assert not needs_gradients(plain, None)
    with torch.no_grad():
        assert not needs_gradients(plain, None, trained)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_are_combined_in_the_dtype_of_the_outputs(dtype: torch.dtype, combine: str) -> None:
    outputs, gates = torch.ones(3, 2, 4, dtype=dtype), torch.ones(3, 2)
    assert combine_slots(outputs, gates, combine).dtype == dtype
