"""Sizes and routers of released models, as data: the only list of them.

Workloads, router problems and the exact problems at the (E, K) of models are made from it, so that a model is
added by its lines here. Facts are of the published configurations (``config.json`` on the Hub), unless the
source is another address; defaults of configuration classes differ from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_impls.interface import Clamp
from moe_impls.router_interface import RouterSpec

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Model:
    """The routed experts of one layer of a model.

    D, H: features of a token, and hidden features of an expert.
    router: None if `RouterSpec` cannot say it.
    selection_bias: whether a bias decides with the scores who is chosen.
    shared: hidden features of the experts that every token visits beside these, all together; a dense layer.
    gap: what the layer does that the contract cannot say; its sizes and its router still count.
    """

    name: str
    D: int
    H: int
    E: int
    K: int
    source: str
    router: RouterSpec | None
    selection_bias: bool = False
    activation: str = "swiglu"
    clamp: Clamp = Clamp()
    output_activation: str = "none"
    bias: bool = False
    shared: int = 0
    gap: str = ""


def _model(
    name: str, D: int, H: int, E: int, K: int, source: str, *, router: dict[str, Any] | None, **others: Any
) -> Model:
    spec = None if router is None else RouterSpec(top_k=K, **router)
    return Model(name, D, H, E, K, source if "://" in source else f"{HUB}/{source}", spec, **others)


_SOFTMAX: dict[str, Any] = {}
_SOFTMAX_TO_ONE = {"renormalise": True}
_SOFTMAX_OF_CHOSEN = {"score": "topk_softmax"}
# Their code divides by the sum of the gates + 1e-20.
_SIGMOID_TO_ONE = {"score": "sigmoid", "renormalise": True, "epsilon": 1e-20}
_LLAMA = {"router": {"score": "sigmoid"}, "gap": "gates multiply the experts' inputs", "shared": 8192}
_GPT_OSS = {"router": _SOFTMAX_OF_CHOSEN, "activation": "swiglu_clamped", "bias": True}
_PAPER = "https://arxiv.org/abs/1701.06538"

_MODELS = (
    _model("switch-base-8", 768, 3072, 8, 1, "google/switch-base-8", router=_SOFTMAX, activation="relu",
           gap="tokens beyond an expert's capacity are dropped"),
    _model("mixtral-8x7b", 4096, 14336, 8, 2, "mistralai/Mixtral-8x7B-v0.1", router=_SOFTMAX_TO_ONE),
    _model("mixtral-8x22b", 6144, 16384, 8, 2, "mistralai/Mixtral-8x22B-v0.1", router=_SOFTMAX_TO_ONE),
    _model("llama-4-scout", 5120, 8192, 16, 1, "meta-llama/Llama-4-Scout-17B-16E", **_LLAMA),
    _model("llama-4-maverick", 5120, 8192, 128, 1, "meta-llama/Llama-4-Maverick-17B-128E", **_LLAMA),
    _model("olmoe-1b-7b", 2048, 1024, 64, 8, "allenai/OLMoE-1B-7B-0924", router=_SOFTMAX),
    _model("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4, "Qwen/Qwen1.5-MoE-A2.7B", router=_SOFTMAX, shared=5632),
    _model("qwen2-57b-a14b", 3584, 2560, 64, 8, "Qwen/Qwen2-57B-A14B", router=_SOFTMAX, shared=20480),
    _model("qwen3-30b-a3b", 2048, 768, 128, 8, "Qwen/Qwen3-30B-A3B", router=_SOFTMAX_TO_ONE),
    _model("qwen3-235b-a22b", 4096, 1536, 128, 8, "Qwen/Qwen3-235B-A22B", router=_SOFTMAX_TO_ONE),
    _model("qwen3-next-80b-a3b", 2048, 512, 512, 10, "Qwen/Qwen3-Next-80B-A3B-Instruct",
           router=_SOFTMAX_TO_ONE, shared=512),
    _model("deepseek-v2-lite", 2048, 1408, 64, 6, "deepseek-ai/DeepSeek-V2-Lite", router=_SOFTMAX,
           shared=2816),
    _model("deepseek-v2", 5120, 1536, 160, 6, "deepseek-ai/DeepSeek-V2", shared=3072,
           router={"scale": 16.0, "groups": 8, "keep_groups": 3}),
    _model("deepseek-v3", 7168, 2048, 256, 8, "deepseek-ai/DeepSeek-V3", selection_bias=True, shared=2048,
           router={**_SIGMOID_TO_ONE, "scale": 2.5, "groups": 8, "keep_groups": 4,
                   "group_score": "top2_sum"}),
    _model("deepseek-v4-flash", 4096, 2048, 256, 6, "deepseek-ai/DeepSeek-V4-Flash-Base", selection_bias=True,
           router={**_SIGMOID_TO_ONE, "score": "sqrtsoftplus", "scale": 1.5}, shared=2048,
           activation="swiglu_clamped", clamp=Clamp(10.0, 1.0, 0.0),
           gap="the first layers route by a table of token ids"),
    _model("kimi-k2", 7168, 2048, 384, 8, "moonshotai/Kimi-K2-Instruct", selection_bias=True, shared=2048,
           router={**_SIGMOID_TO_ONE, "scale": 2.827}),
    _model("glm-4.5", 5120, 1536, 160, 8, "zai-org/GLM-4.5", selection_bias=True, shared=1536,
           router={**_SIGMOID_TO_ONE, "scale": 2.5}),
    _model("glm-4.5-air", 4096, 1408, 128, 8, "zai-org/GLM-4.5-Air", selection_bias=True, shared=1408,
           router=_SIGMOID_TO_ONE),
    _model("phi-3.5-moe", 4096, 6400, 16, 2, "microsoft/Phi-3.5-MoE-instruct",
           router={"score": "sparsemixer"}),
    _model("gpt-oss-20b", 2880, 2880, 32, 4, "openai/gpt-oss-20b", **_GPT_OSS),
    _model("gpt-oss-120b", 2880, 2880, 128, 4, "openai/gpt-oss-120b", **_GPT_OSS),
    _model("granite-3.0-1b-a400m", 1024, 512, 32, 8, "ibm-granite/granite-3.0-1b-a400m-base",
           router=_SOFTMAX_OF_CHOSEN),
    _model("granite-3.0-3b-a800m", 1536, 512, 40, 8, "ibm-granite/granite-3.0-3b-a800m-base",
           router=_SOFTMAX_OF_CHOSEN),
    _model("dbrx", 6144, 10752, 16, 4, "databricks/dbrx-base", router=_SOFTMAX_TO_ONE),
    # The notebook fixes K, the ReLU experts with their ReLU output and the biases; the sizes are ours.
    _model("notebook", 512, 1024, 16, 4, _PAPER, router=_SOFTMAX_OF_CHOSEN, activation="relu",
           output_activation="relu", bias=True),
    # The paper goes from 4 to 131072 experts; this is its largest flat layer.
    _model("shazeer-2017", 512, 1024, 256, 4, _PAPER, router=_SOFTMAX_OF_CHOSEN, activation="relu"),
)  # fmt: skip
MODELS = {model.name: model for model in _MODELS}
