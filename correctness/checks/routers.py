"""What every ``route(logits, spec, *, selection_bias=None)`` is held to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from correctness.checks.case import Case, Check, Kind, Subject
from correctness.checks.layouts import LAYOUTS
from correctness.judging.budget import (
    allowed_error,
    by_logarithm,
    eps,
    relative_errors,
    roundings,
    storing,
    worst,
)
from correctness.judging.finding import CheckFailed
from correctness.judging.process_state import require_unchanged
from correctness.judging.router_hints import HINT, Routed, choice_hint, gates_hint
from correctness.oracle import router as oracle
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
from moe_impls.router_interface import RouterSpec, RouterSupport

Route = Callable[..., Routing]


@dataclass(frozen=True)
class Router:
    """A router under test, called as its function, with what it declares."""

    function: Route
    support: RouterSupport = RouterSupport()
    told: dict[str, str] = field(default_factory=dict, compare=False)  # causes, and where each was told

    def __call__(self, *arguments: Any, **bias: Any) -> Routing:
        return self.function(*arguments, **bias)


THREADS, ROUNDS = 3, 20
MANY = (*(2**n for n in range(5, 14)), 65_536 + 11)  # tokens


def _computed(gates: Tensor) -> torch.dtype:
    """Return the dtype whose precision is asked for: float64 where gates come in it, else float32."""
    return torch.float64 if gates.dtype == torch.float64 else torch.float32


def _smallest(t: Tensor) -> float:
    """Return the smallest normal number of a tensor's dtype, below which nothing is owed."""
    return torch.finfo(t.dtype).smallest_normal


