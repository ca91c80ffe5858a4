"""The direction of imports, read from the source: each folder may import what stands before it here."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_impls.registry import DISTRIBUTED, IMPLEMENTATIONS, INSTALLED_BY, PREPARED
from reporting.provenance import ROOT

# The floors of the two houses that have them, from the ground up: each may import those below it.
JUDGES = tuple(
    f"correctness/{room}"
    for room in ("oracle", "problems", "judging", "checks", "families", "ranks", "session")
)
COSTS = ("benchmarks/workloads", "benchmarks/timing", "benchmarks/sweep", "benchmarks/report")
# What each folder may import of the project, with what is below that, beside itself.
ROOMS = {
    "moe_impls": (),
    # What runs the suite for others.
    "moe_impls/__main__": ("moe_impls", "reporting", "correctness", "benchmarks"),
    "moe_impls/testing": ("moe_impls", "correctness"),
    "moe_impls/pytest_names": ("moe_impls",),
    "reporting": ("moe_impls/suite",),
    **{room: ("moe_impls", *JUDGES[:i]) for i, room in enumerate(JUDGES)},
    # Shares no code with what it judges.
    "correctness/oracle": ("moe_impls/interface", "moe_impls/layer_interface", "moe_impls/router_interface"),
    "correctness/session": ("moe_impls", "reporting", *JUDGES[:-1]),
    "correctness/session/child": (),  # which knows nothing of what it runs
    "correctness/ranks": ("moe_impls", *JUDGES[:4], "correctness/session/child"),
    "correctness/models": ("moe_impls", "correctness/judging"),
    "correctness": ("moe_impls", "reporting", *JUDGES),
    "evidence": ("moe_impls", "reporting", "correctness"),
    **{room: ("moe_impls", "reporting", "correctness", *COSTS[:i]) for i, room in enumerate(COSTS) if i},
    "benchmarks": ("moe_impls", "reporting", "correctness"),
    "docs": ("moe_impls", "correctness", "evidence"),
    "tests": ("moe_impls", "reporting", "correctness", "evidence", "benchmarks", "docs"),
}
TOPS = {room.partition("/")[0] for room in ROOMS}
# Distributions whose modules are not named like them.
MODULES = {
    "scikit-learn": {"sklearn"},
    "pytest-benchmark": {"pytest_benchmark", "cpuinfo"},
    "vl-convert-python": {"vl_convert"},
    "markdown-it-py": {"markdown_it"},
    "pyyaml": {"yaml"},
}
# What a file of the package may import besides, when it is called.
ON_REQUEST = {"moe_impls/triton_kernels.py": "triton", "moe_impls/transformers.py": "transformers"}


def declared_modules() -> tuple[set[str], set[str]]:
    """The third-party modules that pyproject.toml declares: for the wheel, and with all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def modules(requirements: list[str]) -> set[str]:
        names = [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]
        return {module for name in names for module in MODULES.get(name, {name.replace("-", "_")})}

    wheel = modules(project["dependencies"])
    return wheel, wheel.union(*map(modules, project["optional-dependencies"].values()))


def imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parts[: -node.level] if node.level else ()
            source = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*source, alias.name]) for alias in node.names)


def is_within(name: str, place: str) -> bool:
    """Whether a dotted name is a module, or in a module, below ``place``, a path."""
    module = place.replace("/", ".")
    return name == module or name.startswith(module + ".")


def room_of(file: str) -> str:
    """The longest room that a file is in, or that it is."""
    return max((r for r in ROOMS if file.startswith(r + "/") or file == r + ".py"), key=len)


