"""What a whole layer is held to, from its input to the gradient of every parameter.

A layer under test is a class or function without arguments that makes an ``nn.Module`` from [..., D] to
[..., O], and beside it ``read(layer) -> LayerWeights``. Its file may also hold

    losses(layer, x, mask) -> {name: scalar}    mask [...] bool, False for padding, or None; names as LOSSES
    SUPPORT = Support(...)                      dtypes, gradients, deterministic

A check is a function of a `Bench`, a layer with tokens and what is right for them, that raises
``CheckFailed`` with its finding. The same table judges the project's layers, a stranger's (``--layer``) and
the deliberately wrong ones. All parameters are drawn anew, since a router or biases that start at zero would
hide mistakes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from correctness.judging.blame import blamed
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import (
    COPIES,
    B,
    Bench,
    LayerSubject,
    S,
    T,
    _allowed,
    _copies,
    _draw,
    _judged,
    _onto_parameters,
    _reached,
    _trained,
    _weights,
    build,
    expected,
)
from correctness.oracle import layer as oracle
from correctness.oracle.layer import LOSSES
from moe_impls.interface import (
    dtype_name,
)
from moe_impls.registry import one_line


def values(bench: Bench) -> None:
    """The output for x [B, S, D] is the oracle's, for the weights that `read` returned."""
    bench.require_y(bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1))


def low_precision(bench: Bench) -> None:
    """In bfloat16 logits are still made in float32: the right experts, and y within its budget."""
    hint = (
        "; logits in 16 bits send tokens to other experts: make them in float32, or declare in SUPPORT the "
        "dtypes that the layer is right in"
    )
    bench.require_y(bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1), context=hint)


def low_precision_gradients(bench: Bench) -> None:
    """In bfloat16 the gradients of x and of every parameter are within their budget, too."""
    for name, got in _gradients(bench).items():
        if name in bench.expected.want:
            _require_gradient(bench, name, got)


def half_precision(bench: Bench) -> None:
    """In float16 likewise."""
    low_precision(bench)


def double_precision(bench: Bench) -> None:
    """In float64 y is right; the router may work in float32, as low as the budget then is."""
    values(bench)


def leading_dimensions(bench: Bench) -> None:
    """x may be [D], [T, D], [B, S, D] or longer, strided, and may hold no tokens.

    An x that is not contiguous may be refused with an error.
    """
    x = bench.x.unflatten(0, (B, S))
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        try:
            y = bench.call(strided)
        except CheckFailed as failure:
            if isinstance(failure.__cause__, RuntimeError):
                continue
            raise
        bench.require_y(y.flatten(0, 1), context=f" for x with strides {strided.stride()}")
    for shape in ((T,), (B, S), (S, B), (2, 2, S), (0,), (2, 0)):
        rows = slice(None if 0 not in shape else 0)
        y = bench.call(
            bench.x[rows].reshape(*shape, -1) if 0 not in shape else bench.x[:0].expand(*shape, -1)
        )
        bench.require_y(y.reshape(-1, y.shape[-1]), rows, f" for x {[*shape, bench.x.shape[1]]}")
    bench.require_y(bench.call(bench.x[5]).unsqueeze(0), slice(5, 6), f" for x {[bench.x.shape[1]]}")


def gradients(bench: Bench) -> None:
    """The gradients of x and of every parameter are the oracle's, pushed through `read`."""
    right, read = bench.expected, oracle.tensors(bench.subject.read(bench.layer))
    for name, tensor in read.items():
        if name != "selection_bias" and not _reached(bench.layer, tensor) and not _is_buffer(bench, name):
            raise CheckFailed(
                f"{name}, as read(layer) returns it, is made of no parameter that is trained and of no buffer"
            )
    for x_wanted, context in ((True, ""), (False, " where x needs none")):
        for name, got in _gradients(bench, x_wanted=x_wanted).items():
            if name in right.want:
                _require_gradient(bench, name, got, context)
            elif got is not None and bool(got.any()):
                raise CheckFailed(f"y depends on {name}, which read(layer) does not return")


