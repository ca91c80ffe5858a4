"""What the rules of published MoE test suites make of the mutants: ``python -m evidence published``.

Every suite of `evidence.published_suites` is applied to right implementations, to one that returns zeros and
to the wrong expert computations of `evidence.mutants`: results/verification.csv and its page. The figures of
this suite beside them are those of results/mutants.csv.

A subject is killed by a suite if any of the suite's comparisons rejects a tensor or if it raises. In favour
of the suites: new memory holds NaN until it is written to, inputs of equal shape lie at the addresses of
earlier ones, and a mutant keeps its state from the first comparison of a suite to the last.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from correctness.checks.memory import fresh_memory_is_nan
from correctness.judging import calling, compare
from correctness.oracle.experts import evaluate
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs
from evidence import published_suites, tables
from evidence.mutants import MUTANTS, Mutant, table
from evidence.mutants.judge import KILLED, SURVIVED
from evidence.published_suites import SUITES, Comparison, Suite, describe
from moe_impls.interface import Experts, Forward, Routing, dtype_name
from moe_impls.router import route
from moe_impls.router_interface import RouterSpec
from reporting.pages import markdown_table, write_atomically

CSV = tables.RESULTS / "verification.csv"
PAGE = CSV.with_suffix(".md")
OURS = "this suite"
BY_NAME = {suite.name: suite for suite in SUITES}
EXPERTS = [mutant for mutant in MUTANTS if mutant.kind == "experts"]
# Right implementations: what the mutants are made of, and the loop that is the plainest.
GROUPED, DENSE = "evidence.mutants.grouped", "evidence.mutants.dense"
RIGHT = (GROUPED, "moe_impls.sorted_dispatch", DENSE)
ZEROS = "zeros"
CONCERNS = ("forward", "gradients", "behaviour")
# What is right in numbers and large in memory leaves out problems with more pairs than this: of token and
# expert, for `dense` and its mutants; of slot and token, for the mutants by a one-hot product.
MAX_TOKEN_EXPERTS = 2**17
MAX_SLOT_TOKENS = 2**26


def concern(mutant: Mutant) -> str:
    """Tell what a mutant gets wrong: the numbers of one forward or of its gradients, or its behaviour.

    Behaviour: what it remembers, writes to or leaves unwritten, strides, NaN, modes of torch.
    """
    if mutant.killed_by not in ("values", "exact"):
        return "behaviour"
    return "gradients" if re.search("gradient|graph", mutant.finding) else "forward"


@dataclass
class Subject:
    """What a suite is applied to, and what has come of it so far."""

    name: str
    kind: str  # right | zeros | mutant
    base: str
    load: Callable[[], Forward]
    rejected_by: str = ""
    shown: bool = False
    accepted: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        self.forward = self.load()

    @property
    def done(self) -> bool:
        """Tell whether a subject is called no more: a mutant that is rejected; of others, all calls count."""
        return self.kind == "mutant" and bool(self.rejected_by)

    def takes(self, comparison: Comparison) -> bool:
        p = comparison.problem
        if comparison.compiled and not (self.base and importlib.import_module(self.base).SUPPORT.fullgraph):
            return False
        if "one_hot_product" in self.name and p.T * p.K * p.T > MAX_SLOT_TOKENS:
            return False
        return self.base != DENSE or p.T * p.E <= MAX_TOKEN_EXPERTS


def zeros(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Return zeros, and zero gradients."""
    y = x.new_zeros(len(x), experts.w_out.shape[1])
    return y + sum(t.flatten()[:0].sum().to(x.dtype) for t in (x, routing.gates, *experts.tensors.values()))


def subjects() -> list[Subject]:
    """Load right implementations, zeros, and each wrong expert computation anew."""
    return [
        *(Subject(name.rpartition(".")[2], "right", name, partial(_forward, name)) for name in RIGHT),
        Subject(ZEROS, "zeros", "", lambda: zeros),
        *(Subject(m.name, "mutant", m.base, partial(_mutant_forward, m)) for m in EXPERTS),
    ]


def _forward(module: str) -> Forward:
    return importlib.import_module(module).forward


