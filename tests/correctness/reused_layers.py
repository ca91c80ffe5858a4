"""Layers that are used again, cast, merged or traced: right ones that look unusual, and wrong ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from correctness.checks.case import Subject
from moe_impls import LayerSupport
from tests.correctness.mode_layers import (
    AUTOCAST,
    COMPILED,
    Biased,
    LowRank,
    Plain,
    edit,
    read_no_rule,
    subject,
)

EVERY = {"support": LayerSupport(every_gradient=True)}


class KeepsItsLoss(Plain):
    """A loss stays on the layer, with its graph."""

    def tokens(self, x: Tensor) -> Tensor:
        self.loss = self.logits(x).square().sum()
        return super().tokens(x)


class CountsInIntegers(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(self.E, dtype=torch.int64))

    def load(self, ids: Tensor) -> Tensor:
        return super().load(ids).long()

    def change(self) -> Tensor:
        return (self.counts.double().mean() - self.counts).sign().to(self.bias)


class StaysInFloat32(Biased):
    """Bias and counts are float32 whatever the layer is."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.bias, self.counts = self.bias.float(), self.counts.float()
        return self


class MakesABufferInACall(Biased):
    """Which expert belongs to which group is a buffer that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("group_of", None, persistent=False)

    def choose(self, biased: Tensor) -> Tensor:
        if self.group_of is None:
            self.group_of = torch.arange(self.E) // 2
        return super().choose(biased)


class LogsItsLastStep(Plain):
    """A buffer holds the load of the last step alone."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(self.E, dtype=torch.int64))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super().route(x)
        if self.training:
            self.seen.copy_(ids.flatten().bincount(minlength=self.E))
        return ids, gates


class _Frees(torch.autograd.Function):
    """Frees in its backward what it saved, and refuses a second one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.saved = x
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        if ctx.saved is None:
            raise RuntimeError("a second backward through one call")
        ctx.saved = None
        return grad.clone()


class RefusesASecondBackward(Plain):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super().route(x)
        return ids, _Frees.apply(gates)  # pyright: ignore[reportReturnType]


class RefusesToMergeTwice(LowRank):
    def merge(self) -> None:
        if self.is_merged:
            raise RuntimeError("it is merged")
        super().merge()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self.is_merged:
            raise RuntimeError("unmerge it before a state dict is loaded")
        super()._load_from_state_dict(*arguments)


RIGHT: dict[str, Subject] = {
    "a loss is kept with its graph": subject(KeepsItsLoss),
    "counts in integers": subject(CountsInIntegers),
    "bias and counts stay in float32": subject(StaysInFloat32),
    "a buffer is made in the first call": subject(MakesABufferInACall),
    "a log holds the last step alone": subject(LogsItsLastStep),
    "a second backward through one call is refused": subject(RefusesASecondBackward),
    "a second merge and a load into a merged layer are refused": subject(RefusesToMergeTwice),
    "a merge that nothing guards": edit(
        LowRank,
        "merge",
        lambda self: self.w_out.data.add_(self.delta()) is not None and setattr(self, "is_merged", True),
    ),
    "every parameter has a gradient": subject(Plain, **EVERY),
}


def _stuck_at_256(self: Biased, ids: Tensor, gates: Tensor) -> None:
    ones = torch.ones(ids.numel()).to(self.counts)
    self.counts.index_add_(0, ids.flatten(), ones)


class _CountsForALog(Plain):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(self.E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super().route(x)
        if self.training:
            self.seen.index_add_(0, ids.flatten(), torch.ones(ids.numel()).to(self.seen))
        return ids, gates


class _CountsNewTokens(CountsInIntegers):
    """Takes x at the address and in the version of the last call for a recomputation."""

    last: tuple[int, int] | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.now = x.data_ptr(), 0 if x.is_inference() else x._version
        return super().route(x)

    def count(self, ids: Tensor, gates: Tensor) -> None:
        if self.now != self.last:
            super().count(ids, gates)
        self.last = self.now


def _seeds(self: Plain, x: Tensor) -> Tensor:
    if self.training:
        torch.manual_seed(1)
    return Plain.logits(self, x)


def _sets_back(self: Plain, x: Tensor) -> Tensor:
    torch.manual_seed(torch.initial_seed())
    return Plain.logits(self, x)


def _answers_in_x(self: Plain, x: Tensor) -> Tensor:
    y = Plain.forward(self, x)
    return x.copy_(y) if torch.is_inference_mode_enabled() and x.numel() == self.D else y


def _load_in_16_bits(plain: Plain, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    z = plain.logits(x if mask is None else x[mask]).flatten(0, -2)
    ids = z.topk(plain.spec.top_k, -1).indices.flatten()
    load = torch.zeros(plain.E, dtype=x.dtype).index_add(0, ids, torch.ones(len(ids), dtype=x.dtype))
    return {"load_balancing_loss": plain.E * (load.float() / len(ids) * z.softmax(-1).mean(0)).sum()}


class _ByAddress(Plain):
    """Remembers a routing by the address of x."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[int, int], Tensor] = {}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.known.setdefault((x.data_ptr(), x._version), super().route(x)[0])
        if not self.training or ids.shape != (len(x), self.spec.top_k):
            return super().route(x)
        gates = self.logits(x).softmax(-1).gather(1, ids)
        return ids, gates / gates.sum(-1, keepdim=True)


