"""Where the suite lies, and whose packages its names mean.

In a checkout the packages below lie beside this one, in the wheel inside it: their names are too common to be
taken in a stranger's environment, so they are on the path only of the command ``moe-impls``, and of
`moe_impls.testing` while it runs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGED = Path(__file__).with_name("_suite")
ROOT = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1]
PACKAGES = ("correctness", "benchmarks", "reporting")

_kept: dict[str, ModuleType] = {}  # the suite's modules, between one `imported` and the next


def project() -> dict[str, Any]:
    """Read the table [project] of pyproject.toml, which is in the wheel, too."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def missing() -> list[str]:
    """List what the extra `suite` installs and is not here."""
    requirements = project()["optional-dependencies"]["suite"]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]
    return [name for name in names if not list(importlib.metadata.distributions(name=name))]


@contextlib.contextmanager
def imported() -> Iterator[None]:
    """Let the names in PACKAGES mean the suite's inside, and what they meant before outside."""
    before = {name for name in PACKAGES if _is_ours(name)}
    theirs = _set_aside([name for name in PACKAGES if name not in before])
    sys.modules.update(_kept)
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a subject may have changed the path itself
            sys.path.remove(str(ROOT))
        _kept.update(_set_aside([name for name in PACKAGES if name not in before]))
        sys.modules.update(theirs)


@contextlib.contextmanager
def neighbours_of(file: Path) -> Iterator[None]:
    """Let the names in PACKAGES that lie beside a file mean what lies there while the file is loaded."""
    folder, root = file.parent, str(ROOT)
    beside = [name for name in PACKAGES if (folder / name).is_dir() or (folder / f"{name}.py").is_file()]
    if not beside or folder == ROOT:
        yield
        return
    ours = _set_aside([name for name in beside if _is_ours(name)])
    path = list(sys.path)
    sys.path[:] = [place for place in path if place != root]
    try:
        yield
    finally:
        if root in path:
            sys.path.insert(0, root)
        _set_aside({name.partition(".")[0] for name in ours})
        sys.modules.update(ours)


def _is_ours(package: str) -> bool:
    places = getattr(sys.modules.get(package), "__path__", [])
    return any(Path(place) == ROOT / package for place in places)


def _set_aside(packages: Container[str]) -> dict[str, ModuleType]:
    """Take packages and what is in them out of `sys.modules`."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}
