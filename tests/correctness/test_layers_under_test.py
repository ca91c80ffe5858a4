"""Every whole layer is right: see ``correctness.checks.layers``. So are the checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctness.checks.case import Subject
from correctness.checks.layers import CHECKS, layer
from correctness.judging.layer_bench import Layer
from correctness.session.layer_subject import resolve_layer
from moe_impls import Experts, LayerWeights, RouterSpec, load_balancing_loss, z_loss
from moe_impls.registry import ResolveError
from reporting.provenance import ROOT
from tests.correctness.findings import findings

pytest_plugins = "pytester"


class Swiglu(nn.Module):
    """down(silu(gate(x)) * up(x)), three linear layers."""

    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((D, H), (D, H), (H, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def stacked(experts: Iterable) -> Experts:
    """Experts that are modules of their own, in the form of this suite: all gate rows, then all up rows."""
    experts = list(experts)
    w_in = torch.stack([torch.cat([e.gate.weight, e.up.weight]) for e in experts])
    return Experts(w_in, None, torch.stack([e.down.weight for e in experts]), None, "swiglu")


class Block(nn.Module):
    """A list of experts that are visited one by one, as in transformers."""

    spec = RouterSpec(2, renormalise=True)  # Mixtral
    E, D, H = 6, 12, 10

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(self.D, self.E, bias=False)
        self.experts = nn.ModuleList(Swiglu(self.D, self.H) for _ in range(self.E))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.router.weight.float())

    def route(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = z.softmax(dim=1).topk(self.spec.top_k, dim=1)
        return ids, gates / gates.sum(dim=1, keepdim=True) if self.spec.renormalise else gates

    def routed(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = (ids == e).nonzero(as_tuple=True)
            y.index_add_(0, t, (expert(x[t]) * gates[t, k].unsqueeze(1)).to(y.dtype))
        return y

    def tokens(self, x: Tensor) -> Tensor:
        return self.routed(x, *self.route(self.logits(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.reshape(-1, self.D)).reshape(x.shape)


def read_block(layer: Block) -> LayerWeights:
    return LayerWeights(stacked(layer.experts), layer.spec, layer.router.weight)


def block_losses(layer: Block, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    z = layer.logits(x.flatten(0, -2))
    mask = None if mask is None else mask.flatten()
    ids = layer.route(z)[0]
    return {"load_balancing_loss": load_balancing_loss(z, ids, mask=mask), "z_loss": z_loss(z, mask=mask)}


class Qwen(Block):
    """Gates that are not renormalised, and a shared expert behind a sigmoid; y and the logits come back."""

    spec = RouterSpec(3)

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.shared_gate = Swiglu(self.D, 8), nn.Linear(self.D, 1, bias=False)

    def weigh(self, x: Tensor, shared: Tensor) -> Tensor:
        return torch.sigmoid(self.shared_gate(x)) * shared

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.weigh(x, self.shared(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.logits(x)


def read_qwen(layer: Qwen) -> LayerWeights:
    experts = stacked(layer.experts)
    shared, gate = stacked([layer.shared]), layer.shared_gate.weight
    return LayerWeights(experts, layer.spec, layer.router.weight, shared=shared, shared_gate=gate)


class DeepSeek(Block):
    """Sigmoid scores, a selection bias in a buffer, groups by their two best, a scale, two shared experts."""

    spec = RouterSpec(3, "sigmoid", True, 2.5, groups=4, keep_groups=2, group_score="top2_sum")
    E = 12
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.E))
        self.shared = nn.ModuleList(Swiglu(self.D, 5) for _ in range(2))

    def allowed(self, scores: Tensor) -> Tensor:
        groups = scores.unflatten(1, (self.spec.groups, -1))
        kept = groups.topk(2, dim=2).values.sum(dim=2).topk(self.spec.keep_groups, dim=1).indices
        return (
            torch.zeros_like(groups[..., 0]).scatter(1, kept, 1.0).unsqueeze(2).expand_as(groups).flatten(1)
        )

    masked = -torch.inf

    def route(self, z: Tensor) -> tuple[Tensor, Tensor]:
        scores = z.sigmoid()
        rank = (scores + self.bias).detach()
        ids = rank.masked_fill(self.allowed(rank) == 0, self.masked).topk(self.spec.top_k, dim=1).indices
        return ids, self.weigh(scores.gather(1, ids), ids)

    def weigh(self, chosen: Tensor, ids: Tensor) -> Tensor:
        return self.spec.scale * chosen / chosen.sum(dim=1, keepdim=True)

    def join(self, x: Tensor, routed: Tensor) -> Tensor:
        return routed + sum(shared(x) for shared in self.shared)

    def tokens(self, x: Tensor) -> Tensor:
        return self.join(x, super().tokens(x))


def read_deepseek(layer: DeepSeek) -> LayerWeights:
    return LayerWeights(
        stacked(layer.experts),
        layer.spec,
        layer.router.weight,
        selection_bias=layer.bias,
        shared=stacked(layer.shared),
    )


class GptOss(nn.Module):
    """Products of all experts at once, gate and up interleaved in [E, D, 2H], and biases everywhere."""

    spec = RouterSpec(2, "topk_softmax")

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 5)
        self.w_in, self.b_in = nn.Parameter(torch.zeros(5, 12, 14)), nn.Parameter(torch.zeros(5, 14))
        self.w_out, self.b_out = nn.Parameter(torch.zeros(5, 7, 12)), nn.Parameter(torch.zeros(5, 12))

    def gates(self, x: Tensor) -> Tensor:
        z = F.linear(x.float(), self.router.weight.float(), self.router.bias.float())
        best, ids = z.topk(self.spec.top_k, dim=-1)
        return torch.zeros_like(z).scatter(-1, ids, best.softmax(dim=-1))  # [..., E]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...d,edf->...ef", x, self.w_in) + self.b_in
        gate, up = h[..., 0::2].clamp(max=7), h[..., 1::2].clamp(-7, 7)
        a = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        outputs = torch.einsum("...eh,ehd->...ed", a, self.w_out) + self.b_out
        return torch.einsum("...e,...ed->...d", self.gates(x).to(x.dtype), outputs)


def read_gpt_oss(layer: GptOss) -> LayerWeights:
    w_in, b_in = layer.w_in.mT, layer.b_in
    experts = Experts(
        torch.cat([w_in[:, 0::2], w_in[:, 1::2]], dim=1),
        torch.cat([b_in[:, 0::2], b_in[:, 1::2]], dim=1),
        layer.w_out.mT,
        layer.b_out,
        "swiglu_clamped",
    )
    return LayerWeights(experts, layer.spec, layer.router.weight, layer.router.bias)


class Switch(Block):
    """One expert with the softmax over all as its gate."""

    spec = RouterSpec(1)


class LowRank(Block):
    """The output matrices of all experts are one, and of each expert a part of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(self.D, self.H))
        self.a = nn.Parameter(torch.randn(self.E, 3, self.H))
        self.b = nn.Parameter(torch.randn(self.E, self.D, 3))
        self.w_in = nn.Parameter(torch.randn(self.E, self.H, self.D))
        del self.experts

    def routed(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("td,ehd->teh", x, self.w_in))
        outputs = torch.einsum("teh,edh->ted", hidden, self.down + self.b @ self.a)
        chosen = outputs.gather(1, ids.unsqueeze(2).expand(-1, -1, self.D))
        return (chosen * gates.unsqueeze(2)).sum(dim=1).to(x.dtype)


