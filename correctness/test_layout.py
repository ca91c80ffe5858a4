"""The direction of imports, read from the source: benchmarks -> correctness -> moe_impls -> torch."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_impls.registry import IMPLEMENTATIONS, INSTALLED_BY, PREPARED

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "moe_impls": {"moe_impls"},
    "correctness": {"correctness", "moe_impls"},
    "benchmarks": {"benchmarks", "correctness", "moe_impls"},
}
# Distributions whose modules are not named like them.
MODULES = {
    "scikit-learn": {"sklearn"},
    "pytest-benchmark": {"pytest_benchmark", "cpuinfo"},
    "vl-convert-python": {"vl_convert"},
}


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


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def breaches(root: Path) -> list[str]:
    """Every import below ``root`` that goes against the layout, as ``file imports name``."""
    wheel, suite = declared_modules()
    # What a peer needs may be on no package index, so that no extra can declare it.
    suite = suite | {library for library, package in INSTALLED_BY.items() if package.startswith("git+")}
    implementations = {f"moe_impls.{name.removesuffix(PREPARED)}" for name in IMPLEMENTATIONS}
    found = []
    for package, packages in MAY_IMPORT.items():
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            alone = package == "moe_impls" and not file.startswith("moe_impls/peers/")
            valid = packages | (wheel if alone else suite) | sys.stdlib_module_names
            if file == "moe_impls/triton_kernels.py":  # imported by what is for GPUs, when it is called
                valid = valid | {"triton"}
            for name in imports(path, root):
                wrong = name.split(".")[0] not in valid
                if file.removesuffix(".py").replace("/", ".") in implementations - {"moe_impls.compiled"}:
                    wrong |= any(is_within(name, other) for other in implementations)
                if file == "correctness/reference.py":  # the oracle shares no code with what it judges
                    wrong |= is_within(name, "moe_impls") and not is_within(name, "moe_impls.interface")
                if wrong:
                    found.append(f"{file} imports {name}")
    return found


def test_every_import_follows_the_layout() -> None:
    assert all(any((ROOT / package).rglob("*.py")) for package in MAY_IMPORT)
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("moe_impls/layer.py", "import correctness.compare", "correctness.compare"),
        ("moe_impls/layer.py", "def f():\n    from benchmarks import measure", "benchmarks.measure"),
        ("moe_impls/router.py", "import numpy as np", "numpy"),
        ("moe_impls/index_add.py", "from moe_impls import dense_mask", "moe_impls.dense_mask"),
        ("moe_impls/index_add.py", "from .dense_mask import forward", "moe_impls.dense_mask.forward"),
        ("moe_impls/index_add.py", "from . import compiled", "moe_impls.compiled"),
        ("correctness/compare.py", "from benchmarks.measure import time", "benchmarks.measure.time"),
        (
            "correctness/reference.py",
            "from moe_impls.functional import activate",
            "moe_impls.functional.activate",
        ),
        ("benchmarks/tests/test_x.py", "import not_declared", "not_declared"),
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
        "correctness/reference.py": "from moe_impls.interface import Experts",
        "correctness/test_training.py": "import sklearn.datasets\nfrom .compare import verify",
        "benchmarks/record.py": "import cpuinfo\nfrom correctness.problems import Problem\nimport moe_impls",
    }
    for file, source in sources.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(source, encoding="utf-8")
    assert breaches(tmp_path) == []
