"""One rank's share of a problem of several, which checks of one process take for a problem of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from correctness.judging.compare import WEIGHTS, Reference, reference
from correctness.oracle.experts import Evaluation
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from correctness.ranks.problems import Spread
from moe_impls.interface import Routing


@dataclass(frozen=True, repr=False)
class Share(Problem):
    """What a rank has of a problem: T tokens of its own, and the weights of its chunk of the E experts.

    all_tokens: T of all ranks. ranks, tokens: of the `Spread`. rank: its number in the mesh.
    """

    all_tokens: int = 0
    ranks: int = 1
    rank: int = 0
    tokens: str = "unequal"

    @property
    def spread(self) -> Spread:
        """Return the problem of all ranks."""
        return Spread(Problem(**_fields(self, self.all_tokens)), self.ranks, self.tokens)

    def code(self) -> str:
        """Write one line of Python that makes the problem of all ranks."""
        return self.spread.problem.code()

    __repr__ = code


def share(spread: Spread, rank: int) -> Share:
    """Return what one rank has of a problem."""
    own = _fields(spread.problem, spread.sizes[rank])
    return Share(**own, all_tokens=spread.problem.T, ranks=spread.ranks, rank=rank, tokens=spread.tokens)


def _fields(problem: Problem, T: int) -> dict[str, Any]:
    """Name the fields of a problem of so many tokens."""
    return {f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)} | {"T": T}


@make_inputs.register
def _(problem: Share) -> Inputs:
    part = problem.spread.part(make_inputs(problem.spread.problem), problem.rank)
    ids, gates = part.routing
    return part.map(torch.clone)._replace(routing=Routing(ids.clone(), gates.clone()))


@reference.register
def _(problem: Share) -> Reference:
    spread = problem.spread
    whole = reference(spread.problem)
    tokens, experts = spread.own_tokens(problem.rank), spread.own_experts(problem.rank)
    values, scale = (
        {name: t[experts if name in WEIGHTS else tokens] for name, t in found.items()}
        for found in (whole.oracle.values, whole.oracle.scale)
    )
    kept = list(range(len(values["w_in"])))
    oracle = Evaluation(values, scale, kept)
    return Reference(problem, make_inputs(problem), oracle, whole.budget, is_whole=False)
