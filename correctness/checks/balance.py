"""What loads, importance and balance losses are held to: checks of one function each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from correctness.checks.case import Check, Kind, Subject
from correctness.judging.budget import STANDARD_ERRORS, require_close
from correctness.judging.finding import CheckFailed
from correctness.oracle import router as oracle
from moe_impls.interface import DTYPES, Routing, dtype_name
from moe_impls.router_interface import RouterSpec

EPS64, EPS32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
REDRAWS = 4000
CALLS = 200


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logits(T: int = 17, E: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Draw clean, noisy and scale [T, E] in float64."""
    clean, scale = _normal(T, E), _normal(T, E, seed=1).exp()
    return clean, clean + scale * _normal(T, E, seed=2), scale


def load_values(smooth_load: Callable[..., Tensor]) -> None:
    """Return the oracle's load from smooth_load(clean, noisy, scale, k), for every k, in float32 at least."""
    for dtype in DTYPES:
        for k in range(1, 7):
            clean, noisy, scale = (t.to(dtype) for t in _logits())
            want = oracle.smooth_load(clean.double(), noisy.double(), scale.double(), k)
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            require_close(f"the load for k = {k} in {dtype}", smooth_load(clean, noisy, scale, k), want, eps)
    empty = torch.zeros(0, 7)
    require_close("the load without tokens", smooth_load(empty, empty, empty, 2), torch.zeros(7), 0)


def load_gradients(smooth_load: Callable[..., Tensor]) -> None:
    """Give clean, noisy and scale the oracle's gradients of the load."""
    for k in (1, 3, 6):
        weights = _normal(7, seed=3)
        grads = []
        for function in (smooth_load, oracle.smooth_load):
            clean, noisy, scale = leaves = [t.clone().requires_grad_() for t in _logits()]
            load = function(clean, noisy, scale, k)
            if not load.requires_grad:
                raise CheckFailed("the load does not require a gradient though the logits do")
            grads.append(torch.autograd.grad((weights * load).sum(), leaves, allow_unused=True))
        for name, got, want in zip(("clean", "noisy", "scale"), *grads, strict=True):
            if got is None:
                raise CheckFailed(f"the load gives {name} no gradient")
            require_close(f"the gradient of {name} for k = {k}", got, want, EPS64)


def load_matches_redraws(smooth_load: Callable[..., Tensor]) -> None:
    """Return as load the share of redraws of expert i's noise, the others' kept, that put i in the top k."""
    clean, noisy, scale = _logits(T=3)
    generator = torch.Generator().manual_seed(4)
    for t in range(3):
        for k in (1, 2, 6):
            chance = smooth_load(clean[t : t + 1], noisy[t : t + 1], scale[t : t + 1], k)
            for i in range(7):
                fresh = torch.randn(REDRAWS, generator=generator, dtype=torch.float64)
                logits = noisy[t].expand(REDRAWS, 7).clone()
                logits[:, i] = clean[t, i] + scale[t, i] * fresh
                share = float((logits.topk(k, dim=1).indices == i).any(dim=1).double().mean())
                # The binomial error of the share, by the claimed chance, not less than one redraw.
                p = min(max(float(chance[i]), 1 / REDRAWS), 1 - 1 / REDRAWS)
                error = math.sqrt(p * (1 - p) / REDRAWS)
                if not abs(share - float(chance[i])) <= STANDARD_ERRORS * error:
                    raise CheckFailed(
                        f"expert {i} of token {t} is in the top {k} in {share:.4f} of {REDRAWS} redraws, "
                        f"the load says {float(chance[i]):.4f} ± {error:.4f}"
                    )


Gating = Callable[..., tuple[Routing, Tensor]]


