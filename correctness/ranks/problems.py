"""Problems of several ranks: a problem of all their tokens, and how many of these each rank has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from correctness.problems import catalogue
from correctness.problems.problem import Inputs, Problem
from moe_impls.interface import (
    ACTIVATIONS,
    CLAMPED,
    COMBINES,
    OUTPUT_ACTIVATIONS,
    Clamp,
    Routing,
    Support,
)

SHARES = (3, 1, 4, 2)  # of the tokens, that ranks have where it is unequal


def _unequal(T: int, ranks: int) -> list[int]:
    shares = list(itertools.accumulate(SHARES[:ranks], initial=0))
    ends = [T * share // shares[-1] for share in shares]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _equal(T: int, ranks: int) -> list[int]:
    return [T // ranks + (rank < T % ranks) for rank in range(ranks)]


# Tokens of each rank, by name.
TOKENS: dict[str, Callable[[int, int], list[int]]] = {
    "unequal": _unequal,
    "equal": _equal,
    "none_on_first": lambda T, ranks: [0, *_unequal(T, ranks - 1)],
    "none_on_last": lambda T, ranks: [*_unequal(T, ranks - 1), 0],
    "all_on_last": lambda T, ranks: [0] * (ranks - 1) + [T],
}


@dataclass(frozen=True)
class Spread:
    """A problem spread over ranks, as the implementation's contract cuts it.

    problem: of all ranks' tokens, those of the first rank first. tokens: a key of TOKENS.
    """

    problem: Problem
    ranks: int
    tokens: str = "unequal"

    @property
    def dtype(self) -> torch.dtype:
        return self.problem.dtype

    @property
    def exact(self) -> bool:
        return self.problem.exact

    @property
    def sizes(self) -> list[int]:
        """Count the tokens of each rank."""
        return TOKENS[self.tokens](self.problem.T, self.ranks)

    @property
    def id(self) -> str:
        tokens = "" if self.tokens == "unequal" else f"-{self.tokens}"
        return f"{self.problem.id}-{self.ranks}_ranks{tokens}"

    def own_tokens(self, rank: int) -> slice:
        """Return which tokens of all are a rank's."""
        begin = sum(self.sizes[:rank])
        return slice(begin, begin + self.sizes[rank])

    def own_experts(self, rank: int) -> slice:
        """Return which experts of all are a rank's."""
        held = -(-self.problem.E // self.ranks)  # by every rank but the last ones
        return slice(rank * held, (rank + 1) * held)

    def part(self, inputs: Inputs, rank: int) -> Inputs:
        """Cut out of the inputs of all ranks those of one."""
        tokens = self.own_tokens(rank)
        x, (ids, gates), experts, dy = inputs
        own = experts.map(lambda w: w[self.own_experts(rank)])
        return Inputs(x[tokens], Routing(ids[tokens], gates[tokens]), own, dy[tokens])


def fit_tokens(spread: Spread, support: Support) -> Spread:
    """Make the number of experts and the tokens of each rank such as ``support`` declares."""
    p, ranks = spread.problem, spread.ranks
    if support.even_experts:
        p = replace(p, E=-(-p.E // ranks) * ranks)
    if support.equal_tokens:
        return Spread(replace(p, T=-(-p.T // ranks) * ranks), ranks, "equal")
    return replace(spread, problem=p)


def aimed(p: Problem, ranks: int) -> tuple[Spread, ...]:
    """Aim all slots at the experts of each rank in turn, so that the others receive nothing."""
    held = p.E // ranks
    return tuple(
        Spread(
            replace(p, name=f"all_to_rank{rank}", load=f"experts_{rank * held}-{(rank + 1) * held - 1}"),
            ranks,
        )
        for rank in range(ranks)
    )


def both(p: Problem, **options: Any) -> tuple[Spread, ...]:
    """Spread a problem over 2 and over 4 ranks."""
    return tuple(Spread(p, ranks, **options) for ranks in (2, 4))


SMALL = replace(catalogue.SMALL, name="spread", E=8)
LOG = replace(SMALL, combine="logsumexp")
LOW = replace(SMALL, dtype=torch.bfloat16)
UNEVEN = replace(SMALL, name="uneven_experts", E=5, K=3, load="zipf", dtype=torch.float64)  # 2, 2, 1 and 0
INTEGERS = replace(catalogue.named("integers"), E=8, T=43)
_PAIRS = replace(catalogue.named("integers_cancelling_pairs"), E=8)
CANCELLING = tuple(replace(_PAIRS, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float16))
# Each activation, with the other options by turns.
OPTIONS = tuple(
    Spread(
        replace(
            SMALL,
            activation=activation,
            output_activation=OUTPUT_ACTIVATIONS[n // 2 % 2],
            combine=COMBINES[(n // 2 + n) % 2],
            bias=n % 3 > 0,
            clamp=catalogue.NEAR if activation == CLAMPED else Clamp(),
        ),
        (2, 3, 4)[n % 3],
    )
    for n, activation in enumerate(ACTIVATIONS)
)
_MANY = replace(catalogue.named("integers_512_tokens"), E=8)

VALUES: tuple[Spread, ...] = (
    *both(SMALL),
    *both(LOW),
    *both(LOG),
    *both(UNEVEN),
    *(Spread(p, 3) for p in (SMALL, UNEVEN)),
    *(spread for ranks in (2, 4) for spread in aimed(SMALL, ranks)),
    *both(SMALL, tokens="none_on_first"),
    *both(UNEVEN, tokens="none_on_last"),
    *both(replace(LOG, dtype=torch.bfloat16), tokens="all_on_last"),
    *both(replace(SMALL, name="no_tokens", T=0)),
    *(Spread(replace(SMALL, name="one_token_each", T=n, K=n if n > 2 else 3), n, "equal") for n in (2, 3, 4)),
    *both(replace(catalogue.named("one_choice"), dtype=torch.float16)),
    *both(catalogue.named("signed_gates")),
    *both(replace(catalogue.named("half_empty"), combine="logsumexp")),
    *(Spread(replace(SMALL, gates="one_zero", combine=c), n) for c in COMBINES for n in (2, 3)),
    Spread(replace(LOG, activation="silu", x_scale=300.0), 2),
    Spread(replace(LOW, name="hundreds_of_tokens", T=700), 2),
    Spread(replace(catalogue.named("aligned"), activation="gelu"), 4, "equal"),
    *(Spread(p, 1) for p in (SMALL, LOG, LOW)),
)
EXACT: tuple[Spread, ...] = (
    *(spread for p in CANCELLING for spread in both(p)),
    *(Spread(replace(INTEGERS, dtype=d), 4) for d in (torch.float64, torch.float16)),
    *(spread for ranks in (2, 4) for spread in aimed(INTEGERS, ranks)),
    *both(replace(INTEGERS, E=5, dtype=torch.bfloat16), tokens="none_on_first"),
    Spread(replace(CANCELLING[0], low_gates=True), 4, "all_on_last"),
    # Loads, numbers of tokens and of a rank's experts beyond what is counted in a byte or cut off.
    *both(replace(_MANY, load="one_hot_expert")),
    *both(_MANY, tokens="none_on_first"),
    Spread(replace(catalogue.named("integers_1024_tokens"), E=8), 2),
    *both(replace(INTEGERS, E=48, K=4)),
    Spread(catalogue.named("integers_many"), 2),
)
# Where y is defined and gradients are too low for the budget, or undefined.
OUTPUT: tuple[Spread, ...] = (
    *(Spread(replace(p, dtype=torch.float64, low_gates=True), 2) for p in (SMALL, LOG)),
    Spread(replace(LOG, gates="zero_rows"), 2),
)
# For checks of several calls.
SOME: tuple[Spread, ...] = (*both(SMALL), *both(INTEGERS), *both(UNEVEN, tokens="none_on_last"))
# For those that each rank makes on its own share: the last by another pair of ranks.
SHARED: tuple[Spread, ...] = (Spread(SMALL, 2), Spread(LOG, 3), Spread(INTEGERS, 2, "equal"))
