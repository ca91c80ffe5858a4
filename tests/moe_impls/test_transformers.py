"""Whole transformers models, tiny and with random weights, whose experts are computed by ours."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch import nn

import moe_impls.transformers as ours
from correctness.judging.budget import allowed_error, eps, roundings
from moe_impls import IMPLEMENTATIONS
from moe_impls.registry import ResolveError
from moe_impls.transformers import Refused, calls, refresh, unuse, use

# Of those that run here and need no compilation of torch.compile for each case.
FOR_CPUS = [n for n in IMPLEMENTATIONS if n not in ("compiled", "gathered", "triton_fused")]
VOCABULARY, HIDDEN, E, K = 97, 64, 8, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "moe_intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": E, "num_local_experts": E, "num_experts_per_tok": K, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "decoder_sparse_step": 1,
}  # fmt: skip
# One that is as the contract, one with shared experts, one whose weights alternate and are transposed.
FAMILIES = ("Olmoe", "Qwen2Moe", "GptOss")


def build(family: str = "Olmoe", **values: Any) -> Any:
    """Make a model of a family, with transformers' own loop over experts."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | values)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.set_experts_implementation("eager")
    return model.eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether results of two computations in one dtype are alike but for rounding."""
    limit = 1e-14 if got.dtype == torch.float64 else 2 * roundings(eps(got.dtype))
    return float((got - want).detach().abs().max()) <= limit * float(want.detach().abs().max())


def as_right(got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a result is within the budget, by what transformers' own loop loses."""
    size = exact.detach().abs().max()
    allowed = allowed_error((theirs - exact).detach().abs() / size, theirs.dtype, theirs.dtype)
    return float((got - exact).detach().abs().max() / size) <= allowed


def only_ours(model: nn.Module) -> bool:
    return sum(calls(model).values()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_model(family: str, dtype: torch.dtype) -> None:
    # In bfloat16 the rounding of one layer may change whom the next one chooses.
    model = build(family, num_hidden_layers=1 if dtype == torch.bfloat16 else 2).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens()).logits
        theirs = model(tokens()).logits
        report = use(model)
        got = model(tokens()).logits
    assert as_right(got, theirs, exact) if dtype != torch.float64 else agree(got, theirs)
    assert sum(calls(model).values()) == len(report.taken) == len(experts_modules(model))
    assert not report.refused


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of every parameter that is trained, in a training step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(tokens(), labels=tokens()).loss
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_has_the_gradients_of_the_model(
    family: str, dtype: torch.dtype, frozen: bool
) -> None:
    model = build(family).to(dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and "experts" in name))
    exact, theirs = gradients(copy.deepcopy(model).double()), gradients(model)
    use(model)
    got = gradients(model)
    assert only_ours(model)
    wrong = [name for name in exact if not as_right(got[name], theirs[name], exact[name])]
    assert wrong == []


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_and_padding_is_that_of_the_model(family: str) -> None:
    model = build(family).double()
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0  # padded on the left

    def generated() -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    want = generated()
    use(model)
    assert torch.equal(generated(), want)
    assert sum(calls(model).values()) == 2 * 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_by_ours(reentrant: bool) -> None:
    model = build().double().train()
    want = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    use(model)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(agree(p.grad, want[name]) for name, p in model.named_parameters())
    assert sum(calls(model).values()) == 4  # two layers, twice


