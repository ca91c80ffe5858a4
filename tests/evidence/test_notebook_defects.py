"""One test for each defect of the notebook (``docs/notebook.md``): ours passes, its does not."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from correctness.checks import balance
from correctness.checks.balance import require_close
from correctness.judging.finding import CheckFailed
from evidence import notebook
from moe_impls import MoE, RouterSpec, SparseDispatcher, count_load, noisy_top_k, route, sort_by_expert
from reporting.provenance import ROOT


def require(condition: object, finding: str) -> None:
    if not condition:
        raise CheckFailed(finding)


def rejects(
    check: Callable[..., None],
    subject: Any,
    error: type[Exception] | tuple = CheckFailed,
    match: str | None = None,
) -> None:
    with pytest.raises(error, match=match):
        check(subject)


def _gates(T: int = 6, E: int = 4, k: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Softmax gates [T, E] of k experts for each token."""
    top = torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=dtype).topk(k, dim=1)
    return torch.zeros(T, E, dtype=dtype).scatter(1, top.indices, top.values.softmax(dim=1))


def _round_trip(dispatcher: type, gates: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Dispatch x [T, D] and combine it again, as experts that compute the identity would."""
    subject = dispatcher(gates.shape[1], gates)
    return subject.combine(subject.dispatch(x), **options)


def _ours_in_log_space(gates: Tensor, x: Tensor) -> Tensor:
    return _round_trip(SparseDispatcher, gates, x, combine="logsumexp")


def _notebook_in_log_space(gates: Tensor, x: Tensor) -> Tensor:
    return _round_trip(notebook.NotebookDispatcher, gates, x)


def test_defect_1_a_training_step_runs() -> None:
    def check(layer: type) -> None:
        model = layer(5, 3, 8, 7, noisy_gating=True, k=2).train()
        y, loss = model(torch.randn(16, 5))
        (y.sum() + loss).backward()
        require(model.w_noise.grad is not None and bool(model.w_noise.grad.any()), "the noise is not trained")

    check(MoE)
    rejects(check, notebook.NotebookMoE, TypeError, "missing 1 required positional argument")


def test_defect_2_the_load_assumes_the_noise_that_is_drawn() -> None:
    balance.gating_matches_redraws(noisy_top_k)
    rejects(balance.gating_matches_redraws, notebook.uniform_noise_gating)


def test_defect_3_combine_is_linear_by_default() -> None:
    def check(dispatcher: type) -> None:
        gates, x = 2 * _gates(), torch.rand(6, 3)
        y = _round_trip(dispatcher, gates, x)
        require_close("gates that sum to two, on experts that return x,", y, 2 * x, balance.EPS32)

    check(SparseDispatcher)
    rejects(check, notebook.NotebookDispatcher, match="gates that sum to two")


def test_defect_4_the_log_space_combine_does_not_overflow() -> None:
    def check(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        x = 1e4 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
        y = combine(_gates(), x)  # gates sum to one, so the result is x
        require_close("the result", y, x, balance.EPS32)

    check(_ours_in_log_space)
    rejects(check, _notebook_in_log_space, match="the result is .*inf")


def test_defect_5_a_token_without_experts_shows() -> None:
    """Zero in the linear form, and the log of zero in log space, not the log of some small number."""

    def check(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        gates = _gates()
        gates[2] = 0
        y = combine(gates, torch.ones(6, 3))
        require(bool((y[2] == -math.inf).all()), f"the token without experts is {y[2].tolist()}")
        require(bool(y[[0, 1, 3, 4, 5]].isfinite().all()), "another token is not finite")

    check(_ours_in_log_space)
    rejects(check, _notebook_in_log_space, match="-36")
    gates = _gates()
    gates[2] = 0
    assert _round_trip(SparseDispatcher, gates, torch.ones(6, 3))[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_defect_6_combine_keeps_the_dtype(dtype: torch.dtype) -> None:
    def check(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        x = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        y = combine(_gates(dtype=dtype), x)
        require(y.dtype == dtype, f"the result is {y.dtype}")
        require_close("the result", y, x, torch.finfo(dtype).eps)

    check(_ours_in_log_space)
    rejects(check, _notebook_in_log_space, match="the result is torch.float32")


def test_defect_7_one_input_feature_works() -> None:
    def check(dispatcher: type) -> None:
        gates = _gates()
        for part, size in zip(
            dispatcher(4, gates).dispatch(torch.ones(6, 1)), (gates > 0).sum(0), strict=True
        ):
            require(part.shape == (size, 1), f"a part has shape {list(part.shape)}")

    check(SparseDispatcher)
    rejects(check, notebook.NotebookDispatcher)


@pytest.mark.parametrize("value", (math.nan, -0.5))
def test_defect_8_one_odd_gate_stays_in_its_row(value: float) -> None:
    def check(dispatcher: type) -> None:
        gates, x = _gates(), torch.rand(6, 3)
        want = _round_trip(SparseDispatcher, gates, x)
        gates[3, gates[3] > 0] = value
        y = _round_trip(dispatcher, gates, x)
        others = [0, 1, 2, 4, 5]
        require(torch.equal(y[others], want[others]), "other tokens are affected")

    check(SparseDispatcher)
    rejects(check, notebook.NotebookDispatcher, RuntimeError, "split")


def test_defect_9_a_gate_that_underflows_keeps_its_expert() -> None:
    def check(load: Callable[[Tensor], Tensor]) -> None:
        logits = 1000 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        require(
            load(logits).sum() == 100, f"50 tokens visit 2 experts each, the load is {load(logits).tolist()}"
        )

    def ours(logits: Tensor) -> Tensor:
        routing = route(logits, RouterSpec(2, score="topk_softmax"))
        assert bool((routing.gates == 0).any())
        assert sum(SparseDispatcher.from_routing(routing, 8).part_sizes) == 100
        return count_load(routing, 8)

    def of_the_notebook(logits: Tensor) -> Tensor:
        layer = notebook.NotebookMoE(8, 3, 8, 5, k=2).eval()
        layer.w_gate.data.copy_(torch.eye(8))
        return layer.gating(logits)[1]

    check(ours)
    rejects(check, of_the_notebook)


def test_defect_10_without_noise_the_tokens_of_a_new_layer_spread() -> None:
    def check(visits: Callable[[Tensor], Tensor]) -> None:
        used = int((visits(torch.randn(64, 16)) > 0).sum())
        require(used > 2, f"all tokens visit the same {used} experts")

    def ours(x: Tensor) -> Tensor:
        return MoE(16, 3, 8, 5, noisy_gating=False, k=2).gate(x)[1]

    def of_the_notebook(x: Tensor) -> Tensor:
        return notebook.NotebookMoE(16, 3, 8, 5, noisy_gating=False, k=2).gating(x)[1]

    check(ours)
    rejects(check, of_the_notebook, match="the same 2 experts")
    with_noise = MoE(16, 3, 8, 5, k=2)
    assert not with_noise.w_gate.any()  # as in the paper: at first the noise alone decides
    routing, _ = with_noise.gate(torch.randn(64, 16))
    assert count_load(routing, 8).count_nonzero() > 2


def test_defect_11_leading_dimensions_are_kept() -> None:
    def check(layer: type) -> None:
        model = layer(5, 3, 8, 7, k=2).eval()
        y, _ = model(torch.randn(2, 4, 5))
        require(y.shape == (2, 4, 3), f"[2, 4, 5] becomes {list(y.shape)}")

    check(MoE)
    rejects(check, notebook.NotebookMoE, (CheckFailed, RuntimeError, ValueError, IndexError))


def test_defect_12_bad_arguments_are_refused_at_once_and_by_name() -> None:
    def check(layer: type) -> None:
        for name, wrong in (("k", 0), ("k", 9), ("num_experts", 0), ("hidden_size", -1), ("input_size", 0)):
            sizes = {"input_size": 5, "output_size": 3, "num_experts": 8, "hidden_size": 7, "k": 2}
            with pytest.raises(ValueError, match=f"{name} is {wrong};"):
                layer(**{**sizes, name: wrong})
        with pytest.raises(ValueError, match=r"x has shape \[2, 6\]; it must be \[..., 5\]"):
            layer(5, 3, 8, 7, k=2)(torch.randn(2, 6))

    check(MoE)
    rejects(check, notebook.NotebookMoE, (pytest.fail.Exception, Exception))


def test_defect_13_the_load_in_eval_mode_is_a_count_and_says_so() -> None:
    def check(load_function: Callable) -> None:
        require(
            "without a gradient" in (load_function.__doc__ or ""), "that the load has no gradient is not said"
        )

    check(count_load)
    rejects(check, notebook.NotebookMoE.gating)
    layer = MoE(5, 3, 8, 7, k=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.w_gate)
    x = torch.randn(32, 5, dtype=torch.float64)
    assert layer.gate(x)[1].requires_grad
    _, load = layer.eval().gate(x)
    assert load.dtype == torch.int64 and not load.requires_grad
    (grad,) = torch.autograd.grad(layer(x)[1], layer.w_gate)
    assert grad.any()  # the importance still trains the gate


def test_defect_14_routing_reads_nothing_back_to_the_host() -> None:
    """On the meta device tensors hold no values, so that reading one fails."""

    def check(dispatch: Callable[[Tensor], Any]) -> None:
        try:
            dispatch(torch.empty(16, 8, device="meta"))
        except (NotImplementedError, RuntimeError) as error:
            raise CheckFailed(f"a value is read: {error}") from error

    check(lambda logits: sort_by_expert(route(logits, RouterSpec(2)).expert_ids, 8))
    check(MoE(8, 3, 8, 5, k=2, device="meta").gate)
    rejects(check, lambda gates: notebook.NotebookDispatcher(8, gates))
    layer = MoE(8, 3, 8, 5, k=2, implementation="dense_mask").eval()
    x = torch.randn(16, 8)
    whole = torch.compile(layer, backend="eager", fullgraph=True)  # raises where the graph breaks
    assert torch.equal(whole(x)[0], layer(x)[0])


def test_defect_15_there_is_no_dead_code() -> None:
    def check(source: str) -> None:
        tree = ast.parse(source)
        exported = ast.unparse(tree) if "__all__" in source else ""
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(r"(.*\.)?[Ss]oftmax", ast.unparse(node.func)):
                require(node.args or node.keywords, f"line {node.lineno}: softmax without a dimension")
            if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
                for alias in node.names:
                    name = (alias.asname or alias.name).split(".")[0]
                    require(
                        name in used or f"'{name}'" in exported, f"line {node.lineno}: {name} is not used"
                    )

    files = sorted((ROOT / "moe_impls").glob("*.py"))
    assert files
    for file in files:
        check(file.read_text(encoding="utf-8"))
    rejects(check, notebook.DEAD_CODE, match="tqdm is not used")
    rejects(check, notebook.DEAD_CODE.replace("from tqdm import tqdm", ""), match="softmax without")


def test_every_defect_is_in_the_document_with_the_test_that_catches_it() -> None:
    text = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*`(test_\w+)` \|$", text, flags=re.MULTILINE)
    tests = {name for name in globals() if name.startswith("test_defect_")}
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    assert {test for _, test in rows} == tests
    assert all(test.startswith(f"test_defect_{number}_") for number, test in rows)
