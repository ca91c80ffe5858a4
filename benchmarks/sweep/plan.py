"""What a sweep is to measure: names of its workloads, and its plan, which ``journal`` keeps beside its CSV.

The plan holds the options that were given and, for each workload by its id, the implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep import journal, record
from benchmarks.sweep.journal import RecordError
from benchmarks.sweep.record import Row
from correctness.problems.problem import Problem
from moe_impls.interface import dtype_name

SIZES = ("T", "D", "H", "E", "K")


@dataclass(frozen=True)
class Plan:
    """options: those that differ from their defaults. cells: names of implementations by workload."""

    options: dict[str, Any]
    cells: dict[str, list[str]]


def cell_id(p: Problem, mode: str) -> str:
    """The name of a workload in one mode, as in the ids of tests."""
    return _id(p.name, [getattr(p, size) for size in SIZES], p.load, dtype_name(p.dtype), p.device, mode)


def cell_id_of(row: Row) -> str:
    """The name of the workload that a row is of."""
    sizes = [getattr(row, size) for size in SIZES]
    return _id(row.workload, sizes, row.load, row.dtype, row.device, row.mode)


def _id(name: str, sizes: list[int], load: str, dtype: str, device: str, mode: str) -> str:
    named = [f"{size}{value}" for size, value in zip(SIZES, sizes, strict=True)]
    return "-".join([name, *named, *([] if load == "uniform" else [load]), dtype, device, mode])


def read(csv: Path) -> Plan:
    """Read the plan of a sweep.

    Raises:
        RecordError: there is none, or it is not readable.
    """
    try:
        return Plan(**journal.read_plan(csv))
    except TypeError as error:
        raise RecordError(f"{journal.plan_path(csv)} is no plan of a sweep: {error}") from error


def by_workload(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by workload and implementation."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(cell_id_of(row), {})[row.implementation] = row
    return found


def progress(csv: Path) -> tuple[int, int] | None:
    """How many of the planned rows a file holds, and how many were planned; None without a plan."""
    if not journal.plan_path(csv).exists():
        return None
    rows = by_workload(record.read(csv))
    planned = [(cell, name) for cell, names in read(csv).cells.items() for name in names]
    return sum(name in rows.get(cell, {}) for cell, name in planned), len(planned)