@pytest.mark.parametrize("name", ["auto", "sorted_dispatch", "dense_mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_computes_in_its_dtype(family: str, name: str) -> None:
    model = build(family)
    exact = copy.deepcopy(model).double()(tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(tokens()).logits
        use(model, name)
        got = model(tokens()).logits
    assert got.dtype == theirs.dtype

    assert as_right(got, theirs, exact)
    assert only_ours(model)


class LowRank(nn.Module):
    """A weight with an adapter: w + b a."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        E, rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(E, 2, columns, dtype=weight.dtype) / 8)
        self.b = nn.Parameter(torch.randn(E, rows, 2, dtype=weight.dtype) / 8)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def experts_modules(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts")]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_fused_experts_are_trained_and_applied(family: str) -> None:
    model = build(family).double().requires_grad_(False)
    use(model)
    without = model(tokens()).logits
    for module in experts_modules(model):
        nn.utils.parametrize.register_parametrization(module, "gate_up_proj", LowRank(module.gate_up_proj))
    adapters = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[torch.Tensor]:
        out = model(tokens(), labels=tokens())
        return [out.logits.detach(), *torch.autograd.grad(out.loss, adapters)]

    got = step()
    with torch.no_grad():
        inference = model(tokens()).logits
    assert only_ours(model)
    unuse(model)
    want = step()
    assert len(adapters) == 4 and not agree(got[0], without)
    assert all(map(agree, got, want)) and agree(inference, want[0])


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.mul_(0.5),
    "merged through .data": lambda p: p.data.add_(torch.ones_like(p[:, :, :1])),  # as PEFT merges adapters
    "another .data": lambda p: setattr(p, "data", p.data * 0.5),
    "one expert through .data": lambda p: p.data[3].mul_(0.5),
    "loaded": lambda p: p.copy_(p.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["auto", "packed+prepared"])
def test_no_stale_copy_of_changed_weights_is_used(name: str, change: str) -> None:
    model = build("GptOss").to(torch.float32 if name == "packed+prepared" else torch.float64)
    with torch.no_grad():
        use(model, name)
        before = model(tokens()).logits
        for module in experts_modules(model):
            CHANGES[change](module.gate_up_proj)
        got = model(tokens()).logits
        unuse(model)
        want = model(tokens()).logits
    assert agree(got, want) and not agree(before, want)


def test_a_parameter_that_is_replaced_is_noticed() -> None:
    model = build("GptOss")
    use(model)
    with torch.no_grad():
        model(tokens())
        for module in experts_modules(model):
            module.down_proj = nn.Parameter(module.down_proj * -1)
        got = model(tokens()).logits
        unuse(model)
        assert agree(got, model(tokens()).logits)


def test_single_numbers_that_are_written_through_data_need_a_refresh() -> None:
    model = build("GptOss", hidden_size=256)
    use(model)
    with torch.no_grad():
        model(tokens())
        for module in experts_modules(model):
            module.gate_up_proj.data[:, 7, 11] = 40.0
        refresh(model)
        got = model(tokens()).logits
        unuse(model)
        assert agree(got, model(tokens()).logits)


def test_weights_are_laid_out_once_and_their_memory_is_told() -> None:
    model = build("GptOss")
    report = use(model)
    weights = sum(p.nbytes for module in experts_modules(model) for p in module.parameters())
    assert report.kept_bytes == weights and "MiB more" in str(report)
    with torch.no_grad():
        model(tokens())
        kept = [module._moe_impls.kept._made for module in experts_modules(model)]
        model(tokens())
        assert all(
            module._moe_impls.kept._made is k for module, k in zip(experts_modules(model), kept, strict=True)
        )
    assert use(build()).kept_bytes == 0


def test_a_compiled_model_is_one_graph_even_where_it_was_never_called() -> None:
    torch._dynamo.reset()
    ours.register()
    model = build("GptOss", num_hidden_layers=1).double()
    want = model(tokens()).logits
    model.set_experts_implementation("moe_impls:auto")
    graphs: list[torch.fx.GraphModule] = []
    got = torch.compile(model, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)(tokens())
    assert agree(got.logits, want)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in called if "moe_impls" in target] == ["moe_impls.auto.default"]


@pytest.mark.parametrize("name", FOR_CPUS)
def test_every_implementation_has_a_name_for_a_configuration(name: str) -> None:
    ours.register()
    model = build()
    with torch.no_grad():
        want = model(tokens()).logits
        model.set_experts_implementation(f"moe_impls:{name}")
        assert agree(model(tokens()).logits, want)
    assert sum(calls(model).values()) == 2
    if name != "auto":
        assert set(calls(model)) == {name}


def test_a_name_can_be_given_where_a_model_is_made() -> None:
    ours.register()
    config = transformers.OlmoeConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_impls:auto")
    model(tokens())
    assert only_ours(model)


def test_sentinel_slots_of_expert_parallel_code_add_nothing() -> None:
    module = experts_modules(build().double())[0]
    module._is_expert_parallel = True
    x, gates = torch.randn(5, HIDDEN, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    ids = torch.tensor([[0, E, E], [1, 2, E], [3, 4, 5], [E, E, E], [7, E, 6]])
    want = module(x, ids, gates)
    ours.register()
    module.config._experts_implementation_internal = "moe_impls:auto"
    assert agree(module(x, ids, gates), want)


def test_what_use_changed_is_put_back() -> None:
    model = build()
    attributes = set(vars(experts_modules(model)[0]))
    use(model)
    use(model, "sorted_dispatch")
    model(tokens())
    assert set(calls(model)) == {"sorted_dispatch"}
    unuse(model)
    assert model.config._experts_implementation == "eager"
    assert set(vars(experts_modules(model)[0])) == attributes
    assert not calls(model)


def test_a_copy_of_a_model_in_use_is_in_use() -> None:
    model = build("GptOss")
    use(model)
    with torch.no_grad():
        want = model(tokens()).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(tokens()).logits, want)


def dense() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def llama4() -> Any:
    sizes: dict[str, Any] = SIZES | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    config = transformers.Llama4TextConfig(**sizes)
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (dense, "LlamaForCausalLM was taken: it has no experts modules: it is dense"),
        (llama4, "model.layers.0.feed_forward.experts: Llama4TextExperts: .* multiply the input"),
        (lambda: nn.Linear(2, 2), "Linear was taken"),
        (lambda: build().to("meta"), "model.layers.1.mlp.experts: OlmoeExperts: .* meta device"),
        (lambda: build(hidden_act="mish"), "activation is none of the contract's"),
    ],
)
def test_a_model_of_which_nothing_can_be_taken_is_refused(model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        use(model())


@pytest.mark.parametrize("model", [transformers.OlmoeConfig(), "a/path", None])
def test_what_is_no_module_is_refused_by_its_type(model: Any) -> None:
    kind = type(model).__name__
    with pytest.raises(TypeError, match=f"model is a {kind}; it must be an nn.Module of transformers"):
        use(model, "auto")


def test_what_cannot_be_taken_is_computed_as_before_and_told() -> None:
    model = build()
    want = model(tokens()).logits
    first, second = experts_modules(model)
    first.has_post_expert_norm, first.post_expert_norm = True, nn.Identity()
    report = use(model)
    assert list(report.taken) == ["model.layers.1.mlp.experts"]
    assert "post_expert_norm" in report.refused["model.layers.0.mlp.experts"]
    assert "post_expert_norm" in str(report)
    assert agree(model(tokens()).logits, want)
    assert sum(second._moe_impls.calls.values()) == 1 and not first._moe_impls.calls


def test_a_name_in_a_configuration_does_not_fall_back() -> None:
    ours.register()
    model = build(hidden_act="mish")
    model.set_experts_implementation("moe_impls:auto")
    with pytest.raises(Refused, match="activation is none of the contract's"):
        model(tokens())


def test_an_implementation_that_does_not_take_the_model_says_why() -> None:
    with pytest.raises(Refused, match="native does not take dtype torch.float64"):
        use(build().double(), "native")
    with pytest.raises(ResolveError, match="name is 'fast'; valid are auto"):
        use(build(), "fast")
    model = build()
    use(model, "gathered")
    with pytest.raises(Refused, match="gathered has no gradients"):
        model(tokens())


def test_repeated_ids_in_a_row_are_refused() -> None:
    model = build()
    use(model)
    module = experts_modules(model)[0]
    with pytest.raises(Refused, match="an expert appears twice in a row"):
        module(torch.randn(1, HIDDEN), torch.tensor([[3, 3]]), torch.rand(1, 2))


def test_a_version_that_was_not_tested_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"transformers": "9.0.0"}[name])
    ours.register.cache_clear()
    with pytest.warns(UserWarning, match="transformers 9.0.0 was not tested"):
        use(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model)