def call(route: Router, logits: Tensor, spec: RouterSpec, selection_bias: Tensor | None) -> Routing:
    """Call a router: return its routing, or raise CheckFailed unless it is what the contract says."""
    bias = {} if selection_bias is None else {"selection_bias": selection_bias}
    result = route(logits, spec, **bias)
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result)):
        raise CheckFailed(f"the result is a {type(result).__name__}; it must be Routing(expert_ids, gates)")
    ids, gates = result
    T, E, K = len(logits), logits.shape[1], spec.top_k
    for name, tensor in (("expert_ids", ids), ("gates", gates)):
        if tensor.shape != (T, K):
            raise CheckFailed(f"{name} has shape {list(tensor.shape)}; it must be [{T}, {K}]")
        if tensor.device != logits.device:
            raise CheckFailed(f"{name} is on {tensor.device}; logits are on {logits.device}")
    if ids.dtype != torch.int64:
        raise CheckFailed(f"expert_ids has dtype {ids.dtype}; it must be torch.int64")
    if gates.dtype not in (torch.float32, logits.dtype):
        raise CheckFailed(f"gates has dtype {gates.dtype}; it must be torch.float32 or {logits.dtype}")
    for t, row in enumerate(ids.tolist()):
        if not all(0 <= e < E for e in row):
            raise CheckFailed(f"expert_ids[{t}] is {row}; ids must be in [0, {E})")
        if len(set(row)) < K:
            raise CheckFailed(f"expert_ids[{t}] is {row}; the ids of a row must be distinct")
        if len({e // (E // spec.groups) for e in row}) > spec.keep_groups:
            found = f"expert_ids[{t}] is {row}: more than {spec.keep_groups} groups of {E // spec.groups}"
            raise CheckFailed(found + _groups_hint(Routed(logits, selection_bias, spec, ids, gates), t))
    return Routing(ids, gates)


def _groups_hint(routed: Routed, t: int) -> str:
    """Name the mistake that leads token t to experts of too many groups; empty if there is none."""
    logits, bias, spec, *_ = routed
    if not bool(logits.isfinite().all()):
        return ""
    right = [oracle.select(z, spec, bias, eps(torch.float32)) for z in logits.detach().double()]
    hint = choice_hint(routed, right)
    if hint or right[t][1]:
        return hint
    return f"{HINT}groups tie here: a threshold at the last kept one keeps more than {spec.keep_groups}"


def _require_gates(
    routing: Routing, logits: Tensor, spec: RouterSpec, selection_bias: Tensor | None = None
) -> None:
    """Raise CheckFailed unless the gates are those of the experts that were chosen, for every token.

    selection_bias: in which a hint may find the cause.
    """
    computed = _computed(routing.gates)
    if spec.score == "sparsemixer":  # whose gates jump where a logit comes within reach of a better one
        clear = _clear(logits, spec, computed)
        routing, logits = Routing(routing.expert_ids[clear], routing.gates[clear]), logits[clear]
    if not len(logits):
        return
    wide, narrow = logits.double(), logits.float()
    rows = routing.expert_ids.tolist()
    want = torch.stack([oracle.gates(z, ids, spec) for z, ids in zip(wide, rows, strict=True)])
    plain = torch.stack([oracle.gates(z, ids, spec) for z, ids in zip(narrow, rows, strict=True)])
    got = routing.gates.detach()
    lost = relative_errors(plain, want, want, _smallest(plain))
    # exp(log(gate)) is right, too, and exp(log(score) - log(sum)) of scores that are divided by their sum.
    budgets = allowed_error(lost, narrow.dtype, computed) + storing(got.dtype) + by_logarithm(want, computed)
    if spec.renormalise and spec.score == "sigmoid":
        scores = wide.gather(1, routing.expert_ids).sigmoid()
        budgets = budgets + by_logarithm(scores, computed)
    error = relative_errors(got, want, want, _smallest(got))
    if not bool((error <= budgets).all()):
        t, k = divmod(int((error / budgets).argmax()), spec.top_k)
        raise CheckFailed(
            f"the gate of token {t}, expert {rows[t][k]} is {float(got[t, k])!r}, "
            f"right is {float(want[t, k])!r}: relative error {float(error[t, k]):.3g}, "
            f"budget {float(budgets[t, k]):.3g}; "
            f"{int((error > budgets).sum())} of {error.numel()} gates are over theirs"
            + gates_hint(Routed(logits, selection_bias, spec, *routing), budgets)
        )


def _clear(logits: Tensor, spec: RouterSpec, computed: torch.dtype) -> Tensor:
    """Tell for which tokens the choice is clear: bool [T]."""
    rows = [oracle.select(z, spec, None, eps(computed))[1] for z in logits.double()]
    return torch.tensor(rows, dtype=torch.bool)


@functools.lru_cache(maxsize=1024)
def right_choices(problem: RouterProblem, precision: float) -> list[tuple[list[int], bool]]:
    """Return for each token the oracle's experts, and whether the choice is clear at that precision."""
    logits, bias, _ = make_router_inputs(problem)
    return [oracle.select(z, problem.spec, bias, precision) for z in logits.double()]


def values(route: Router, problem: RouterProblem) -> None:
    """Choose the right experts for each token whose choice is clear, and give each token the right gates."""
    logits, bias, _ = make_router_inputs(problem)
    _require(call(route, logits, problem.spec, bias), problem)
    with torch.no_grad():
        _require(call(route, logits, problem.spec, bias), problem)


def _require(routing: Routing, problem: RouterProblem) -> None:
    """Raise CheckFailed unless the routing is right for the problem."""
    logits, bias, _ = make_router_inputs(problem)
    choices = right_choices(problem, eps(_computed(routing.gates)))
    for t, (row, (chosen, clear)) in enumerate(zip(routing.expert_ids.tolist(), choices, strict=True)):
        if clear and set(row) != set(chosen):
            found = choice_hint(Routed(logits, bias, problem.spec, *routing), choices)
            raise CheckFailed(f"token {t} visits experts {sorted(row)}; right is {sorted(chosen)}{found}")
    _require_gates(routing, logits, problem.spec, bias)


def gradients(route: Router, problem: RouterProblem) -> None:
    """Pass the gradient of the gates back to the logits as the oracle does, and none to the bias."""
    logits, bias, dgates = make_router_inputs(problem)
    leaf = logits.clone().requires_grad_()
    bias = None if bias is None else bias.requires_grad_()
    routing = call(route, leaf, problem.spec, bias)
    _require(routing, problem)
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
    _require_gradient(got, routing, problem)


def _require_gradient(got: Tensor, routing: Routing, problem: RouterProblem) -> None:
    """Raise CheckFailed unless the gradient of the logits is right for the experts that were chosen."""
    ids, gates = routing
    logits, _, dgates = make_router_inputs(problem)

    def evaluate(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = [
            oracle.gate_gradient(z, row, problem.spec, d)
            for z, row, d in zip(logits.to(dtype), ids.tolist(), dgates.to(dtype), strict=True)
        ]
        return torch.stack([d for d, _ in rows]).double(), torch.stack([size for _, size in rows]).double()

    (want, scale), (plain, _) = evaluate(torch.float64), evaluate(torch.float32)
    lost = relative_errors(plain, want, scale)
    allowed = allowed_error(lost, torch.float32, _computed(gates)) + storing(got.dtype)
    error = relative_errors(got, want, scale, _smallest(got))
    if problem.spec.score == "sparsemixer":
        error[~_clear(logits, problem.spec, _computed(gates))] = 0
    if worst(error) > allowed:
        t, e = divmod(int(error.argmax()), problem.E)
        raise CheckFailed(
            f"the gradient of logits[{t}, {e}] is {float(got[t, e])!r}, right is {float(want[t, e])!r}: "
            f"error {worst(error):.3g} of its scale, budget {allowed:.3g}; "
            f"token {t} visits {ids[t].tolist()}"
        )


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
    _require_gates(routing, equal, problem.spec)
    if not torch.equal(call(route, equal, problem.spec, bias).expert_ids, routing.expert_ids):
        raise CheckFailed("equal scores lead to other experts in a second call")


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
        _require_gates(Routing(ids[sound], gates[sound]), logits[sound], problem.spec)
    except CheckFailed as failure:
        raise CheckFailed(f"beside tokens with NaN, {failure}") from failure


_NO_EXTREMES = f"{HINT}a router that never meets such logits declares extremes=False"


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
    _require_gates(Routing(ids, gates), masked, problem.spec)
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
                _require_gates(Routing(ids, gates), extreme, problem.spec)
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


def inputs_unchanged(route: Router, problem: RouterProblem) -> None:
    """Write to neither logits nor bias, with gradients or without."""
    logits, bias, dgates = make_router_inputs(problem)
    before = make_router_inputs(problem)
    for gradients in {route.support.gradients, False}:
        leaf = logits.detach().requires_grad_(gradients)
        gates = call(route, leaf, problem.spec, bias).gates
        if gradients:
            torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))
        for name, got, want in zip(before._fields, (logits, bias, dgates), before, strict=True):
            if got is not None and want is not None and not torch.equal(got, want):
                raise CheckFailed(f"{name} was written to")


def strides(route: Router, problem: RouterProblem) -> None:
    """Accept logits, a bias and a gradient that are not contiguous: the numbers alone decide."""
    logits, bias, dgates = make_router_inputs(problem)
    for layout in LAYOUTS:
        leaf = layout(logits).requires_grad_(route.support.gradients)
        spread = None if bias is None else bias.repeat_interleave(2)[::2]
        routing = call(route, leaf, problem.spec, spread)
        _require(routing, problem)
        if route.support.gradients:
            (got,) = torch.autograd.grad(routing.gates, leaf, layout(dgates.to(routing.gates.dtype)))
            _require_gradient(got, routing, problem)


def state(route: Router, problem: RouterProblem) -> None:
    """Depend on no earlier call, and overwrite no earlier result."""
    logits, bias, _ = make_router_inputs(problem)
    first = call(route, logits, problem.spec, bias)
    kept = Routing(first.expert_ids.clone(), first.gates.detach().clone())
    second = replace(problem, seed=problem.seed + 1)
    others = make_router_inputs(second)
    logits.copy_(others.logits)  # new contents at the same address
    if bias is not None and others.selection_bias is not None:
        bias.copy_(others.selection_bias)
    for repeat in range(30):
        try:
            _require(call(route, logits, problem.spec, bias), second)
        except CheckFailed as failure:
            raise CheckFailed(f"in call {repeat + 2}: {failure}") from failure
    for number, mode in enumerate((torch.no_grad, torch.inference_mode, torch.inference_mode)):
        now = replace(problem, seed=problem.seed + 2 + number)
        new = make_router_inputs(now)
        logits.data.copy_(new.logits)  # without a new version
        if bias is not None and new.selection_bias is not None:
            bias.data.copy_(new.selection_bias)
        with mode():
            _require(call(route, logits, problem.spec, bias), now)
    if route.support.num_experts is None:  # the same spec for another number of experts
        more = replace(problem, E=2 * problem.E)
        logits, bias, _ = make_router_inputs(more)
        _require(call(route, logits, more.spec, bias), more)
    if not all(torch.equal(a, b.detach()) for a, b in zip(kept, first, strict=True)):
        raise CheckFailed("the routing returned by an earlier call was overwritten by a later one")


def several_threads(route: Router, problem: RouterProblem) -> None:
    """Give threads that route tokens of their own at the same time their own routing."""
    own = [replace(problem, seed=problem.seed + number) for number in range(THREADS)]
    inputs = [make_router_inputs(p) for p in own]
    want = [call(route, logits, problem.spec, bias) for logits, bias, _ in inputs]
    together = threading.Barrier(THREADS)

    def route_in_rounds(number: int) -> bool:
        logits, bias, _ = inputs[number]
        same = True
        for _ in range(ROUNDS):
            together.wait()
            got = call(route, logits, problem.spec, bias)
            same &= torch.equal(got.expert_ids, want[number].expert_ids)
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        if not all(pool.map(route_in_rounds, range(THREADS))):
            raise CheckFailed("a token gets other experts where another thread routes at the same time")


def global_state(route: Router, problem: RouterProblem) -> None:
    """Leave random generators, modes, threads and other settings of the process as they were."""
    logits, bias, dgates = make_router_inputs(problem)

    def forward_and_backward(gradients: bool) -> None:
        leaf = logits.detach().requires_grad_(gradients)
        _, gates = call(route, leaf, problem.spec, bias)
        if gradients:
            torch.autograd.grad(gates, leaf, dgates.to(gates.dtype))

    for gradients in {route.support.gradients, False}:
        forward_and_backward(gradients)  # what the first call imports is no setting
        with torch.set_grad_enabled(gradients):
            require_unchanged(functools.partial(forward_and_backward, gradients), problem.dtype)


def modes(route: Router, problem: RouterProblem) -> None:
    """Return the same routing under no_grad, inference_mode and autocast, and for a bias of another dtype."""
    logits, bias, _ = make_router_inputs(problem)
    want = call(route, logits, problem.spec, bias)
    modes = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast(logits.device.type, dtype=torch.bfloat16),
    }
    for name, mode in modes.items():
        with mode:
            got = call(route, logits, problem.spec, bias)
            if not torch.equal(got.expert_ids, want.expert_ids):
                raise CheckFailed(f"the experts change under {name}")
            _require_gates(got, logits, problem.spec)
    if bias is not None:
        in_float64 = call(route, logits, problem.spec, bias.double())
        if not torch.equal(in_float64.expert_ids, want.expert_ids):
            raise CheckFailed("the experts change with a float64 selection_bias of the same values")
        low = bias.bfloat16()
        ids = [call(route, logits, problem.spec, b).expert_ids for b in (low, low.float())]
        if not torch.equal(*ids):
            raise CheckFailed("the experts change with a bfloat16 selection_bias of the same values")


