"""Where and with what a file of results was made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from moe_impls import suite

ROOT = suite.ROOT
# Of the wheel, whose folder is no place to write into, the results go into a folder beside the user's work.
IS_CHECKOUT = (ROOT / "moe_impls").is_dir()
RESULTS = ROOT / "results" if IS_CHECKOUT else Path.cwd() / "moe-impls-results"


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    import cpuinfo  # comes with pytest-benchmark; it takes a second to look

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def git_commit() -> str:
    """The commit of the checkout, with ``-dirty`` if files differ from it; ``unknown`` outside of one.

    The wheel holds the commit that it was built from.
    """
    if (built_from := ROOT / "commit").is_file():
        return built_from.read_text(encoding="utf-8").strip()
    if not (ROOT / ".git").exists():  # nor is it that of a repository around this folder
        return "unknown"

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    # Tables and pages follow from code, and one command after another writes them.
    code = ("--", ".", ":(exclude)results", ":(exclude)docs")
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", *code) else "")


def which() -> str:
    """One line that says which copy of the project runs: a checkout and a wheel may lie side by side."""
    place, here = Path(suite.__file__).parent, Path.cwd() / "moe_impls"
    other = ", not the one in this folder" if here.is_dir() and here.resolve() != place else ""
    commit, _, dirty = git_commit().partition("-")
    version = f"{suite.project()['version']} (commit {commit[:12]}{'-' * bool(dirty)}{dirty})"
    return f"moe-impls {version} of {place.parent}{other}"


def columns() -> dict[str, str]:
    """The first columns of a table of results on the CPU."""
    import torch

    return {
        "git_commit": git_commit(),
        "torch_version": torch.__version__,
        "device_name": device_name("cpu"),
    }
