"""What implementations share beside arithmetic, which their own checks judge."""

from __future__ import annotations

import torch

from moe_impls.functional import needs_gradients


def test_a_call_needs_gradients_where_one_of_its_tensors_does_and_they_are_recorded() -> None:
    plain, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert needs_gradients(plain, None, trained)
    assert not needs_gradients(plain, None)
    with torch.no_grad():
        assert not needs_gradients(plain, None, trained)