def tokens_apart(route: Router, problem: RouterProblem) -> None:
    """Route each token without regard to the others: the batch comes in two parts, in reverse order."""
    logits, bias, _ = make_router_inputs(problem)
    whole = call(route, logits, problem.spec, bias)
    for part in (slice(0, 1), slice(1, None)):
        rows = torch.arange(problem.T)[part].flip(0)
        routing = call(route, logits[rows], problem.spec, bias)
        if not torch.equal(routing.expert_ids, whole.expert_ids[rows]):
            raise CheckFailed("the experts of a token depend on the other tokens")
        _require_gates(routing, logits[rows], problem.spec)


def many_tokens(route: Router, problem: RouterProblem) -> None:
    """Route each of many tokens as it routes few: of whole tiles and chunks, and of more than 65,536."""
    logits, bias, _ = make_router_inputs(problem)
    few = call(route, logits, problem.spec, bias)
    _require(few, problem)
    want_ids, order = few.expert_ids.sort(dim=1)
    want = few.gates.detach().gather(1, order)
    computed = _computed(few.gates)
    allowed = roundings(eps(computed)) + storing(want.dtype) + 2 * by_logarithm(want, computed)
    for tokens in MANY:
        rows = torch.arange(tokens) % problem.T
        with torch.no_grad():
            ids, gates = call(route, logits[rows], problem.spec, bias)
        ids, order = ids.sort(dim=1)
        wrong = (ids != want_ids[rows]).any(dim=1)
        if not bool(wrong.any()):
            wrong = (relative_errors(gates.gather(1, order), want[rows], want[rows]) > allowed[rows]).any(
                dim=1
            )
        if bool(wrong.any()):
            t = int(wrong.nonzero()[0])
            raise CheckFailed(
                f"{int(wrong.sum())} of {tokens} tokens, the first of them {t}, have other experts or gates "
                f"than among {problem.T} tokens"
            )


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
    Check(strides, KINDS),
    Check(tokens_apart, KINDS),
    Check(many_tokens, KINDS[:3:2]),
    Check(state, KINDS),
    Check(several_threads, tuple(replace(p, T=300) for p in KINDS)),
    Check(global_state, KINDS),
    Check(modes, KINDS),
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
