"""The command ``moe-impls``: what the suite does in a checkout, from any folder and for any file.

``verify`` and ``bench`` are ``pytest correctness`` and ``pytest benchmarks`` with subjects as arguments, and
take all of pytest's options. Settings, plugins and conftest files of the folder where they are called have no
effect.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_impls import suite

USAGE = """\
usage: moe-impls COMMAND ...

  verify [NAME ...] [OPTION ...]   check implementations, a --router or a --layer; --verdict writes the result
                                   without a name: all of the project's own, several minutes
  bench [NAME ...] [OPTION ...]    measure implementations on a sweep; results go into moe-impls-results/
                                   without a name: all of the project's own, several minutes
  model MODEL [--against MODEL]    is a checkpoint or model the other one; if not, which layer differs and why
  list                             implementations, peers, models and checks
{measuring}

NAME is a name of `moe-impls list`, path/file.py:function or package.module:function. COMMAND --help lists the
options of a command; verify and bench take those of pytest, too.

Exit status of verify and bench, as pytest's: 0 all is right, 1 something is wrong, 2 interrupted, 4 the
request is wrong, 5 no test was selected. Of model: 0 equal, 1 different, 2 the request is wrong. Of the
others: 0 done, 1 no result, 2 the request is wrong.
"""
# Commands of `python -m benchmarks` that need no checkout.
MEASURING = {
    "compare": "two implementations, in the same rounds: which is faster",
    "report": "make report.md and its plots from CSV files",
    "profile": "time by operator and stage of one implementation",
    "tune": "measure which implementation `auto` takes on this machine",
    "peers": "measure ours beside other libraries' experts",
}
BY_PYTEST = {"verify": "correctness", "bench": "benchmarks"}
EXAMPLES = {
    "verify": "moe-impls verify kernel.py:forward --verdict verdict.json",
    "bench": "moe-impls bench kernel.py:forward --impl sorted_dispatch --T 16 --mode forward",
}
OF_PYTEST = """\
example: {example}

