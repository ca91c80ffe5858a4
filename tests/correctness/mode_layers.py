"""Layers that are right in a mode: training, recomputed, autocast, compiled, merged, moved, loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from correctness.checks.case import Subject
from correctness.checks.layers import layer
from correctness.judging.layer_bench import Layer
from moe_impls import BiasRule, Experts, LayerSupport, LayerWeights, RouterSpec, Routing


class Plain(nn.Module):
    """Mixtral's routing and stacked experts, of which each step can be replaced."""

    spec = RouterSpec(2, renormalise=True)
    D, H, E = 8, 6, 5

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(self.E, self.D))
        self.w_in = nn.Parameter(torch.randn(self.E, 2 * self.H, self.D))
        self.w_out = nn.Parameter(torch.randn(self.E, self.D, self.H))

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.router.float())

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = self.logits(x).softmax(-1).topk(self.spec.top_k, -1)
        return ids, gates / gates.sum(-1, keepdim=True)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w_in, self.w_out

    def outputs(self, x: Tensor) -> Tensor:
        """What every expert makes of every token: [T, E, D]."""
        w_in, w_out = self.weights()
        gate, up = torch.einsum("td,efd->tef", x, w_in).chunk(2, -1)
        return torch.einsum("teh,eoh->teo", F.silu(gate) * up, w_out)

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        outputs = self.outputs(x).gather(1, ids.unsqueeze(-1).expand(-1, -1, self.D))
        return (outputs.float() * gates.float().unsqueeze(-1)).sum(1).to(x.dtype)

    def tokens(self, x: Tensor) -> Tensor:
        return self.combine(x, *self.route(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.reshape(-1, self.D)).reshape(x.shape)


def read(plain: Plain) -> LayerWeights:
    return LayerWeights(
        Experts(plain.w_in, None, plain.w_out, None, "swiglu"), plain.spec, router_weight=plain.router
    )


class Biased(Plain):
    """A selection bias that training moves, in the call or by `update_bias`."""

    spec = RouterSpec(2, "sigmoid", True)
    bias: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.E))
        self.register_buffer("counts", torch.zeros(self.E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        ids = self.choose(scores.detach() + self.bias.float())
        gates = scores.gather(1, ids)
        if self.training:
            self.count(ids, gates)
        return ids, gates / gates.sum(-1, keepdim=True)

    def choose(self, biased: Tensor) -> Tensor:
        return biased.topk(self.spec.top_k, -1).indices

    def count(self, ids: Tensor, gates: Tensor) -> None:
        self.counts += self.load(ids)

    def load(self, ids: Tensor) -> Tensor:
        return ids.flatten().bincount(minlength=self.E).float()

    @torch.no_grad()
    def update_bias(self) -> None:
        self.bias += 0.001 * self.change()
        self.counts.zero_()

    def change(self) -> Tensor:
        return (self.counts.mean() - self.counts).sign()


RULE = BiasRule(0.001)


def read_biased(biased: Biased, rule: BiasRule | None = RULE) -> LayerWeights:
    weights = read(biased)
    return LayerWeights(
        weights.experts, biased.spec, biased.router, selection_bias=biased.bias, bias_rule=rule
    )


def read_no_rule(biased: Biased) -> LayerWeights:
    return read_biased(biased, None)


class InCall(Biased):
    """The bias moves at the end of routing."""

    def count(self, ids: Tensor, gates: Tensor) -> None:
        with torch.no_grad():
            counts = self.load(ids)
            self.bias += 0.001 * (counts.mean() - counts).sign()


class LowRank(Plain):
    """A low-rank part of w_out that can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(self.E, 3, self.H))
        self.b = nn.Parameter(torch.randn(self.E, self.D, 3))
        self.is_merged = False

    def delta(self) -> Tensor:
        return self.b @ self.a

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w_in, self.w_out if self.is_merged else self.w_out + self.delta()

    def merge(self) -> None:
        if not self.is_merged:
            self.w_out.data += self.merged_delta()
            self.is_merged = True

    def unmerge(self) -> None:
        self.w_out.data -= self.delta()
        self.is_merged = False

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.is_merged = False

    def merged_delta(self) -> Tensor:
        return self.delta()


def read_low_rank(plain: LowRank) -> LayerWeights:
    experts = Experts(plain.w_in, None, plain.weights()[1], None, "swiglu")
    return LayerWeights(experts, plain.spec, router_weight=plain.router)


class Placed(Plain):
    """Experts lie in slots: ``slots[e]`` is where expert e is."""

    slots: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slots", torch.tensor([2, 0, 1, 4, 3]))

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return super().combine(x, self.slots[ids], gates)


def read_placed(placed: Placed) -> LayerWeights:
    experts = read(placed).experts.map(lambda w: w[placed.slots])
    return LayerWeights(experts, placed.spec, router_weight=placed.router)


class Noisy(Plain):
    """Noise on the logits in training."""

    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        return z + 0.5 * self.noise(z) if self.training else z

    def noise(self, z: Tensor) -> Tensor:
        return torch.randn_like(z)


class Jitter(Plain):
    """The experts' input, too, is multiplied by noise in training, in a copy."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(self.jitter(x) if self.training else x)

    def jitter(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).uniform_(0.9, 1.1)


READ: dict[type, Callable] = {
    Biased: read_biased,
    LowRank: read_low_rank,
    Placed: read_placed,
    Plain: read,
}


def routing_of(plain: Plain, x: Tensor) -> Routing:
    return Routing(*plain.route(x))


def subject(make: type[nn.Module], **more: object) -> Subject:
    """A layer with the `read` of what it derives from, and `update_bias` if it has that."""
    own_read = next(READ[base] for base in make.__mro__ if base in READ)
    if issubclass(make, Biased) and not issubclass(make, InCall):
        more = {"update_bias": lambda made: made.update_bias()} | more
    more = {"read": own_read} | more
    return layer(make.__name__, Layer(make, **more))  # pyright: ignore[reportArgumentType]


def edit(base: type[nn.Module], name: str, method: Callable, **more: object) -> Subject:
    """``base`` with one method replaced."""
    return subject(type("Wrong", (base,), {name: method}), **more)


AUTOCAST = {"support": LayerSupport(autocast=True)}
COMPILED = {"support": LayerSupport(fullgraph=True, exports=True)}


class KeptByVersion(Plain):
    """For inference a transposed copy is kept, until the address or the version of a weight moves."""

    kept: tuple[tuple[int, int], Tensor] | None = None

    def weights(self) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return super().weights()
        key = (self.w_out.data_ptr(), self.w_out._version)
        if self.kept is None or self.kept[0] != key:
            self.kept = (key, self.w_out.detach().mT.contiguous())
        return self.w_in, self.kept[1].mT


class CountsOnce(Biased):
    """Counts in what a reentrant checkpoint recomputes, as only that has a graph."""

    def tokens(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().tokens(x)
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(super().tokens, x, use_reentrant=True)  # pyright: ignore[reportReturnType]

    def count(self, ids: Tensor, gates: Tensor) -> None:
        if torch.is_grad_enabled():
            super().count(ids, gates)


class CountsInAHook(Plain):
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(self.E))
        self.register_forward_hook(self.count)

    @staticmethod
    def count(made: nn.Module, arguments: tuple[Tensor], y: Tensor) -> None:
        assert isinstance(made, CountsInAHook)
        if made.training:
            ids = made.route(arguments[0].detach().reshape(-1, made.D))[0]
            made.counts += ids.flatten().bincount(minlength=made.E)


class OfAnAverage(Biased):
    """The bias follows an average of loads; no rule is declared."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((self.E,), 0.2))

    def change(self) -> Tensor:
        self.average.mul_(0.5).add_(0.5 * self.counts / self.counts.sum())
        return self.average.mean() - self.average


class Centred(Biased):
    def change(self) -> Tensor:
        change = super().change()
        return change - change.mean()


class Tied(Plain):
    """Experts 0 and 3 share their weights."""

    def weights(self) -> tuple[Tensor, Tensor]:
        order = torch.tensor([0, 1, 2, 0, 4])
        return self.w_in[order], self.w_out[order]


def read_tied(tied: Tied) -> LayerWeights:
    return LayerWeights(Experts(*_with_none(*tied.weights()), "swiglu"), tied.spec, router_weight=tied.router)


def _with_none(w_in: Tensor, w_out: Tensor) -> tuple[Tensor, None, Tensor, None]:
    return w_in, None, w_out, None


class Parametrised(Plain):
    """Weight normalisation of the experts."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("w_in", "w_out"):
            nn.utils.parametrizations.weight_norm(self, name)


class CompiledInside(Plain):
    """Part of its call is compiled."""

    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        combine = torch.compile(_combine, backend="eager", dynamic=True)
        return combine(self.outputs(x), ids, gates).to(x.dtype)


def _combine(outputs: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    chosen = outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
    return (chosen.float() * gates.float().unsqueeze(-1)).sum(1)


class OwnGenerator(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def noise(self, z: Tensor) -> Tensor:
        return torch.randn(z.shape, generator=self.generator)

    def __deepcopy__(self, memo: dict) -> OwnGenerator:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin.to(self.router.dtype).train(self.training)


class DropsOutputs(Plain):
    def combine(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return F.dropout(super().combine(x, ids, gates), 0.2, self.training)


class Checkpointed(Noisy):
    """Recomputed with the noise of the first time."""

    def tokens(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().tokens(x)
        return checkpoint(super().tokens, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


RIGHT = {
    "plain, compiled and exported": subject(Plain, **COMPILED),
    "plain, under autocast": subject(Plain, **AUTOCAST),
    "a copy is kept until the version moves": subject(KeptByVersion),
    "loads are counted where a reentrant checkpoint recomputes": subject(CountsOnce),
    "loads are counted in a hook": subject(CountsInAHook),
    "the bias moves in the call": subject(InCall),
    "the bias follows an average of loads": subject(OfAnAverage, read=read_no_rule),
    "the change of the bias is centred": subject(
        Centred, read=lambda made: read_biased(made, BiasRule(0.001, centred=True))
    ),
    "low rank, merged": subject(LowRank),
    "experts lie in slots": subject(Placed),
    "experts are tied": subject(Tied, read=read_tied),
    "weights are parametrised": subject(Parametrised),
    "compiled inside its call": subject(CompiledInside),
    "noise on the logits": subject(Noisy),
    "noise on the logits, reported": subject(Noisy, routing=routing_of),
    "noise on the input, in a copy": subject(Jitter),
    "noise of a generator of its own": subject(OwnGenerator),
    "outputs are dropped": subject(DropsOutputs),
    "noise and recomputation": subject(Checkpointed),
}
