"""What a whole layer is held to, from its input to the gradient of every parameter.

A layer under test is a class or function without arguments that makes an ``nn.Module`` from [..., D] to
[..., O], and beside it ``read(layer) -> LayerWeights``. Its file may also hold

    losses(layer, x, mask) -> {name: scalar}    mask [...] bool, False for padding, or None; names as LOSSES
    SUPPORT = Support(...)                      dtypes, gradients, deterministic

A check is given a `Bench`: a layer with tokens, and what is right for them. All parameters are drawn anew,
since a router or biases that start at zero would hide mistakes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from correctness.checks.case import Case, Check, Kind, Subject
from correctness.judging.budget import entry_budgets, relative_errors
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import (
    COPIES,
    B,
    Bench,
    Layer,
    S,
    T,
    build,
    copies_of,
    draw,
    expected,
    judged,
    onto_parameters,
    reached,
    trained,
    weights_of,
)
from correctness.oracle import layer as oracle
from correctness.oracle.layer import LOSSES
from correctness.problems.layers import LayerProblem
from moe_impls.interface import Support
from moe_impls.registry import one_line


def values(bench: Bench) -> None:
    """Return the oracle's output for x [B, S, D] and the weights that `read` returns."""
    bench.require_y(bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1))


def low_precision(bench: Bench) -> None:
    """Make logits in float32 where x is bfloat16: choose the right experts, and keep y within its budget."""
    y = bench.call(bench.x.unflatten(0, (B, S))).flatten(0, 1)
    try:
        bench.require_y(y)
    except CheckFailed as failure:
        if _rounded_logits_explain(bench, y):
            raise CheckFailed(f"{failure}{_ROUNDED_LOGITS}") from failure
        raise


_ROUNDED_LOGITS = (
    "\n  hint: logits in 16 bits send tokens to other experts: make them in float32, or declare in SUPPORT "
    "the dtypes that the layer is right in"
)


def _rounded_logits_explain(bench: Bench, y: Tensor) -> bool:
    """Tell whether float32 is right, and only tokens are wrong that rounded logits send elsewhere."""
    want, allowed = bench.expected.want["y"], bench.expected.allowed["y"]
    is_wrong = (relative_errors(y.detach().cpu(), want, allowed) > 1).any(dim=1)
    if bool((is_wrong & ~bench.expected.is_swayed).any()):
        return False
    try:
        values(_made(bench.subject, torch.float32))
    except CheckFailed:
        return False
    return True


def low_precision_gradients(bench: Bench) -> None:
    """Keep the gradients of x and of every parameter within their budget in bfloat16."""
    for name, got in _gradients(bench).items():
        if name in bench.expected.want:
            _require_gradient(bench, name, got)


def half_precision(bench: Bench) -> None:
    """Make logits in float32 where x is float16, too, and keep y within its budget."""
    low_precision(bench)


def double_precision(bench: Bench) -> None:
    """Return the right y in float64, where the budget leaves room for a router that works in float32."""
    values(bench)


def leading_dimensions(bench: Bench) -> None:
    """Accept x of shape [D], [T, D], [B, S, D] or longer, strided, and without tokens.

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
    """Give x and every parameter the oracle's gradients, followed through `read`."""
    right, read = bench.expected, oracle.tensors(bench.subject.read(bench.layer))
    for name, tensor in read.items():
        if name != "selection_bias" and not reached(bench.layer, tensor) and not _is_buffer(bench, name):
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
    """Tell whether a tensor of `read` changes with the layer's buffers."""
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
    """Return the gradients of x and each parameter, by name; another call comes between forward and backward.

    copies: of each token; the gradient flows into one of them, in all parts of the call.
    """
    x = bench.x.repeat(copies, 1).requires_grad_(x_wanted)
    y = bench.call(x.unflatten(0, (B * copies, S)))
    leaves = {**({"x": x} if x_wanted else {}), **trained(bench.layer)}
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
    """Keep the gradients of x and of the other parameters what they are when any one parameter is frozen."""
    for name, parameter in trained(bench.layer).items():
        parameter.requires_grad_(False)
        for other, got in _gradients(bench).items():
            if other in bench.expected.want:
                _require_gradient(bench, other, got, f" with {name} frozen")
        parameter.requires_grad_()