def _is_buffer(bench: Bench, name: str) -> bool:
    """Whether a tensor of `read` changes with the layer's buffers."""
    twin = copy.deepcopy(bench.layer)
    with torch.no_grad():
        before = oracle.tensors(bench.subject.read(twin))[name].clone()
        for buffer in twin.buffers():
            buffer.copy_(buffer == 0)  # of any dtype
        return not torch.equal(oracle.tensors(bench.subject.read(twin))[name], before)


def _require_gradient(bench: Bench, name: str, got: Tensor | None, context: str = "") -> None:
    want, allowed = bench.expected.want[name], bench.expected.allowed[name]
    if got is None and bool(want.any()):
        raise CheckFailed(f"the gradient of {name} is missing{context}: y does not depend on it")
    if got is not None:
        bench.require(f"the gradient of {name}", got, want, allowed, context)


def _gradients(bench: Bench, *, copies: int = 1, x_wanted: bool = True) -> Mapping[str, Tensor | None]:
    """What dy gives x and each parameter, by name, though another call comes between forward and backward.

    copies: of each token; the gradient flows into one of them, in all parts of the call.
    """
    x = bench.x.repeat(copies, 1).requires_grad_(x_wanted)
    y = bench.call(x.unflatten(0, (B * copies, S)))
    leaves = {**({"x": x} if x_wanted else {}), **_trained(bench.layer)}
    if not leaves:
        return {}
    if not y.requires_grad:
        raise CheckFailed("y does not require a gradient though x and the parameters do: the graph is cut")
    bench.call(x.flip(0).unflatten(0, (B * copies, S)))
    rows = torch.arange(T) + T * (torch.arange(T) * 5 % copies)
    dy = torch.zeros(len(x), y.shape[-1], dtype=y.dtype).index_copy(0, rows, bench.expected.dy)
    dy = dy.to(bench.device).reshape(y.shape)
    try:
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    except Exception as error:
        raise CheckFailed(f"the backward of layer(x) raises {one_line(error)}") from error
    found = dict(zip(leaves, grads, strict=True))
    if (dx := found.get("x")) is not None:
        found["x"] = dx[rows.to(dx.device)]
    return found


def frozen(bench: Bench) -> None:
    """With any one parameter frozen, the gradients of x and of the others stay what they are."""
    for name, parameter in _trained(bench.layer).items():
        parameter.requires_grad_(False)
        for other, got in _gradients(bench).items():
            if other in bench.expected.want:
                _require_gradient(bench, other, got, f" with {name} frozen")
        parameter.requires_grad_()


def training(bench: Bench) -> None:
    """In training mode, output and gradients are right where they do not depend on a random generator.

    With many tokens, too. Where they are drawn, every parameter that is trained has a gradient nevertheless.
    """
    bench.layer.train()
    x, drawn = bench.x.unflatten(0, (B, S)), []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn.append(bench.call(x).detach())
    gradients = bench.subject.support.gradients
    if torch.equal(*drawn):
        bench.require_y(drawn[0].flatten(0, 1), context=" in training mode")
        many = bench.call(bench.x.repeat(COPIES, 1).unsqueeze(0)).squeeze(0)
        where = f" in training mode, with {len(many)} tokens"
        bench.require_y(many, torch.arange(T).repeat(COPIES), where)
        for copies, context in ((1, " in training mode"), (COPIES, where)):
            for name, got in _gradients(bench, copies=copies).items() if gradients else ():
                if name in bench.expected.want:
                    _require_gradient(bench, name, got, context)
    elif gradients:
        for name, got in _gradients(bench).items():
            if got is None and name in bench.expected.want and bool(bench.expected.want[name].any()):
                raise CheckFailed(f"the gradient of {name} is missing in training mode")


