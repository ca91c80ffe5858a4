"""What routers do, as data, and what one declares that it can carry out.

Part of the contract of ``moe_impls.interface``, in whose notation it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe_impls.interface import DTYPES, check_choice, check_declared, check_positive

SCORES = ("softmax", "sigmoid", "topk_softmax", "sqrtsoftplus", "sparsemixer")
GROUP_SCORES = ("max", "top2_sum")
BIASED = ("score", "logit")
SPARSEMIXER_REACH = 0.02  # twice the router_jitter_noise of Phi-3.5-MoE


@dataclass(frozen=True)
class RouterSpec:
    """What the routers of released models do, as data; ``moe_impls.router.route`` carries it out.

    top_k: K, experts per token.
    score: softmax | sigmoid | topk_softmax (softmax over the K chosen logits) | sqrtsoftplus,
        sqrt(log(1 + exp(z))) (DeepSeek-V4) | sparsemixer (PhiMoE, arXiv:2409.12136, in evaluation: the gate
        of the best logit m is its softmax over the logits with m - z <= 0.02 max(|z|, m); the next one's is
        the same without those chosen before). sparsemixer has no groups and takes no selection bias.
    renormalise: divide the gates by their sum over K; topk_softmax sums to one anyway.
    scale: multiplies the gates, whether renormalised or not.
    groups, keep_groups: experts lie in ``groups`` equal, contiguous groups, and only the best
        ``keep_groups`` of them may be chosen from.
    group_score: max (DeepSeek-V2) | top2_sum, the sum of a group's two best scores (DeepSeek-V3).
    epsilon: added to the sum that the gates are divided by, once, where ``renormalise`` divides.
    biased: score | logit (Kolibri): what the selection bias is added to, by which experts and groups are then
        ranked.
    """

    top_k: int
    score: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    keep_groups: int = 1
    group_score: str = "max"
    epsilon: float = 0.0
    biased: str = "score"

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        check_choice("group_score", self.group_score, GROUP_SCORES)
        check_choice("biased", self.biased, BIASED)
        for name in ("top_k", "groups", "keep_groups"):
            check_positive(name, getattr(self, name))
        if self.keep_groups > self.groups:
            raise ValueError(f"keep_groups is {self.keep_groups}; it must not exceed groups, {self.groups}")
        if self.score == "sparsemixer" and self.groups > 1:
            raise ValueError(f"groups is {self.groups}; with score 'sparsemixer' it must be 1")
        least = torch.finfo(torch.float32).smallest_normal
        if self.epsilon != 0 and not least <= self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; it must be 0, or from {least:.3g} to below 1")


def check_num_experts(spec: RouterSpec, E: int) -> None:
    """Raise ValueError unless ``spec`` can be carried out with E experts."""
    if E % spec.groups:
        raise ValueError(f"groups is {spec.groups}; it must divide the number of experts, {E}")
    if spec.groups > 1 and spec.group_score == "top2_sum" and E // spec.groups < 2:
        raise ValueError(
            f"group_score 'top2_sum' needs groups of at least 2 experts; {spec.groups} of {E} have 1"
        )
    candidates = E // spec.groups * spec.keep_groups
    if spec.top_k > candidates:
        raise ValueError(
            f"top_k is {spec.top_k}; it must be at most the number of experts to choose from, {candidates}"
        )


@dataclass(frozen=True)
class RouterSupport:
    """What a router declares that it can carry out. The suite tests all of it and nothing else.

    A router's file may hold ``SUPPORT = RouterSupport(...)`` beside its ``route``; without one, every default
    below is claimed.

    specs: all that it carries out, such as that of one model; None: every `RouterSpec` of the fields below.
    num_experts: E, where it is made for that number alone; None: any.
    scores, group_scores, biased, renormalise: values of these fields of `RouterSpec`.
    groups, scale, epsilon: False where it has no groups, no scale but 1, no epsilon.
    biases: whether it is called with a selection bias, without one, or both.
    dtypes: of the logits.
    gradients: of the logits.
    extremes: logits of -inf, which mask experts, of size 1000 and far below 0, with finite gradients.
    """

    specs: tuple[RouterSpec, ...] | None = None
    num_experts: int | None = None
    scores: tuple[str, ...] = SCORES
    group_scores: tuple[str, ...] = GROUP_SCORES
    biased: tuple[str, ...] = BIASED
    renormalise: tuple[bool, ...] = (True, False)
    groups: bool = True
    scale: bool = True
    epsilon: bool = True
    biases: tuple[bool, ...] = (True, False)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    gradients: bool = True
    extremes: bool = True

    def __post_init__(self) -> None:
        for name, valid in (
            ("scores", SCORES),
            ("group_scores", GROUP_SCORES),
            ("biased", BIASED),
            ("renormalise", (True, False)),
            ("biases", (True, False)),
            ("dtypes", DTYPES),
        ):
            check_declared(f"{name} of RouterSupport", getattr(self, name), valid)
        if self.num_experts is not None:
            check_positive("num_experts of RouterSupport", self.num_experts)
        if self.specs is None:
            return
        if not (
            isinstance(self.specs, tuple)
            and self.specs
            and all(isinstance(s, RouterSpec) for s in self.specs)
        ):
            raise TypeError(
                f"specs of RouterSupport is {self.specs!r}; it must be a tuple of RouterSpec, not empty"
            )
        plain = {field.name: field.default for field in fields(self)}
        for name in ("scores", "group_scores", "biased", "renormalise", "groups", "scale", "epsilon"):
            if getattr(self, name) != plain[name]:
                raise ValueError(f"{name} of RouterSupport is given beside specs, which say it already")
        for spec in self.specs:
            if spec.score == "sparsemixer" and False not in self.biases:
                raise ValueError("biases of RouterSupport is (True,); score 'sparsemixer' takes no bias")
            if self.num_experts is not None:
                check_num_experts(spec, self.num_experts)
