"""Put into the distributions the commit that they are built from, and into the wheel the compiled kernel."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    """Write the file `commit`, into the sdist at its top, into the wheel beside the suite; compile kernels.

    Where there is no compiler, or one that does not know the processors, the wheel is one for any system, and
    the kernel is compiled where it is used.
    """

    PLACES = {"sdist": "commit", "wheel": "moe_impls/_suite/commit"}

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        self.folder = tempfile.TemporaryDirectory()
        written = root / "commit"  # of an sdist, from which a wheel is built
        if not written.is_file():
            written = Path(self.folder.name) / "commit"
            written.write_text(f"{_commit(root)}\n", encoding="utf-8")
        build_data["force_include"][str(written)] = self.PLACES[self.target_name]
        if self.target_name != "wheel":
            return
        try:
            kernels = _kernels(root, Path(self.folder.name))
        except RuntimeError as error:
            self.app.display_warning(f"the wheel holds no compiled kernel: {error}")
            return
        build_data["force_include"] |= {str(p): f"moe_impls/_native/{p.name}" for p in kernels}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _kernels(root: Path, folder: Path) -> list[Path]:
    """Compile the kernel for each kind of processor.

    Raises:
        RuntimeError: it is made for another system than Linux, for another processor than those of
            ``kernel_file.LEVELS``, or the compiler is missing or fails.
    """
    sys.path.insert(0, str(root))
    from moe_impls import kernel_file  # which imports neither torch nor what else may not be here

    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    system, _, machine = sysconfig.get_platform().partition("-")  # another system where one is set
    levels = {name: level for name, level in kernel_file.LEVELS.items() if level.machine == machine}
    if system != "linux" or not levels:
        known = sorted({level.machine for level in kernel_file.LEVELS.values()})
        raise RuntimeError(f"it is made for Linux on {' and '.join(known)}, not {system} on {machine}")
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"{compiler[0]} is not there")

    def compiled(level: str) -> Path:
        (own := folder / level).mkdir()
        return kernel_file.compile_kernel(compiler, levels[level].flags, own).rename(folder / f"{level}.so")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compiled, levels))


def _commit(root: Path) -> str:
    """The commit of the checkout, with ``-dirty`` if files differ from it; ``unknown`` without git."""
    if not (root / ".git").exists():
        return "unknown"
    described = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
