"""Deliberately wrong implementations, routers and losses: the suite must reject every one."""

from correctness.mutants.experts import EXPERTS
from correctness.mutants.losses import LOSSES
from correctness.mutants.mutant import Mutant
from correctness.mutants.routers import ROUTERS

MUTANTS: tuple[Mutant, ...] = (*EXPERTS, *ROUTERS, *LOSSES)

__all__ = ["EXPERTS", "LOSSES", "MUTANTS", "ROUTERS", "Mutant"]