def router_gradient(bench: Bench) -> None:
    """The router is trained by the output, also with K = 1, unless the gate of K = 1 is 1 by definition."""
    places = _reached(bench.layer, bench.subject.read(bench.layer).router_weight)
    grads, right = _gradients(bench), bench.expected
    for name, place in places.items():
        here, got = (place != 0).cpu(), grads[name]
        want, allowed = right.want[name][here], right.allowed[name][here]
        if bool(want.any()) and (got is None or not bool(got.cpu()[here].any())):
            raise CheckFailed(
                f"the output gives the router, {name}, no gradient though its gates depend on it"
            )
        if not want.any() and got is not None:
            context = ", as the gates are constant"
            bench.require(f"the gradient of {name}", got.cpu()[here], want, allowed, context)


def every_parameter_counts(bench: Bench) -> None:
    """New numbers in one parameter at a time give the output that is right for them.

    A parameter that `read` ignores is a finding unless it is named in training_only, and such a one must not
    change the output.
    """
    subject, x = bench.subject, bench.expected.x
    twin = build(subject, bench.dtype).to("cpu", torch.float64)
    before, generator = _copies(subject, twin), torch.Generator().manual_seed(3)
    training_only = subject.read(bench.layer).training_only
    wide = dict(twin.named_parameters())
    for name, parameter in bench.layer.named_parameters():
        old, new = parameter.detach().clone(), _draw(parameter, generator).to(parameter.dtype)
        with torch.no_grad():
            parameter.data.copy_(new)  # which leaves its version as it was
            wide[name].copy_(new)
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            after = _copies(subject, twin)
            is_read = any(not torch.equal(before[n], after[n]) for n in before)
            if name in training_only and is_read:
                raise CheckFailed(f"read(layer) depends on {name}, which training_only holds")
            if name not in training_only and not is_read:
                raise CheckFailed(f"read(layer) does not depend on {name}; is it for training_only?")
            if is_read:
                weights = _weights(subject, twin)
                ids, clear = oracle.choose(x, weights)
                if not clear.any():
                    raise CheckFailed(f"after new numbers in {name} no token has a clear choice of experts")
                want, allowed = _judged(x[clear], ids[clear], weights, None, bench.dtype)
                bench.require("y", y[clear], want["y"], allowed["y"], f" after new numbers in {name}")
            else:
                bench.require_y(y, context=f" after new numbers in {name}, which is for training only")
            parameter.data.copy_(old)
            wide[name].copy_(old.double())


def evaluation(bench: Bench) -> None:
    """In eval mode there is no noise: equal inputs give bit-equal outputs."""
    x = bench.x.unflatten(0, (B, S))
    first = bench.call(x)
    for _ in range(3):
        if not torch.equal(bench.call(x), first):
            raise CheckFailed("two calls in eval mode on equal inputs differ")


def without_gradients(bench: Bench) -> None:
    """Under no_grad and inference_mode the output is right, and stays so when the layer is called again."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            bench.require_y(y, context=f" under {mode.__name__}")
            bench.call(bench.x.flip(0).unsqueeze(0))
            bench.require_y(y, context=f" under {mode.__name__}, after another call")


def inputs_unchanged(bench: Bench) -> None:
    """No call writes to x or a parameter, and none in eval mode to a buffer that `read` returns."""

    def held() -> dict[str, Tensor]:
        return {**dict(bench.layer.named_parameters()), **oracle.tensors(bench.subject.read(bench.layer))}

    for training in (False, True):
        bench.layer.train(training)
        x, before = bench.x, {name: tensor.detach().clone() for name, tensor in held().items()}
        bench.call(x.unsqueeze(0))
        mode = "training" if training else "eval"
        if not torch.equal(x, bench.x):
            raise CheckFailed(f"x was written to by a call in {mode} mode")
        for name, tensor in held().items():
            may_move = training and name == "selection_bias"
            if name not in before or not (may_move or torch.equal(tensor, before[name])):
                raise CheckFailed(f"{name} was written to by a call in {mode} mode")


def _state(layer: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers."""
    return {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}


