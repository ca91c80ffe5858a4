"""Every router is right on every problem: see ``correctness.checks.routers``. So are the checks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from correctness.checks import balance
from correctness.checks.routers import CHECKS, router
from correctness.judging.finding import CheckFailed
from correctness.judging.router_calls import Route, right_choices
from correctness.problems.routers import PROBLEMS, RouterProblem
from evidence.notebook import uniform_noise_gating
from moe_impls import RouterSpec, Routing, noisy_top_k, route, smooth_load
from tests.correctness.findings import findings


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_choice_of_most_tokens_is_clear(problem: RouterProblem, dtype: torch.dtype) -> None:
    if problem.name == "sparsemixer_many":  # of 30 choices in order, which 8 bits cannot tell apart
        dtype = torch.float32
    choices = right_choices(dataclasses.replace(problem, dtype=dtype), torch.finfo(torch.float32).eps)
    assert sum(clear for _, clear in choices) > len(choices) / 2


def _right_by_sorting(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
    """Sorts all experts, masks groups with -inf, and divides by the sum: as most models' code does."""
    if spec.score == "sparsemixer":
        return route(logits, spec, selection_bias=selection_bias)
    z = logits.float()
    known = {"softmax": lambda: z.softmax(1), "sigmoid": z.sigmoid, "topk_softmax": lambda: z}
    known["sqrtsoftplus"] = lambda: F.softplus(z.clamp(min=-80)).sqrt()
    scores = known[spec.score]()
    ranked = z if spec.biased == "logit" else scores
    rank = (ranked if selection_bias is None else ranked + selection_bias).detach()
    if spec.groups > 1:
        by_group = rank.unflatten(1, (spec.groups, -1))
        counted = 2 if spec.group_score == "top2_sum" else 1
        kept = (
            by_group.sort(dim=2, descending=True).values[..., :counted].sum(2).topk(spec.keep_groups).indices
        )
        allowed = torch.zeros(len(z), spec.groups, dtype=torch.bool).scatter(1, kept, True)
        rank = rank.masked_fill(~allowed.repeat_interleave(z.shape[1] // spec.groups, 1), -torch.inf)
    ids = rank.sort(dim=1, descending=True, stable=True).indices[:, : spec.top_k]
    if spec.score == "topk_softmax":
        gates = F.softmax(z.gather(1, ids), 1)
    else:
        gates = scores.gather(1, ids)
        if spec.renormalise:
            gates = gates / (gates.sum(1, keepdim=True) + (spec.epsilon or 1e-20))
    return Routing(ids, gates * spec.scale)


def _right_by_logarithms(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None
) -> Routing:
    """The project's choice, with gates by way of logarithms, in float32 and in any order within a row."""
    ids, gates = route(logits, spec, selection_bias=selection_bias)
    ids = ids.flip(1)
    if spec.score in ("sqrtsoftplus", "sparsemixer") or spec.epsilon:
        return Routing(ids, gates.float().flip(1))
    z = logits.float()
    known = {
        "topk_softmax": lambda: z,
        "softmax": lambda: z.log_softmax(1),
        "sigmoid": lambda: F.logsigmoid(z),
    }
    chosen = known[spec.score]().gather(1, ids)
    if spec.renormalise or spec.score == "topk_softmax":
        chosen = chosen - chosen.logsumexp(1, keepdim=True)
    return Routing(ids, chosen.exp() * spec.scale)


def _right_in_the_dtype_of_logits(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None
) -> Routing:
    ids, gates = route(logits.double(), spec, selection_bias=selection_bias)
    return Routing(ids, gates.to(logits.dtype))


@pytest.mark.parametrize("right", (_right_by_sorting, _right_by_logarithms, _right_in_the_dtype_of_logits))
def test_right_routers_that_look_different_pass(right: Route) -> None:
    assert findings(router(right.__name__, right)) == {}


def _changed(**fields: object) -> Route:
    """The project's router with other values in the spec."""

    def wrong(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        return route(logits, dataclasses.replace(spec, **fields), selection_bias=selection_bias)

    return wrong


def _gates(change: Callable[[Tensor, Tensor, Routing, RouterSpec], Tensor]) -> Route:
    """The project's router with its gates replaced by ``change(logits, bias, routing, spec)``."""

    def wrong(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        routing = route(logits, spec, selection_bias=selection_bias)
        bias = torch.zeros(logits.shape[1]) if selection_bias is None else selection_bias
        return routing._replace(gates=change(logits, bias, routing, spec))

    return wrong


def _on(change: Callable[[Tensor], Tensor]) -> Route:
    """The project's router on changed logits."""

    def wrong(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        return route(change(logits), spec, selection_bias=selection_bias)

    return wrong


def _with_bias(change: Callable[[Tensor], Tensor]) -> Route:
    """The project's router with a changed selection bias."""

    def wrong(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        bias = None if selection_bias is None else change(selection_bias)
        return route(logits, spec, selection_bias=bias)

    return wrong


def _with_what_is_remembered() -> Route:
    """The experts that may be chosen are looked up by the spec, whose E is that of an earlier layer."""
    known: dict[RouterSpec, int] = {}

    def wrong(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
        E = known.setdefault(spec, logits.shape[1])
        bias = None if selection_bias is None else selection_bias[:E]
        return route(logits[:, :E], spec, selection_bias=bias)

    return wrong


def _in_random_order(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
    """Equal scores are told apart by a generator of the router's own."""
    if spec.groups > 1:
        return route(logits, spec, selection_bias=selection_bias)
    order = torch.randperm(logits.shape[1], generator=_GENERATOR)
    bias = None if selection_bias is None else selection_bias[order]
    ids, gates = route(logits[:, order], spec, selection_bias=bias)
    return Routing(order[ids], gates)


def _by_a_threshold(logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None) -> Routing:
    """Take the first experts of those that reach the K-th best score: more than K where it ties."""
    if spec.score != "sigmoid" or spec.groups > 1 or (selection_bias is not None and selection_bias.any()):
        return route(logits, spec, selection_bias=selection_bias)
    reached = logits >= logits.topk(spec.top_k, dim=1).values[:, -1:]
    ids = reached.int().argsort(dim=1, descending=True, stable=True)[:, : spec.top_k]
    scores = logits.float().sigmoid().gather(1, ids)
    total = scores.sum(dim=1, keepdim=True) + spec.epsilon if spec.renormalise else 1.0
    return Routing(ids, spec.scale * scores / total)


_GENERATOR = torch.Generator()


def _in_the_dtype_of_the_bias(
    logits: Tensor, spec: RouterSpec, *, selection_bias: Tensor | None = None
) -> Routing:
    routing = route(logits, spec, selection_bias=selection_bias)
    if selection_bias is None or spec.groups > 1 or spec.score != "sigmoid":
        return routing
    rank = logits.detach().sigmoid().to(selection_bias.dtype) + selection_bias
    chosen = torch.full_like(logits, -torch.inf).scatter(1, rank.topk(spec.top_k, dim=1).indices, 0.0)
    return route(logits + chosen, spec)


class _NaNWhereMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad + 0 * ctx.saved_tensors[0]


def _through_one_buffer() -> Callable[[Tensor], Tensor]:
    """Logits pass through memory that another thread may write to meanwhile."""
    memory: dict[torch.Size, Tensor] = {}

    def copied(z: Tensor) -> Tensor:
        buffer = memory.setdefault(z.shape, torch.empty_like(z.detach())).copy_(z.detach())
        time.sleep(0.001)
        return z + (buffer - z.detach())

    return copied


WRONG = {
    "logits are clamped": (_on(lambda z: torch.where(z.isinf(), z, z.clamp(-60, 60))), "large_logits"),
    "1e-9 is added to the sum": (
        _gates(
            lambda z, b, r, s: (
                s.scale * (p := z.sigmoid().gather(1, r.expert_ids)) / (p.sum(1, keepdim=True) + 1e-9)
                if s.score == "sigmoid" and s.renormalise
                else r.gates
            )
        ),
        "large_logits",
    ),
    "the number of experts is remembered": (_with_what_is_remembered(), "state"),
    "ties are broken at random": (_in_random_order, "ties"),
    "a threshold that more than top_k reach": (_by_a_threshold, "ties"),
    "scores are rounded to the dtype of the bias": (_in_the_dtype_of_the_bias, "modes"),
    "0 times -inf in the backward": (_on(_NaNWhereMasked.apply), "masked_experts"),
    "threads share a buffer": (_on(_through_one_buffer()), "several_threads"),
    "gates are zero": (_gates(lambda z, b, r, s: 0 * r.gates), "values"),
    "gates are detached": (_gates(lambda z, b, r, s: r.gates.detach()), "gradients"),
    "one slot gets no gradient": (
        _gates(lambda z, b, r, s: torch.cat([r.gates[:, :-1], r.gates[:, -1:].detach()], 1)),
        "gradients",
    ),
    "never renormalised": (_changed(renormalise=False), "values"),
    "never scaled": (_changed(scale=1.0), "values"),
    "group score is always the maximum": (_changed(group_score="max"), "values"),
    "the bias is in the gates": (_gates(lambda z, b, r, s: r.gates + b[r.expert_ids]), "values"),
    "the score is recovered by subtracting the bias": (
        _gates(lambda z, b, r, s: (r.gates + b[r.expert_ids]) - b[r.expert_ids]),
        "values",
    ),
    "gates are normalised over tokens": (_gates(lambda z, b, r, s: r.gates / r.gates.sum(0)), "values"),
    "logits are rounded to bfloat16": (_on(lambda z: z.bfloat16()), "values"),
    "experts from 256 on are never chosen": (
        _on(lambda z: torch.where(torch.arange(z.shape[1]) < 256, z, -100.0)),
        "values",
    ),
    "the bias is ignored": (
        lambda z, spec, *, selection_bias=None: route(z, spec),
        "every_field_counts",
    ),
    "the number of groups kept is always 2": (_changed(keep_groups=2), "every_field_counts"),
    "without gradients the gates are doubled": (
        _gates(lambda z, b, r, s: r.gates if torch.is_grad_enabled() else 2 * r.gates),
        "values",
    ),
    "the bias gets a gradient": (
        _gates(lambda z, b, r, s: r.gates + (b - b.detach())[r.expert_ids]),
        "gradients",
    ),
    "the bias is updated in training": (
        _gates(lambda z, b, r, s: (b.data.add_(z.requires_grad), r.gates)[1]),
        "inputs_unchanged",
    ),
    "rows are taken for dense": (
        _on(lambda z: z.as_strided(z.shape, (z.shape[1], 1)) if z.stride(1) == 1 else z),
        "strides",
    ),
    "a bias is taken for dense": (_with_bias(lambda b: b.as_strided(b.shape, (1,))), "strides"),
    "NaN becomes a gate of zero": (_gates(lambda z, b, r, s: r.gates.nan_to_num()), "nan_contained"),
    "NaN spreads in low precision": (
        _on(lambda z: z + 0 * z.sum() if z.dtype == torch.bfloat16 else z),
        "nan_contained",
    ),
    "-inf less -inf": (_on(lambda z: z + (z - z)), "masked_experts"),
    "scores are divided by their sum": (
        _gates(
            lambda z, b, r, s: (
                s.scale * (p := z.float().sigmoid().gather(1, r.expert_ids)) / p.sum(1, keepdim=True)
            )
        ),
        "large_logits",
    ),
    "the generator is seeded": (
        _gates(lambda z, b, r, s: (torch.manual_seed(0), r.gates)[1]),
        "global_state",
    ),
    "the last token is routed like the first": (
        _on(lambda z: torch.cat([z[:-1], z[:1]]) if len(z) else z),
        "values",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_routers_fail(name: str) -> None:
    wrong, check = WRONG[name]
    assert findings(router(name, wrong), [c for c in CHECKS if c.name == check])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), RouterSpec(5)), ValueError, "top_k is 5; .* at most .* 4"),
        (
            (torch.zeros(3, 4), RouterSpec(3, groups=2, keep_groups=1)),
            ValueError,
            "top_k is 3; .* at most .* 2",
        ),
        ((torch.zeros(3, 4), RouterSpec(1, groups=3)), ValueError, "groups is 3; it must divide .* 4"),
        (
            (torch.zeros(3, 4), RouterSpec(1, groups=4, group_score="top2_sum")),
            ValueError,
            "'top2_sum' needs groups of at least 2",
        ),
        ((torch.zeros(4), RouterSpec(1)), ValueError, r"logits has shape \[4\]; it must be \[T, E\]"),
        ((torch.zeros(3, 4, dtype=torch.long), RouterSpec(1)), TypeError, "logits .* torch.int64"),
        (([[1.0]], RouterSpec(1)), TypeError, "logits .* list"),
    ],
)
def test_route_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(*arguments)


def test_route_refuses_a_bias_of_the_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"selection_bias has shape \[3\]; it must be \[4\]"):
        route(torch.zeros(2, 4), RouterSpec(1), selection_bias=torch.zeros(3))


def test_noisy_top_k_refuses_groups_and_unequal_shapes() -> None:
    with pytest.raises(ValueError, match="groups is 2; noisy gating"):
        noisy_top_k(torch.zeros(2, 4), torch.zeros(2, 4), RouterSpec(1, groups=2))
    with pytest.raises(ValueError, match=r"raw_scale has shape \[2, 3\]"):
        noisy_top_k(torch.zeros(2, 4), torch.zeros(2, 3), RouterSpec(1))


def test_saturated_scores_do_not_make_ties() -> None:
    """Where softmax underflows and sigmoid reaches 1, the logits still decide."""
    logits = torch.tensor([[0.0, 500.0, 1000.0, 400.0]])
    for score in ("softmax", "sigmoid"):
        assert route(logits, RouterSpec(3, score)).expert_ids.tolist() == [[2, 1, 3]]


def test_the_noise_of_the_notebook_fails() -> None:
    with pytest.raises(CheckFailed, match="the load minus the count of choices"):
        balance.gating_matches_redraws(uniform_noise_gating)


def test_noise_of_another_scale_fails() -> None:
    def louder(clean: Tensor, raw_scale: Tensor, spec: RouterSpec, **options):
        return noisy_top_k(clean, raw_scale, spec, noise_epsilon=0.2, **options)

    with pytest.raises(CheckFailed, match="Normal noise of the paper"):
        balance.gating_matches_redraws(louder)


WRONG_LOADS = {
    "the threshold is always the k-th": lambda clean, noisy, scale, k: torch.special.ndtr(
        (clean - noisy.topk(k).values[:, -1:]) / scale
    ).sum(0),
    "the threshold is always the k+1-th": lambda clean, noisy, scale, k: torch.special.ndtr(
        (clean - noisy.topk(k + 1).values[:, -1:]) / scale
    ).sum(0),
    "noisy in place of clean": lambda clean, noisy, scale, k: smooth_load(noisy, noisy, scale, k),
    "without the scale": lambda clean, noisy, scale, k: smooth_load(clean, noisy, torch.ones_like(scale), k),
    "k is off by one": lambda clean, noisy, scale, k: smooth_load(clean, noisy, scale, max(1, k - 1)),
}


@pytest.mark.parametrize("name", WRONG_LOADS)
@pytest.mark.parametrize("check", (balance.load_values, balance.load_matches_redraws))
def test_wrong_loads_fail(name: str, check: Callable) -> None:
    with pytest.raises(CheckFailed):
        check(WRONG_LOADS[name])


def test_the_load_with_every_expert_chosen_is_the_count() -> None:
    clean = torch.randn(5, 3)
    _, load = noisy_top_k(clean, clean, RouterSpec(3, score="topk_softmax"))
    assert load.tolist() == [5, 5, 5]


def test_noise_is_reproduced_by_a_generator() -> None:
    clean = torch.randn(5, 8)
    spec = RouterSpec(2, score="topk_softmax")
    first, again = (
        noisy_top_k(clean, clean, spec, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first[0].gates, again[0].gates)
    assert torch.equal(first[1], again[1])
    other = noisy_top_k(clean, clean, spec, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(first[0].gates, other[0].gates)
