"""What a distributed implementation is held to, at 1 to 4 ranks.

Results of all ranks are put together and judged as those of one process: against the one oracle, by the one
budget, exact problems to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from correctness.checks import layouts, memory, repeated_calls, values
from correctness.checks.case import Case, Check, Kind, Subject
from correctness.judging.compare import require_right
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue, problem
from correctness.problems.problem import Problem
from correctness.ranks import causes, pool, work
from correctness.ranks.problems import EXACT, OPTIONS, OUTPUT, SHARED, SOME, VALUES, Spread, fit_tokens
from correctness.ranks.rank import MEMBERS, OTHER_TWO
from correctness.ranks.work import Results, Source, Work
from moe_impls.interface import Implementation, Support

LIMIT_S = 60.0  # of a check on one problem, without the start of the ranks


@dataclass(frozen=True, eq=False)
class Remote:
    """An implementation as it is tested: found anew in each rank."""

    source: Source
    gradients: bool


def ask(tested: Remote, doing: Work, *spreads: Spread) -> list[Results]:
    """Let every rank do its part of the work, and put together what the ranks return of each result.

    Raises:
        CheckFailed: not every rank returned, or one found something wrong.
    """
    members = _members(spreads[0])
    calls = {
        member: (doing, tested.source, list(spreads), rank, members) for rank, member in enumerate(members)
    }
    found = pool.shared().call(work.do, calls, limit_s=LIMIT_S)
    by_rank = [found[member] for member in members]
    return [joined([of_rank[n] for of_rank in by_rank]) for n in range(len(by_rank[0]))]


def _members(spread: Spread) -> tuple[int, ...]:
    """Choose the ranks of the world that take part: of two, one pair or another by how tokens are spread."""
    return OTHER_TWO if spread.ranks == 2 and spread.tokens != "unequal" else MEMBERS[spread.ranks]


def joined(parts: list[Results]) -> Results:
    """Put together the rows of all ranks' tokens, and of weights' gradients those of all experts."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _judge(results: list[Results], spreads: list[Spread]) -> dict[str, float]:
    """Return the worst fraction of the budget of each tensor."""
    worst: dict[str, float] = {}
    for found, spread in zip(results, spreads, strict=True):
        try:
            fractions = require_right(found, spread.problem)
        except CheckFailed as failure:
            pool.shared().renew()  # its messages may still be under way
            raise CheckFailed(causes.told(str(failure), found, spread), failure.fractions) from None
        for name, fraction in fractions.items():
            worst[name] = max(fraction, worst.get(name, 0.0))
    return worst


def values_of_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give on several ranks the output and all gradients that one process with all tokens and experts has.

    Ranks have other numbers of tokens, one or all of them none; ranks receive nothing, or have no experts.
    """
    results = ask(tested, work.both_ways if tested.gradients else work.output, spread)
    return _judge(results, [spread] * len(results))


def exact_of_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give on several ranks the right integers to the bit, also where large terms cancel in low precision."""
    return values_of_ranks(tested, spread)


def graphs_of_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Keep three graphs of other routings apart, whose backwards come after all forwards in either order."""
    p = spread.problem
    spreads = [replace(spread, problem=replace(p, seed=p.seed + n)) for n in range(3)]
    return _judge(ask(tested, work.several_graphs, *spreads), spreads * 2)


def recomputed_by_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give the same gradients under activation checkpointing."""
    return _judge(ask(tested, work.recomputed, spread), [spread])


def accumulated_by_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Add up the gradients of two backwards in .grad."""
    return _judge(ask(tested, work.accumulated, spread), [spread])


def twice_by_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give the right gradients in a second backward of a retained graph, too."""
    return _judge(ask(tested, work.twice, spread), [spread] * 2)


def subsets_by_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give the right gradients where only some inputs require them, on all ranks the same ones."""
    results = ask(tested, work.subsets, spread)
    return _judge(results, [spread] * len(results))


def output_of_ranks(tested: Remote, spread: Spread) -> dict[str, float]:
    """Give the right output on several ranks where no gradient is defined or can be judged."""
    return _judge(ask(tested, work.output, spread), [spread])


def _by_each_rank(check: Callable[[Implementation, Problem], object]) -> Callable[[Remote, Spread], None]:
    """Make a check of one process one of several: all ranks do it in step, each on its own share."""

    @functools.wraps(check)
    def by_each_rank(tested: Remote, spread: Spread) -> None:
        ask(tested, functools.partial(work.of_one_process, check), spread)

    return by_each_rank


CHECKS: tuple[Check, ...] = (
    Check(exact_of_ranks, EXACT),
    Check(values_of_ranks, VALUES),
    Check(values_of_ranks, OPTIONS, fits=False),
    Check(output_of_ranks, OUTPUT, fits=False),
    *(
        Check(_by_each_rank(check), SHARED)
        for check in (
            memory.inputs_unchanged,
            memory.results_are_the_callers,
            memory.dirty_memory,
            repeated_calls.global_state,
            repeated_calls.new_contents,
            repeated_calls.same_objects,
            repeated_calls.thread_alone,
            layouts.strides,
            layouts.one_strided,
            layouts.offsets,
            values.non_finite_contained,
        )
    ),
    Check(_by_each_rank(repeated_calls.deterministic), SHARED, needs="deterministic"),
    Check(graphs_of_ranks, SOME, needs="gradients"),
    Check(recomputed_by_ranks, SOME, needs="gradients"),
    Check(accumulated_by_ranks, SOME, needs="gradients"),
    Check(twice_by_ranks, SOME, needs="gradients"),
    Check(subsets_by_ranks, SOME, needs="gradients"),
)


def _arguments(case: Case) -> tuple[Remote, Spread]:
    return case.subject.tested, case.problem


def _fit(subject: Subject, check: Check, spread: Spread) -> Spread | None:
    """As an implementation of one process, and the number of experts and tokens as declared."""
    support = subject.support
    sized = problem.resize(spread.problem, support)
    fitted = problem.fit(sized, support) if check.fits else sized
    if support.compiles_per_case and not catalogue.is_representative(fitted, support):
        return None
    return fit_tokens(replace(spread, problem=fitted), support)


def _unsupported(support: Support, spread: Spread) -> str | None:
    return problem.unsupported(support, spread.problem)


def _where(spread: Spread) -> str:
    return f" on {spread.ranks} rank{'s' * (spread.ranks > 1)}"


RANKS = Kind("implementation", CHECKS, _arguments, _fit, _unsupported, _where, variant="distributed")


def distributed(
    name: str, support: Support, find: Callable[..., Implementation], *arguments: object
) -> Subject:
    """Make a distributed implementation a subject, that each rank finds by ``find(*arguments)``."""
    return Subject(RANKS, name, Remote(Source(find, arguments), support.gradients), support)