def read_low_rank(layer: LowRank) -> LayerWeights:
    experts = Experts(layer.w_in, None, layer.down + layer.b @ layer.a, None, "gelu")
    return LayerWeights(experts, layer.spec, layer.router.weight)


READ: dict[type, Callable] = {
    Block: read_block,
    Switch: read_block,
    Qwen: read_qwen,
    DeepSeek: read_deepseek,
    GptOss: read_gpt_oss,
    LowRank: read_low_rank,
}


def subject(make: type[nn.Module], read: Callable | None = None, losses: Callable | None = None) -> Subject:
    """A layer with the `read` of the right layer that it derives from."""
    read = read or next(READ[base] for base in make.__mro__ if base in READ)
    losses = losses or (block_losses if issubclass(make, Block) else None)
    return layer(make.__name__, Layer(make, read, losses))


class _RandomRouter(Block):
    """Its router is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.router.weight.detach()
        del self.router.weight
        self.router.register_buffer("weight", weight)


class _Tempered(Block):
    """What its `read` returns shares a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(self.E))

    def logits(self, x: Tensor) -> Tensor:
        return (super().logits(x) + self.bias.float()) * self.temperature.float().exp()


def read_tempered(layer: _Tempered) -> LayerWeights:
    scale = layer.temperature.exp()
    weight, bias = layer.router.weight * scale, layer.bias * scale
    return LayerWeights(stacked(layer.experts), layer.spec, weight, bias)


