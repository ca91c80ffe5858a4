"""Put into the distributions the commit that they are built from."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """Write the file `commit`: into the sdist at its top, into the wheel beside the suite."""

    PLACES = {"sdist": "commit", "wheel": "moe_impls/_suite/commit"}

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        written = root / "commit"  # of an sdist, from which a wheel is built
        if not written.is_file():
            self.folder = tempfile.TemporaryDirectory()
            written = Path(self.folder.name) / "commit"
            written.write_text(f"{_commit(root)}\n", encoding="utf-8")
        build_data["force_include"][str(written)] = self.PLACES[self.target_name]


def _commit(root: Path) -> str:
    """The commit of the checkout, with ``-dirty`` if files differ from it; ``unknown`` without git."""
    if not (root / ".git").exists():
        return "unknown"
    described = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
