"""What is measured, as data: grids of synthetic layers and the layers of released models.

A workload is a ``Problem`` (shapes, dtype, device, load, seed) and a mode. The name of the problem is the
``workload`` column: ``sweep`` for synthetic layers, otherwise the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from correctness.problems.loads import LOADS, load_named
from correctness.problems.problem import Problem
from moe_impls.interface import GATED_ACTIVATIONS, RouterSpec, check_choice

# forward: inference, no gradients recorded. forward_backward: y, then the gradients of x, the gates and
# every weight from a random dy.
MODES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Workloads:
    """Every combination of the tuples is one problem; those with K > E do not exist and are left out."""

    name: str = "sweep"
    T: tuple[int, ...] = (512,)
    D: tuple[int, ...] = (256,)
    H: tuple[int, ...] = (128,)
    E: tuple[int, ...] = (32,)
    K: tuple[int, ...] = (4,)
    O: int | None = None  # D unless given
    load: tuple[str, ...] = ("uniform",)
    activation: str = "swiglu"
    output_activation: str = "none"
    bias: bool = False
    router: RouterSpec | None = None  # of a model; None is softmax over the logits, top K
    modes: tuple[str, ...] = MODES
    source: str = ""

    def problems(self) -> Iterator[Problem]:
        for load, D, H, E, K, T in itertools.product(self.load, self.D, self.H, self.E, self.K, self.T):
            if K <= E:
                yield Problem(
                    self.name, T, D, H, self.O or D, E, K,
                    activation=self.activation, output_activation=self.output_activation,
                    bias=self.bias, load=load,
                )  # fmt: skip


HUB = "https://huggingface.co"


def _model(
    name: str, D: int, H: int, E: int, K: int, source: str, *, activation: str = "swiglu",
    output_activation: str = "none", bias: bool = False, **router: Any,
) -> Workloads:  # fmt: skip
    """T is a small batch of tokens, so that full-size weights can be measured on a CPU; --T takes others."""
    return Workloads(
        name, T=(16,), D=(D,), H=(H,), E=(E,), K=(K,), activation=activation,
        output_activation=output_activation, bias=bias, router=RouterSpec(top_k=K, **router),
        source=source if "/" not in source or "://" in source else f"{HUB}/{source}",
    )  # fmt: skip


_SIGMOID: dict[str, Any] = {"score": "sigmoid", "renormalise": True}
_CHOSEN: dict[str, Any] = {"score": "topk_softmax"}
# The routed experts of released models and their routers, from the published configurations; shared experts
# are a dense layer beside them. Left out: what has no place in the contract (gates on the experts' inputs in
# Llama 4, sampled choices in Phi-3.5-MoE) or in a configuration (Grok-1's activation).
_MODELS = (
    _model("mixtral-8x7b", 4096, 14336, 8, 2, "mistralai/Mixtral-8x7B-v0.1", renormalise=True),
    _model("mixtral-8x22b", 6144, 16384, 8, 2, "mistralai/Mixtral-8x22B-v0.1", renormalise=True),
    _model("olmoe-1b-7b", 2048, 1024, 64, 8, "allenai/OLMoE-1B-7B-0924"),
    _model("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4, "Qwen/Qwen1.5-MoE-A2.7B"),
    _model("qwen2-57b-a14b", 3584, 2560, 64, 8, "Qwen/Qwen2-57B-A14B"),
    _model("qwen3-30b-a3b", 2048, 768, 128, 8, "Qwen/Qwen3-30B-A3B", renormalise=True),
    _model("qwen3-235b-a22b", 4096, 1536, 128, 8, "Qwen/Qwen3-235B-A22B", renormalise=True),
    _model("qwen3-next-80b-a3b", 2048, 512, 512, 10, "Qwen/Qwen3-Next-80B-A3B-Instruct", renormalise=True),
    _model("deepseek-v2-lite", 2048, 1408, 64, 6, "deepseek-ai/DeepSeek-V2-Lite"),
    _model(
        "deepseek-v2", 5120, 1536, 160, 6, "deepseek-ai/DeepSeek-V2",
        scale=16.0, groups=8, keep_groups=3, group_score="max",
    ),
    _model(
        "deepseek-v3", 7168, 2048, 256, 8, "deepseek-ai/DeepSeek-V3",
        **_SIGMOID, scale=2.5, groups=8, keep_groups=4, group_score="top2_sum",
    ),
    _model("kimi-k2", 7168, 2048, 384, 8, "moonshotai/Kimi-K2-Instruct", **_SIGMOID, scale=2.827),
    _model("glm-4.5-air", 4096, 1408, 128, 8, "zai-org/GLM-4.5-Air", **_SIGMOID),
    _model(
        "gpt-oss-20b", 2880, 2880, 32, 4, "openai/gpt-oss-20b",
        activation="swiglu_clamped", bias=True, **_CHOSEN,
    ),
    _model(
        "gpt-oss-120b", 2880, 2880, 128, 4, "openai/gpt-oss-120b",
        activation="swiglu_clamped", bias=True, **_CHOSEN,
    ),
    _model("granite-3.0-1b-a400m", 1024, 512, 32, 8, "ibm-granite/granite-3.0-1b-a400m-base", **_CHOSEN),
    _model("granite-3.0-3b-a800m", 1536, 512, 40, 8, "ibm-granite/granite-3.0-3b-a800m-base", **_CHOSEN),
    _model("dbrx", 6144, 10752, 16, 4, "databricks/dbrx-base", renormalise=True),
    # The notebook fixes K, the ReLU experts with their ReLU output and the biases; the sizes are ours.
    _model(
        "notebook", 512, 1024, 16, 4, "sizes chosen here",
        activation="relu", output_activation="relu", bias=True, **_CHOSEN,
    ),
    # The paper goes from 4 to 131072 experts; this is its largest flat layer.
    _model(
        "shazeer-2017", 512, 1024, 256, 4, "https://arxiv.org/abs/1701.06538", activation="relu", **_CHOSEN
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _MODELS}

# A full product of T, E and K; the same layer in its middle under every other load; real models.
GRIDS: dict[str, tuple[Workloads, ...]] = {
    "smoke": (Workloads(T=(16, 64), D=(64,), H=(32,), E=(4, 8), K=(2,)),),
    "default": (
        Workloads(T=(16, 128, 512), E=(8, 16, 32), K=(2, 4, 8)),
        Workloads(T=(512,), E=(16,), K=(4,), load=tuple(load for load in LOADS if load != "uniform")),
        replace(MODELS["olmoe-1b-7b"], modes=("forward",)),  # its gradients would take most of the time
    ),
    # Few tokens: the weights that are read decide.
    "latency": (
        Workloads(T=(1, 2, 4, 8, 16, 32, 64), D=(1024,), H=(512,), E=(8, 64), K=(2, 8)),
        *(replace(MODELS[name], T=(1, 4, 16, 64)) for name in ("olmoe-1b-7b", "notebook")),
    ),
    # Many tokens, up to what fits: cells that need more memory than there is become rows that say so.
    "throughput": (
        Workloads(T=(1024, 4096, 16384, 65536), D=(1024,), H=(512,), E=(8, 64), K=(2, 8)),
        *(replace(MODELS[name], T=(1024, 4096, 16384)) for name in ("olmoe-1b-7b", "notebook")),
    ),
    "full": (
        Workloads(T=(1, 16, 128, 1024, 4096), E=(8, 32, 128), K=(1, 2, 4, 8)),
        Workloads(
            T=(1024, 4096), E=(32, 128), K=(4,), load=tuple(load for load in LOADS if load != "uniform")
        ),
        *(replace(model, T=(1, 16, 128)) for model in MODELS.values()),
    ),
}

# Seconds to spend on the samples of each cell, unless its minimum number of rounds takes longer.
SECONDS = {"smoke": 0.05, "default": 0.1, "latency": 0.5, "throughput": 0.5, "full": 1.0}


def chosen(
    blocks: Sequence[Workloads],
    models: Sequence[str],
    sizes: Mapping[str, Sequence[int]],
    loads: Sequence[str],
) -> list[Workloads]:
    """The blocks, or the layers of models instead, with the given sizes and loads in place of their own.

    Raises:
        ValueError: something given is not valid; the message names the option.
    """
    for name in models:
        check_choice("--model", name, tuple(MODELS))
    given = {size: tuple(dict.fromkeys(values)) for size, values in sizes.items() if values}
    for size, values in given.items():
        if min(values) < 1:
            raise ValueError(f"--{size} is {min(values)}; it must be at least 1")
    fixed = [f"--{size}" for size in given if size != "T"]
    if models and fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be given with --model, whose layer is fixed; valid is --T"
        )
    changes: dict[str, Any] = dict(given)
    for load in loads:
        load_named(load, "--load")
    if loads:
        changes["load"] = tuple(dict.fromkeys(loads))
    found = [replace(block, **changes) for block in ([MODELS[name] for name in models] or blocks)]
    for problem in (problem for block in found for problem in block.problems()):
        load_named(problem.load)(replace(problem, T=1), torch.Generator())  # raises if it takes more experts
    if {"E", "K"} & set(given):
        for block in found:
            if max(block.K) > min(block.E):
                raise ValueError(f"--K is {max(block.K)}; it must not exceed E, here {min(block.E)}")
    return found


def flops(problem: Problem, mode: str) -> int:
    """Floating-point operations of the expert products of one call; a multiply-add counts two.

    2·T·K·(F·D + O·H), and three times that with the backward: 6·T·K·D·H and 18 for gated experts with
    O = D, 4 and 12 for others. The router, activations and the combine are not counted.
    """
    p = problem
    rows_in = p.H * (2 if p.activation in GATED_ACTIVATIONS else 1)
    forward = 2 * p.T * p.K * (rows_in * p.D + p.O * p.H)
    return forward * {"forward": 1, "forward_backward": 3}[mode]
