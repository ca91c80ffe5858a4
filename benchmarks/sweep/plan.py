"""What a sweep is to measure, written beside its CSV before it begins, so that it can be continued.

``<name>.plan.json`` holds the options that were given and, for each workload by its id, the implementations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sweep import record
from benchmarks.sweep.record import RecordError, Row
from correctness.problems.problem import Problem
from moe_impls.interface import dtype_name
from reporting.pages import write_atomically

SIZES = ("T", "D", "H", "E", "K")


@dataclass(frozen=True)
class Plan:
    """options: of the command line that differ from their defaults. cells: implementations by workload."""

    options: dict[str, object]
    cells: dict[str, list[str]]


def path_of(csv: Path) -> Path:
    return csv.with_suffix(".plan.json")


def cell_id(p: Problem, mode: str) -> str:
    """The name of a workload in one mode, as in the ids of tests."""
    return _id(p.name, [getattr(p, size) for size in SIZES], p.load, dtype_name(p.dtype), p.device, mode)


def cell_id_of(row: Row) -> str:
    """The same, of a row."""
    sizes = [getattr(row, size) for size in SIZES]
    return _id(row.workload, sizes, row.load, row.dtype, row.device, row.mode)


def _id(name: str, sizes: list[int], load: str, dtype: str, device: str, mode: str) -> str:
    named = [f"{size}{value}" for size, value in zip(SIZES, sizes, strict=True)]
    return "-".join([name, *named, *([] if load == "uniform" else [load]), dtype, device, mode])


def write(csv: Path, options: Mapping[str, object], cells: Mapping[str, Sequence[str]]) -> None:
    write_atomically(
        path_of(csv), (json.dumps({"options": options, "cells": cells}, indent=1) + "\n").encode()
    )


def read(csv: Path) -> Plan:
    """The plan of a sweep.

    Raises:
        RecordError: there is none, or it is not readable.
    """
    path = path_of(csv)
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecordError(f"{csv} cannot be continued: its plan {path.name} {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path} is no plan of a sweep: {error}") from error


def done(csv: Path) -> dict[str, dict[str, Row]]:
    """The rows that a file holds, by workload and implementation."""
    rows: dict[str, dict[str, Row]] = {}
    for row in record.read(csv):
        rows.setdefault(cell_id_of(row), {})[row.implementation] = row
    return rows


def progress(csv: Path) -> tuple[int, int] | None:
    """How many of the planned rows a file holds, and how many were planned; None without a plan."""
    if not path_of(csv).exists():
        return None
    rows = done(csv)
    planned = [(cell, name) for cell, names in read(csv).cells.items() for name in names]
    return sum(name in rows.get(cell, {}) for cell, name in planned), len(planned)