def gating_matches_redraws(noisy_top_k: Gating) -> None:
    """Return from noisy_top_k a load that agrees with counts of choices over redraws of all its noise.

    The load of noisy_top_k is compared with the counts of its own choices, and those with the counts of
    choices made here with Normal noise of scale softplus(raw_scale) + 0.01.
    """
    T, E, K = 5, 6, 2
    clean, raw_scale = _normal(T, E), _normal(T, E, seed=1) - 1
    spec = RouterSpec(K, score="topk_softmax")
    scale = torch.log1p(raw_scale.exp()) + 1e-2
    # A call draws the noise of the same T tokens many times over; the spread between calls gives the error.
    clean, raw_scale, scale = (t.repeat(REDRAWS // CALLS, 1) for t in (clean, raw_scale, scale))
    generator, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    loads, counts, expected = [], [], []
    for _ in range(CALLS):
        routing, load = noisy_top_k(clean, raw_scale, spec, generator=generator)
        loads.append(load.double())
        counts.append(routing.expert_ids.flatten().bincount(minlength=E).double())
        drawn = clean + scale * torch.randn(*clean.shape, generator=own, dtype=torch.float64)
        expected.append(drawn.topk(K, dim=1).indices.flatten().bincount(minlength=E).double())
    load, count, right = torch.stack(loads), torch.stack(counts), torch.stack(expected)  # [calls, E]
    _require_mean_zero("the load minus the count of choices", load - count)
    _require_mean_zero("the count of choices minus that under the Normal noise of the paper", count - right)


def _require_mean_zero(what: str, samples: Tensor) -> None:
    """Raise CheckFailed unless the mean of samples [calls, E] is zero for each expert, to STANDARD_ERRORS."""
    mean, error = samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples))
    if not bool((mean.abs() <= STANDARD_ERRORS * error).all()):
        worst = int((mean.abs() / error).argmax())
        per_redraw = CALLS / REDRAWS
        raise CheckFailed(
            f"{what} is {float(mean[worst]) * per_redraw:.4f} ± {float(error[worst]) * per_redraw:.4f} for "
            f"expert {worst}, on average over {REDRAWS} redraws; it must be 0"
        )


def counts_visits(count_load: Callable[[Routing, int], Tensor]) -> None:
    """Count every slot, also one whose gate is zero or NaN, and 0 for experts without tokens."""
    ids = torch.tensor([[0, 3], [3, 1], [3, 0]])
    gates = torch.tensor([[1.0, 0.0], [torch.nan, 0.5], [-1.0, 0.0]])
    require_close("the load", count_load(Routing(ids, gates), 5), torch.tensor([2, 1, 0, 3, 0]), 0)
    require_close("the load without tokens", count_load(Routing(ids[:0], gates[:0]), 5), torch.zeros(5), 0)


def importance_values(importance: Callable[[Routing, int], Tensor]) -> None:
    """Sum the gates of each expert in importance(routing, E), and give a gate its expert's gradient."""
    E, weights = 9, _normal(9, seed=1)
    ids = _normal(40, E).topk(4, dim=1).indices
    gates = _normal(40, 4, seed=2).requires_grad_()
    got = importance(Routing(ids, gates), E)
    want = torch.tensor(oracle.importance(ids, gates, E), dtype=torch.float64)
    require_close("importance", got.detach(), want, EPS64)
    (grad,) = torch.autograd.grad((got * weights).sum(), gates)
    require_close("the gradient of the gates", grad, weights[ids], EPS64)
    same = Routing(ids[:1].expand(3000, 4), torch.full((3000, 4), 0.25).bfloat16())
    # Added up one by one in bfloat16 the sum would end at 64, where 0.25 is less than half a unit.
    require_close("importance of bfloat16 gates", importance(same, E).max(), 750.0, 0)


VECTORS = (
    [1.0, 2.0, 3.0, 4.0],
    [5.0, 5.0, 5.0],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 12.0],
    [7.0],
    [1e6, 1e6 + 100],
    [-1.0, 2.0, 0.5],
)


