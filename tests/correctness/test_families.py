"""Families of transformers by name: which there are, what is found by running them, what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from correctness.checks.case import cases
from correctness.checks.layers import layer
from correctness.families import beside, probe, tiny
from correctness.families.reading import perceptron_of, reading_of
from correctness.judging.finding import CheckFailed
from correctness.session.families import family_layer, named_layers
from correctness.session.layer_subject import resolve_layer
from moe_impls import RouterSpec
from moe_impls.registry import ResolveError
from reporting.provenance import ROOT

# A softmax, a sigmoid gate of a shared expert, groups with a selection bias, biases interleaved with a clamp.
SAMPLE = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_passes_every_check_that_it_declares(family: str) -> None:
    for case in cases([resolve_layer(f"transformers:{family}")]):
        if not case.skip:
            case.run()


def test_the_router_is_found_by_running_it() -> None:
    found = {family: reading_of(probe.randomise(tiny.make(family))).router.spec for family in SAMPLE}
    assert found == {
        "olmoe": RouterSpec(2),
        "qwen2_moe": RouterSpec(2),
        "deepseek_v3": RouterSpec(2, "sigmoid", True, 2.5, 2, 1, "top2_sum", epsilon=1e-20),
        "gpt_oss": RouterSpec(2, renormalise=True),
    }


def test_the_epsilon_of_renormalising_is_measured() -> None:
    assert reading_of(probe.randomise(tiny.make("lfm2_moe"))).router.spec.epsilon == 1e-6


def test_an_rms_norm_before_the_router_and_a_scale_of_each_expert_are_found() -> None:
    router = reading_of(probe.randomise(tiny.make("gemma4"))).router
    assert (router.norm, router.norm_epsilon) == ("router.scale", 1e-6)
    assert router.roles == {"expert_scale": "router.per_expert_scale"}


def test_what_another_setting_of_the_config_changes_is_found() -> None:
    block = probe.randomise(tiny.make("olmoe", norm_topk_prob=True))
    assert reading_of(block).router.spec == RouterSpec(2, renormalise=True)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("axk1", "post_mlp_layernorm"),
        ("inkling2", "activation"),
        ("zaya", "choice of experts"),
        *beside.REFUSED.items(),
    ],
)
def test_what_the_contract_cannot_say_is_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(ResolveError, match=f"transformers:{family} is refused: .*{reason}"):
        family_layer(f"transformers:{family}")


def test_an_unknown_family_is_answered_with_those_that_there_are() -> None:
    families = r"mixtral, .*olmoe, .*; all means each of them$"
    with pytest.raises(ResolveError, match=rf"no family 'olmo9' with experts; it has .*{families}"):
        named_layers(["transformers:olmo9"])
    with pytest.raises(ResolveError, match=rf"the family 'olmo' of .* has no MoE block; those .*{families}"):
        named_layers(["transformers:olmo"])


def test_a_family_with_two_blocks_means_both() -> None:
    names = named_layers(["transformers:qwen3_omni_moe", "other.py:Layer"])
    assert [name.rpartition(".")[2] for name in names] == [
        "Qwen3OmniMoeThinkerTextExperts",
        "Qwen3OmniMoeTalkerTextExperts",
        "py:Layer",
    ]
    with pytest.raises(ResolveError, match="several blocks; name one of transformers:qwen3_omni_moe.Qwen3"):
        resolve_layer("transformers:qwen3_omni_moe")


def test_blocks_are_known_of_every_class_on_the_interface() -> None:
    blocks = tiny.blocks("all")
    assert len(blocks) == len(set(blocks)) >= 65
    assert set(tiny.BESIDE) <= set(blocks)


def test_a_fault_of_a_block_is_found() -> None:
    """Scale one expert's output in place of all: what NLLB-MoE's use of two experts alone is like."""
    tested = family_layer("transformers:olmoe")

    class Faulty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = tested.make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.01 * self.block(x)

    faulty = layer("faulty", replace(tested, make=Faulty, read=lambda m: tested.read(m.block)))
    (values,) = (case for case in cases([faulty]) if case.check.name == "values")
    with pytest.raises(CheckFailed, match="faulty fails 'values'"):
        values.run()


def test_nllb_uses_two_experts_alone() -> None:
    (values,) = (c for c in cases([resolve_layer("transformers:nllb_moe")]) if c.check.name == "values")
    with pytest.raises(CheckFailed, match=r"y\[\d+, \d+\] is .* times its budget"):
        values.run()


def test_a_perceptron_whose_gate_comes_second_is_read_gates_first() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) * nn.functional.gelu(self.b(x)))

    found = perceptron_of(nn.ModuleDict({"mlp": Mlp()}), "mlp")
    assert (found.inner, found.outer, found.activation) == (("b", "a"), "c", "geglu")


def test_transformers_is_imported_only_for_a_family() -> None:
    code = "import sys, correctness.session.subjects; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
