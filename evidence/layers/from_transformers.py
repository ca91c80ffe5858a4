"""transformers: blocks with settings of the config that a family's own default does not have."""

from typing import Any

import torch

from correctness.families import beside, probe, reading, tiny
from moe_impls import LayerSupport, LayerWeights

SUPPORT = LayerSupport(leading="batch_sequence", router_dtype="input")
READ = {
    "LongcatFlashMoE": beside.READINGS["longcat_flash"].read,
    "NllbMoeSparseMLP": beside.READINGS["nllb_moe"].read,
}


def longcat_router_bias() -> torch.nn.Module:
    """Make the block of LongCat-Flash with router_bias=True."""
    return tiny.make("longcat_flash", router_bias=True)


def nllb() -> torch.nn.Module:
    """Make the block of NLLB-MoE."""
    return tiny.make("nllb_moe")


def mixtral_jitter() -> torch.nn.Module:
    """Make the block of Mixtral with noise in training."""
    return tiny.make("mixtral", router_jitter_noise=0.1)


def minimax_jitter() -> torch.nn.Module:
    """Make the block of MiniMax with noise in training."""
    return tiny.make("minimax", router_jitter_noise=0.1)


def read(layer: Any) -> LayerWeights:
    """Read a block as its family is read."""
    name = type(layer).__name__
    if name not in READ:
        family = {"MixtralSparseMoeBlock": "mixtral", "MiniMaxSparseMoeBlock": "minimax"}[name]
        READ[name] = reading.reading_of(probe.randomise(tiny.make(family))).read
    return READ[name](layer)
