"""Layers that are wrong in one mode alone, and for each the check that must find it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from correctness.checks.case import Subject
from moe_impls import LayerWeights
from tests.correctness.mode_layers import (
    AUTOCAST,
    COMPILED,
    Biased,
    InCall,
    Jitter,
    KeptByVersion,
    LowRank,
    Noisy,
    Placed,
    Plain,
    edit,
    read,
    read_no_rule,
    routing_of,
    subject,
)


class _AverageGates(Plain):
    """Evaluation weighs with an average that training has left in an attribute."""

    average: Tensor | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super().route(x)
        if self.training:
            self.average = gates.detach().mean(0)
        return ids, gates if self.training or self.average is None else gates * 0.9 + 0.1 * self.average


class _RunningMean(Plain):
    """Evaluation takes a running mean, which `read` does not know, off the logits of one expert."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * z.detach().abs().mean())
            return z
        return z - self.mean.float() * F.one_hot(torch.tensor(0), self.E)


class _BiasIsNotSaved(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.E), persistent=False)

    def change(self) -> Tensor:
        return 300 * super().change()


class _LearntNoise(Noisy):
    """The scale of the noise is a parameter that is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(self.E))

    def noise(self, z: Tensor) -> Tensor:
        return torch.randn_like(z) * self.scale.detach().float()


def _read_learnt(made: _LearntNoise) -> LayerWeights:
    return replace(read(made), training_only=("scale",))


class _UnusedNoise(_LearntNoise):
    """The noise has another scale than that parameter."""

    def noise(self, z: Tensor) -> Tensor:
        return torch.randn_like(z)


class _UnknownBias(Biased):
    """The choice depends on a buffer of zeros."""

    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.zeros(self.E))

    def choose(self, biased: Tensor) -> Tensor:
        return super().choose(biased + self.offsets.float())


class _OtherNoiseBack(torch.autograd.Function):
    """Multiplies by noise, and the gradient by noise that is drawn anew."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).uniform_(0.5, 1.5)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.empty_like(grad).uniform_(0.5, 1.5)