READ[_Tempered] = read_tempered


class _CountsInEval(Block):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def tokens(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().tokens(x)


@pytest.mark.parametrize("make", [*READ, _CountsInEval, _RandomRouter], ids=lambda make: make.__name__)
def test_right_layers_that_look_different_pass(make: type[nn.Module]) -> None:
    right = subject(make)
    if make is _RandomRouter:  # which no loss can train
        right = layer(make.__name__, dataclasses.replace(right.tested, losses=None))
    assert findings(right) == {}


def edit(base: type[nn.Module], name: str, method: Callable) -> Subject:
    """``base`` with one method replaced."""
    return subject(type("Wrong", (base,), {name: method}))


class _FrozenRouter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.router.weight.requires_grad_(False)


class _RemembersItsWeights(Block):
    def logits(self, x: Tensor) -> Tensor:
        self.kept = getattr(self, "kept", self.router.weight.detach().float().clone())
        return F.linear(x.float(), self.router.weight.float() * 0 + self.kept)


class _MovesItsBias(DeepSeek):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.bias += 0.01
        return y


class _WritesInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.requires_grad:
            x *= 1.01
        return super().forward(x)


class _NoiseWithoutGraph(Block):
    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        return z.detach() + 0.1 * torch.randn_like(z) if self.training else z


class _LastChunkHasAGraph(Block):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not self.training or len(rows) <= 256:
            return super().forward(x)
        parts = [super(_LastChunkHasAGraph, self).forward(part) for part in rows.split(256)]
        return torch.cat([*(part.detach() for part in parts[:-1]), parts[-1]]).reshape(*x.shape[:-1], -1)


class _GraphOfX(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.requires_grad else y.detach() + 0 * self.router.weight.sum()


class _KeepsInferenceCopy(Block):
    def logits(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            self.kept = getattr(self, "kept", self.router.weight.float().clone())
            return F.linear(x.float(), self.kept)
        return super().logits(x)


class _OneResult(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if torch.is_grad_enabled():
            return y
        if getattr(self, "kept", y[:0]).shape != y.shape:
            self.kept = torch.empty_like(y)
        return self.kept.copy_(y)


class _SharedTwice(DeepSeek):
    def join(self, x: Tensor, routed: Tensor) -> Tensor:
        return routed + self.shared[0](x) + self.shared[0](x)


class _RouterInAList(Block):
    """A weight in a plain list is in no state dict, and no optimiser sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [torch.randn(self.E, self.D, requires_grad=True)]
        del self.router

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weights[0])


def _read_from_a_list(layer: _RouterInAList) -> LayerWeights:
    return LayerWeights(stacked(layer.experts), layer.spec, layer.weights[0])


class _KeepsItsGates(Block):
    """The backward reads the gates of the latest call."""

    def routed(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if not gates.requires_grad:
            return super().routed(x, ids, gates)
        self.latest = gates.detach()
        return super().routed(x, ids, _Latest.apply(gates, self))


class _Latest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates: Tensor, layer: _KeepsItsGates) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(gates)
        return gates.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad * ctx.layer.latest / ctx.saved_tensors[0], None


def _min_capacity(self: Block, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    visits = torch.zeros(len(x), self.E).scatter(1, ids, 1.0).cumsum(0).gather(1, ids)
    return Block.routed(self, x, ids, gates * (visits <= max(64, 1.25 * len(x) * 2 / self.E)))


def _without_the_last_chunk(self: Block, x: Tensor) -> Tensor:
    whole = len(x) // 512 * 512 or len(x)
    return torch.cat([Block.tokens(self, x[:whole]), 0 * x[whole:]])


def _capacity(self: Block, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    return Block.routed(self, x, ids, gates * (ids == ids[:, :1]).cumsum(0).le(8))


def _swapped_leading(self: Block, x: Tensor) -> Tensor:
    y = self.tokens(x.transpose(0, -2).reshape(-1, self.D))
    return y.reshape(x.shape)


def _noise(self: Block, x: Tensor) -> Tensor:
    return Block.logits(self, x) + torch.randn(len(x), self.E)


def _losses(change: Callable[[Block, Tensor, Tensor | None], dict[str, Tensor]]) -> Subject:
    return subject(Block, losses=change)


def _without_mask(layer: Block, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return block_losses(layer, x, None)


def _summed_over_k(layer: Block, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {n: layer.spec.top_k * v for n, v in block_losses(layer, x, mask).items() if n != "z_loss"}


def _of_probabilities(layer: Block, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    z = layer.logits(x.flatten(0, -2)).softmax(dim=1)
    return {"z_loss": z_loss(z, mask=None if mask is None else mask.flatten())}


def _read_without_the_bias(layer: GptOss) -> LayerWeights:
    weights = read_gpt_oss(layer)
    return LayerWeights(weights.experts, weights.router, weights.router_weight)


# For each wrong layer the check that must find it.
WRONG: dict[str, tuple[Subject, str]] = {
    "the shared expert is scaled like the routed": (
        edit(DeepSeek, "join", lambda self, x, y: y + self.spec.scale * sum(s(x) for s in self.shared)),
        "values",
    ),
    "the shared expert reads x after the sum was added to it": (
        edit(DeepSeek, "join", lambda self, x, y: y + sum(s(x + y) for s in self.shared)),
        "values",
    ),
    "the shared expert is forgotten": (edit(DeepSeek, "join", lambda self, x, y: y), "values"),
    "one of two shared experts is used twice": (subject(_SharedTwice), "values"),
    "the routed experts are forgotten": (
        edit(DeepSeek, "join", lambda self, x, y: 0 * y + sum(s(x) for s in self.shared)),
        "values",
    ),
    "the shared expert's gate is forgotten": (edit(Qwen, "weigh", lambda self, x, shared: shared), "values"),
    "the shared expert's gate is detached": (
        edit(Qwen, "weigh", lambda self, x, s: torch.sigmoid(self.shared_gate(x)).detach() * s),
        "gradients",
    ),
    "logits in bfloat16": (edit(Block, "logits", lambda self, x: self.router(x).float()), "low_precision"),
    "softmax of a softmax": (
        edit(Block, "route", lambda self, z: Block.route(self, z.softmax(dim=1))),
        "values",
    ),
    "gates on the inputs": (
        edit(
            Block,
            "routed",
            lambda self, x, i, g: sum(
                Block.routed(self, x * g[:, k : k + 1], i[:, k : k + 1], 1 + 0 * g) for k in (0, 1)
            ),
        ),
        "values",
    ),
    "renormalised with K = 1": (
        edit(
            Switch, "route", lambda self, z: (z.argmax(1, keepdim=True), torch.ones(len(z), 1) + 0 * z[:, :1])
        ),
        "router_gradient",
    ),
    "not renormalised": (
        edit(Block, "route", lambda self, z: z.softmax(dim=1).topk(2, dim=1)[::-1]),
        "values",
    ),
    "the router is detached": (
        edit(Block, "logits", lambda self, x: Block.logits(self, x).detach()),
        "router_gradient",
    ),
    "x is detached before the router": (
        edit(Block, "logits", lambda self, x: Block.logits(self, x.detach())),
        "gradients",
    ),
    "the selection bias is in the gates": (
        edit(
            DeepSeek, "weigh", lambda self, c, ids: DeepSeek.weigh(self, c + self.bias[ids].to(c.dtype), ids)
        ),
        "values",
    ),
    "the scale is lost in the renormalising": (
        edit(DeepSeek, "weigh", lambda self, c, ids: c / c.sum(dim=1, keepdim=True)),
        "values",
    ),
    "groups are ignored": (
        edit(DeepSeek, "allowed", lambda self, scores: torch.ones_like(scores)),
        "values",
    ),
    "the output is float32 whatever x is": (
        edit(Block, "forward", lambda self, x: Block.forward(self, x).float()),
        "low_precision",
    ),
    "noise in eval": (edit(Block, "logits", _noise), "evaluation"),
    "the residual is added inside": (
        edit(Block, "tokens", lambda self, x: x + Block.tokens(self, x)),
        "values",
    ),
    "leading dimensions are flattened in another order": (
        edit(Block, "forward", _swapped_leading),
        "leading_dimensions",
    ),
    "one token comes back as a batch": (
        edit(Block, "forward", lambda self, x: self.tokens(x.reshape(-1, self.D)).reshape(-1, *x.shape[-2:])),
        "leading_dimensions",
    ),
    "tokens beyond a capacity are dropped": (edit(Block, "routed", _capacity), "tokens_apart"),
    "tokens beyond a capacity of 64 are dropped": (edit(Block, "routed", _min_capacity), "tokens_apart"),
    "an incomplete chunk is forgotten": (edit(Block, "tokens", _without_the_last_chunk), "tokens_apart"),
    "x is taken for dense": (
        edit(
            Block,
            "forward",
            lambda self, x: self.tokens(x.as_strided((x.numel() // 12, 12), (12, 1))).reshape(x.shape),
        ),
        "strides",
    ),
    "the router is detached in low precision": (
        edit(
            Block,
            "logits",
            lambda self, x: (
                Block.logits(self, x).detach() if x.dtype == torch.bfloat16 else Block.logits(self, x)
            ),
        ),
        "low_precision_gradients",
    ),
    "the output is float32 in float64, too": (
        edit(Block, "tokens", lambda self, x: Block.tokens(self, x).float()),
        "double_precision",
    ),
    "a frozen router passes nothing back": (
        edit(
            Block,
            "logits",
            lambda self, x: Block.logits(self, x if self.router.weight.requires_grad else x.detach()),
        ),
        "frozen",
    ),
    "training leaves out an expert": (
        edit(
            Block,
            "routed",
            lambda self, x, i, g: Block.routed(self, x, i, g * (i > 0) if self.training else g),
        ),
        "training",
    ),
    "the backward reads the latest gates": (subject(_KeepsItsGates), "gradients"),
    "scores are normalised over tokens": (
        edit(Block, "route", lambda self, z: Block.route(self, z - z.mean(dim=0))),
        "tokens_apart",
    ),
    "a NaN is hidden": (
        edit(Block, "tokens", lambda self, x: Block.tokens(self, x).nan_to_num()),
        "nan_contained",
    ),
    "a NaN reaches the batch": (
        edit(Block, "logits", lambda self, x: Block.logits(self, x) - 0 * x.float().sum()),
        "nan_contained",
    ),
    "x is written to": (
        edit(Block, "tokens", lambda self, x: x.detach().copy_(Block.tokens(self, x)) + 0 * x),
        "inputs_unchanged",
    ),
    "the selection bias is written to in eval": (subject(_MovesItsBias), "inputs_unchanged"),
    "x is written to in training": (subject(_WritesInTraining), "inputs_unchanged"),
    "noise without a graph in training": (subject(_NoiseWithoutGraph), "training"),
    "the last chunk alone has a graph in training": (subject(_LastChunkHasAGraph), "training"),
    "no graph where x needs none": (subject(_GraphOfX), "gradients"),
    "a copy of inference mode is kept": (subject(_KeepsInferenceCopy), "state"),
    "one result for all calls": (subject(_OneResult), "without_gradients"),
    "the last expert is never used": (
        edit(Block, "routed", lambda self, x, i, g: Block.routed(self, x, i, g * (i < self.E - 1))),
        "values",
    ),
    "the router's weight is remembered": (subject(_RemembersItsWeights), "every_parameter_counts"),
    "the router's weight is frozen": (subject(_FrozenRouter), "gradients"),
    "the router's weight is no parameter": (subject(_RouterInAList, _read_from_a_list), "state"),
    "the loss counts padding": (_losses(_without_mask), "losses"),
    "the loss is K times too large": (_losses(_summed_over_k), "losses"),
    "the z-loss of probabilities": (_losses(_of_probabilities), "losses"),
    "the loss of detached logits": (
        _losses(lambda layer, x, mask: {n: v.detach() for n, v in block_losses(layer, x, mask).items()}),
        "losses",
    ),
    "no loss is returned": (_losses(lambda layer, x, mask: {}), "losses"),
    "read forgets the router's bias": (subject(GptOss, _read_without_the_bias), "every_parameter_counts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_layers_fail(name: str) -> None:
    wrong, check = WRONG[name]
    assert check in findings(wrong, [c for c in CHECKS if c.name == check])


def test_groups_masked_with_zero_are_named() -> None:
    check = [c for c in CHECKS if c.name == "selection_bias"]
    masked = subject(type("Wrong", (DeepSeek,), {"masked": 0.0}), read_deepseek)
    told = "hint: y is right with experts of other groups masked with 0, not with -inf"
    assert told in findings(masked, check)["selection_bias"]
    without = subject(type("Wrong", (DeepSeek,), {"join": lambda self, x, routed: routed}), read_deepseek)
    assert "masked" not in findings(without, check)["selection_bias"]


@pytest.mark.parametrize("check", ["low_precision", "half_precision"])
@pytest.mark.parametrize(
    ("wrong", "is_told"),
    [
        (edit(Block, "logits", lambda self, x: self.router(x).float()), True),
        (edit(Block, "routed", lambda self, x, i, g: Block.routed(self, x, i, g * (i < self.E - 1))), False),
        (
            edit(Block, "tokens", lambda self, x: Block.tokens(self, x) * (2 - (x.dtype == torch.float32))),
            False,
        ),
        (
            edit(
                Block,
                "logits",
                lambda self, x: -self.router(x) if x.dtype == torch.float32 else self.router(x).float(),
            ),
            False,
        ),
    ],
    ids=["rounded logits", "an expert is left out", "every y is wrong", "float32 is wrong, too"],
)
def test_rounded_logits_are_named_where_they_explain_every_wrong_token_and_float32_is_right(
    wrong: Subject, is_told: bool, check: str
) -> None:
    found = findings(wrong, [c for c in CHECKS if c.name == check])
    assert ("logits in 16 bits send tokens to other experts" in found[check]) is is_told


FILE = """
import torch
from torch import nn

from moe_impls import Experts, LayerWeights, RouterSpec


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.zeros(4, 6))
        self.w_in, self.w_out = nn.Parameter(torch.zeros(4, 5, 6)), nn.Parameter(torch.zeros(4, 6, 5))

    def forward(self, x):
        gates, ids = (x.float() @ self.router.float().T).softmax(-1).topk(2)
        table = torch.zeros_like(x[..., :4]).scatter(-1, ids, gates.to(x.dtype))
        h = torch.einsum("...d,efd->...ef", x, self.w_in).relu()
        return torch.einsum("...e,...ef,eof->...o", table, h, self.w_out)


def read(layer):
    experts = Experts(layer.w_in, None, layer.w_out, None, "relu")
    return LayerWeights(experts, RouterSpec(2), layer.router)
"""


def run_pytest(pytester: pytest.Pytester, path: Path, source: str) -> pytest.RunResult:
    """``pytest correctness --layer path:Layer``."""
    path.write_text(source, encoding="utf-8")
    os.chdir(ROOT)
    options = ("-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--layer={path}:Layer")
    return pytester.runpytest_inprocess("correctness", *options)


def test_a_strangers_layer_is_run_alone(pytester: pytest.Pytester, tmp_path: Path) -> None:
    done = run_pytest(pytester, tmp_path / "right.py", FILE)
    assert done.ret == 0
    options = {"losses", "selection_bias", "autocast", "fullgraph", "exports", "merge", "placement"}
    options |= {"moves_bias", "counters", "every_gradient", "training_only"}
    skipped = sum(len(c.problems) for c in CHECKS if options & {*c.needs.split(" and ")})
    done.assert_outcomes(passed=sum(len(c.problems) for c in CHECKS) - skipped, skipped=skipped)


def test_a_strangers_wrong_layer_fails(pytester: pytest.Pytester, tmp_path: Path) -> None:
    wrong = FILE.replace("RouterSpec(2)", "RouterSpec(2, scale=2)")
    done = run_pytest(pytester, tmp_path / "wrong.py", wrong)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*wrong.py:Layer fails 'values': y[[]*] is *, right is *its budget*"])


BAD = {
    "has no 'Layer'": FILE.replace("class Layer", "class Other"),
    "has no function read(layer)": FILE.replace("def read", "def other"),
    "SyntaxError": FILE + "def",
    "it must take ()": FILE.replace("def __init__(self):", "def __init__(self, size):"),
    "Layer() failed: ZeroDivisionError: division by zero": FILE.replace("super().__init__()", "1 / 0"),
    "the layer is a int; it must be a torch.nn.Module": FILE + "Layer = lambda: 3",
    "read: TypeError: the result is a dict": FILE + "def read(layer): return {}",
    "read: AttributeError": FILE.replace("layer.w_in", "layer.w"),
    "router_weight has shape [6, 4]; it must be [4, 6]": FILE.replace("layer.router)", "layer.router.T)"),
    "router is a int; it must be RouterSpec": FILE.replace("RouterSpec(2),", "2,"),
    "top_k is 9; it must be at most": FILE.replace("RouterSpec(2)", "RouterSpec(9)"),
    "w_out has shape [4, 5, 6]": FILE.replace("layer.w_out", "layer.w_out.mT"),
    "training_only holds 'noise'; the parameters are router, w_in, w_out": FILE.replace(
        "layer.router)", "layer.router, training_only=('noise',))"
    ),
    "activation is 'tanh'; valid are": FILE.replace('"relu"', '"tanh"'),
    "SUPPORT is a dict": FILE + "SUPPORT = {}",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files_are_refused_in_one_line(message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD[message], encoding="utf-8")
    with pytest.raises(ResolveError) as caught:
        resolve_layer(f"{tmp_path / 'bad.py'}:Layer")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Layer", "nowhere.py does not exist"),
        ("nowhere.py", "must be path/file.py:Class, package.module:function or transformers:FAMILY"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ResolveError, match=message):
        resolve_layer(name)


def test_a_bad_file_is_a_usage_error(pytester: pytest.Pytester, tmp_path: Path) -> None:
    done = run_pytest(pytester, tmp_path / "bad.py", BAD["has no function read(layer)"])
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in done.errlines if line.strip())
    assert line.startswith("ERROR: ") and "has no function read(layer)" in line
