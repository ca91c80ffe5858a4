"""Graphs take implementations that read the routing on the host whole, and compute what eager calls do."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from correctness.problems.catalogue import SMALL
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls import MoE, RouterSpec, auto, native, operators, packed, recompute
from moe_impls.functional import constant_in_graphs
from moe_impls.interface import CLAMPED, Experts, Prepared, Routing
from moe_impls.registry import resolve
from reporting.provenance import ROOT

INFERENCE = ("auto", "native", "native_prepared", "recompute", "sorted_dispatch", "packed")
TRAINING = ("auto", "native", "recompute", "sorted_dispatch")
PLAIN = replace(SMALL, activation="silu", output_activation="none")
OPTIONS: tuple[Any, ...] = ("silu", "none", [7.0, 1.702, 1.0], "sum", None, True)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def arguments(problem: Problem = PLAIN) -> list[Tensor | None]:
    x, routing, experts, _ = make_inputs(problem)
    return [x, *routing, experts.w_in, experts.b_in, experts.w_out, experts.b_out]


def on_leaves(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None or t.dtype == torch.int64 else t.clone().requires_grad_() for t in tensors]


def layer(implementation: str = "auto", **options: Any) -> MoE:
    torch.manual_seed(0)
    options = {"activation": "swiglu", "output_activation": "none", "router": RouterSpec(2)} | options
    return MoE(12, 12, 6, 10, noisy_gating=False, implementation=implementation, **options)


def operators_of(program: Any) -> list[str]:
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in called if target.startswith("moe_impls.")]


def gradients(model: Callable[[Tensor], Any], parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, loss = model(x)
    return list(torch.autograd.grad(y.square().sum() + loss, [x, *parameters], allow_unused=True))


def require_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INFERENCE)
def test_an_operator_passes_opcheck(name: str, bias: bool) -> None:
    resolve({"packed": "packed+prepared", "native_prepared": "native+prepared"}.get(name, name))
    run = getattr(torch.ops.moe_impls, name).default
    torch.library.opcheck(run, (*arguments(replace(PLAIN, bias=bias)), *OPTIONS))


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("name", TRAINING)
def test_an_operator_with_a_backward_passes_opcheck(name: str, lasting: bool) -> None:
    resolve(name)
    training = getattr(torch.ops.moe_impls, f"{name}_training").default
    options = (*OPTIONS[:-1], lasting)
    all_leaves = on_leaves(arguments())
    torch.library.opcheck(training, (*all_leaves, *options, [True] * 6))
    one = [t if i in (1, 3) or t is None else t.detach() for i, t in enumerate(all_leaves)]
    torch.library.opcheck(training, (*one, *options, [False, False, True, False, False, False]))
    torch.library.opcheck(getattr(torch.ops.moe_impls, name).default, (*all_leaves, *options))


@pytest.mark.parametrize("name", TRAINING)
def test_the_backward_of_an_operator_passes_opcheck(name: str) -> None:
    resolve(name)
    run = getattr(torch.ops.moe_impls, f"{name}_backward").default
    dy, holder = make_inputs(PLAIN).dy, operators.hold(None)
    torch.library.opcheck(run, (dy, holder, *arguments(), *OPTIONS, [True, False, True, True, False, True]))


@pytest.mark.parametrize("implementation", ["auto", "native", "recompute", "sorted_dispatch"])
def test_a_compiled_layer_keeps_its_implementation_for_any_tokens(implementation: str) -> None:
    model, graphs = layer(implementation), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for T in (5, 9, 33, 700):
            x = torch.randn(T, 12)
            torch.testing.assert_close(compiled(x)[0], model(x)[0])
    (graph,) = graphs
    assert operators_of(graph) == [f"moe_impls.{implementation}.default"]


def test_a_layer_with_noise_trains_in_one_graph_for_any_tokens() -> None:
    model, graphs = MoE(12, 12, 6, 10, output_activation="none"), []
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g.forward
    )
    for T in (5, 9, 33):
        y, loss = compiled(torch.randn(T, 12))
        (y.sum() + loss).backward()
    assert len(graphs) == 1


def test_auto_chooses_inside_a_compiled_graph_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    choose = auto.choose

    def noted(*call: Any, **options: Any) -> Any:
        found = choose(*call, **options)
        taken.append(found.name)
        return found

    few, many = torch.randn(3, 12), torch.randn(800, 12)
    cell: dict[str, Any] = {"device": "cpu", "dtype": "float32", "gradients": False, "gated": True}
    sizes: dict[str, Any] = {"D": 12, "H": 10, "E": 6, "K": 2}
    table = (
        auto.Cell(**cell, **sizes, T=3, times_ms={"dense_mask": 1.0}),
        auto.Cell(**cell, **sizes, T=800, times_ms={"index_add": 1.0}),
        auto.Cell(**cell | {"gradients": True}, **sizes, T=3, times_ms={"padded": 1.0}),
    )
    monkeypatch.setattr(auto, "table", lambda device: table)
    monkeypatch.setattr(auto, "NEIGHBOURS", 1)
    auto._nearest.cache_clear()
    auto._on_an_even_load.cache_clear()
    model = layer(router=RouterSpec(2, scale=2.0))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    wanted = gradients(model, list(model.parameters()), few)
    monkeypatch.setattr(auto, "choose", noted)
    with torch.no_grad():
        for x in (few, many, few):
            compiled(x)
    assert taken == ["dense_mask", "index_add", "dense_mask"]
    require_equal(gradients(compiled, list(model.parameters()), few), wanted)
    assert taken[3:] == ["padded"]
    auto._nearest.cache_clear()
    auto._on_an_even_load.cache_clear()


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the forwards of `recompute`: each sorts once."""
    counts, sort = [0], recompute.sort_by_expert

    def counted(*call: Any) -> Any:
        counts[0] += 1
        return sort(*call)

    monkeypatch.setattr(recompute, "sort_by_expert", counted)
    return counts


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_backward_in_a_graph_computes_no_forward_again(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = layer("recompute")
    mixed = nn.Linear(12, 12)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        """Surround the layer by what a compiler fuses and whose memory it uses again."""
        y, loss = model((mixed(x).tanh() * 2).sin())
        return (y * 3).cos() + x, loss

    parameters = [*model.parameters(), *mixed.parameters()]
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    counts = count_forwards(monkeypatch)
    for T in (7, 41):
        x = torch.randn(T, 12)
        wanted, counts[0] = gradients(block, parameters, x), 0
        require_equal(gradients(compiled, parameters, x), wanted)
        assert counts == [1]
    gc.collect()
    assert not any(memory.content for memory in operators._memories.values())  # freed with what was saved


@pytest.mark.parametrize("why", ["copied", "computed"])
def test_a_backward_whose_graph_could_not_be_held_computes_the_forward_again(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    model = layer("recompute")

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        routing, experts = model.gate(x)[0], model.experts
        if why == "computed":  # memory that a compiler may use again
            experts = experts.map(lambda w: w * 1)
        return recompute.forward(x, routing, experts), x.sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, parameters, counts = torch.randn(7, 12), list(model.parameters()), count_forwards(monkeypatch)
    wanted, counts[0] = gradients(block, parameters, x), 0
    copies = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with copies if why == "copied" else torch.enable_grad():
        found = gradients(compiled, parameters, x)
    assert [g is None for g in found] == [g is None for g in wanted]
    require_equal([g for g in found if g is not None], [g for g in wanted if g is not None])
    assert counts == [2]


def test_gradients_of_gradients_are_refused_in_a_graph() -> None:
    compiled = torch.compile(layer("sorted_dispatch"), fullgraph=True, backend="eager")
    x = torch.randn(7, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="'sorted_dispatch' has no gradients of gradients"):
        torch.autograd.grad(compiled(x)[0].square().sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_computes_under_the_autocast_that_it_was_made_under(backend: str) -> None:
    model = layer("sorted_dispatch")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, parameters = torch.randn(7, 12), list(model.parameters())
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(x)[0], model(x)[0])
            require_equal(gradients(compiled, parameters[2:], x), gradients(model, parameters[2:], x))


@pytest.mark.parametrize(
    ("implementation", "changes", "message"),
    [
        ("recompute", {"combine": "logsumexp"}, "combine of implementation recompute is 'logsumexp'; valid"),
        ("native", {"dtype": torch.float64}, "dtype of implementation native is torch.float64; valid are"),
        ("auto", {"activation": "tanh"}, "activation is 'tanh'; valid are"),
    ],
)
def test_a_graph_is_refused_what_its_operator_does_not_take(
    implementation: str, changes: dict[str, Any], message: str
) -> None:
    x, routing, experts, _ = make_inputs(replace(PLAIN, dtype=changes.get("dtype", torch.float32)))
    experts = replace(experts, activation=changes.get("activation", "silu"))
    forward = torch.compile(resolve(implementation).forward, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=message):
        forward(x, routing, experts, combine=changes.get("combine", "sum"))


def test_shapes_that_do_not_fit_are_told_where_the_graph_is_made() -> None:
    x, routing, experts, _ = make_inputs(PLAIN)
    wrong = replace(experts, w_out=experts.w_out[..., 1:])
    forward = torch.compile(resolve("sorted_dispatch").forward, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"w_out has shape \[.*\]; it must be \[5, O, 10\]"):
        forward(x, routing, wrong)
    compiled = torch.compile(layer("native"), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"x has shape \[3, 11\]; it must be \[..., 12\]"):
        compiled(torch.randn(3, 11))
    compiled = torch.compile(layer("gathered"), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="implementation 'gathered' has no gradients"):
        compiled(torch.randn(3, 12))


def test_what_a_routing_holds_is_refused_when_a_graph_runs() -> None:
    x, routing, experts, _ = make_inputs(PLAIN)
    forward = torch.compile(resolve("native").forward, fullgraph=True, backend="eager")
    forward(x, routing, experts)
    with pytest.raises(ValueError, match=r"expert_ids holds an id that is not in \[0, 5\)"):
        forward(x, routing._replace(expert_ids=routing.expert_ids + 1), experts)


@pytest.mark.parametrize("prepare", [packed.prepare, native.prepare], ids=["packed", "native"])
def test_prepared_weights_are_one_node_and_last_as_long_as_the_function(
    prepare: Callable[..., Prepared],
) -> None:
    x, routing, experts, _ = make_inputs(PLAIN)
    f = prepare(experts)
    wanted = f(x, routing)
    for backend in ("eager", "inductor"):
        assert torch.equal(torch.compile(f, fullgraph=True, backend=backend)(x, routing), wanted)
    copy = operators.hold(f).clone()
    with pytest.raises(RuntimeError, match="is not in this process: prepare and compile again"):
        torch.ops.moe_impls.prepared(copy, x, *routing, 7, "sum")


def test_the_numbers_of_a_clamp_reach_an_operator() -> None:
    problem = replace(PLAIN, activation=CLAMPED)
    x, routing, experts, _ = make_inputs(problem)
    experts = replace(experts, clamp=experts.clamp._replace(limit=float("inf"), offset=0.25))
    forward = resolve("sorted_dispatch").forward
    compiled = torch.compile(forward, fullgraph=True, backend="inductor")
    assert torch.equal(compiled(x, routing, experts), forward(x, routing, experts))


class _Output(nn.Module):
    """The layer without its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_an_exported_layer_serves_any_number_of_tokens_and_has_gradients(tmp_path: Path) -> None:
    model, T = _Output(), torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(model, (torch.randn(9, 12),), dynamic_shapes=({0: T},))
    assert operators_of(program) == ["moe_impls.auto.default"]
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for tokens in (2, 9, 130):
        x = torch.randn(tokens, 12)
        torch.testing.assert_close(again(x), model(x))
    again(x).square().sum().backward()
    model(x).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(wanted) == 5
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


class _Experts(nn.Module):
    """The experts alone, so that there is little to compile."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.w_in, self.w_out = experts.w_in, experts.w_out

    def forward(self, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        return resolve("auto").forward(x, Routing(expert_ids, gates), self.experts)


@pytest.mark.timeout(600)  # a C++ compiler reads all of torch's headers
def test_experts_are_compiled_ahead_of_time(tmp_path: Path) -> None:
    x, routing, experts, _ = make_inputs(replace(PLAIN, bias=False))
    T = torch.export.Dim("T", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(_Experts(experts), (x, *routing), dynamic_shapes=({0: T},) * 3)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "moe.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for tokens in (2, 9, 37):
            call = x[:tokens], *(t[:tokens] for t in routing)
            wanted = resolve("auto").forward(call[0], Routing(*call[1:]), experts)
            torch.testing.assert_close(compiled(*call), wanted)


def test_an_eager_call_goes_through_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an operator was called")

    monkeypatch.setattr(operators._Call, "run", fail)
    x, routing, experts, _ = make_inputs(PLAIN)
    for name in ("auto", "native", "recompute", "sorted_dispatch", "packed+prepared", "native+prepared"):
        resolve(name).forward(x, Routing(*routing), Experts(*vars(experts).values()))


def test_the_compiler_is_not_imported_before_something_is_compiled() -> None:
    code = (
        "import sys\nfrom moe_impls import MoE, resolve, transformers\nmoe = MoE(4, 4, 2, 3, k=1)\n"
        "resolve('auto')\nassert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_constant_of_graphs_is_marked_as_torch_marks_it() -> None:
    assert vars(torch.compiler.assume_constant_result(lambda: 0)) == vars(constant_in_graphs(lambda: 0))
