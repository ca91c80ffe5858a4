"""What every ``route(logits, spec, *, selection_bias=None)`` is held to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from correctness.checks.case import Case, Check, Kind, Subject
from correctness.checks.router_modes import MODES, inputs_unchanged
from correctness.judging.finding import CheckFailed
from correctness.judging.router_calls import Route, Router, call, require, require_gates, require_gradient
from correctness.judging.router_hints import HINT
from correctness.problems.declared_routers import problems_for, undeclared
from correctness.problems.generated import router_problems
from correctness.problems.problem import LOW_PRECISION
from correctness.problems.routers import (
    ALL_DTYPES,
    EVERY_FIELD,
    KINDS,
    PROBLEMS,
    FieldProblem,
    RouterProblem,
    make_router_inputs,
)
from moe_impls.interface import Routing, dtype_name
from moe_impls.router_interface import RouterSupport

_NO_EXTREMES = f"{HINT}a router that never meets such logits declares extremes=False"


def values(route: Router, problem: RouterProblem) -> None:
    """Choose the right experts for each token whose choice is clear, and give each token the right gates."""
    logits, bias, _ = make_router_inputs(problem)
    require(call(route, logits, problem.spec, bias), problem)
    with torch.no_grad():
        require(call(route, logits, problem.spec, bias), problem)


def gradients(route: Router, problem: RouterProblem) -> None:
    """Pass the gradient of the gates back to the logits as the oracle does, and none to the bias."""
    logits, bias, dgates = make_router_inputs(problem)
    leaf = logits.clone().requires_grad_()
    bias = None if bias is None else bias.requires_grad_()
    routing = call(route, leaf, problem.spec, bias)
    require(routing, problem)
    if not routing.gates.requires_grad:
        raise CheckFailed("gates does not require a gradient though logits does: the graph is cut")
    wanted = [leaf] if bias is None else [leaf, bias]
    got, *of_bias = torch.autograd.grad(
        routing.gates, wanted, dgates.to(routing.gates.dtype), allow_unused=True
    )
    if got is None:
        raise CheckFailed("gates does not depend on logits: the graph is cut")
    if any(d is not None and bool(d.any()) for d in of_bias):
        raise CheckFailed("selection_bias gets a gradient: it is in the gates")
    require_gradient(got, routing, problem)


def ties(route: Router, problem: RouterProblem) -> None:
    """Choose valid, distinct experts where scores are equal, the same in each call, with right gates.

    All are, or many, or one in each group, so that the groups are equal, too.
    """
    logits, bias, _ = make_router_inputs(problem)
    equal = logits.clone()
    equal[::2] = 0
    equal[1::2] = equal[1::2].clamp(-0.5, 0.5).round()  # -1, 0 and 1 at most
    size = logits.shape[1] // problem.spec.groups
    for t in range(0, problem.T, 4):
        equal[t, t % size :: size] = 1
    bias = None if bias is None else torch.zeros_like(bias)
    routing = call(route, equal, problem.spec, bias)
    require_gates(routing, equal, problem.spec)
    _require_the_best(routing.expert_ids, equal, problem.spec.groups)
    if not torch.equal(call(route, equal, problem.spec, bias).expert_ids, routing.expert_ids):
        raise CheckFailed("equal scores lead to other experts in a second call")


def _require_the_best(ids: Tensor, logits: Tensor, groups: int) -> None:
    """Raise CheckFailed if an expert is left out for a worse one, though others of its group are chosen."""
    T, E = logits.shape
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, ids.cpu(), True)
    kept = chosen.view(T, groups, -1).any(dim=2).repeat_interleave(E // groups, dim=1)
    z = logits.cpu().double()
    least = z.masked_fill(~chosen, torch.inf).amin(dim=1)
    best_left = z.masked_fill(chosen | ~kept, -torch.inf).amax(dim=1)
    for t in (best_left > least).nonzero().flatten().tolist():
        raise CheckFailed(
            f"token {t} visits experts {ids[t].tolist()}, the least of them with a logit of "
            f"{float(least[t]):g}; one with {float(best_left[t]):g} is left out{HINT}where scores tie, more "
            "than top_k reach a threshold: those above it come first"
        )


def nan_contained(route: Router, problem: RouterProblem) -> None:
    """Refuse a token with NaN with a ValueError, or give it alone gates of NaN, and valid ids."""
    logits, bias, _ = make_router_inputs(problem)
    poisoned = logits.clone()
    poisoned[3] = torch.nan
    poisoned[7, -1] = torch.nan
    try:
        ids, gates = call(route, poisoned, problem.spec, bias)
    except ValueError:
        return
    if bool(gates[3].isfinite().all()):
        raise CheckFailed("a token whose logits are all NaN has finite gates")
    clean = call(route, logits, problem.spec, bias)
    sound = torch.ones(len(logits), dtype=torch.bool)
    sound[[3, 7]] = False
    if not torch.equal(ids[sound], clean.expert_ids[sound]):
        raise CheckFailed("a NaN in the logits of one token changes the experts of others")
    try:
        require_gates(Routing(ids[sound], gates[sound]), logits[sound], problem.spec)
    except CheckFailed as failure:
        raise CheckFailed(f"beside tokens with NaN, {failure}") from failure


def masked_experts(route: Router, problem: RouterProblem) -> None:
    """Choose no expert whose logit is -inf where others are left, with sound gates and gradients."""
    logits, bias, dgates = make_router_inputs(problem)
    others = problem.E // problem.spec.groups * problem.spec.keep_groups - problem.spec.top_k
    least = logits.topk(min(3, others), dim=1, largest=False).indices
    masked = logits.scatter(1, least, -torch.inf)
    leaf = masked.clone().requires_grad_(route.support.gradients)
    ids, gates = call(route, leaf, problem.spec, bias)
    if bias is None and bool(masked.gather(1, ids).isinf().any()):
        raise CheckFailed("an expert whose logit is -inf is chosen though others are left")
    require_gates(Routing(ids, gates), masked, problem.spec)
    if route.support.gradients:
        (gradient,) = torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))
        if not bool(gradient.isfinite().all()) or bool(gradient[masked.isinf()].any()):
            raise CheckFailed(
                f"the gradient of a logit of -inf is not 0, or that of another is not finite{_NO_EXTREMES}"
            )
    few = logits.clone()
    few[:, 1:] = -torch.inf
    try:
        call(route, few, problem.spec, bias)  # whose experts are distinct, though one alone has a score
    except CheckFailed as failure:
        raise CheckFailed(f"where all logits but one are -inf, {failure}{_NO_EXTREMES}") from failure


def large_logits(route: Router, problem: RouterProblem) -> None:
    """Give right gates and finite gradients for logits a thousand times larger than usual, or far below 0.

    Near -100, where sigmoids underflow, the gates need only be finite: models add 1e-20 to their sum.
    """
    logits, bias, dgates = make_router_inputs(problem)
    for dtype in (dtype for dtype in LOW_PRECISION if dtype in route.support.dtypes):
        gates = call(route, (logits * 1000).to(dtype), problem.spec, bias).gates
        _require_finite("gates", gates, f"of size 1000 in {dtype_name(dtype)}")
    underflows = "near -100"
    extremes = {"of size 1000": logits * 1000, "near -25": logits - 25, underflows: logits - 100}
    for what, extreme in extremes.items():
        leaf = extreme.clone().requires_grad_(route.support.gradients)
        ids, gates = call(route, leaf, problem.spec, bias)
        _require_finite("gates", gates, what)
        if route.support.gradients:
            (gradient,) = torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))
            _require_finite("the gradient of logits", gradient, what)
        if what != underflows:
            try:
                require_gates(Routing(ids, gates), extreme, problem.spec)
            except CheckFailed as failure:
                raise CheckFailed(f"for logits {what}: {failure}") from failure


def _require_finite(name: str, tensor: Tensor, what: str) -> None:
    """Raise CheckFailed if a result for extreme logits holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        raise CheckFailed(
            f"{name} holds {tensor[~tensor.isfinite()][0].item()} for logits {what}{_NO_EXTREMES}"
        )