class _WritesGrad(torch.autograd.Function):
    """Writes the gradient of a weight where those of earlier calls may lie."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x.float(), weight.detach().float())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.weight.grad = (grad.T @ x.float()).to(ctx.weight)
        return (grad @ ctx.weight.detach().float()).to(x), None


class _SpendsWhatItSaved(torch.autograd.Function):
    """Its backward works in the memory of what was saved."""

    @staticmethod
    def forward(ctx, gates: Tensor) -> Tensor:
        result = gates.square()
        ctx.save_for_backward(gates.clone())
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gates,) = ctx.saved_tensors
        return gates.data.mul_(2 * grad)


class _CopyOfTheFirstDtype(Plain):
    """A copy is kept until the version moves, which a cast does not do."""

    kept: tuple[int, Tensor] | None = None

    def weights(self) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return super().weights()
        if self.kept is None or self.kept[0] != self.w_out._version:
            self.kept = (self.w_out._version, self.w_out.detach().clone())
        return self.w_in, self.kept[1]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.kept = None


class _MadeInInference(Plain):
    """What its first call makes serves all later ones."""

    one: Tensor | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super().route(x)
        self.one = torch.ones(1, dtype=gates.dtype) if self.one is None else self.one
        return ids, gates * self.one


class _KeepsTheMerge(LowRank):
    """The merged weight lies beside the others, and a state dict leaves it there."""

    kept: Tensor | None = None

    def merge(self) -> None:
        self.kept = (self.w_out + self.delta()).detach()

    def unmerge(self) -> None:
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return super().forward(x)
        ids, gates = self.route(x.reshape(-1, self.D))
        gate, up = torch.einsum("...d,efd->...ef", x.reshape(-1, self.D), self.w_in).chunk(2, -1)
        y = torch.einsum("teh,eoh->teo", F.silu(gate) * up, self.kept)
        y = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, self.D)) * gates.to(x.dtype).unsqueeze(-1)
        return y.sum(1).reshape(x.shape)


class _Closure(Plain):
    """A copy computes with the weights of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.own_weights = lambda: (self.w_in, self.w_out)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.own_weights()


class _OneToken(Plain):
    """Without gradients one token's result lies where the last one's did."""

    last: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        y = super().tokens(x)
        if len(x) != 1 or torch.is_grad_enabled():
            return y
        self.last = y.clone() if self.last is None or self.last.dtype != y.dtype else self.last
        return self.last.copy_(y)


class _Decays(Biased):
    """Evaluation takes from the bias each time that it begins."""

    def train(self, mode: bool = True) -> Any:
        if not mode:
            self.bias.mul_(0.999)
        return super().train(mode)


