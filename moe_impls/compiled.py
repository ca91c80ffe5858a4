"""``dense_mask`` through ``torch.compile``: one graph, forward and backward, for any routing and shape.

Nothing in ``dense_mask`` depends on the values of the routing, so a new routing never recompiles.
"""

from __future__ import annotations

from torch import Tensor

from moe_impls import dense_mask
from moe_impls.compiling import run_compiled
from moe_impls.interface import Experts, Routing, Support

SUPPORT = Support(compiles_per_case=True)


def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return run_compiled(dense_mask.forward, x, routing, experts, combine=combine)
