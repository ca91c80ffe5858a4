"""Whether what a router returns is what the contract says, by the oracle: its routing, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from correctness.judging.budget import allowed_error, by_logarithm, eps, relative_errors, storing, worst
from correctness.judging.finding import CheckFailed
from correctness.judging.router_hints import HINT, Routed, choice_hint, gates_hint
from correctness.oracle import router as oracle
from correctness.problems.routers import RouterProblem, make_router_inputs
from moe_impls.interface import Routing
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


def computed_in(gates: Tensor) -> torch.dtype:
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


def require_gates(
    routing: Routing, logits: Tensor, spec: RouterSpec, selection_bias: Tensor | None = None
) -> None:
    """Raise CheckFailed unless the gates are those of the experts that were chosen, for every token.

    selection_bias: in which a hint may find the cause.
    """
    computed = computed_in(routing.gates)
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


def require(routing: Routing, problem: RouterProblem) -> None:
    """Raise CheckFailed unless the routing is right for the problem."""
    logits, bias, _ = make_router_inputs(problem)
    choices = right_choices(problem, eps(computed_in(routing.gates)))
    for t, (row, (chosen, clear)) in enumerate(zip(routing.expert_ids.tolist(), choices, strict=True)):
        if clear and set(row) != set(chosen):
            found = choice_hint(Routed(logits, bias, problem.spec, *routing), choices)
            raise CheckFailed(f"token {t} visits experts {sorted(row)}; right is {sorted(chosen)}{found}")
    require_gates(routing, logits, problem.spec, bias)


def require_gradient(got: Tensor, routing: Routing, problem: RouterProblem) -> None:
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
    allowed = allowed_error(lost, torch.float32, computed_in(gates)) + storing(got.dtype)
    error = relative_errors(got, want, scale, _smallest(got))
    if problem.spec.score == "sparsemixer":
        error[~_clear(logits, problem.spec, computed_in(gates))] = 0
    if worst(error) > allowed:
        t, e = divmod(int(error.argmax()), problem.E)
        raise CheckFailed(
            f"the gradient of logits[{t}, {e}] is {float(got[t, e])!r}, right is {float(want[t, e])!r}: "
            f"error {worst(error):.3g} of its scale, budget {allowed:.3g}; "
            f"token {t} visits {ids[t].tolist()}"
        )