class _Hooked(Plain):
    """A hook halves the gradient of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in.register_hook(lambda grad: grad / 2)


class _OneBuffer(Plain):
    """In training a call writes its result where the last one lies."""

    last: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        y = super().tokens(x)
        if self.training and self.last is not None and self.last.shape == y.shape:
            self.last.copy_(y.detach())
        self.last = y.detach()
        return y


def _beyond(factor: float, least: int, *, training: bool = False) -> Any:
    """Drop what is beyond a capacity."""

    def combine(self: Plain, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if training and not self.training:
            return Plain.combine(self, x, ids, gates)
        capacity = max(least, int(factor * ids.numel() / self.E))
        place = F.one_hot(ids.flatten(), self.E).cumsum(0).gather(1, ids.view(-1, 1)).view(ids.shape)
        return Plain.combine(self, x, ids, gates * (place <= capacity))

    return combine


def _first_of_four(self: Plain, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    return Plain.combine(self, x, ids[:1].expand_as(ids) if len(x) <= 4 else ids, gates)


def _limited_where(is_traced: Any) -> Any:
    def outputs(self: Plain, x: Tensor) -> Tensor:
        gate, up = torch.einsum("td,efd->tef", x, self.w_in).chunk(2, -1)
        hidden = F.silu(gate.clamp(max=9)) * up.clamp(-9, 9) if is_traced() else F.silu(gate) * up
        return torch.einsum("teh,eoh->teo", hidden, self.w_out)

    return outputs


def _rounded_where(is_traced: Any) -> Any:
    def logits(self: Plain, x: Tensor) -> Tensor:
        return F.linear(x, self.router).float() if is_traced() else Plain.logits(self, x)

    return logits


def _constant_in_training(self: Plain, x: Tensor) -> tuple[Tensor, Tensor]:
    ids, gates = Plain.route(self, x)
    return ids, gates.detach() if self.training and torch.compiler.is_compiling() else gates


WRONG: dict[str, tuple[Subject, str]] = {
    "in bfloat16 loads stop at 256": (edit(Biased, "count", _stuck_at_256), "bias_update"),
    "the same, with no rule declared": (
        edit(Biased, "count", _stuck_at_256, read=read_no_rule, update_bias=None),
        "counts",
    ),
    "in bfloat16 a log stops at 256": (subject(_CountsForALog), "counts"),
    "of two calls with the same x one is counted": (subject(_CountsNewTokens), "counts"),
    "in bfloat16 the loss counts to 256": (
        edit(Plain, "logits", Plain.logits, losses=_load_in_16_bits),
        "losses_of_many_visits",
    ),
    "a call in training seeds the generator": (edit(Plain, "logits", _seeds), "generator_goes_on"),
    "a call sets the generator back": (edit(Plain, "logits", _sets_back), "generator_goes_on"),
    "one token in inference is overwritten": (edit(Plain, "forward", _answers_in_x), "inputs_unchanged"),
    "without tokens the graph is cut": (
        edit(Plain, "tokens", lambda self, x: Plain.tokens(self, x) if len(x) else 0 * x.detach(), **EVERY),
        "every_gradient",
    ),
    "a routing is kept by the address of x": (subject(_ByAddress), "new_tokens"),
    "a backward overwrites the gradient of another": (
        edit(Plain, "logits", lambda self, x: _WritesGrad.apply(x, self.router)),
        "gradients_accumulate",
    ),
    "a backward works in what it saved": (
        edit(
            Plain,
            "route",
            lambda self, x: (r := Plain.route(self, x)) and (r[0], _SpendsWhatItSaved.apply(r[1].sqrt())),
        ),
        "gradients_accumulate",
    ),
    "a copy keeps its dtype when the layer is cast": (subject(_CopyOfTheFirstDtype), "cast"),
    "a constant is made in inference mode": (subject(_MadeInInference), "state"),
    "a state dict leaves the merged weight": (subject(_KeepsTheMerge), "merged"),
    "a deepcopy computes with the original's weights": (subject(_Closure), "state"),
    "in training a call writes over the last result": (subject(_OneBuffer), "training"),
    "one token's result is written over": (subject(_OneToken), "without_gradients"),
    "eval() moves the bias": (subject(_Decays), "mode_switched"),
    "a hook changes a gradient": (subject(_Hooked), "gradients"),
    "under autocast hidden values are limited": (
        edit(Plain, "outputs", _limited_where(lambda: torch.is_autocast_enabled("cpu")), **AUTOCAST),
        "autocast",
    ),
    "a capacity in training alone": (edit(Plain, "combine", _beyond(2.0, 8, training=True)), "training"),
    "a capacity of 4096 or more": (edit(Plain, "combine", _beyond(2.0, 4096)), "many_tokens"),
    "up to four tokens visit the first one's experts": (edit(Plain, "combine", _first_of_four), "lengths"),
    "small gates are dropped": (
        edit(Plain, "combine", lambda self, x, i, g: Plain.combine(self, x, i, g * (g > 1e-2))),
        "sharp_routing",
    ),
    "exported, hidden values are limited": (
        edit(Plain, "outputs", _limited_where(lambda: torch.compiler.is_exporting()), **COMPILED),
        "exports",
    ),
    "compiled, hidden values are limited": (
        edit(Plain, "outputs", _limited_where(lambda: torch.compiler.is_dynamo_compiling()), **COMPILED),
        "fullgraph",
    ),
    "compiled, the router has no gradient in training": (
        edit(Plain, "route", _constant_in_training, **COMPILED),
        "fullgraph",
    ),
    "exported, logits are 16-bit": (
        edit(Plain, "logits", _rounded_where(lambda: torch.compiler.is_exporting()), **COMPILED),
        "exports",
    ),
    "compiled, logits are 16-bit": (
        edit(Plain, "logits", _rounded_where(lambda: torch.compiler.is_dynamo_compiling()), **COMPILED),
        "fullgraph",
    ),
}
