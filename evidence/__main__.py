"""``python -m evidence``: one command for each kind of evidence, one for pages, one for what is stale."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# As in correctness/conftest.py: threads that wait for work must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from evidence import error_budget, freshness, published
from evidence.mutants import table
from evidence.mutation import table as drawn


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence",
        description="Make the evidence for what the verification is worth, and say whether it is stale.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("mutants", help="every check on every mutant: results/mutants.csv and its page")
    lookalikes = commands.add_parser(
        "lookalikes",
        help="right implementations on many seeds: results/error_budget.csv, docs/error-budget.md",
    )
    lookalikes.add_argument("--seeds", type=int, default=error_budget.SEEDS, help="default: %(default)s")
    commands.add_parser(
        "published", help="published rules on the mutants: results/verification.csv and its page"
    )
    mutation = commands.add_parser(
        "mutation", help="single edits that are drawn, and what finds each: results/mutation.csv and its page"
    )
    mutation.add_argument("--seed", type=int, default=drawn.SEED, help="default: %(default)s")
    mutation.add_argument("--number", type=int, default=drawn.NUMBER, help="of edits; default: %(default)s")
    mutation.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    commands.add_parser(
        "families", help="the suite on every family of transformers: results/families.csv and its page"
    )
    commands.add_parser(
        "layers", help="the suite on public layers that are installed: results/layers.csv and its page"
    )
    mutation.add_argument("--only", nargs="+", choices=drawn.JUDGES, default=(), help="modules of moe_impls")
    commands.add_parser("pages", help="every page again, from the committed tables")
    commands.add_parser("check", help="which tables and pages are stale, and what makes them anew")
    options = parser.parse_args(arguments)
    if options.command == "mutants":
        return table.run()
    if options.command == "lookalikes":
        return error_budget.run(options.seeds)
    if options.command == "mutation":
        return drawn.run(options.seed, options.number, options.workers, options.only)
    if options.command == "published":
        return published.run()
    if options.command in ("families", "layers"):  # transformers is imported for them alone
        return importlib.import_module(f"evidence.{options.command}_table").run()
    return freshness.write_pages() if options.command == "pages" else freshness.run()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
