"""A layer on the bench: its parameters drawn anew, tokens, and what is right for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from correctness.judging.budget import entry_budgets, relative_errors, underflow
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_made import Layer, build, copies_of, draw  # noqa: F401
from correctness.judging.layer_routing import dropped_slots
from correctness.judging.layer_tokens import B, S, T, comparable, draw_tokens, is_swayed  # noqa: F401
from correctness.oracle import layer as oracle
from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import dtype_name
from moe_impls.layer_interface import LayerWeights
from moe_impls.registry import one_line

SIGNS = 64  # patterns of signs of errors
COPIES = 163  # of each token in a call with many: more than 4096 tokens, and no multiple of a usual tile


def weights_of(subject: Layer, twin: nn.Module) -> LayerWeights:
    """Read the layer's twin in float64, without its graph."""
    return oracle.map_tensors(subject.read(twin), lambda t: t.detach().double().clone())


@dataclass(frozen=True)
class Expected:
    """What is right for tokens x [T, D] and dy [T, O], and how far each entry may be off, by name.

    The names are y, x and those of the layer's parameters. A parameter that `read` does not read is not
    among them. is_swayed: tokens, bool [T], that go to other experts by logits rounded to the dtype of x.
    weights: what `read` returns, in float64. Of a layer that reports its routing no slot is dropped here.
    """

    x: Tensor
    ids: Tensor
    is_swayed: Tensor
    dy: Tensor
    want: dict[str, Tensor]
    allowed: dict[str, Tensor]
    weights: LayerWeights


@functools.lru_cache(maxsize=64)
def expected(subject: Layer, dtype: torch.dtype) -> Expected:
    """Return the oracle's answer for a layer as `build` makes it."""
    return expected_of(subject, build(subject, dtype).to("cpu", torch.float64), dtype)


def expected_of(
    subject: Layer,
    twin: nn.Module,
    dtype: torch.dtype,
    gradients: bool = True,
    tokens: int = T,
    like: Callable[[Tensor], Tensor] = lambda x: x,
) -> Expected:
    """Return the oracle's answer, on so many tokens, for a layer whose twin in float64 that is.

    like: makes the tokens of normal ones [N, D].
    """
    weights = weights_of(subject, twin)
    x, ids = draw_tokens(weights, dtype, subject.logits_dtype(dtype), tokens, like)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(tokens, weights.experts.w_out.shape[1], generator=generator).to(dtype)
    bare = Expected(x, ids, is_swayed(x, weights), dy, {}, {}, weights)
    return answered(subject, dtype, bare, twin, gradients)


def answered(
    subject: Layer,
    dtype: torch.dtype,
    tokens: Expected,
    twin: nn.Module,
    gradients: bool = True,
    dropped: Tensor | None = None,
) -> Expected:
    """Fill in what is right for these tokens where the slots ``dropped``, bool [T, K], add nothing."""
    gradients = gradients and subject.support.gradients and comparable(tokens.weights, dtype)
    rounded, dy = subject.logits_dtype(dtype), tokens.dy if gradients else None
    want, allowed = judged(tokens.x, tokens.ids, tokens.weights, dy, dtype, rounded, dropped)
    parameters = onto_parameters(subject, twin, want, allowed) if gradients else {}
    own = [name for name in ("y", "x") if name in want]
    return replace(
        tokens,
        want={n: want[n] for n in own} | {n: value for n, (value, _) in parameters.items()},
        allowed={n: allowed[n] for n in own} | {n: budget for n, (_, budget) in parameters.items()},
    )