def training(bench: Bench) -> None:
    """Be right in training mode, with few tokens and many, unless a random generator decides the output.

    Where it does, every parameter that is trained has a gradient nevertheless.
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
    """Train the router by the output, also with K = 1, unless the gate of K = 1 is 1 by definition."""
    places = reached(bench.layer, bench.subject.read(bench.layer).router_weight)
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
    """Follow new numbers in each parameter with the output that is right for them.

    A parameter that `read` ignores is a finding unless it is named in training_only, and such a one must not
    change the output.
    """
    subject, x = bench.subject, bench.expected.x
    twin = build(subject, bench.dtype).to("cpu", torch.float64)
    before, generator = copies_of(subject, twin), torch.Generator().manual_seed(3)
    training_only = subject.read(bench.layer).training_only
    wide = dict(twin.named_parameters())
    for name, parameter in bench.layer.named_parameters():
        old, new = parameter.detach().clone(), draw(parameter, generator).to(parameter.dtype)
        with torch.no_grad():
            parameter.data.copy_(new)  # which leaves its version as it was
            wide[name].copy_(new)
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            after = copies_of(subject, twin)
            is_read = any(not torch.equal(before[n], after[n]) for n in before)
            if name in training_only and is_read:
                raise CheckFailed(f"read(layer) depends on {name}, which training_only holds")
            if name not in training_only and not is_read:
                raise CheckFailed(f"read(layer) does not depend on {name}; is it for training_only?")
            if is_read:
                weights = weights_of(subject, twin)
                ids, clear = oracle.choose(x, weights)
                if not clear.any():
                    raise CheckFailed(f"after new numbers in {name} no token has a clear choice of experts")
                want, allowed = judged(x[clear], ids[clear], weights, None, bench.dtype)
                bench.require("y", y[clear], want["y"], allowed["y"], f" after new numbers in {name}")
            else:
                bench.require_y(y, context=f" after new numbers in {name}, which is for training only")
            parameter.data.copy_(old)
            wide[name].copy_(old.double())


def evaluation(bench: Bench) -> None:
    """Add no noise in eval mode: equal inputs give bit-equal outputs."""
    x = bench.x.unflatten(0, (B, S))
    first = bench.call(x)
    for _ in range(3):
        if not torch.equal(bench.call(x), first):
            raise CheckFailed("two calls in eval mode on equal inputs differ")


def without_gradients(bench: Bench) -> None:
    """Return the right output under no_grad and inference_mode, and leave it alone in later calls."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = bench.call(bench.x.unsqueeze(0)).squeeze(0)
            bench.require_y(y, context=f" under {mode.__name__}")
            bench.call(bench.x.flip(0).unsqueeze(0))
            bench.require_y(y, context=f" under {mode.__name__}, after another call")


def inputs_unchanged(bench: Bench) -> None:
    """Write to neither x nor a parameter, and in eval mode to no buffer that `read` returns."""

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
    """Name all parameters and buffers."""
    return {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}


def tokens_apart(bench: Bench) -> None:
    """Treat each token without regard to the others: in reverse, in parts, among many, alone."""
    reverse, many = torch.arange(T).flip(0), torch.arange(T).repeat(COPIES)
    groups = (reverse, torch.arange(1), torch.arange(1, T), torch.arange(T // 2).repeat_interleave(2), many)
    for rows in groups:
        y = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
        bench.require_y(y, rows, f" among {len(rows)} tokens, {rows[:3].tolist()}...")
    y = bench.call(bench.x.unsqueeze(1)).squeeze(1)
    bench.require_y(y, context=" with each token alone in its sequence")


def nan_contained(bench: Bench) -> None:
    """Refuse a token with NaN with a ValueError, or make its own output NaN and leave the others right."""
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
    """Carry everything in the state dict, and make a deepcopy a layer of its own."""
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
    """Return the oracle's balance losses and gradients from `losses`, without padding and with."""
    subject, right, dtype = bench.subject, bench.expected, bench.dtype
    assert subject.losses
    twin = build(subject, dtype).to("cpu", torch.float64)
    weights = weights_of(subject, twin)
    parameters = trained(bench.layer)
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
            allowed = entry_budgets(terms, plain, torch.float32)
            bench.require(name, got, terms.values["loss"], allowed["loss"], f" {how}")
            grads = torch.autograd.grad(got, list(parameters.values()), allow_unused=True, retain_graph=True)
            want = onto_parameters(subject, twin, terms.values, allowed)
            for parameter, grad in zip(parameters, grads, strict=True):
                if parameter in want:
                    grad = torch.zeros_like(parameters[parameter]) if grad is None else grad
                    bench.require(
                        f"the gradient of {parameter} from {name}", grad, *want[parameter], f" {how}"
                    )
                elif grad is not None and bool(grad.any()):
                    raise CheckFailed(f"{name} gives {parameter} a gradient; only the router is to have one")


_FLOAT32 = (LayerProblem(),)
_BFLOAT16 = (LayerProblem(torch.bfloat16),)

CHECKS = (
    Check(values, _FLOAT32),
    Check(gradients, _FLOAT32, needs="gradients"),
    Check(low_precision, _BFLOAT16),
    Check(half_precision, (LayerProblem(torch.float16),)),
    Check(double_precision, (LayerProblem(torch.float64),)),
    Check(leading_dimensions, _FLOAT32),
    Check(low_precision_gradients, _BFLOAT16, needs="gradients"),
    Check(router_gradient, _FLOAT32, needs="gradients"),
    Check(frozen, _FLOAT32, needs="gradients"),
    Check(training, _FLOAT32),
    Check(every_parameter_counts, _FLOAT32),
    Check(evaluation, _FLOAT32, needs="deterministic"),
    Check(without_gradients, _FLOAT32),
    Check(inputs_unchanged, _FLOAT32),
    Check(tokens_apart, _FLOAT32),
    Check(nan_contained, _FLOAT32),
    Check(state, _FLOAT32),
    Check(losses, _FLOAT32, needs="losses"),
)


def _bench(case: Case) -> tuple[Bench]:
    return (_made(case.subject.tested, case.problem.dtype),)


def _made(subject: Layer, dtype: torch.dtype) -> Bench:
    """Make a fresh layer of that dtype and what is right for it."""
    return Bench(subject, dtype, build(subject, dtype), expected(subject, dtype))


def _unsupported(support: Support, problem: LayerProblem) -> str | None:
    return None if problem.dtype in support.dtypes else f"dtype {problem.id} not declared"


LAYER = Kind("layer", CHECKS, _bench, unsupported=_unsupported)


def layer(name: str, tested: Layer) -> Subject:
    """Make a layer a subject."""
    return Subject(LAYER, name, tested, tested.support)
