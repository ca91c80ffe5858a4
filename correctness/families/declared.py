"""What a block can declare, tried out: shapes of x, dtypes, modes, and the dtype that its router works in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from correctness.families.probe import TOKENS, trace
from correctness.families.reading import Reading
from correctness.families.tiny import D
from moe_impls.interface import DTYPES
from moe_impls.layer_interface import LayerSupport
from moe_impls.router import route

MANY = 50 * TOKENS  # tokens, so that rounding of logits sends some elsewhere


def support_of(make: Callable[[], nn.Module], is_wide: Callable[[torch.dtype, bool], bool]) -> LayerSupport:
    """Try what a layer may declare, on blocks that ``make`` makes with drawn parameters.

    is_wide: tells whether its router works in float32 for an x of that dtype, or under autocast to it.
    """
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(3))
    dtypes = tuple(dtype for dtype in DTYPES if _runs(make().to(dtype), x.to(dtype)))
    block = make()
    any_leading = all(_runs(block, t) for t in (x[0, 0], x[0], x.unsqueeze(0)))
    return LayerSupport(
        dtypes=dtypes,
        leading="any" if any_leading else "batch_sequence",
        no_tokens=all(_runs(block, t) for t in (x[:0], x[:, :0])),
        training=_runs(make().train(), x),
        router_dtype="float32" if is_wide(torch.bfloat16, False) else "input",
        autocast=is_wide(torch.bfloat16, True),
    )


@torch.no_grad()
def _runs(block: nn.Module, x: Tensor) -> bool:
    """Tell whether a block takes x and returns as many rows; what raises may be anything."""
    with contextlib.suppress(Exception):
        y = block(x.clone())
        return (y[0] if isinstance(y, tuple) else y).shape == x.shape
    return False


@torch.no_grad()
def is_wide(make: Callable[[], nn.Module], reading: Reading, dtype: torch.dtype, autocast: bool) -> bool:
    """Tell whether tokens go where logits in float32 send them, where logits rounded to ``dtype`` differ.

    Under autocast what raises is no router in float32, either.
    """
    x = torch.randn(MANY, D, generator=torch.Generator().manual_seed(4))
    block = make()
    if not autocast:
        block, x = block.to(dtype), x.to(dtype)
    with contextlib.suppress(Exception), torch.autocast("cpu", dtype, enabled=autocast):
        seen = trace(block, reading.experts, x).routing.expert_ids.sort().values
        with torch.autocast("cpu", enabled=False):
            block = block.float()
            wide, rounded = (_ids(block, reading, x.float(), d) for d in (torch.float32, dtype))
        differ = (wide != rounded).any(dim=1)
        return bool(differ.any()) and bool((seen == wide)[differ].all(dim=1).double().mean() > 0.99)
    return False


def _ids(block: nn.Module, reading: Reading, x: Tensor, dtype: torch.dtype) -> Tensor:
    router = reading.router
    z, bias = router.logits(block, x).to(dtype).float(), router.vector(block, "selection_bias")
    return route(z, router.spec, selection_bias=bias).expert_ids.sort().values
