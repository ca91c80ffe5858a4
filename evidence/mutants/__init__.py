"""Deliberately wrong implementations, routers, layers and losses: the suite must reject every one."""

from evidence.mutants.mutant import KINDS, Mutant, read

MUTANTS: tuple[Mutant, ...] = tuple(mutant for kind in KINDS for mutant in read(kind))

__all__ = ["MUTANTS", "Mutant"]
