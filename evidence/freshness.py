"""Whether the committed evidence is of this checkout: ``python -m evidence check``; and its pages."""

from __future__ import annotations

from pathlib import Path

from evidence import error_budget, overview, published, tables
from evidence.mutants import table
from evidence.mutation import table as mutation
from reporting.pages import write_atomically

TABLES = {  # by the command
    "mutants": table,
    "mutation": mutation,
    "lookalikes": error_budget,
    "published": published,
}
PAGES = (*TABLES.values(), overview)
SHOWN = 8  # names of each sort, for each table


def write_pages() -> int:
    """Write every page from the committed tables."""
    for module in PAGES:
        write_atomically(module.PAGE, module.page().encode())
        print(module.PAGE)
    return 0


def run() -> int:
    """Say which tables and pages are stale, since when, why, and what makes them anew; 1 if any is."""
    stale = 0
    for command, module in TABLES.items():
        changes = tables.changes(module.CSV, module.made_of())
        stale += bool(changes)
        print(report(command, module.CSV, changes))
    for module in PAGES:
        if module.PAGE.read_text(encoding="utf-8") != module.page():
            stale += 1
            print(
                f"{module.PAGE.name} does not say what its tables say\n  to write it: {error_budget.COMMAND}"
            )
    return int(stale > 0)


def report(command: str, csv: Path, changes: dict[str, list[str]]) -> str:
    """Tell what `tables.changes` found, in lines."""
    made = tables.made_at(tables.read(csv)) if csv.exists() else "not made"
    lines = [f"{csv.name}, {made}: {'stale' if changes else 'fresh'}"]
    for sort, names in changes.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  {sort}: {', '.join(names[:SHOWN])}{more}")
    if changes:
        lines.append(f"  to make it anew: python -m evidence {command}")
    return "\n".join(lines)
