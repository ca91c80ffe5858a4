"""Tiny whole models of the families of transformers, with random weights, made from their configs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch import nn
from transformers.models.auto.configuration_auto import (  # pyright: ignore[reportMissingImports]
    CONFIG_MAPPING,
)

from correctness.models.formats import class_of

LAYERS = 2
# Attributes of a config by the end of their name, and what they are set to.
SIZES: tuple[tuple[str, int], ...] = (
    ("vocab_size|vocab_size_per_layer_input", 96),
    ("hidden_size|d_model|emb_dim", 32),
    ("moe_intermediate_size|expert_ffn_hidden_size|expert_dim|expert_intermediate_size", 16),
    ("shared_intermediate_size|shared_expert_intermediate_size", 16),
    ("intermediate_size|ffn_hidden_size|ffn_dim|d_ff|intermediate_size_mlp", 48),
    ("num_hidden_layers|num_layers|n_layers|num_decoder_layers|encoder_layers|decoder_layers", LAYERS),
    ("attention_heads|num_heads|n_heads", 4),
    ("key_value_heads|kv_n_heads", 2),
    ("qk_head_dim", 16),
    ("head_dim|d_kv|kv_channels|d_head|ssm_state_size|d_state|lora_rank", 8),
    ("(?<!shared_)(?<!shared)experts", 4),
    ("experts_per_tok|experts_per_token|moe_topk|moe_top_k|top_k_experts|moe_k", 2),
    ("shared_experts|n_groups", 1),
    ("n_group|topk_group|num_expert_groups|num_limited_groups", 1),
    ("first_k_dense_replace|num_dense_layers|moe_layer_start_index|moe_layer_offset|first_k_dense", 0),
    ("decoder_sparse_step|moe_layer_freq|moe_layer_interval|interleave_moe_layer_step", 1),
    ("max_position_embeddings|sliding_window|max_seq_len", 64),
    ("key_heads|value_heads|index_n_heads|mamba_num_heads|mamba_n_heads", 2),
    ("pad_token_id", 0),
    ("bos_token_id|decoder_start_token_id", 1),
    ("eos_token_id", 2),
)
# What the names do not tell, by model type: arguments of the config.
SETTINGS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "ernie4_5_vl_moe_text": {"moe_num_experts": 4, "moe_intermediate_size": [16, 16]},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def find(family: str) -> Any:
    """Make the tiny config of a family, or of its text model where the family has several.

    Raises:
        ValueError: transformers has no such family with experts; the message lists those that it has.
    """
    if family not in names():
        raise ValueError(
            f"transformers:{family} is not a family with experts; valid are {', '.join(names())}"
        )
    for name in (f"{family}_text", family, f"{family}_mm_model", family.replace("_", "-")):
        if name in CONFIG_MAPPING:
            return shrink(CONFIG_MAPPING[name]())
    raise ValueError(f"transformers:{family} has no config of its own")


@functools.cache
def names() -> tuple[str, ...]:
    """List the families whose source has a class of experts."""
    folder = Path(str(transformers.__file__)).parent / "models"
    sources = {file.parent.name: file for file in sorted(folder.glob("*/modeling_*.py"))}
    experts = re.compile(r"^class \w*(Experts|MoE|Moe|MoeBlock|SparseMLP|ExpertGLU)\(", re.MULTILINE)
    return tuple(f for f, file in sources.items() if experts.search(file.read_text(encoding="utf-8")))


def shrink(config: Any) -> Any:
    """Make a config like another, with the sizes set by the names of its attributes."""
    given: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "attribute_map"):  # a config in a config
            given[name] = shrink(value)
        size = next((size for ending, size in SIZES if re.search(f"(^|_)({ending})$", name)), None)
        if size is not None and (value is None or type(value) is int):
            given[name] = size
        if (
            isinstance(value, list)
            and len(value) > LAYERS
            and re.search(r"layer_types|mlp_layer|layers_block", name)
        ):
            given[name] = value[:LAYERS]
    if "kv_lora_rank" in given:  # each head has keys of its own
        given["num_key_value_heads"] = 4
    return type(config)(**given | SETTINGS.get(config.model_type, {}))


def make(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Make the model of a config, all parameters drawn at random."""
    torch.manual_seed(seed)
    config._experts_implementation = "eager"
    model = class_of(config)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(drawn + 1 if parameter.dim() == 1 else drawn)
        kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        for buffer in model.buffers():  # such as a router's selection bias
            if buffer.is_floating_point() and id(buffer) in kept:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.to(dtype)