def cv_squared_values(cv_squared: Callable[..., Tensor]) -> None:
    """Return var / mean² from cv_squared(v): the unbiased variance, or with population=True the paper's."""
    for vector in VECTORS:
        for options in ({}, {"population": False}, {"population": True}):
            got = cv_squared(torch.tensor(vector, dtype=torch.float64), **options)
            want = oracle.cv_squared(vector, options.get("population", False))
            require_close(f"cv_squared({vector}, {options})", got, want, EPS64)
    require_close("cv_squared of counts", cv_squared(torch.tensor([1, 3])), 0.5, EPS32)
    # The two differ by 1 in 256, so a relative error of eps in them is one of 256 eps in their difference.
    narrow = cv_squared(torch.tensor([256.0, 255.0], dtype=torch.bfloat16))
    want = oracle.cv_squared([256.0, 255.0])
    require_close("cv_squared in bfloat16", narrow, want, 256 * EPS32)


def cv_squared_gradients(cv_squared: Callable[..., Tensor]) -> None:
    """Give gradients of cv_squared that agree with finite differences and are zero at perfect balance."""
    for options in ({}, {"population": True}):
        _gradcheck(lambda v, options=options: cv_squared(v, **options), _normal(6).exp())
        for vector in ([3.0] * 5, [0.0] * 5, [1.0]):
            leaf = torch.tensor(vector, requires_grad=True)
            (grad,) = torch.autograd.grad(cv_squared(leaf, **options) + 0 * leaf.sum(), leaf)
            require_close(f"the gradient of cv_squared({vector})", grad, torch.zeros(len(vector)), 0)


def auxiliary_loss_values(auxiliary_loss: Callable[..., Tensor]) -> None:
    """Return coef * (cv²(importance) + cv²(load)) from auxiliary_loss, with coef 0.01 by default."""
    a, b = [1.0, 4.0, 2.0], [3.0, 3.0, 6.0]
    va, vb = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    for coef in (1e-2, 1.0, 0.0):
        want = coef * (oracle.cv_squared(a) + oracle.cv_squared(b))
        require_close(f"auxiliary_loss(coef {coef})", auxiliary_loss(va, vb, coef), want, EPS64)
    want = 1e-2 * (oracle.cv_squared(a) + oracle.cv_squared(b))
    require_close("auxiliary_loss with its default", auxiliary_loss(va, vb), want, EPS64)
    want = 1e-2 * (oracle.cv_squared(a, True) + oracle.cv_squared(b, True))
    require_close("auxiliary_loss of the population", auxiliary_loss(va, vb, population=True), want, EPS64)
    _gradcheck(lambda i, l: auxiliary_loss(i, l, 0.5), _normal(5).exp(), _normal(5, seed=1).exp())


def _gradcheck(function: Callable[..., Tensor], *tensors: Tensor) -> None:
    try:
        torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors])
    except RuntimeError as error:  # GradcheckError derives from it
        raise CheckFailed(str(error)) from error


def load_balancing_values(load_balancing_loss: Callable[..., Tensor]) -> None:
    """Return E Σ f P from load_balancing_loss(logits, expert_ids, mask=None), with its gradient."""
    logits, mask = 2 * _normal(30, 6), _normal(30, seed=1) > 0
    for K in (1, 2, 6):
        ids = (logits + _normal(30, 6, seed=2)).topk(K, dim=1).indices
        kept = mask.nonzero().flatten().tolist()
        want = oracle.load_balancing_loss(logits, ids, range(30))
        require_close(f"the loss for K = {K}", load_balancing_loss(logits, ids), want, EPS64)
        want = oracle.load_balancing_loss(logits, ids, kept)
        require_close(
            f"the masked loss for K = {K}", load_balancing_loss(logits, ids, mask=mask), want, EPS64
        )
        _gradcheck(lambda z, ids=ids: load_balancing_loss(z, ids[:8], mask=mask[:8]), logits[:8])
    balanced = torch.arange(6).repeat(5).unsqueeze(1)
    require_close("the loss at balance", load_balancing_loss(torch.zeros(30, 6), balanced), 1.0, EPS32)
    collapsed = torch.zeros(30, 6)
    collapsed[:, 2] = 200.0
    require_close(
        "the loss with one expert", load_balancing_loss(collapsed, torch.full((30, 1), 2)), 6.0, EPS32
    )
    low = logits.bfloat16()
    want = oracle.load_balancing_loss(low.double(), balanced, range(30))
    _require_in_float32(load_balancing_loss(low, balanced), want)
    none = load_balancing_loss(logits, balanced, mask=torch.zeros(30, dtype=torch.bool))
    require_close("the loss without tokens", none, 0.0, 0)
    _padding_invariant("load_balancing_loss", lambda z, m: load_balancing_loss(z, balanced[: len(z)], mask=m))


