"""What a wrong result of several ranks says about the mistake behind it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from correctness.judging.blame import REPRODUCE
from correctness.judging.compare import WEIGHTS, reference
from correctness.judging.finding import what
from correctness.oracle.experts import evaluate
from correctness.problems.problem import Inputs
from correctness.ranks.problems import Spread

NEARER = 4  # times nearer to what a mistake gives than to what is right
NEAR = 0.02  # of a tensor's scale: so near are results of the same mistake, in low precision, too


def told(finding: str, results: dict[str, Tensor], spread: Spread) -> str:
    """Add the likely cause to a finding, if one of the mistakes below gives the same numbers."""
    name = next((n for n in results if finding.startswith(f"{what(n)} ")), None)
    cause = "" if name is None else _cause(name, results[name], spread)
    before, mark, after = finding.partition(REPRODUCE)
    return f"{before}{cause and f'{chr(10)}  likely cause: {cause}'}{mark}{after}"


def _cause(name: str, got: Tensor, spread: Spread) -> str:
    want = reference(spread.problem).oracle.values[name].double()
    if got.shape != want.shape or not got.numel():
        return ""
    for cause, other in _mistakes(name, want, spread):
        if not bool(other.isfinite().all()):  # log space without any slot
            continue
        distance, off = ((got.double() - t).abs().max() for t in (other, want))
        if distance <= NEAR * other.abs().max() and NEARER * distance <= off:
            return cause
    return ""


def _mistakes(name: str, want: Tensor, spread: Spread) -> Iterator[tuple[str, Tensor]]:
    """List what the tensor would be by common mistakes, each with its description."""
    ranks = spread.ranks
    yield f"it is multiplied by the number of ranks, {ranks}: summed twice?", want * ranks
    yield f"it is divided by the number of ranks, {ranks}: averaged, not summed?", want / ranks
    home = torch.repeat_interleave(torch.arange(ranks), torch.tensor(spread.sizes))  # [T]
    owner = torch.arange(spread.problem.E) // -(-spread.problem.E // ranks)  # [E]
    inputs = reference(spread.problem).inputs
    own = owner[inputs.routing.expert_ids] == home.unsqueeze(1)  # [T, K], slots that stay on their rank
    yield "slots of experts on other ranks are missing", _of_slots(name, inputs, own, spread)
    yield "slots of experts on the token's own rank are missing", _of_slots(name, inputs, ~own, spread)
    if name in WEIGHTS:
        for rank in (rank for rank, size in enumerate(spread.sizes) if size):
            others = (home != rank).unsqueeze(1).expand_as(own)
            yield f"tokens of rank {rank} are missing", _of_slots(name, inputs, others, spread)


def _of_slots(name: str, inputs: Inputs, counted: Tensor, spread: Spread) -> Tensor:
    """Compute the tensor from some of the slots alone."""
    x, (ids, gates), experts, dy = inputs
    gates, wide = torch.where(counted, gates, 0), torch.Tensor.double
    arguments = (wide(x), ids, gates, experts.map(wide), wide(dy))
    found = evaluate(*arguments, spread.problem.combine, scales=False).values[name]
    return torch.where(counted, found, 0) if name == "gates" else found
