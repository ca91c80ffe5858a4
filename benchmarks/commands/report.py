"""``python -m benchmarks report``: the reports of folders, from their CSV files alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.options import RESULTS
from benchmarks.report import page
from benchmarks.report.folder import write_report
from reporting.provenance import IS_CHECKOUT

SWEEP = "pytest benchmarks" if IS_CHECKOUT else "moe-impls bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=(
        "folders of CSV files; a report is written into each (default: every folder in "
        f"{RESULTS.name}/ that a sweep has written to)"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    folders = options.folders or sorted({path.parent for path in RESULTS.glob("*/*.plan.json")})
    if not folders:
        raise ValueError(f"{RESULTS} holds no folder of a sweep; `{SWEEP}` makes them")
    for folder in folders:
        print(*write_report(folder), sep="\n")
    if not page.is_available():
        print(page.MISSING, file=sys.stderr)
    return 0