def tokens_apart(bench: Bench) -> None:
    """The output of a token does not depend on the others: in reverse, in parts, many, each alone."""
    reverse, many = torch.arange(T).flip(0), torch.arange(T).repeat(COPIES)
    groups = (reverse, torch.arange(1), torch.arange(1, T), torch.arange(T // 2).repeat_interleave(2), many)
    for rows in groups:
        y = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
        bench.require_y(y, rows, f" among {len(rows)} tokens, {rows[:3].tolist()}...")
    y = bench.call(bench.x.unsqueeze(1)).squeeze(1)
    bench.require_y(y, context=" with each token alone in its sequence")


def nan_contained(bench: Bench) -> None:
    """A token with NaN is refused with a ValueError, or its own output is NaN and the others are right."""
    x, sound = bench.x, torch.arange(T) != 3
    x[3, -1] = torch.nan
    try:
        y = bench.call(x.unflatten(0, (B, S))).flatten(0, 1)
    except CheckFailed as failure:
        if isinstance(failure.__cause__, ValueError):
            return
        raise
    bench.require_y(y[sound.to(y.device)], sound, " in a token beside one with NaN")
    if not bool(y[3].isnan().all()):
        raise CheckFailed("a NaN in a token does not make its own output NaN")


def state(bench: Bench) -> None:
    """A state dict makes another layer the same one, and a deepcopy is a layer of its own."""
    x, other = bench.x.unsqueeze(0), build(bench.subject, bench.dtype, seed=7)
    with torch.inference_mode():
        replace(bench, layer=other).call(x)  # what it keeps of this call has to be forgotten
    try:
        other.load_state_dict(bench.layer.state_dict())
        twin = copy.deepcopy(bench.layer)
    except Exception as error:
        raise CheckFailed(f"load_state_dict or copy.deepcopy raises {one_line(error)}") from error
    for layer, how in ((other, "after load_state_dict"), (twin, "in a deepcopy")):
        for mode in (contextlib.nullcontext, torch.inference_mode):
            with mode():
                y = replace(bench, layer=layer).call(x).squeeze(0)
            bench.require_y(y, context=f" {how}")
    with torch.no_grad():
        for tensor in _state(twin).values():
            tensor.zero_()
    bench.require_y(bench.call(x).squeeze(0), context=" after its deepcopy was written to")


def losses(bench: Bench) -> None:
    """The balance losses that the file's `losses` returns, and their gradients: without padding and with."""
    subject, right, dtype = bench.subject, bench.expected, bench.dtype
    assert subject.losses
    twin = build(subject, dtype).to("cpu", torch.float64)
    weights = _weights(subject, twin)
    parameters = _trained(bench.layer)
    real = torch.rand(T, generator=torch.Generator().manual_seed(4)) < 0.6
    for mask in (None, torch.ones(T, dtype=torch.bool), real):
        x, kept = bench.x, slice(None) if mask is None else mask
        if mask is not None:
            x[~mask] *= -3  # what padding holds has no effect
        shaped = None if mask is None else mask.to(x.device).reshape(B, S)
        how = "without a mask" if mask is None else f"with {int((~mask).sum())} of {T} tokens masked"
        try:
            found = dict(subject.losses(bench.layer, x.unflatten(0, (B, S)), shaped))
        except Exception as error:
            raise CheckFailed(f"losses(layer, x, mask) {how} raises {one_line(error)}") from error
        if not found or not found.keys() <= set(LOSSES):
            raise CheckFailed(f"losses returns {list(found)}; valid are {', '.join(LOSSES)}")
        for name, got in found.items():
            if not isinstance(got, Tensor) or got.shape != () or not got.requires_grad:
                raise CheckFailed(f"{name} must be a scalar tensor that requires a gradient")
            x64, ids = right.x[kept].double(), right.ids[kept]
            terms = oracle.loss(name, x64, ids, weights)
            plain = oracle.loss(name, x64.float(), ids, weights)
            allowed = _allowed(terms, plain, torch.float32)
            bench.require(name, got, terms.values["loss"], allowed["loss"], f" {how}")
            grads = torch.autograd.grad(got, list(parameters.values()), allow_unused=True, retain_graph=True)
            want = _onto_parameters(subject, twin, terms.values, allowed)
            for parameter, grad in zip(parameters, grads, strict=True):
                if parameter in want:
                    grad = torch.zeros_like(parameters[parameter]) if grad is None else grad
                    bench.require(
                        f"the gradient of {parameter} from {name}", grad, *want[parameter], f" {how}"
                    )
                elif grad is not None and bool(grad.any()):
                    raise CheckFailed(f"{name} gives {parameter} a gradient; only the router is to have one")


@dataclass(frozen=True)
class LayerCheck:
    """A check, the dtype of the layer, and the declaration without which it does not apply."""

    function: Callable[[Bench], None]
    needs: str = ""  # gradients | deterministic | losses
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.function.__name__


CHECKS = (
    LayerCheck(values),
    LayerCheck(low_precision, dtype=torch.bfloat16),
    LayerCheck(half_precision, dtype=torch.float16),
    LayerCheck(double_precision, dtype=torch.float64),
    LayerCheck(leading_dimensions),
    LayerCheck(gradients, needs="gradients"),
    LayerCheck(low_precision_gradients, needs="gradients", dtype=torch.bfloat16),
    LayerCheck(router_gradient, needs="gradients"),
    LayerCheck(frozen, needs="gradients"),
    LayerCheck(training),
    LayerCheck(every_parameter_counts),
    LayerCheck(evaluation, needs="deterministic"),
    LayerCheck(without_gradients),
    LayerCheck(inputs_unchanged),
    LayerCheck(tokens_apart),
    LayerCheck(nan_contained),
    LayerCheck(state),
    LayerCheck(losses, needs="losses"),
)


@dataclass(frozen=True)
class LayerCase:
    """One check of one layer."""

    subject: LayerSubject
    check: LayerCheck

    @property
    def id(self) -> str:
        return f"{self.check.name}-{self.subject.name}"

    @property
    def skip(self) -> str | None:
        """Why the declaration takes this case out; None if it is to be run."""
        support, needs = self.subject.support, self.check.needs
        if needs == "losses" and not self.subject.has_losses:
            return "losses not declared"
        if needs and needs != "losses" and not getattr(support, needs):
            return f"{needs} not declared"
        if self.check.dtype not in support.dtypes:
            return f"dtype {dtype_name(self.check.dtype)} not declared"
        return None

    def code(self) -> str:
        """One line of Python that runs this case again."""
        dtype = "" if self.check.dtype == torch.float32 else f", dtype={self.check.dtype}"
        check = f"LayerCheck({self.check.name}{dtype})"
        return f"LayerCase(resolve_layer({self.subject.name!r}), {check}).run()"

    def run(self) -> None:
        subject, dtype = self.subject, self.check.dtype
        with blamed(f"{subject.name} fails {self.check.name!r}", self.code()):
            self.check.function(Bench(subject, dtype, build(subject, dtype), expected(subject, dtype)))


def cases(subjects: Iterable[LayerSubject], checks: Iterable[LayerCheck] = CHECKS) -> list[LayerCase]:
    """The loop over layers and checks. Layers come outermost: their oracle is then made once."""
    checks = list(checks)
    return [LayerCase(subject, check) for subject in subjects for check in checks]


def findings(subject: LayerSubject, checks: Iterable[LayerCheck] = CHECKS) -> dict[str, str]:
    """For each check that the layer fails, its finding; empty if it is right."""
    found = {}
    for case in cases([subject], checks):
        if not case.skip:
            try:
                case.run()
            except CheckFailed as failure:
                found[case.check.name] = str(failure)
    return found