def _require_in_float32(loss: Tensor, want: float) -> None:
    """Raise CheckFailed unless the loss of bfloat16 logits is right, and float32."""
    if loss.dtype != torch.float32:
        raise CheckFailed(f"the loss of bfloat16 logits is {dtype_name(loss.dtype)}; it must be float32")
    require_close("the loss in bfloat16", loss, want, EPS32)


def z_loss_values(z_loss: Callable[..., Tensor]) -> None:
    """Return the mean of logsumexp² from z_loss(logits, mask=None), with its gradient."""
    logits, mask = 2 * _normal(30, 6), _normal(30, seed=1) > 0
    require_close("the loss", z_loss(logits), oracle.z_loss(logits, range(30)), EPS64)
    want = oracle.z_loss(logits, mask.nonzero().flatten().tolist())
    require_close("the masked loss", z_loss(logits, mask=mask), want, EPS64)
    require_close("the loss of zeros", z_loss(torch.zeros(4, 8)), math.log(8) ** 2, EPS32)
    large = torch.full((3, 4), 1e4)
    require_close("the loss of large logits", z_loss(large), (1e4 + math.log(4)) ** 2, EPS32)
    require_close("the loss without tokens", z_loss(logits[:0]), 0.0, 0)
    require_close("the loss of one token", z_loss(torch.zeros(1, 8)), math.log(8) ** 2, EPS32)
    low = logits.bfloat16()
    _require_in_float32(z_loss(low), oracle.z_loss(low.double(), range(30)))
    _gradcheck(lambda z: z_loss(z, mask=mask[:8]), logits[:8])
    _padding_invariant("z_loss", lambda z, m: z_loss(z, mask=m))


def _padding_invariant(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raise CheckFailed unless the loss and its gradient ignore what padding holds, even NaN."""
    logits = _normal(12, 6)
    real = torch.arange(20) < 12
    alone = logits.clone().requires_grad_()
    value = loss(alone, real[:12])
    (want,) = torch.autograd.grad(value, alone)
    for filling in (0.0, 50.0, torch.nan, -torch.inf):
        padded = torch.cat([logits, torch.full((8, 6), filling, dtype=logits.dtype)]).requires_grad_()
        with_padding = loss(padded, real)
        (grad,) = torch.autograd.grad(with_padding, padded)
        require_close(f"{name} with padding of {filling}", with_padding.detach(), value.detach(), EPS64)
        require_close(f"the gradient of {name} with padding of {filling}", grad[:12], want, EPS64)
        require_close(f"the gradient of {name} in padding of {filling}", grad[12:], torch.zeros(8, 6), 0)


# Each with the function that it is called with.
CHECKS = (
    Check(load_values, needs="smooth_load"),
    Check(load_gradients, needs="smooth_load"),
    Check(load_matches_redraws, needs="smooth_load"),
    Check(gating_matches_redraws, needs="noisy_top_k"),
    Check(counts_visits, needs="count_load"),
    Check(importance_values, needs="importance"),
    Check(cv_squared_values, needs="cv_squared"),
    Check(cv_squared_gradients, needs="cv_squared"),
    Check(auxiliary_loss_values, needs="auxiliary_loss"),
    Check(load_balancing_values, needs="load_balancing_loss"),
    Check(z_loss_values, needs="z_loss"),
)

LOSSES = Kind("losses", CHECKS, arguments=lambda case: (getattr(case.subject.tested, case.check.needs),))


def losses(name: str, module: object) -> Subject:
    """Make the losses and loads that a module holds a subject; what it does not hold is skipped."""
    return Subject(LOSSES, name, module)
