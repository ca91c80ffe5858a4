"""What `triton_fused` refuses and what it keeps; what it computes is checked under Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness import problems
from correctness.problems import make_inputs
from moe_impls import triton_fused
from moe_impls.interface import GATED_ACTIVATIONS

not_interpreted = pytest.mark.skipif(triton_fused.INTERPRETED, reason="Triton's kernels are interpreted")


@not_interpreted
def test_tensors_on_the_cpu_are_refused_with_what_to_use_instead() -> None:
    x, routing, experts, _ = make_inputs(problems.SMALL)
    with pytest.raises(
        RuntimeError, match="needs CUDA tensors and x is on cpu: use 'grouped_mm', or set TRITON"
    ):
        triton_fused.forward(x, routing, experts)


def test_without_triton_an_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_fused._kernels.cache_clear()
    assert not triton_fused.is_available()
    with pytest.raises(RuntimeError, match="needs triton: pip install triton, or use 'grouped_mm'"):
        triton_fused._kernels()


@pytest.mark.parametrize(
    ("dtype", "E", "error", "message"),
    [
        (torch.float64, 4, TypeError, "x has dtype torch.float64; 'triton_fused' takes torch.float32, "),
        (torch.float32, 65536, ValueError, "E is 65536; 'triton_fused' takes at most 65535 experts"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, E: int, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(triton_fused, "INTERPRETED", True)
    with pytest.raises(error, match=message):
        triton_fused._check(torch.zeros(2, 3, dtype=dtype), E)


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    plan = triton_fused._plan(torch.zeros(4, 1, dtype=torch.int64), 2, torch.float32)
    with pytest.raises(ValueError, match="need .* programs; 'triton_fused' takes at most 2147483647"):
        triton_fused._grid(plan, 2**40)


@pytest.mark.parametrize("counts", [[5, 0, 300, 1], [0, 0, 0, 64], [128, 128], [1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiles_hold_every_row_of_every_expert_once(counts: list[int], dtype: torch.dtype) -> None:
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    plan = triton_fused._plan(ids.flip(0), len(counts), dtype)
    seen = []
    for e, begin in zip(plan.tile_expert.tolist(), plan.tile_begin.tolist(), strict=True):
        if e < len(counts):
            rows = range(begin, min(begin + plan.blocks.m, int(plan.ends[e])))
            assert len(rows) > 0
            seen += [(e, row) for row in rows]
    assert seen == [(e, row) for row, e in enumerate(ids.flatten().tolist())]


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize(("D", "H"), [(4096, 14336), (2048, 768), (2048, 1024)])
def test_no_more_is_kept_for_the_backward_than_the_rows_of_the_two_products(
    activation: str, D: int, H: int
) -> None:
    T, E, K = 64, 8, 2
    F = 2 * H if activation in GATED_ACTIVATIONS else H
    with FakeTensorMode():
        x, ids, gates = torch.empty(T, D), torch.empty(T, K, dtype=torch.int64), torch.empty(T, K)
        w_in, w_out = torch.empty(E, F, D), torch.empty(E, D, H)
        _, pre, outputs = torch.ops.moe_impls.triton_fused(
            x, ids, gates, w_in, None, w_out, None, activation, "none", "sum", True
        )
    assert pre.numel() + outputs.numel() <= T * K * (D + H)
