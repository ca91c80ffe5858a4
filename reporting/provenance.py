"""Where and with what a file of results was made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    import cpuinfo  # comes with pytest-benchmark; it takes a second to look

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def git_commit() -> str:
    """The commit of the checkout, with ``-dirty`` if files differ from it; ``unknown`` outside of one."""

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


def columns() -> dict[str, str]:
    """The first columns of a table of results on the CPU."""
    return {
        "git_commit": git_commit(),
        "torch_version": torch.__version__,
        "device_name": device_name("cpu"),
    }
