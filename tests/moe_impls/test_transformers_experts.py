"""What is read of the experts modules of transformers, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch import nn

from moe_impls.activation_probe import UnknownActivation, activation_of
from moe_impls.interface import Clamp, Experts, Routing
from moe_impls.sorted_dispatch import forward
from moe_impls.transformers import Refused, experts_of, form_of

T, D, H, E, K = 10, 24, 40, 8, 3
MODELS = Path(inspect.getfile(transformers)).parent / "models"
CLASS = re.compile(r"^@use_experts_implementation[^\n]*\nclass (\w+)", re.MULTILINE)
# Classes whose experts the contract cannot say, with a word of the reason.
NOT_EXPRESSIBLE = {"Inkling2Experts": "activation", "MuseSparkExperts": "post_expert_norm"}


class Config(SimpleNamespace):
    """A configuration that has every name that an experts module of transformers asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for end, value in {"_act": "silu", "experts": E, "hidden_size": D, "size": H}.items():
            if name.endswith(end):
                return value
        return 8.0


def config(**values: Any) -> Config:
    return Config(
        hidden_activation="gelu_pytorch_tanh", mlp_hidden_act="relu2", moe_latent_size=None, swiglu_limit=7.0,
        swiglu_alpha=1.702, _experts_implementation="eager", **values,
    )  # fmt: skip


def all_classes() -> list[str]:
    """``module:class`` of every experts module on the interface, read from the source."""
    return [
        f"transformers.models.{path.parent.name}.{path.stem}:{name}"
        for path in sorted(MODELS.glob("*/modeling_*.py"))
        for name in CLASS.findall(path.read_text(encoding="utf-8"))
    ]


def build(place: str, **values: Any) -> Any:
    """Make an experts module in float64, with random weights that reach its clamps."""
    module, _, name = place.partition(":")
    made = getattr(importlib.import_module(module), name)(config(**values)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return made


def place_of(name: str) -> str:
    return next(place for place in all_classes() if place.endswith(f":{name}"))


def inputs() -> tuple[torch.Tensor, Routing]:
    torch.manual_seed(1)
    ids = torch.rand(T, E).topk(K).indices
    return torch.randn(T, D, dtype=torch.float64), Routing(ids, torch.rand(T, K, dtype=torch.float64))


def disagreement(module: nn.Module) -> float:
    """The largest difference of y and of the gradients of x, gates and weights, by their largest value."""

    def results(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        x, (ids, gates) = inputs()
        leaves = [x.requires_grad_(), gates.requires_grad_(), *module.parameters()]
        y = function(x, ids, gates)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    ours = results(lambda x, ids, gates: forward(x, Routing(ids, gates), experts_of(module)))
    theirs = results(module)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def tolerance(module: nn.Module) -> float:
    """1e-14, or that of float32 where the module computes in it."""
    source = Path(sys.modules[type(module).__module__].__file__ or "").read_text(encoding="utf-8")
    body = source.partition(f"\nclass {type(module).__name__}(")[2].partition("\nclass ")[0]
    return 1e-6 if ".float()" in body else 1e-14


@pytest.mark.parametrize("place", all_classes(), ids=lambda place: place.partition(":")[2])
def test_experts_are_those_of_the_module(place: str) -> None:
    name = place.partition(":")[2]
    module = build(place)
    if name in NOT_EXPRESSIBLE:
        with pytest.raises(Refused, match=NOT_EXPRESSIBLE[name]):
            experts_of(module)
    else:
        assert disagreement(module) <= tolerance(module)


def test_every_class_on_the_interface_is_found() -> None:
    assert len(all_classes()) >= 65


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("transformers.models.llama4.modeling_llama4:Llama4TextExperts", "multiply the input"),
        ("transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashExperts", "identity experts"),
        ("transformers.models.step3p7.modeling_step3p7:Step3p7Experts", "a limit after the activation"),
    ],
)
def test_experts_beside_the_interface_are_refused_with_the_reason(place: str, reason: str) -> None:
    module = build(place, zero_expert_num=2)
    if hasattr(module, "limit"):
        module.limit = 7.0  # of silu(gate), after the activation
    with pytest.raises(Refused, match=reason):
        experts_of(module)


def mixtral() -> Any:
    return build(place_of("MixtralExperts"))


def test_a_perceptron_is_no_stack_of_experts() -> None:
    with pytest.raises(Refused, match="Linear: it has no gate_up_proj"):
        experts_of(nn.Linear(2, 2))


def test_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(Refused, match="gate_up_proj is on the meta device"):
        experts_of(mixtral().to("meta"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    module = mixtral()
    module.down_proj = nn.Parameter(module.down_proj.detach().to(dtype), requires_grad=False)
    with pytest.raises(Refused, match=f"down_proj has dtype {dtype}: it is quantised"):
        experts_of(module)


def test_weights_of_another_class_are_refused() -> None:
    class Packed(torch.Tensor):
        pass

    module = mixtral()
    module._parameters["down_proj"] = module.down_proj.detach().as_subclass(Packed)
    with pytest.raises(Refused, match="down_proj is a Packed"):
        experts_of(module)


def test_a_wrong_flag_is_told_by_the_shapes_and_by_the_activation() -> None:
    module = mixtral()
    module.is_transposed = True
    with pytest.raises(Refused, match="do not fit together, if transposed"):
        experts_of(module)
    module = build(place_of("GptOssExperts"))
    module.is_concatenated = True
    with pytest.raises(Refused, match="activation is none of the contract's"):
        experts_of(module)


def test_a_view_is_read_where_the_layout_allows() -> None:
    module = build(place_of("AriaExperts"))
    experts = experts_of(module)
    assert experts.w_in.data_ptr() == module.gate_up_proj.data_ptr()
    assert experts.w_in.shape == (E, 2 * H, D)


def clamped(limit: float, alpha: float, offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + offset)

    return function


@pytest.mark.parametrize("inside", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "clamp", [Clamp(), Clamp(10.0, 1.0, 0.0), Clamp(0.2, 1.3, 2.0), Clamp(6.54321, 1.0, -0.5)]
)
def test_the_numbers_of_a_clamp_are_measured(clamp: Clamp, inside: torch.dtype) -> None:
    function = clamped(*clamp)
    found = activation_of(lambda h: function(h.to(inside)).double(), gated=True, numbers=clamp)
    assert found == ("swiglu_clamped", clamp)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda h: nn.functional.silu(h.chunk(2, -1)[1]) * h.chunk(2, -1)[0],  # gate and up exchanged
        lambda h: nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1].clamp(-1e3, 1e3),
        lambda h: nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1].clamp(min=-7),
        lambda h: nn.functional.mish(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        lambda h: nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] * (1 + 1e-9),
        lambda h: h.bfloat16().double()[..., ::2],
        lambda h: h,
        lambda h: None,
        lambda h: h.undefined,
    ],
)  # fmt: skip
def test_what_is_no_activation_of_the_contract_is_told(wrong: Any) -> None:
    with pytest.raises(UnknownActivation, match="it is|it makes|running it failed"):
        activation_of(wrong, gated=True)


def test_a_form_says_the_layout() -> None:
    form = form_of(build(place_of("GptOssExperts")))
    assert form.transposed and form.interleaved and form.bias and form.gated
    assert list(form.names.values()) == ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
    assert isinstance(experts_of(build(place_of("GptOssExperts"))), Experts)