def breaches(root: Path) -> list[str]:
    """Every import below ``root`` that goes against the layout, as ``file imports name``."""
    wheel, suite = declared_modules()
    # What a peer needs may be on no package index, so that no extra can declare it.
    suite = suite | {library for library, package in INSTALLED_BY.items() if package.startswith("git+")}
    implementations = {
        f"moe_impls/{name.removesuffix(PREPARED)}" for name in (*IMPLEMENTATIONS, *DISTRIBUTED)
    }
    found = []
    for path in sorted(p for top in TOPS for p in (root / top).rglob("*.py")):
        if path.parent.name == "reproductions":  # scripts for other packages, which know nothing of this one
            continue
        file = path.relative_to(root).as_posix()
        room = room_of(file)
        alone = room == "moe_impls" and not file.startswith("moe_impls/peers/")
        libraries = (wheel if alone else suite) | sys.stdlib_module_names
        libraries = libraries | {ON_REQUEST.get(file)}
        for name in imports(path, root):
            top = name.split(".")[0]
            if top in TOPS:
                wrong = not any(is_within(name, place) for place in (room, *ROOMS[room]))
            else:
                wrong = top not in libraries
            if file.removesuffix(".py") in implementations - {"moe_impls/compiled"}:
                wrong |= any(is_within(name, other) for other in implementations)
            if wrong:
                found.append(f"{file} imports {name}")
    return found


def test_every_import_follows_the_layout() -> None:
    assert all(any((ROOT / room).rglob("*.py")) or (ROOT / f"{room}.py").is_file() for room in ROOMS)
    assert breaches(ROOT) == []


def test_every_folder_of_code_has_a_place_in_the_layout() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*.py")
    }
    inside = ("moe_impls", "evidence", "tests", "benchmarks/commands")  # whose parts follow the whole
    assert {f for f in folders if f not in ROOMS and not f.startswith(inside)} == set()


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("moe_impls/layer.py", "import correctness.judging.compare", "correctness.judging.compare"),
        (
            "moe_impls/layer.py",
            "def f():\n    from benchmarks.timing import measure",
            "benchmarks.timing.measure",
        ),
        ("moe_impls/router.py", "import numpy as np", "numpy"),
        ("moe_impls/index_add.py", "from moe_impls import dense_mask", "moe_impls.dense_mask"),
        ("moe_impls/index_add.py", "from .dense_mask import forward", "moe_impls.dense_mask.forward"),
        ("moe_impls/index_add.py", "from . import compiled", "moe_impls.compiled"),
        (
            "correctness/judging/budget.py",
            "from benchmarks.timing import measure",
            "benchmarks.timing.measure",
        ),
        (
            "correctness/judging/budget.py",
            "from correctness.checks import values",
            "correctness.checks.values",
        ),
        ("correctness/problems/gates.py", "import correctness.judging.budget", "correctness.judging.budget"),
        ("correctness/oracle/layer.py", "from moe_impls import functional", "moe_impls.functional"),
        ("correctness/oracle/router.py", "from moe_impls.router import route", "moe_impls.router.route"),
        ("correctness/checks/values.py", "from evidence.mutants import MUTANTS", "evidence.mutants.MUTANTS"),
        ("benchmarks/report/page.py", "from benchmarks.commands import peers", "benchmarks.commands.peers"),
        ("benchmarks/workloads.py", "import evidence.lookalikes", "evidence.lookalikes"),
        ("tests/test_x.py", "import not_declared", "not_declared"),
    ],
)
def test_an_import_against_the_layout_is_found(tmp_path: Path, file: str, source: str, name: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert breaches(tmp_path) == [f"{file} imports {name}"]


def test_imports_along_the_layout_are_allowed(tmp_path: Path) -> None:
    sources = {
        "moe_impls/compiled.py": "import os\nimport torch\nfrom moe_impls import dense_mask",
        "correctness/oracle/experts.py": "from moe_impls.interface import Experts",
        "correctness/checks/values.py": "from correctness.judging import compare",
        "evidence/lookalikes.py": "from correctness.checks.table import CHECKS",
        "benchmarks/sweep/record.py": "import cpuinfo\nfrom correctness.problems.problem import Problem",
        "tests/moe_impls/test_layer.py": "import sklearn.datasets\nfrom moe_impls import MoE",
    }
    for file, source in sources.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(source, encoding="utf-8")
    assert breaches(tmp_path) == []
