"""``python -m benchmarks report``: the reports of folders, from their CSV files alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import HISTORY, RESULTS
from benchmarks.report import page
from benchmarks.report.folder import write_report
from reporting.provenance import IS_CHECKOUT

SWEEP = "pytest benchmarks" if IS_CHECKOUT else "moe-impls bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=(
        "folders of CSV files; a report is written into each (default: every folder in "
        f"{RESULTS.name}/)"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    made = {path.parent for path in RESULTS.glob("*/*.csv")} - {HISTORY}
    folders = options.folders or sorted(made)
    if not folders:
        raise ValueError(f"{RESULTS} holds no CSV file; `{SWEEP}` makes them")
    for folder in folders:
        print(*write_report(folder), sep="\n")
    if not page.is_available():
        print(page.MISSING, file=sys.stderr)
    return 0
