"""``python -m benchmarks COMMAND``; the sweep is ``pytest benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

# Each is the module of that name in benchmarks/commands, with `add_arguments(parser)` and `run(options)`.
# Only the one that is asked for is imported: what it needs may be missing where another runs.
COMMANDS = {
    "report": "make report.md and its plots from CSV files",
    "profile": "time by operator and stage of one implementation",
    "tune": "measure which implementation `auto` takes on this machine",
    "regret": "what `auto` loses by its choice, on loads that it was not tuned on",
    "compare": "two implementations, or two versions of one, in rounds",
    "gate": "exit status 1 if an implementation is slower than at a commit",
    "peers": "ours beside other libraries': two hours, or --quick 8 minutes",
    "ep": "bytes, collectives and waits of experts spread over ranks",
    "ep-model": "experts over many ranks on paper, for released models",
    "model": "transformers models with our experts, end to end",
    "cuda": "verify, measure and profile on a GPU, in the time given",
    "limits": "what the machine can do at best: matrix products and bandwidths",
    "carry": "fetch small packages for a GPU machine without a network",
    "measurement": "measure what the measurement is worth: 20 minutes",
    "history": "keep a summary of a run; plot them over commits",
}
PROG = "python -m benchmarks"
HERE = ("benchmarks", "correctness", "moe_impls", "reporting")


def run_as(prog: str) -> int:
    """Run the command that the process was started with, ``prog`` in its help."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no worktree and no process behind
    return main(prog=prog)


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Run a command.

    Returns:
        Its exit status: 0, or 1 where it says so; 2 for bad input, with one line on standard error that says
        what is valid; 130 after Ctrl-C.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = parser(given[0] if given else "", prog).parse_args(given)
    from correctness.judging.finding import CheckFailed

    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in HERE:
            raise
        print(f"error: {given[0]} needs {error.name}: pip install 'moe-impls[suite]'", file=sys.stderr)
        return 2
    except (ValueError, OSError, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was written before is kept", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parser(command: str, prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of all commands, with the options of the one that is asked for."""
    made = _Parser(prog=prog, description="The sweep itself is `pytest benchmarks`.")
    commands = made.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            module = importlib.import_module(f"benchmarks.commands.{name.replace('-', '_')}")
            module.add_arguments(own)
            own.set_defaults(run=module.run)
    return made


if __name__ == "__main__":
    sys.exit(run_as(PROG))