def judged(
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    dy: Tensor | None,
    dtype: torch.dtype,
    logits_dtype: torch.dtype = torch.float32,
    dropped: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the oracle's results, and the budget of each entry: what a plain computation in ``dtype`` loses.

    That makes its logits in at least float32, and rounds them to ``logits_dtype``.
    """
    rounded = logits_dtype if logits_dtype in LOW_PRECISION else None
    right = oracle.evaluate_layer(x, ids, weights, dy, dropped=dropped)
    plain = oracle.evaluate_layer(
        x, ids, weights, dy, dtype=dtype, wide=torch.float32, rounded=rounded, dropped=dropped
    )
    return right.values, entry_budgets(right, plain, dtype)


def onto_parameters(
    subject: Layer, twin: nn.Module, values: dict[str, Tensor], allowed: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Push the gradients of what `read` returned, and their budgets, through `read` onto the parameters."""
    named = {n: t for n, t in oracle.tensors(subject.read(twin)).items() if t.requires_grad and n in values}
    parameters = trained(twin)
    if not named or not parameters:
        return {}
    for parameter in parameters.values():
        if parameter._backward_hooks:  # of the layer's making, which would change what is right
            parameter._backward_hooks.clear()

    def push(terms: dict[str, Tensor]) -> dict[str, Tensor]:
        along = [terms[name].to(tensor) for name, tensor in named.items()]
        pushed = torch.autograd.grad(
            list(named.values()), list(parameters.values()), along, retain_graph=True, allow_unused=True
        )
        return {n: t for n, t in zip(parameters, pushed, strict=True) if t is not None}

    # Where `read` adds up, errors of either sign add up: their root mean square over random signs.
    generator = torch.Generator().manual_seed(5)
    errors = [
        push({n: a * (2 * torch.randint(2, a.shape, generator=generator) - 1) for n, a in allowed.items()})
        for _ in range(SIGNS)
    ]
    return {
        name: (value, torch.stack([e[name] for e in errors]).square().mean(dim=0).sqrt())
        for name, value in push(values).items()
    }


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def reached(layer: nn.Module, tensor: Tensor) -> dict[str, Tensor]:
    """Find the parameters that a tensor of `read` is made of, with the derivative of the tensor's sum."""
    parameters = trained(layer)
    if not parameters or not tensor.requires_grad:
        return {}
    leaves = list(parameters.values())  # what `read` returns may share a graph
    derivatives = torch.autograd.grad(tensor.sum(), leaves, retain_graph=True, allow_unused=True)
    return {name: d for name, d in zip(parameters, derivatives, strict=True) if d is not None}


@dataclass(frozen=True)
class Bench:
    """One layer on the bench: a fresh layer, and what is right for it."""

    subject: Layer
    dtype: torch.dtype
    layer: nn.Module
    expected: Expected

    @classmethod
    def of(cls, subject: Layer, dtype: torch.dtype) -> Bench:
        """Make a fresh layer of that dtype and what is right for it."""
        return cls(subject, dtype, build(subject, dtype), expected(subject, dtype))

    def twin(self) -> nn.Module:
        """Make a twin in float64 that holds what the layer holds now."""
        twin = build(self.subject, self.dtype).to("cpu", torch.float64)
        values = dict((*self.layer.named_parameters(), *self.layer.named_buffers()))
        with torch.no_grad():
            for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
                tensor.copy_(values[name])
        return twin

    @property
    def x(self) -> Tensor:
        """Tokens [T, D] on the layer's device; a copy."""
        return self.expected.x.clone().to(self.device)

    @property
    def device(self) -> torch.device:
        return self.subject.read(self.layer).router_weight.device

    def call(self, x: Tensor) -> Tensor:
        """Call the layer: return its y, or raise CheckFailed unless it is a tensor [..., O] like x."""
        what = f"layer(x) with x {list(x.shape)} of {dtype_name(x.dtype)}"
        try:
            result = self.layer(x)
        except Exception as error:
            raise CheckFailed(f"{what} raises {one_line(error)}") from error
        y = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(y, Tensor):
            raise CheckFailed(f"{what} returns a {type(y).__name__}; it must be y or (y, ...)")
        O = self.expected.dy.shape[1]
        for fact, got, want in (
            ("shape", tuple(y.shape), (*x.shape[:-1], O)),
            ("dtype", y.dtype, x.dtype),
            ("device", y.device, x.device),
        ):
            if got != want:
                raise CheckFailed(f"{what} returns y of {fact} {got}; it must be {want}")
        return y

    def dropping(self, tokens: int = 0) -> Bench:
        """Return a bench where the slots count as dropped that the layer says it drops in a call.

        tokens: of that call, made by `call_of`; those that are judged.
        """
        if self.subject.routing is None:
            return self
        right, twin = self.expected, self.twin()
        rows, places = call_of(len(right.x), tokens)
        dropped = self.dropped(self.x[rows], right.ids[rows], places)
        assert dropped is not None
        taken = dropped[places]
        return replace(self, expected=answered(self.subject, self.dtype, right, twin, dropped=taken))

    def alone(self, rows: Tensor) -> Bench:
        """Return a bench of some of the tokens, that visit few of the experts."""
        e = self.expected
        few = replace(e, x=e.x[rows], ids=e.ids[rows], is_swayed=e.is_swayed[rows], dy=e.dy[rows])
        return replace(self, expected=answered(self.subject, self.dtype, few, self.twin()))

    def dropped(
        self,
        x: Tensor,
        ids: Tensor,
        only: Tensor | slice = slice(None),
        weights: LayerWeights | None = None,
    ) -> Tensor | None:
        """Return the slots that the layer says it drops in a call with x, checked for the tokens ``only``.

        weights: what the layer holds, if not what it did when it was made.
        """
        if self.subject.routing is None:
            return None
        weights, rounded = weights or self.expected.weights, self.subject.logits_dtype(self.dtype)
        return dropped_slots(self.subject.routing, self.layer, x, ids, weights, rounded, only)

    def require(self, name: str, got: Tensor, want: Tensor, allowed: Tensor, context: str = "") -> None:
        """Raise CheckFailed unless each entry is within its budget."""
        ratio = relative_errors(got.detach().cpu(), want, allowed, underflow(got.dtype))
        if not ratio.numel() or float(ratio.max()) <= 1:
            return
        index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise CheckFailed(
            f"{name}{list(index) if index else ''} is {got[index].item():.6g}, right is "
            f"{want[index].item():.6g}{context}; error {float(ratio.max()):.3g} times its budget, "
            f"{int((ratio > 1).sum())} of {ratio.numel()} entries are over theirs ({dtype_name(self.dtype)})"
        )

    def require_y(
        self,
        y: Tensor,
        rows: Tensor | slice = slice(None),
        context: str = "",
        *,
        x: Tensor | None = None,
        only: Tensor | slice = slice(None),
    ) -> None:
        """Raise CheckFailed unless the outputs [N, O] of a call are right for its tokens ``rows``.

        x: what the layer was called with, if not those tokens. only: of the N, those that are judged.
        """
        right, only_of_y = self.expected, only if isinstance(only, slice) else only.to(y.device)
        want, allowed, ids = right.want["y"][rows][only], right.allowed["y"][rows][only], right.ids[rows]
        dropped = self.dropped(self.x[rows] if x is None else x, ids, only) if len(ids) else None
        if dropped is not None and bool(dropped[only].any()):
            with torch.inference_mode(False):
                arguments = (right.x[rows][only], right.ids[rows][only], right.weights, None, self.dtype)
                logits_dtype = self.subject.logits_dtype(self.dtype)
                values, budgets = judged(*arguments, logits_dtype, dropped[only].clone())
            want, allowed = values["y"], budgets["y"]
        self.require("y", y[only_of_y], want, allowed, context)


def call_of(distinct: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Say which of the distinct tokens stands where in a call with more: [N], and the place of one of each.

    These places go from the first of the call to its last.

    Args:
        tokens: of the call; each token once by default.
    """
    places = torch.arange(distinct) * (max(tokens, distinct) - 1) // max(1, distinct - 1)
    rows = torch.arange(max(tokens, distinct)) % distinct
    rows[places] = torch.arange(distinct)
    return rows, places