Without a name: all of the project's own, several minutes. The options of pytest pass through, such as -x, -k
and -n; `pytest --help` lists them.
"""
COMMANDS = (*BY_PYTEST, "list", *MEASURING, "model")
# In place of what pytest loads by itself, which depends on what else is installed; entry points and modules.
PLUGINS = ("timeout", "xdist", "hypothesispytest", "moe_impls.pytest_names")
OF_ANOTHER_REPOSITORY = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


def main() -> int:
    """Run the command that the arguments name; USAGE says what the exit status means."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("--help", "-h"):
        measuring = "\n".join(f"  {name:<31}  {meaning}" for name, meaning in MEASURING.items())
        print(USAGE.format(measuring=measuring), end="")
        return 0
    sys.path.insert(0, str(suite.ROOT))
    sys.path.append(str(Path.cwd()))  # after all others, for package.module:function of this folder
    from benchmarks.__main__ import COMMANDS as OF_CHECKOUT
    from benchmarks.__main__ import run_as
    from reporting import provenance

    if command in OF_CHECKOUT and command not in COMMANDS:
        needs = f"{command} needs a checkout of the repository: python -m benchmarks {command}"
        print(f"error: {needs}", file=sys.stderr)
        return 2
    if command not in (*COMMANDS, "--version"):
        print(f"error: unknown command {command!r}; valid are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    print(provenance.which(), flush=True)
    if command == "--version":
        return 0
    if missing := suite.missing():
        error, status = ("ERROR", 4) if command in BY_PYTEST else ("error", 2)
        needs = f"{command} needs {', '.join(missing)}: pip install 'moe-impls[suite]'"
        print(f"{error}: {needs}", file=sys.stderr)
        return status
    if command == "list":
        return _list(arguments)
    if command == "model":
        return _model(arguments)
    if command in BY_PYTEST and {"--help", "-h"} & {*arguments}:
        return _help(command)
    if command in BY_PYTEST:
        return _pytest(BY_PYTEST[command], arguments)
    return run_as("moe-impls")


def _model(arguments: Sequence[str]) -> int:
    try:
        from correctness.models import command
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        print(f"error: model needs {error.name}: pip install 'moe-impls[models]'", file=sys.stderr)
        return 2
    return command.main(arguments)


def _help(command: str) -> int:
    """Print the options that the suite adds to pytest's."""
    parser = argparse.ArgumentParser(
        prog=f"moe-impls {command}",
        usage=f"moe-impls {command} [NAME ...] [OPTION ...]",
        description=OF_PYTEST.format(example=EXAMPLES[command]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )

    def getgroup(name: str, title: str) -> Any:  # as pytest's parser has it
        return types.SimpleNamespace(addoption=parser.add_argument_group(title).add_argument)

    conftest = importlib.import_module(f"{BY_PYTEST[command]}.conftest")
    conftest.pytest_addoption(types.SimpleNamespace(getgroup=getgroup))
    parser.print_help()
    return 0


def _pytest(package: str, arguments: Sequence[str]) -> int:
    for name in OF_ANOTHER_REPOSITORY:
        os.environ.pop(name, None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    paths = (str(suite.ROOT), os.environ.get("PYTHONPATH"))  # of the processes that are started
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if package == "correctness":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as its conftest.py says
    import pytest

    own = [
        f"-p{package}.conftest"
    ]  # as a plugin, so that its options are known before others' are looked for
    if package == "benchmarks":
        own += ["-pbenchmark", "--benchmark-storage=file://./moe-impls-results/.benchmarks"]
    if "no:cacheprovider" not in "".join(arguments):
        cache = f"--override-ini=cache_dir={Path.cwd() / '.pytest_cache' / 'moe-impls'}"
        own += [cache if os.access(Path.cwd(), os.W_OK) else "-pno:cacheprovider"]
    options = [
        f"-c{suite.ROOT / 'pyproject.toml'}", f"--rootdir={suite.ROOT}", "--noconftest",
        "--assert=plain",  # writes no files beside those of the suite
        *(f"-p{name}" for name in PLUGINS), *own,
    ]  # fmt: skip
    return int(pytest.main([*options, str(suite.ROOT / package), *arguments]))


def _list(arguments: Sequence[str]) -> int:
    usage = "usage: moe-impls list    prints implementations, peers, models and checks"
    if {"--help", "-h"} & {*arguments}:
        print(usage)
        return 0
    if arguments:
        print(f"error: list takes no arguments; {' '.join(arguments)} is given", file=sys.stderr)
        return 2
    from benchmarks.workloads import MODELS
    from correctness.checks.table import KINDS
    from correctness.ranks.checks import RANKS
    from moe_impls import registry

    def show(title: str, lines: dict[str, str]) -> None:
        width = max(map(len, lines))
        print(f"\n{title}")
        print(*(f"  {name:<{width}}  {meaning}".rstrip() for name, meaning in lines.items()), sep="\n")

    show("implementations", {name: _docstring(name) for name in registry.IMPLEMENTATIONS})
    show("distributed implementations", {name: _docstring(name) for name in registry.DISTRIBUTED})
    show(
        "peers: experts of other libraries",
        {name: _peer(name) for name in (*registry.PEERS, *registry.PEERS_ON_RANKS)},
    )
    show("models, for --model", {name: _sizes(model) for name, model in MODELS.items()})
    for kind in (*KINDS, RANKS):
        meanings = {check.name: _first_line(check.function.__doc__) for check in kind.checks}
        show(f"checks of kind {kind.name}{kind.variant and f', {kind.variant}'}", meanings)
    return 0


def _docstring(implementation: str) -> str:
    """Read what an implementation says it does; not imported, since some need what is not here."""
    file = Path(__file__).with_name(f"{implementation.partition('+')[0]}.py")
    return _first_line(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))


def _first_line(docstring: str | None) -> str:
    return " ".join((docstring or "").partition("\n\n")[0].split())


def _peer(name: str) -> str:
    from moe_impls import registry

    library = name.partition(".")[0]
    if library not in registry.PACKAGES:
        return "comes with this package"
    if registry.is_installed(name):
        return f"{registry.PACKAGES[library]} is installed"
    return f"needs {registry.PACKAGES[library]}: pip install {registry.installed_by(library)}"


def _sizes(model: Any) -> str:
    (problem,) = model.problems()
    sizes = (f"{size}={getattr(problem, size)}" for size in ("D", "H", "E", "K"))
    return f"{', '.join(sizes)}, {problem.activation}"


if __name__ == "__main__":
    sys.exit(main())
