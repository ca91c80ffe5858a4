"""`moe-impls model` where models run: the first output that differs is named, and what is right agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from correctness.models import command, families

# Models of a user: a checkpoint as transformers loads it, with one thing done to it.
PATCHED = """
import torch
import transformers


def right(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")


def patched(path, part, change):
    model = right(path)
    module = model.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(module, forward, *args, **kwargs)
    return model


def router_in_bfloat16(path):
    def change(gate, forward, x):
        logits = (x.flatten(0, -2).bfloat16() @ gate.weight.bfloat16().T).to(x.dtype)
        gates, ids = logits.softmax(-1).topk(gate.top_k, -1)
        return logits, gates, ids

    return patched(path, "model.layers.1.mlp.gate", change)


def no_shared_expert(path):
    return patched(path, "model.layers.0.mlp.shared_expert", lambda module, forward, x: x * 0)


def half(path):
    return patched(path, "model.layers.1.mlp.experts", lambda module, forward, *args: 0.5 * forward(*args))


def renormalised(path):
    def change(gate, forward, x):
        logits, gates, ids = forward(x)
        return logits, gates / gates.sum(-1, keepdim=True), ids

    return patched(path, "model.layers.1.mlp.gate", change)


def an_expert_left_out(path):
    def change(module, forward, x, ids, gates):
        return forward(x, ids, torch.where(ids == 2, 0, gates))

    return patched(path, "model.layers.1.mlp.experts", change)


def epsilon_of_the_norm(path):
    model = right(path)
    model.model.norm.variance_epsilon = 1e-3
    return model


def attention_scaled(path):
    model = right(path)
    model.model.layers[1].self_attn.scaling *= 2
    return model


def gates_without_gradient(path):
    def change(module, forward, x, ids, gates):
        return forward(x, ids, gates.detach())

    return patched(path, "model.layers.1.mlp.experts", change)


def gradient_doubled(path):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context, y):
            return y.view_as(y)

        @staticmethod
        def backward(context, gradient):
            return 2 * gradient

    def change(module, forward, *args):
        return Doubled.apply(forward(*args))

    return patched(path, "model.layers.0.mlp.experts", change)


def not_loaded():
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen2MoeConfig())
"""
FIRST = ": the first output that differs"
ROUTED = f"mlp.experts{FIRST} (Qwen2MoeExperts), "
FAULTS = (
    (
        "router_in_bfloat16",
        f"model.layers.1.mlp.gate{FIRST} (Qwen2MoeTopKRouter), its numbers are those of bf",
    ),
    ("no_shared_expert", f"model.layers.0.mlp.shared_expert{FIRST} (Qwen2MoeMLP), it is all zeros"),
    ("half", f"model.layers.1.{ROUTED}it is 0.5 times the reference's: a factor is missing"),
    ("renormalised", f"model.layers.1.{ROUTED}each token is scaled by a factor of its own"),
    ("an_expert_left_out", f"model.layers.1.{ROUTED}in "),
    (
        "epsilon_of_the_norm",
        f"model.norm{FIRST} (Qwen2MoeRMSNorm), each token is scaled by a factor of its own",
    ),
    ("attention_scaled", f"model.layers.1.self_attn.o_proj{FIRST} (Linear), in "),
    ("gates_without_gradient", "gradients: none of model.layers.1.mlp.gate.weight"),
    ("gradient_doubled", "model.layers.0.mlp.experts."),
)
CONFIGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    (
        "qwen2_moe",
        {"norm_topk_prob": True},
        f"model.layers.0.{ROUTED}each token is scaled by a factor of its own",
    ),
    ("qwen2_moe", {"num_experts_per_tok": 1}, f"model.layers.0.{ROUTED}in 32 of 32 tokens"),
    ("qwen2_moe", {"hidden_act": "gelu"}, f"model.layers.0.mlp.shared_expert.act_fn{FIRST}"),
    (
        "deepseek_v3",
        {"routed_scaling_factor": 1.0},
        f"model.layers.0.mlp.experts{FIRST} (DeepseekV3Experts), it is 0.4",
    ),
    ("qwen2_moe", {"vocab_size": 128}, "note: tensors only: "),
)
# Layouts on disk that are not those in memory, embeddings that are tied, parts in float32, an encoder.
SAMPLE = (
    "qwen2_moe",
    "gpt_oss",
    "phimoe",
    "granitemoe",
    "deepseek_v3",
    "gemma4",
    "jetmoe",
    "switch_transformers",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by the names of their families, and a file of models that a user makes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in ("qwen2_moe", "deepseek_v3"):
        model: Any = families.make(families.find(family))
        model.save_pretrained(folder / family, max_shard_size="40KB")
    (folder / "made.py").write_text(PATCHED, encoding="utf-8")
    return folder


def findings(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if ": " in line and not line.startswith("  note:")]


def test_a_model_of_the_same_code_and_numbers_agrees(checkpoints: Path, tmp_path: Path) -> None:
    written = tmp_path / "verdict.json"
    made = f"{checkpoints / 'made.py'}:right"
    assert command.main([made, "--against", str(checkpoints / "qwen2_moe"), "--json", str(written)]) == 0
    verdict = json.loads(written.read_text(encoding="utf-8"))
    assert verdict["equal"] and verdict["findings"] == [] and verdict["tensors"] == 35
    assert [what for what, _ in verdict["rows"]][:4] == ["model.layers.0", "model.layers.1", "logits", "loss"]
    assert all(fraction < 1 for _, fraction in verdict["rows"])


def test_a_folder_alone_is_run_by_the_experts_that_transformers_chooses(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(checkpoints / "qwen2_moe")]) == 0
    assert "note: in float32: experts by grouped_mm do not run in float64 (" in capsys.readouterr().out


@pytest.mark.parametrize(("function", "said"), FAULTS, ids=[function for function, _ in FAULTS])
def test_the_first_module_that_differs_is_named(
    function: str, said: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = f"{checkpoints / 'made.py'}:{function}"
    assert command.main([made, "--against", str(checkpoints / "qwen2_moe")]) == 1
    out = capsys.readouterr().out
    told = findings(out)
    assert any(line.startswith(said) for line in told), out
    # A norm's epsilon is no matter of gates.
    assert ("renormalised" in out) == (function == "renormalised")


@pytest.mark.parametrize(("family", "change", "said"), CONFIGS)
def test_fields_that_differ_are_listed_with_what_they_change(
    family: str,
    change: dict,
    said: str,
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(checkpoints / family, tmp_path / "b")
    config = tmp_path / "b" / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(fields | change), encoding="utf-8")
    assert command.main([str(tmp_path / "b"), "--against", str(checkpoints / family)]) == 1
    out = capsys.readouterr().out
    ((name, value),) = change.items()
    assert f"config: {name} is {value!r}, in the reference {fields[name]!r}" in out and said in out, out


def test_a_model_that_loads_other_numbers_is_not_the_checkpoint(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = f"{checkpoints / 'made.py'}:right"
    with torch.no_grad():
        other: Any = families.make(families.find("qwen2_moe"), seed=1)
    other.save_pretrained(checkpoints / "other")
    assert command.main([str(checkpoints / "other"), "--against", str(checkpoints / "qwen2_moe")]) == 1
    assert "model.embed_tokens: the first output that differs" in capsys.readouterr().out
    assert command.main([made, "--against", str(checkpoints / "other")]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_saved_in_shards_and_loaded_again_is_equal(
    family: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([f"transformers:{family}", "--dtype", dtype]) == 0, capsys.readouterr().out
