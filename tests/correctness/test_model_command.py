"""`moe-impls model`: planted faults are named, what is equal is equal, bad input is told at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import (  # pyright: ignore[reportMissingImports]
    load_file,
    save_file,
)
from torch import Tensor

from correctness.models import command, families
from moe_impls.__main__ import main as package_main

Tensors = dict[str, Tensor]
E, R, ALPHA = 4, 2, 6.0
MOE, OTHER, ATTENTION = "model.layers.1.mlp", "model.layers.0.mlp", "model.layers.1.self_attn"
pytestmark = pytest.mark.xdist_group("checkpoints")
FIELDS = ("gate_proj", "up_proj", "down_proj")


def expert(e: int, field: str, block: str = MOE) -> str:
    return f"{block}.experts.{e}.{field}.weight"


def save(family: str, folder: Path) -> Path:
    model: Any = families.make(families.find(family))
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Qwen2-MoE in shards: router, shared expert, biases in the attention."""
    folder = tmp_path_factory.mktemp("original")
    save("qwen2_moe", folder)
    return folder


@pytest.fixture(scope="module")
def tensors(original: Path) -> Tensors:
    return {
        name: tensor for file in original.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def written(folder: Path, tensors: Tensors, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def fused(tensors: Tensors) -> Tensors:
    """The same with stacked experts, as transformers has them in memory."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for block in (OTHER, MOE):
        of = [[tensors[expert(e, field, block)] for field in FIELDS] for e in range(E)]
        found[f"{block}.experts.gate_up_proj"] = torch.stack([torch.cat(one[:2]) for one in of])
        found[f"{block}.experts.down_proj"] = torch.stack([one[2] for one in of])
    return found


# Each writes a fault into the tensors of a checkpoint.
def permuted(t: Tensors) -> None:
    old = dict(t)
    for to, source in enumerate((2, 0, 3, 1)):
        t.update({expert(to, f): old[expert(source, f)] for f in FIELDS})


def dropped(t: Tensors) -> None:
    for field in FIELDS:
        del t[expert(2, field)]


def zeroed(t: Tensors) -> None:
    t[expert(2, "down_proj")].zero_()


def halved(t: Tensors) -> None:
    t.update({expert(e, f): t[expert(e - 2, f)] for f in FIELDS for e in (2, 3)})


def last_for_all(t: Tensors) -> None:
    t.update({expert(e, "down_proj"): t[expert(3, "down_proj")] for e in range(E)})


def transposed(t: Tensors) -> None:
    t[f"{ATTENTION}.q_proj.weight"] = t[f"{ATTENTION}.q_proj.weight"].T


def swapped(t: Tensors) -> None:
    for e in range(E):
        gate, up = t[expert(e, "gate_proj")], t[expert(e, "up_proj")]
        t.update({expert(e, "gate_proj"): up, expert(e, "up_proj"): gate})


def interleaved(t: Tensors) -> None:
    for e in range(E):
        gate, up = t[expert(e, "gate_proj")], t[expert(e, "up_proj")]
        mixed = torch.stack([gate, up], 1).flatten(0, 1)
        t.update({expert(e, "gate_proj"): mixed[: len(gate)], expert(e, "up_proj"): mixed[len(gate) :]})


def transposed_experts(t: Tensors) -> None:
    made = fused(t)
    t.clear()
    t.update(made)
    t[f"{MOE}.experts.gate_up_proj"] = t[f"{MOE}.experts.gate_up_proj"].transpose(1, 2)


def scaled(t: Tensors) -> None:
    t[expert(1, "down_proj")] *= 2.5


def without_bias(t: Tensors) -> None:
    del t[f"{ATTENTION}.q_proj.bias"]


def bias_of_another(t: Tensors) -> None:
    t[f"{ATTENTION}.k_proj.bias"] = t[f"{ATTENTION}.v_proj.bias"]


def router_rounded(t: Tensors) -> None:
    t[f"{MOE}.gate.weight"] = t[f"{MOE}.gate.weight"].bfloat16().float()


def router_stored_narrow(t: Tensors) -> None:
    t[f"{MOE}.gate.weight"] = t[f"{MOE}.gate.weight"].bfloat16()


def router_rows(t: Tensors) -> None:
    t[f"{MOE}.gate.weight"] = t[f"{MOE}.gate.weight"][[1, 0, 3, 2]]


def without_shared(t: Tensors) -> None:
    for name in [name for name in t if "shared" in name and MOE in name]:
        del t[name]


def lora_merged_once_more(t: Tensors) -> None:
    t[expert(1, "down_proj")] += torch.randn(32, R) @ torch.randn(R, 16)


def of_another_layer(t: Tensors) -> None:
    t[expert(1, "down_proj")] = t[expert(1, "down_proj", OTHER)]


def keys_for_values(t: Tensors) -> None:
    t[f"{ATTENTION}.k_proj.weight"] = t[f"{ATTENTION}.v_proj.weight"]


def rows_for_other_rotary(t: Tensors) -> None:
    name = f"{ATTENTION}.q_proj.weight"
    t[name] = t[name].reshape(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)


def norm_less_one(t: Tensors) -> None:
    t["model.norm.weight"] -= 1


def norm_folded(t: Tensors) -> None:
    t[f"{MOE}.gate.weight"] *= t["model.layers.1.post_attention_layernorm.weight"]


def tail_lost(t: Tensors) -> None:
    t[expert(1, "down_proj")][24:] = 0


def not_a_number(t: Tensors) -> None:
    t[expert(1, "down_proj")][3, 3] = torch.nan


def unrelated(t: Tensors) -> None:
    t[expert(1, "down_proj")] = torch.randn(32, 16)


FAULTS: list[tuple[Callable[[Tensors], None], str]] = [
    (permuted, f"{MOE}.experts (down_proj, gate_up_proj): experts permuted: 0<-2, 1<-0, 2<-3, 3<-1"),
    (dropped, f"{MOE}.experts (down_proj, gate_up_proj): expert 2 is missing"),
    (zeroed, f"{MOE}.experts.down_proj: expert 2: all zeros"),
    (
        halved,
        f"{MOE}.experts (down_proj, gate_up_proj): experts 0-1 stand 2 times: each of 2 ranks has the same",
    ),
    (
        last_for_all,
        f"{MOE}.experts.down_proj: every expert is expert 3 of the reference: one was written for all",
    ),
    (
        transposed,
        f"{ATTENTION}.q_proj.weight (attention): transposed (square, so that its shape does not tell)",
    ),
    (transposed_experts, f"{MOE}.experts.gate_up_proj: experts 0-3: transposed (square, so that"),
    (swapped, f"{MOE}.experts.gate_up_proj: experts 0-3: gate and up swapped"),
    (interleaved, f"{MOE}.experts.gate_up_proj: experts 0-3: gate and up interleaved"),
    (scaled, f"{MOE}.experts.down_proj: expert 1: scaled by 5/2 (2.5)"),
    (without_bias, f"model.layers.1: bias of the attention missing: {ATTENTION}.q_proj.bias"),
    (bias_of_another, f"{ATTENTION}.k_proj.bias (attention): holds {ATTENTION}.v_proj.bias"),
    (router_rounded, f"{MOE}.gate.weight (router): rounded to bfloat16"),
    (router_stored_narrow, f"{MOE}.gate.weight (router): rounded to bfloat16, where others keep their dtype"),
    (router_rows, f"{MOE}.gate.weight (router): rows in another order: 0<-1, 1<-0, 2<-3, 3<-2"),
    (without_shared, f"model.layers.1: shared expert missing: {MOE}.shared_expert.down_proj.weight, "),
    (lora_merged_once_more, f"{MOE}.experts.down_proj: expert 1: differs by a matrix of rank 2: a LoRA"),
    (of_another_layer, f"{MOE}.experts.down_proj: expert 1 holds {OTHER}.experts.down_proj[1]"),
    (keys_for_values, f"{ATTENTION}.k_proj.weight (attention): holds {ATTENTION}.v_proj.weight"),
    (
        rows_for_other_rotary,
        f"{ATTENTION}.q_proj.weight (attention): rows in another order: 1<-4, 2<-1, 3<-5",
    ),
    (norm_less_one, "model.norm.weight: -1 added to every number"),
    (norm_folded, f"{MOE}.gate.weight (router): columns scaled, each by a factor of its own"),
    (tail_lost, f"{MOE}.experts.down_proj: expert 1: rows 24-31 of 32 are zeros"),
    (not_a_number, f"{MOE}.experts.down_proj: expert 1: 1 numbers are NaN or infinite"),
    (unrelated, f"{MOE}.experts.down_proj: expert 1: other numbers: off by"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_named_and_nothing_else(
    fault: Callable[[Tensors], None], said: str, original: Path, tensors: Tensors,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = {name: t.clone() for name, t in tensors.items()}
    fault(changed)
    status = command.main([str(written(tmp_path / "b", changed)), "--against", str(original), "--weights"])
    out = capsys.readouterr().out
    findings = [line for line in out.splitlines()[2:-1] if not line.startswith("  note:")]
    assert status == 1 and len(findings) == 1 and findings[0].strip().startswith(said), out


def relabelled(t: Tensors) -> None:
    permuted(t)
    t[f"{MOE}.gate.weight"] = t[f"{MOE}.gate.weight"][[2, 0, 3, 1]]


def all_rounded(t: Tensors) -> None:
    t.update({name: tensor.bfloat16().float() for name, tensor in t.items()})


def layers_exchanged(t: Tensors) -> None:
    old = dict(t)
    for name in (name for name in old if "layers." in name):
        first, second = "layers.0." in name, "layers.1."
        t[name] = old[name.replace("layers.0.", second) if first else name.replace(second, "layers.0.")]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (relabelled, "3<-1, as the router's rows are: the block computes the same"),
        (all_rounded, "more: rounded to bfloat16"),
        (layers_exchanged, "model.layers.0: holds what belongs to model.layers.1: "),
    ],
)
def test_what_many_tensors_share_is_told_once(
    fault: Callable[[Tensors], None], said: str, original: Path, tensors: Tensors,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = {name: t.clone() for name, t in tensors.items()}
    fault(changed)
    assert command.main([str(written(tmp_path / "b", changed)), "--against", str(original), "--weights"]) == 1
    out = capsys.readouterr().out
    assert said in out and len(out.splitlines()) <= 8, out


def test_other_formats_of_the_same_numbers_are_equal(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reordered = dict(sorted(tensors.items(), reverse=True))
    narrow = {name: t.bfloat16() for name, t in tensors.items()}
    for i, same in enumerate((tensors, reordered, fused(tensors), narrow)):
        folder = written(tmp_path / str(i), same)
        assert command.main([str(folder), "--against", str(original), "--weights"]) == 0
    assert "note: dtype: 35 of 35 tensors are bfloat16, in the reference float32" in capsys.readouterr().out


def test_everything_that_does_not_fit_is_listed_at_once(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = dict(tensors)
    changed[f"{ATTENTION}.k_proj.weight"] = tensors[f"{ATTENTION}.k_proj.weight"].T
    changed[f"{ATTENTION}.v_proj.weight"] = torch.randn(3, 4)
    changed[f"{ATTENTION}.q_proj.weight"] = tensors[f"{ATTENTION}.q_proj.weight"].T
    changed["model.extra.weight"] = torch.randn(4)
    del changed["lm_head.weight"]
    changed["model.other.weight"] = changed.pop("model.norm.weight")
    assert command.main([str(written(tmp_path / "b", changed)), "--against", str(original), "--weights"]) == 1
    out = capsys.readouterr().out
    for said in (
        f"{ATTENTION}.k_proj.weight (attention): transposed; has shape [32, 16], in the reference [16, 32]",
        f"{ATTENTION}.v_proj.weight (attention): has shape [3, 4], in the reference [16, 32]",
        f"{ATTENTION}.q_proj.weight (attention): transposed (square",
        "not in the reference: model.extra.weight",
        "head missing: lm_head.weight",
        "model.norm.weight: named model.other.weight in the subject",
    ):
        assert said in out, out


def of_uneven_experts(t: Tensors) -> None:
    del t[expert(1, "up_proj", OTHER)], t[expert(2, "down_proj")]
    t[expert(3, "gate_proj")] = torch.zeros(15, 32)
    t[expert(0, "norm")] = torch.zeros(4)


@pytest.mark.parametrize("options", [["--weights"], []], ids=["weights", "runs"])
def test_tensors_of_single_experts_are_compared_by_their_names_on_disk(
    options: list[str], original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = dict(tensors)
    of_uneven_experts(changed)
    folder = written(tmp_path / "b", changed, config_of(original))
    assert command.main([str(folder), "--against", str(original), *options]) == 1
    out = capsys.readouterr().out
    for said in (
        f"model.layers.0: tensors of experts missing: {expert(1, 'up_proj', OTHER)}\n",
        f"model.layers.1: tensors of experts missing: {expert(2, 'down_proj')}\n",
        f"model.layers.1: not in the reference: {expert(0, 'norm')}\n",
        f"{expert(3, 'gate_proj')}: has shape [15, 32], in the reference [16, 32]\n",
    ):
        assert said in out, out
    assert options or f"does not fit Qwen2MoeForCausalLM: {expert(1, 'up_proj', OTHER)} is missing; " in out


def test_a_field_that_all_experts_lack_is_listed(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [expert(e, "up_proj") for e in range(E)]
    kept = {name: t for name, t in tensors.items() if name not in lost}
    folder = written(tmp_path / "b", kept, config_of(original))
    assert command.main([str(folder), "--against", str(original), "--weights"]) == 1
    assert f"model.layers.1: tensors of experts missing: {', '.join(lost)}\n" in capsys.readouterr().out


def test_a_folder_that_does_not_fit_its_config_is_told_by_names_on_disk(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = dict(tensors)
    of_uneven_experts(changed)
    assert command.main([str(written(tmp_path / "b", changed, config_of(original)))]) == 2
    out = capsys.readouterr().err
    assert out.startswith("error: ") and out.partition("\n  ")[2].splitlines() == [
        f"{expert(1, 'up_proj', OTHER)} is missing",
        f"  {expert(2, 'down_proj')} is missing",
        f"  {expert(0, 'norm')} belongs to nothing",
        f"  {expert(3, 'gate_proj')} has shape [15, 32], the model's has [16, 32]",
    ]


def test_an_unexpected_failure_is_one_line_and_says_nothing_of_the_models(
    original: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(command, "compare_weights", fail)
    assert command.main([str(original), "--against", str(original), "--weights"]) == 2
    assert capsys.readouterr().err == "error: the comparison failed: KeyError: 'a\\nb'\n"


def test_a_prefix_of_all_names_is_one_finding(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "b", {f"module.{name}": t for name, t in tensors.items()})
    assert command.main([str(folder), "--against", str(original), "--weights"]) == 1
    assert (
        "  all names: begin with module. in the subject; compared without it\ndifferent"
        in capsys.readouterr().out
    )


def test_what_cannot_be_read_is_one_error(
    original: Path, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no header")
    (tmp_path / "empty").mkdir()
    state = written(tmp_path / "state", tensors)
    twice = written(tmp_path / "twice", tensors)
    save_file({"lm_head.weight": torch.zeros(2)}, twice / "second.safetensors")
    strange = written(tmp_path / "strange", tensors, {"model_type": "nothing"})
    for arguments, said in (
        (
            ["nowhere"],
            "nowhere does not exist; valid are a file or folder of safetensors, transformers:<family>",
        ),
        (["transformers:nothing"], "is not a family with experts; valid are afmoe, aria"),
        ([str(tmp_path / "empty"), "--against", str(original)], "holds no file *.safetensors"),
        ([str(damaged), "--against", str(original)], "cannot be read:\n  damaged.safetensors: "),
        (
            [str(twice), "--against", str(original)],
            "lm_head.weight is in model.safetensors and in second.safetensors",
        ),
        ([str(strange)], "model_type is 'nothing'; transformers has no such family"),
        ([str(state)], "needs --against: alone only a folder with a config.json can be judged"),
        (["os:getcwd", "--against", str(original)], "returns a str; it must return an nn.Module"),
        ([str(original), "--adapter", str(state)], "--adapter needs --against"),
        ([str(state), "--against", str(original), "--adapter", str(state)], "has no adapter_config.json"),
    ):
        assert command.main(arguments) == 2
        out = capsys.readouterr().err
        assert out.startswith("error: ") and said in out, out


# Of merging: what is added to each adapted matrix, from W, lora_B and lora_A of one expert or layer.
def adapter(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> Path:
    folder.mkdir()
    config = {"r": R, "lora_alpha": ALPHA, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    named = {
        f"base_model.model.{m}.lora_{half}.weight": t
        for m, ab in pairs.items()
        for half, t in zip("AB", ab, strict=True)
    }
    save_file({name: t.contiguous() for name, t in named.items()}, folder / "adapter_model.safetensors")
    return folder


def by_rank(B: Tensor) -> Tensor:
    return B.reshape(len(B), R, E)  # [out, r, E], as PEFT has it


def by_expert(B: Tensor) -> Tensor:
    return B.reshape(len(B), E, R).transpose(1, 2)


@pytest.mark.parametrize(
    ("scale", "columns", "said"),
    [
        (ALPHA / R, by_rank, ""),
        (0.0, by_rank, "the LoRA is not merged"),
        (1.0, by_rank, "the LoRA is merged with scale 1 (1); 3 is right"),
        (ALPHA, by_rank, "the LoRA is merged with scale 6 (alpha); 3 is right"),
        (ALPHA / R, by_expert, "the columns of lora_B taken expert by expert; they lie rank by rank"),
    ],
    ids=["right", "not_merged", "scale_one", "alpha_alone", "columns"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_lora_is_held_to_its_equation(
    scale: float, columns: Callable[[Tensor], Tensor], said: str, dtype: torch.dtype,
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    base = {name: t.to(dtype) for name, t in fused(tensors).items()}
    stack, linear = f"{MOE}.experts.down_proj", f"{ATTENTION}.k_proj"
    A, B = torch.randn(R * E, 16), torch.randn(32, R * E)
    a, b = torch.randn(R, 32), torch.randn(16, R)
    merged = dict(base)
    delta = torch.einsum("ore,eri->eoi", columns(B), A.reshape(E, R, 16))
    merged[stack] = (base[stack].float() + scale * delta).to(dtype)
    merged[f"{linear}.weight"] = (base[f"{linear}.weight"].float() + scale * (b @ a)).to(dtype)
    lora = adapter(tmp_path / "lora", {f"{MOE}.experts": (A, B), linear: (a, b)})
    folders = [str(written(tmp_path / name, t)) for name, t in (("merged", merged), ("base", base))]
    status = command.main([folders[0], "--against", folders[1], "--adapter", str(lora)])
    out = capsys.readouterr().out
    assert status == bool(said) and (said in out), out
    if said:
        assert f"{stack}: experts 0-3: {said}" in out and (
            "columns" in said or f"{linear}.weight: {said}" in out
        )


def test_the_command_of_the_package_is_this_one(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["moe-impls", "model", "nowhere"])
    assert package_main() == 2
    assert "nowhere does not exist; valid are a file or folder of safetensors" in capsys.readouterr().err