class _RecomputesOtherNoise(Noisy):
    """Recomputed with noise from where torch.utils.checkpoint restores nothing."""

    def noise(self, z: Tensor) -> Tensor:
        return torch.randn(z.shape, generator=torch.Generator().manual_seed(random.randrange(2**30)))

    def tokens(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().tokens(x)
        return checkpoint(super().tokens, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


class _NoiseOfPython(Noisy):
    def noise(self, z: Tensor) -> Tensor:
        return torch.tensor([[random.gauss(0, 1) for _ in row] for row in z])


class _NoStateOfTheGenerator(Noisy):
    def tokens(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().tokens(x)
        return checkpoint(super().tokens, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class _CountsInBoth(Biased):
    """A reentrant checkpoint counts in the call and when it is recomputed."""

    def tokens(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().tokens(x)
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(super().tokens, x, use_reentrant=True)  # pyright: ignore[reportReturnType]


class _FrozenIsDetached(Plain):
    """Where some weights are frozen, so is x, in training."""

    def outputs(self, x: Tensor) -> Tensor:
        return super().outputs(x.detach() if self.training and not self.w_in.requires_grad else x)


class _OwnProduct(torch.autograd.Function):
    """Saves weights as they come, beside a result in the dtype of autocast."""

    @staticmethod
    def forward(ctx, hidden: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, w)
        return torch.einsum("teh,eoh->teo", hidden, w)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        hidden, w = ctx.saved_tensors
        return torch.einsum("teo,eoh->teh", grad, w), torch.einsum("teo,teh->eoh", grad, hidden)


def _by_own_product(self: Plain, x: Tensor) -> Tensor:
    gate, up = torch.einsum("td,efd->tef", x, self.w_in).chunk(2, -1)
    return _OwnProduct.apply(F.silu(gate) * up, self.w_out)  # pyright: ignore[reportReturnType]


def _counts_evaluation(self: Biased, biased: Tensor) -> Tensor:
    ids = Biased.choose(self, biased)
    if not self.training:
        self.count(ids, biased)
    return ids


def _latest_load(self: Biased, ids: Tensor, gates: Tensor) -> None:
    self.counts.copy_(self.load(ids))


def _mass(self: Biased, ids: Tensor, gates: Tensor) -> None:
    self.counts.scatter_add_(0, ids.flatten(), gates.detach().flatten())


def _by_fraction(self: Biased) -> Tensor:
    return (self.spec.top_k / self.E - self.counts).sign()


class _TowardsTheLoad(InCall):
    def count(self, ids: Tensor, gates: Tensor) -> None:
        with torch.no_grad():
            counts = self.load(ids)
            self.bias -= 0.001 * (counts.mean() - counts).sign()


class _TransposesOnLoad(Plain):
    """Weights [E, H, D] in a checkpoint are turned where their shape does not tell: H = D."""

    H = 8

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        state[prefix + "w_out"] = state[prefix + "w_out"].mT.contiguous()
        super()._load_from_state_dict(state, prefix, *rest)


class _KeptByVersionAlone(KeptByVersion):
    """A weight that load_state_dict assigns has the version of the one before."""

    def weights(self) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return Plain.weights(self)
        key = (0, self.w_out._version)
        kept = self.__dict__.setdefault("copies", {})
        return self.w_in, kept.setdefault(key, self.w_out.detach().clone())


def _in_int16(self: Plain, x: Tensor) -> Tensor:
    rows = torch.arange(len(x)).to(torch.int16).long() % len(x)
    return Plain.tokens(self, x[rows])


def _two_chunks(self: Plain, x: Tensor) -> Tensor:
    return torch.cat([Plain.tokens(self, x[:65_536]), 0 * x[65_536:]])


def _limited(self: Plain, x: Tensor) -> Tensor:
    gate, up = torch.einsum("td,efd->tef", x, self.w_in).chunk(2, -1)
    return torch.einsum("teh,eoh->teo", F.silu(gate.clamp(max=7)) * up.clamp(-7, 7), self.w_out)


def _first_length(self: Plain, x: Tensor) -> Tensor:
    y = Plain.forward(self, x)
    if not torch.compiler.is_compiling():
        return y
    return y * (torch.arange(x.shape[-2]) < 8).to(y).unsqueeze(1)


WRONG: dict[str, tuple[Subject, str]] = {
    "training leaves an average in an attribute": (subject(_AverageGates), "after_training"),
    "evaluation reads a mean that read does not": (subject(_RunningMean), "after_training"),
    "the bias is in no state dict": (subject(_BiasIsNotSaved), "after_training"),
    "the noise's scale has no gradient": (subject(_LearntNoise, read=_read_learnt), "training"),
    "a parameter for training alone has no effect": (
        subject(_UnusedNoise, read=_read_learnt),
        "training_only",
    ),
    "a bias that read does not know": (subject(_UnknownBias), "every_parameter_counts"),
    "the noise cuts the graph of x": (
        edit(Jitter, "jitter", lambda self, x: Jitter.jitter(self, x.detach()) + 0 * x),
        "training",
    ),
    "the backward draws other noise": (
        edit(Jitter, "jitter", lambda self, x: _OtherNoiseBack.apply(x)),
        "training",
    ),
    "the recomputation draws other noise": (subject(_RecomputesOtherNoise), "training"),
    "the recomputation goes on in the generator": (subject(_NoStateOfTheGenerator), "training"),
    "noise of Python's generator under a checkpoint around the layer": (
        subject(_NoiseOfPython),
        "recomputed",
    ),
    "noise reaches the experts, and the routing does not report it": (
        subject(Jitter, routing=lambda made, x: routing_of(made, made.jitter(x))),
        "training",
    ),
    "noise that no seed repeats": (
        edit(Noisy, "noise", lambda self, z: torch.randn(z.shape, generator=_unseeded()).to(z)),
        "training",
    ),
    "a reentrant checkpoint counts twice": (subject(_CountsInBoth), "recomputed"),
    "evaluation is counted for the bias": (edit(Biased, "choose", _counts_evaluation), "bias_update"),
    "x is detached in training where weights are frozen": (subject(_FrozenIsDetached), "frozen"),
    "a backward for float32 alone after autocast": (
        edit(Plain, "outputs", _by_own_product, **AUTOCAST),
        "autocast",
    ),
    "the bias follows the latest part alone": (edit(Biased, "count", _latest_load), "bias_update"),
    "the bias follows the gates": (edit(Biased, "count", _mass), "bias_update"),
    "the bias compares counts with a fraction": (edit(Biased, "change", _by_fraction), "bias_update"),
    "the same, with no rule declared": (
        edit(Biased, "change", _by_fraction, read=read_no_rule),
        "bias_update",
    ),
    "the bias never moves": (edit(Biased, "update_bias", lambda self: None), "bias_update"),
    "the bias favours the loaded": (subject(_TowardsTheLoad, read=read_no_rule), "bias_update"),
    "biased scores below zero tie": (
        edit(Biased, "choose", lambda self, z: z.clamp(min=0).topk(2, -1).indices),
        "selection_bias",
    ),
    "biased scores above one tie": (
        edit(Biased, "choose", lambda self, z: z.clamp(max=1).topk(2, -1).indices),
        "selection_bias",
    ),
    "the output is bfloat16 under autocast": (
        edit(Plain, "tokens", lambda self, x: Plain.tokens(self, x).to(self.outputs(x).dtype), **AUTOCAST),
        "autocast",
    ),
    "products of two dtypes under autocast": (
        edit(
            Plain,
            "tokens",
            lambda self, x: torch.zeros_like(x).index_add_(
                0, torch.arange(len(x)), Plain.tokens(self, x).to(self.outputs(x).dtype)
            ),
            **AUTOCAST,
        ),
        "autocast",
    ),
    "the router's matrix product is in bfloat16 under autocast": (
        edit(Plain, "logits", lambda self, x: x.float() @ self.router.float().mT, **AUTOCAST),
        "autocast",
    ),
    "the router's gradient is lost under autocast": (
        edit(
            Plain,
            "route",
            lambda self, x: (r := Plain.route(self, x)) and (r[0], r[1].detach() if _autocast() else r[1]),
            **AUTOCAST,
        ),
        "autocast",
    ),
    "compiled, tokens after the eighth are lost": (
        edit(Plain, "forward", _first_length, **COMPILED),
        "fullgraph",
    ),
    "exported, the last expert is lost": (
        edit(
            Plain,
            "route",
            lambda self, x: (
                (r := Plain.route(self, x))
                and (r[0], r[1] * (r[0] < 4) if torch.compiler.is_exporting() else r[1])
            ),
            **COMPILED,
        ),
        "exports",
    ),
    "slots are taken for experts": (
        edit(Placed, "combine", lambda self, x, i, g: Plain.combine(self, x, self.slots.argsort()[i], g)),
        "placement",
    ),
    "slots are read once": (
        edit(
            Placed,
            "combine",
            lambda self, x, i, g: Plain.combine(
                self, x, self.__dict__.setdefault("first", self.slots.clone())[i], g
            ),
        ),
        "placement",
    ),
    "merged twice the part": (edit(LowRank, "merged_delta", lambda self: 2 * self.delta()), "merged"),
    "merged without the last expert": (
        edit(LowRank, "merged_delta", lambda self: self.delta() * (torch.arange(5) < 4)[:, None, None]),
        "merged",
    ),
    "merged and not marked so": (
        edit(LowRank, "merge", lambda self: self.w_out.data.add_(self.delta())),
        "merged",
    ),
    "never unmerged": (edit(LowRank, "unmerge", lambda self: setattr(self, "is_merged", False)), "merged"),
    "square weights are turned on load": (subject(_TransposesOnLoad), "round_trip"),
    "a copy is kept by its version alone": (subject(_KeptByVersionAlone), "round_trip"),
    "indices of 16 bits": (edit(Plain, "tokens", _in_int16), "many_tokens"),
    "the second chunk is lost": (edit(Plain, "tokens", _two_chunks), "many_tokens"),
    "a limit that the activation has not": (edit(Plain, "outputs", _limited), "saturated"),
}


def _unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu")