def _mutant_forward(mutant: Mutant) -> Forward:
    return mutant.load().forward


def inputs_of(suite: Suite, comparison: Comparison) -> Inputs:
    """Make inputs at the scales of a suite, with the suite's way from router logits to gates."""
    p = comparison.problem
    x, (ids, gates), experts, dy = make_inputs(p)
    if suite.keeps_weights:
        experts = make_inputs(replace(p, seed=0)).experts
    generator = torch.Generator().manual_seed(p.seed)
    if p.load == "uniform":
        logits = suite.logits * torch.randn(p.T, p.E, generator=generator)
        ids, values = route(logits, RouterSpec(p.K, score=suite.score))
        gates = values.to(gates.dtype)
    else:
        gates = torch.full_like(gates, 1 / p.K)
    # make_inputs has weights of 1/√features and biases of 0.5. Where features are fewer than published, the
    # factor of the published number keeps the size of what is summed over them.
    D, H = comparison.published
    factors = {
        "w_in": suite.weights(D) * D**0.5,
        "w_out": suite.weights(H) * H**0.5,
        "b_in": suite.biases / 0.5,
        "b_out": suite.biases / 0.5,
    }
    scaled = replace(experts, **{name: w * factors[name] for name, w in experts.tensors.items()})
    return Inputs(x, Routing(ids, gates), scaled, dy * suite.dy)


class Addresses:
    """Hands out copies of inputs, those of equal shape always at the same address."""

    def __init__(self) -> None:
        self._kept: dict[tuple, Tensor] = {}

    def place(self, inputs: Inputs, *, padded: bool, owner: object) -> Inputs:
        """Copy inputs; only copies for the same ``owner`` share addresses."""
        position = itertools.count()

        def at(t: Tensor) -> Tensor:
            padding = 128 if padded and t.dim() == 3 else 0
            key = (owner, next(position), t.shape, t.dtype, padding)
            if key not in self._kept:
                self._kept[key] = t.new_zeros(*t.shape[:-1], t.shape[-1] + padding)[..., : t.shape[-1]]
            return self._kept[key].copy_(t)

        placed = inputs.map(at)
        return placed._replace(routing=Routing(at(inputs.routing.expert_ids), placed.routing.gates))


def incoming_gradient(comparison: Comparison, inputs: Inputs, y: Callable[[], Tensor]) -> Tensor | None:
    """Compute what flows into y, [T, O], in the dtype of x; ``y`` makes the result that it may depend on."""
    if comparison.incoming == "none":
        return None
    if comparison.incoming == "dy":
        return inputs.dy
    if comparison.incoming == "mse":
        return (2 * (y() - 1) / inputs.dy.numel()).to(inputs.dy.dtype)
    return torch.ones_like(inputs.dy)


