"""``python -m benchmarks gate``: exit status 1 if an implementation is slower here than at a commit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.commands import compare
from benchmarks.commands.compare import Compared, Tell
from benchmarks.timing import versions
from moe_impls.interface import Implementation
from moe_impls.registry import IMPLEMENTATIONS, PREPARED, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--impl", action="append", metavar="NAME", help=(
        "only this implementation (repeatable); all that both versions have, unless given"
    ))  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.1, metavar="X", help=(
        "what counts as slower: 0.1 is a tenth (the default)"
    ))  # fmt: skip
    compare.add_timing(parser, base_required=True)


def run(options: argparse.Namespace) -> int:
    compare.settle(options)
    if not 0 < options.threshold < 10:
        raise ValueError(f"--threshold is {options.threshold}; it must be in (0, 10)")
    with versions.checked_out(options.base) as base, compare.progress() as tell:
        there = versions.names_in(base)
        usual = [name for name in IMPLEMENTATIONS if name in there and not name.endswith(PREPARED)]
        subjects = [resolve(name) for name in options.impl or usual]
        subjects = [s for s in subjects if options.impl or not s.support.compiles_per_case]
        found, slower = measure(base, subjects, options.threshold, options.seconds, tell)
    compare.write(options, found, f"here, relative to {options.base}")
    if not slower:
        print(f"no implementation is slower than at {options.base} by more than {options.threshold:.0%}")
        return 0
    compare.show(slower, f"slower than at {options.base} by more than {options.threshold:.0%}, twice")
    return 1


def measure(
    base: Path, subjects: Sequence[Implementation], threshold: float, seconds: float, tell: Tell
) -> tuple[list[Compared], list[Compared]]:
    """Measure all cells of these implementations; return them, and those slower by more than ``threshold``.

    What is slower is measured a second time, for twice as long; it counts if it is slower both times.
    """

    def is_slower(c: Compared) -> bool:
        return c.ratio is not None and c.ratio.verdict == "slower" and c.ratio.ratio > 1 + threshold

    everything, slower = [], []
    for subject in subjects:
        for found in compare.base_and_here(base, subject, seconds, compare.default_cells(), tell):
            if is_slower(found):
                tell(f"{found.label} is slower: once more")
                found = compare.two_versions(found, base, 2 * seconds)
                slower += [found] * is_slower(found)
            everything.append(found)
    return everything, slower
