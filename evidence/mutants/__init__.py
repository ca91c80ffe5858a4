"""Deliberately wrong implementations, routers and losses: the suite must reject every one."""

from evidence.mutants.experts import EXPERTS
from evidence.mutants.losses import LOSSES
from evidence.mutants.mutant import Mutant
from evidence.mutants.routers import ROUTERS

MUTANTS: tuple[Mutant, ...] = (*EXPERTS, *ROUTERS, *LOSSES)

__all__ = ["EXPERTS", "LOSSES", "MUTANTS", "ROUTERS", "Mutant"]