def plain(comparison: Comparison, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute y and gradients by the equations, intermediates rounded to ``dtype``, in the dtypes due."""
    x, (ids, gates), experts, _ = inputs

    def values(dy: Tensor | None) -> dict[str, Tensor]:
        return evaluate(x, ids, gates, experts, dy, "sum", dtype=dtype, wide=torch.float32).values

    found = values(incoming_gradient(comparison, inputs, lambda: values(None)["y"]))
    return {name: t.to((inputs.tensors | {"y": inputs.x})[name].dtype) for name, t in found.items()}


def results(forward: Forward, suite: Suite, comparison: Comparison, inputs: Inputs) -> dict[str, Tensor]:
    """Call as the suite does: y, and the gradients that the suite looks at."""
    if comparison.incoming == "none":
        with torch.no_grad() if suite.no_grad else contextlib.nullcontext():
            y = forward(inputs.x, inputs.routing, inputs.experts, combine="sum")
        return {"y": y.detach()}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    x, routing, experts = calling.assemble(inputs, leaves)
    y = forward(x, routing, experts, combine="sum")
    loss, dy = y, None
    if comparison.incoming == "dy":
        dy = inputs.dy
    elif comparison.incoming == "mse":
        loss = F.mse_loss(y, torch.ones_like(y))
    else:
        loss = y.sum()
    if comparison.incoming == "sum_and_balance":
        loss = loss + 0 * (x.sum() + routing.gates.sum())
    wanted = [name for name in comparison.rules if name != "y"]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted], dy)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def rejection(got: dict[str, Tensor], want: dict[str, Tensor], comparison: Comparison) -> str:
    """Name the first tensor that a suite's rule rejects; an empty string if there is none."""
    for name, rule in comparison.rules.items():
        if not rule(got[name], want[name]):
            return f"{'y' if name == 'y' else f'the gradient of {name}'} on {comparison.id}"
    return ""


def is_over_budget(got: dict[str, Tensor], own: compare.Reference, comparison: Comparison) -> bool:
    """Tell whether this suite's budgets reject any tensor that the suite compares."""
    due = {name: t for name, t in got.items() if name in comparison.rules}
    wanted = {"dtype": own.problem.dtype, "shape": own.oracle.values["y"].shape}
    if "y" in due and any(getattr(due["y"], what) != value for what, value in wanted.items()):
        return True
    return any(not fraction <= 1 for fraction in compare.fractions(due, own).values())


@contextlib.contextmanager
def _isolated():
    """Keep what a subject does to the state of torch from the next one."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), fresh_memory_is_nan():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_grad_enabled(True)


class Call:
    """One comparison of a suite: its inputs, what it compares with, and this suite's oracle and budgets."""

    def __init__(self, suite: Suite, comparison: Comparison, addresses: Addresses, owner: object) -> None:
        self.suite, self.comparison, self.pristine = suite, comparison, inputs_of(suite, comparison)
        self._place = partial(addresses.place, self.pristine, padded=comparison.padded, owner=owner)
        self._wanted: dict[str, dict[str, Tensor]] = {}  # by the base of the subject
        dy = incoming_gradient(comparison, self.pristine, lambda: self._plain(self.pristine)["y"])
        inputs = self.pristine if dy is None else self.pristine._replace(dy=dy)
        self.own = compare.make_reference(comparison.problem, inputs, comparison.incoming != "none")

    def _plain(self, inputs: Inputs) -> dict[str, Tensor]:
        return plain(self.comparison, inputs, torch.float32)

    def expected(self, inputs: Inputs, base: str) -> dict[str, Tensor]:
        """Compute what the suite compares a subject with."""
        if self.suite.reference == "base":
            return results(_forward(base), self.suite, self.comparison, inputs)
        if self.suite.reference == "float32":
            return self._plain(inputs)
        return plain(self.comparison, inputs, self.comparison.problem.dtype)

    def rejects(self, subject: Subject) -> str:
        """Call a subject as the suite does: why the suite rejects it, or an empty string."""
        suite, comparison, base = self.suite, self.comparison, GROUPED
        if suite.reference == "base" and subject.kind == "mutant":
            base = subject.base
        if base not in self._wanted:
            self._wanted[base] = self.expected(self._place(), base)
        want, forward = self._wanted[base], subject.forward
        if comparison.compiled:
            torch.compiler.reset()
            forward = torch.compile(forward, fullgraph=True, backend="eager")
        inputs = self._place()
        for call in range(suite.calls):
            if call:  # x and weights are as the last call left them; the router decides anew
                inputs.routing.expert_ids.copy_(self.pristine.routing.expert_ids)
                inputs.routing.gates.copy_(self.pristine.routing.gates)
            try:
                with _isolated():
                    got = results(forward, suite, comparison, inputs)
            except Exception as error:  # a mutant may raise where a right implementation does not
                return f"{type(error).__name__} on {comparison.id}"
            if not suite.reference_first:  # but of what the subject left in the tensors
                want = self.expected(inputs, base)
            subject.shown = subject.shown or is_over_budget(got, self.own, comparison)
            if why := rejection(got, want, comparison):
                return why
            if call + 1 < suite.calls:
                got["y"].zero_()
        return ""


def apply(suite: Suite) -> list[Subject]:
    """Take every subject through the comparisons of a suite until one of them rejects it."""
    found, addresses = subjects(), Addresses()
    for index, comparison in enumerate(suite.comparisons):
        call = Call(suite, comparison, addresses, owner=index if suite.keeps_inputs else None)
        for subject in (s for s in found if not s.done and s.takes(comparison)):
            if comparison.new_process:
                subject.forward = subject.load()
            why = call.rejects(subject)
            subject.calls += 1
            subject.accepted += not why
            subject.rejected_by = subject.rejected_by or why
    return found


def run() -> int:
    """Apply every suite to every subject, in a quarter of an hour on two CPUs."""
    of = made_of()
    tables.write(CSV, tables.make(CSV, of, list(BY_NAME), work), of)
    write_atomically(PAGE, page().encode())
    print(f"{CSV}\n{PAGE}")
    return 0


def page() -> str:
    """Write out the page of the committed tables."""
    return summary(tables.read(CSV), tables.read(table.CSV))


def made_of() -> dict[str, str]:
    """List mutants and suites, and the files that they and the judgement are made of."""
    of_mutants = {k: v for k, v in table.made_of().items() if k.startswith(("mutant experts", "file"))}
    suites = {
        f"suite {suite.name}": tables.digest([(c.id, c.problem) for c in suite.comparisons])
        for suite in SUITES
    }
    return of_mutants | suites | tables.files(Path(__file__), Path(published_suites.__file__))


def work(name: str) -> tables.Rows:
    """Make the lines of the table for one suite."""
    suite, mutants = BY_NAME[name], {m.name: m for m in EXPERTS}
    lines = []
    for s in apply(suite):
        mutant = mutants[s.name] if s.kind == "mutant" else None
        lines.append(
            {
                "suite": suite.name,
                "kind": s.kind,
                "subject": s.name,
                "family": mutant.family if mutant else "",
                "concern": concern(mutant) if mutant else "",
                "verdict": KILLED if s.rejected_by else SURVIVED,
                "rejected_by": s.rejected_by,
                "shown": "yes" if s.shown or s.rejected_by else "no",
                "accepted": str(s.accepted),
                "comparisons": str(s.calls),
            }
        )
    return lines


def own_rows(mutants: pd.DataFrame, frame: pd.DataFrame) -> tables.Rows:
    """Make the lines of this suite, from its own table: of those mutants that both tables have."""
    concerns = dict(zip(frame["subject"], frame["concern"], strict=True))
    return [
        {
            "suite": OURS,
            "kind": "mutant",
            "subject": row["mutant"],
            "concern": concerns[row["mutant"]],
            "verdict": row["verdict"],
            "shown": "yes",
        }
        for row in tables.records(mutants)
        if row["kind"] == "experts" and row["mutant"] in concerns
    ]


def results_table(found: tables.Rows) -> pd.DataFrame:
    """Tabulate for each suite what it accepts and how many mutants it kills."""

    def share(verdict: str, of: tables.Rows) -> str:
        return f"{sum(row['verdict'] == verdict for row in of)} of {len(of)}"

    lines = []
    for name in dict.fromkeys(row["suite"] for row in found):
        here = [row for row in found if row["suite"] == name]
        mutants, right, nothing = ([r for r in here if r["kind"] == k] for k in ("mutant", "right", "zeros"))
        line = {"suite": name, "right accepted": share(SURVIVED, right) if right else "", "zeros": ""}
        for row in nothing:
            verdict = "rejected" if row["verdict"] == KILLED else "accepted"
            line["zeros"] = f"{verdict}; {row['accepted']} of {row['comparisons']} accept them"
        for what in CONCERNS:
            line[what] = share(KILLED, [m for m in mutants if m["concern"] == what])
        line["all"] = share(KILLED, mutants)
        line["of those shown"] = share(KILLED, [m for m in mutants if m["shown"] == "yes"])
        lines.append(line)
    return pd.DataFrame(lines)


def rules_table() -> pd.DataFrame:
    """Tabulate for each rule of each suite the dtypes and tensors that it is applied to."""
    lines: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for suite in SUITES:
        for comparison in suite.comparisons:
            for tensor, rule in comparison.rules.items():
                dtypes, tensors = lines.setdefault((suite.name, describe(rule)), ({}, {}))
                dtypes[dtype_name(comparison.problem.dtype)] = None
                tensors["y" if tensor == "y" else f"d{tensor}"] = None
    return pd.DataFrame(
        [
            {"suite": name, "rule": rule, "dtypes": ", ".join(dtypes), "of": ", ".join(tensors)}
            for (name, rule), (dtypes, tensors) in lines.items()
        ]
    )


def survivors_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Tabulate for each suite the mutants that are wrong in its own calls and that its rules accept."""
    survived = (frame["kind"] == "mutant") & (frame["verdict"] != KILLED) & (frame["shown"] == "yes")
    names = frame[survived].groupby("suite", sort=False)["subject"].agg(", ".join)
    suites = frame["suite"].drop_duplicates()
    return pd.DataFrame([{"suite": suite, "accepted": names.get(suite, "none")} for suite in suites])


def _paragraph(suite: Suite) -> str:
    return f"""### {suite.name}

{len(suite.comparisons)} comparisons, from {"; ".join(suite.source)}.

- Re-created: {suite.recreated}
- Not re-created: {suite.not_recreated}
- Tested there and not shown here: {suite.beyond}
"""


def summary(frame: pd.DataFrame, mutants: pd.DataFrame) -> str:
    """Write the comparison out as a page: from its table, that of the mutants and the suites' data."""
    found = [*own_rows(mutants, frame), *tables.records(frame)]
    count = len({row["subject"] for row in found if row["kind"] == "mutant"})
    right = dict.fromkeys(row["subject"] for row in found if row["kind"] == "right")
    suites = frame["suite"].drop_duplicates()
    paragraphs = "\n".join(_paragraph(BY_NAME[name]) for name in suites if name in BY_NAME)
    return f"""# What published rules make of the same mutants

The tolerance rules and problem sets of {len(suites)} published MoE test suites, re-created as data and
applied to the {count} wrong expert computations of `evidence/mutants/`. The table was
{tables.made_at(frame)}, by
`python -m evidence published`; every verdict and the comparison behind it: [{CSV.name}]({CSV.name}).
The line of this suite is from [{table.CSV.name}]({table.CSV.name}), {tables.made_at(mutants)}.

## Figures

{markdown_table(results_table(found))}

- *right accepted*: of {len(right)} right implementations, {", ".join(right)}.
- *zeros*: an implementation that returns zeros and zero gradients, and how many comparisons accept it.
- *forward*, *gradients*, *behaviour*: mutants killed, by what they get wrong: the numbers of one forward;
  those of its gradients; or what shows beyond one plain call: memory that was never written, state, inputs
  written to, strides, NaN, modes of torch.
- *of those shown*: mutants killed of those that raise or leave this suite's error budget in some call that
  the suite makes, in a tensor that it looks at. What lies between this and *all* is never put to the rule:
  no problem, dtype, option or sequence of calls of that suite shows it.

## Shown and accepted

Out of this suite's budget in a call that the suite makes, and within the suite's tolerance:

{markdown_table(survivors_table(frame))}

## Rules

{markdown_table(rules_table())}

## Method and limits

- The mutants are this suite's own, each made to be caught by one of its checks: that it kills them all is
  asserted, not found. Other mutants give other figures. Routers and losses are left out, since few of these
  suites compare them.
- The published suites are re-created, not run: they need GPUs and kernels of their own, and everything here
  is computed by PyTorch on a CPU. A mutant keeps its state from the first comparison of a suite to the last,
  as in one process.
- In favour of the suites: memory that nothing was written to holds NaN, where a GPU's allocator gives them
  what happens to be there; inputs of equal shape lie at the addresses of earlier ones, so that results kept
  by address go stale; a suite that calls two entry points of one kernel calls the mutant twice.
- Some subjects are right in the numbers of one call and large in memory; they leave out the largest problems:
  the one that computes every expert on every token, its mutants, and the two mutants by a one-hot product.
- Each suite tests more than the numbers of its layer: the last line of each paragraph names what this page
  cannot show. The figures are no measure of a project's kernels.

## The suites

{paragraphs}"""