def empty(route: Router, problem: RouterProblem) -> None:
    """Return an empty routing where there are no tokens."""
    logits, bias, _ = make_router_inputs(replace(problem, T=0))
    leaf = logits.requires_grad_(route.support.gradients)
    _, gates = call(route, leaf, problem.spec, bias)
    if not route.support.gradients:
        return
    if not gates.requires_grad:
        raise CheckFailed("without tokens gates does not require a gradient though logits does")
    torch.autograd.grad(gates.sum(), leaf)


def every_field_counts(route: Router, problem: FieldProblem) -> None:
    """Follow every field of the spec, and the bias."""

    def table(p: RouterProblem) -> Tensor:
        logits, bias, _ = make_router_inputs(p)
        ids, gates = call(route, logits, p.spec, bias)
        return torch.zeros(logits.shape, dtype=gates.dtype).scatter(1, ids, gates)

    if torch.equal(table(problem), table(problem.other)):
        raise CheckFailed(f"{problem.name} has no effect")


def generated_routing(route: Router, problem: RouterProblem) -> None:
    """Return the right experts, gates and gradient of the logits on problems that nobody thought of."""
    values(route, problem)
    if route.support.gradients:
        gradients(route, problem)


CHECKS = (
    Check(inputs_unchanged, KINDS),
    # A problem with several choices of a token comes first, since most mistakes show there.
    # More tokens than a tile holds, of few experts and of many.
    Check(
        values,
        (KINDS[0], *ALL_DTYPES, *(replace(p, T=5_003 if p in KINDS[:1] else 40) for p in KINDS)),
    ),
    Check(gradients, ALL_DTYPES, needs="gradients"),
    Check(ties, PROBLEMS),
    Check(nan_contained, KINDS + tuple(replace(p, dtype=torch.bfloat16) for p in KINDS)),
    Check(masked_experts, KINDS, needs="extremes"),
    Check(large_logits, KINDS, needs="extremes"),
    Check(empty, KINDS),
    *MODES,
    Check(every_field_counts, EVERY_FIELD),
    Check(generated_routing, drawn=router_problems),
)


def _told_once(case: Case, failure: CheckFailed) -> CheckFailed:
    """Tell the cause of a finding in full once, and of later findings that it is theirs, too."""
    finding, _, hint = str(failure).partition(HINT)
    if not hint:
        return failure
    cause, here = hint.partition("; the spec is")[0], f"{case.check.name!r} on {case.problem.name}"
    first = case.subject.tested.told.setdefault(cause, here)
    return failure if first == here else CheckFailed(f"{finding}{HINT}as {first} tells, {cause[:80]}")


ROUTER = Kind(
    "router",
    CHECKS,
    arguments=lambda case: (case.subject.tested, case.problem),
    unsupported=undeclared,
    where=lambda p: f" on {p.name}, E = {p.E}, {dtype_name(p.dtype)}",
    explain=_told_once,
)


def router(name: str, route: Route, support: RouterSupport | None = None) -> Subject:
    """Make a router a subject, on the problems that are there for what it declares: everything if None."""
    support = support or RouterSupport()
    checks = [
        check if check.drawn else replace(check, problems=problems_for(support, check.problems))
        for check in CHECKS
    ]
    kind = ROUTER if support == RouterSupport() else replace(ROUTER, checks=tuple(checks))
    return Subject(kind, name, Router(route, support), support)
