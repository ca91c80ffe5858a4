"""How tokens spread over experts, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from correctness.problems.problem import Problem


def _by_weight(p: Problem, generator: torch.Generator, weight: Tensor) -> Tensor:
    """Draw K distinct experts for each token with the given weights [E] (Gumbel top-k)."""
    uniform = torch.rand(p.T, p.E, generator=generator, dtype=torch.float64)
    return (weight.log() - (-uniform.log()).log()).topk(p.K, dim=1).indices


def _uniform(p: Problem, g: torch.Generator) -> Tensor:
    return _by_weight(p, g, torch.ones(p.E, dtype=torch.float64))


def _one_hot_expert(p: Problem, g: torch.Generator) -> Tensor:
    """Send every token to one expert first; the other choices are uniform."""
    weight = torch.ones(p.E, dtype=torch.float64)
    weight[int(torch.randint(p.E, (), generator=g))] = 1e12
    return _by_weight(p, g, weight)


def _same_experts(p: Problem, g: torch.Generator) -> Tensor:
    """Send every token to the same K experts."""
    return torch.randperm(p.E, generator=g)[: p.K].expand(p.T, p.K).contiguous()


def _half_empty(p: Problem, g: torch.Generator) -> Tensor:
    """Send all tokens to half of the experts, but never to fewer than K."""
    live = torch.randperm(p.E, generator=g)[: max(p.K, (p.E + 1) // 2)]
    return live[_uniform(replace(p, E=len(live)), g)]


def _bursts(p: Problem, g: torch.Generator) -> Tensor:
    """Send runs of 16 neighbouring tokens to the same experts, as tokens of one text go."""
    ids = _uniform(replace(p, T=(p.T + 15) // 16), g)
    return ids.repeat_interleave(16, dim=0)[: p.T]


def _router(p: Problem, g: torch.Generator) -> Tensor:
    """Take the top K of a random linear router, where neighbouring tokens share half of their variance."""
    features, text = 16, 64  # few features make some experts more popular than others
    topics = torch.randn((p.T + text - 1) // text, features, generator=g, dtype=torch.float64)
    own = torch.randn(p.T, features, generator=g, dtype=torch.float64)
    tokens = (topics.repeat_interleave(text, dim=0)[: p.T] + own) / 2**0.5
    return (tokens @ torch.randn(features, p.E, generator=g, dtype=torch.float64)).topk(p.K, dim=1).indices


def _one_differs(p: Problem, g: torch.Generator) -> Tensor:
    """Send each token to the experts 0 to K - 1, in this order, but one in the middle to any in any order."""
    ids = torch.arange(p.K).repeat(p.T, 1)
    ids[p.T // 2 : p.T // 2 + 1] = torch.randperm(p.E, generator=g)[: p.K]
    return ids


Load = Callable[[Problem, torch.Generator], Tensor]


def _zipf_of(exponent: str) -> Load:
    """Send tokens to the n-th expert in proportion to n to the power of minus ``exponent``."""
    power = float(exponent)
    if not 0 < power < 10:
        raise ValueError

    def zipf_of(p: Problem, g: torch.Generator) -> Tensor:
        weight = torch.arange(1, p.E + 1, dtype=torch.float64) ** -power
        return _by_weight(p, g, weight[torch.randperm(p.E, generator=g)])

    return zipf_of


LOADS: dict[str, Load] = {
    "uniform": _uniform,
    "zipf": _zipf_of("1"),
    "one_hot_expert": _one_hot_expert,
    "same_experts": _same_experts,
    "half_empty": _half_empty,
    "bursts": _bursts,
    "router": _router,
}
# Loads that are not measured: a sample of their tokens says something about all of them that is wrong.
TRAPS: dict[str, Load] = {"one_differs": _one_differs}


def _hot_experts(number: str) -> Load:
    """Send every token to as many of ``number`` hot experts as K allows; other choices are uniform."""
    hot = int(number)
    if hot < 1:
        raise ValueError

    def hot_experts(p: Problem, g: torch.Generator) -> Tensor:
        if hot > p.E:
            raise ValueError(f"load is {p.load!r}; there are E = {p.E} experts")
        weight = torch.ones(p.E, dtype=torch.float64)
        weight[torch.randperm(p.E, generator=g)[:hot]] = 1e12
        return _by_weight(p, g, weight)

    return hot_experts


def _experts(ids: str) -> Load:
    """Send every token to some of the experts ``first-last`` alone, as those that one rank holds."""
    first, last = map(int, ids.split("-"))
    if not 0 <= first <= last:
        raise ValueError

    def experts(p: Problem, g: torch.Generator) -> Tensor:
        if last >= p.E or last - first + 1 < p.K:
            raise ValueError(
                f"load is {p.load!r}; there are E = {p.E} experts, and K = {p.K} must be among them"
            )
        return first + _uniform(replace(p, E=last - first + 1), g)

    return experts


# Loads with a number in their name, such as zipf_1.2, hot_experts_4 and experts_4-7.
FAMILIES: dict[str, Callable[[str], Load]] = {
    "zipf": _zipf_of,
    "hot_experts": _hot_experts,
    "experts": _experts,
}
LOAD_NAMES = (
    f"{', '.join(LOADS | TRAPS)}, zipf_<exponent below 10>, hot_experts_<number> and experts_<first>-<last>"
)


def load_named(name: str, argument: str = "load") -> Load:
    """Find the load of that name.

    Raises:
        ValueError: there is none; the message names the ``argument`` and the loads that there are.
    """
    if name in (known := LOADS | TRAPS):
        return known[name]
    family, _, number = name.rpartition("_")
    if family in FAMILIES:
        with contextlib.suppress(ValueError):
            return FAMILIES[family](number)
    raise ValueError(f"{argument} is {name!r}; valid are {LOAD_NAMES}")
