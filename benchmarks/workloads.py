"""What is measured, as data: grids of synthetic layers and the layers of released models.

A workload is a ``Problem`` (shapes, dtype, device, load, seed) and a mode. The name of the problem is the
``workload`` column: ``sweep`` for synthetic layers, otherwise the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from correctness.problems import LOADS, Problem
from moe_impls.interface import GATED_ACTIVATIONS, RouterSpec

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
    source: str = ""

    def problems(self) -> Iterator[Problem]:
        for load, D, H, E, K, T in itertools.product(self.load, self.D, self.H, self.E, self.K, self.T):
            if K <= E:
                yield Problem(
                    self.name, T, D, H, self.O or D, E, K,
                    activation=self.activation, output_activation=self.output_activation,
                    bias=self.bias, load=load,
                )  # fmt: skip


# The layers of released models, from their published configurations. T is a small batch of tokens, so that
# full-size weights can be measured on a CPU; --T takes others.
_MODELS = (
    Workloads(
        "mixtral-8x7b", D=(4096,), H=(14336,), E=(8,), K=(2,),
        router=RouterSpec(top_k=2, renormalise=True), source="https://huggingface.co/mistralai/Mixtral-8x7B-v0.1",
    ),
    Workloads(
        "olmoe-1b-7b", D=(2048,), H=(1024,), E=(64,), K=(8,),
        router=RouterSpec(top_k=8), source="https://huggingface.co/allenai/OLMoE-1B-7B-0924",
    ),
    Workloads(
        "qwen3-30b-a3b", D=(2048,), H=(768,), E=(128,), K=(8,),
        router=RouterSpec(top_k=8, renormalise=True), source="https://huggingface.co/Qwen/Qwen3-30B-A3B",
    ),
    Workloads(
        "deepseek-v3", D=(7168,), H=(2048,), E=(256,), K=(8,),
        router=RouterSpec(
            top_k=8, score="sigmoid", renormalise=True, scale=2.5, groups=8, keep_groups=4,
            group_score="top2_sum",
        ),
        source="https://huggingface.co/deepseek-ai/DeepSeek-V3",
    ),
    Workloads(
        "gpt-oss-20b", D=(2880,), H=(2880,), E=(32,), K=(4,), activation="swiglu_clamped", bias=True,
        router=RouterSpec(top_k=4, score="topk_softmax"), source="https://huggingface.co/openai/gpt-oss-20b",
    ),
    # The notebook fixes K, the ReLU experts with their ReLU output and the biases; the sizes are ours.
    Workloads(
        "notebook", D=(512,), H=(1024,), E=(16,), K=(4,), activation="relu", output_activation="relu",
        bias=True,
        router=RouterSpec(top_k=4, score="topk_softmax"), source="sizes chosen here",
    ),
    # The paper goes from 4 to 131072 experts; this is its largest flat layer.
    Workloads(
        "shazeer-2017", D=(512,), H=(1024,), E=(256,), K=(4,), activation="relu",
        router=RouterSpec(top_k=4, score="topk_softmax"), source="https://arxiv.org/abs/1701.06538",
    ),
)  # fmt: skip
MODELS = {model.name: replace(model, T=(16,)) for model in _MODELS}

# A full product of T, E and K; the same layer in its middle under every other load; real models.
GRIDS: dict[str, tuple[Workloads, ...]] = {
    "smoke": (Workloads(T=(16, 64), D=(64,), H=(32,), E=(4, 8), K=(2,)),),
    "default": (
        Workloads(T=(16, 128, 1024), E=(8, 32, 64), K=(2, 4, 8)),
        Workloads(T=(1024,), E=(32,), K=(4,), load=tuple(load for load in LOADS if load != "uniform")),
        MODELS["olmoe-1b-7b"],
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


def flops(problem: Problem, mode: str) -> int:
    """Floating-point operations of the expert products of one call; a multiply-add counts two.

    2·T·K·(F·D + O·H), and three times that with the backward: 6·T·K·D·H and 18 for gated experts with
    O = D, 4 and 12 for others. The router, activations and the combine are not counted.
    """
    p = problem
    rows_in = p.H * (2 if p.activation in GATED_ACTIVATIONS else 1)
    forward = 2 * p.T * p.K * (rows_in * p.D + p.O * p.H)
    return forward * {"forward": 1, "forward_backward": 3}[mode]
