"""``python -m benchmarks carry``: fetch wheels here and unpack them, for a machine that can fetch nothing.

The folder travels with the checkout, and Python finds it there by ``PYTHONPATH=.carried``. Only wheels of
pure Python are taken, without what they depend on: torch and triton are there already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reporting.provenance import ROOT

PACKAGES = ("liger-kernel", "moe-ops")  # of the peers that run on a GPU
MOST_MIB = 16.0  # of one package, unpacked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packages", nargs="*", default=PACKAGES, metavar="PACKAGE", help=(
        f"names as pip takes them, with a version if need be (default: {' '.join(PACKAGES)})"
    ))  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".carried", metavar="DIR", help=".carried unless given"
    )


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run(
            [*download, "--dest", folder, *options.packages], text=True, stderr=subprocess.PIPE
        )
        if done.returncode:
            raise ValueError(f"pip cannot fetch {' '.join(options.packages)}: {done.stderr.strip()}")
        wheels = sorted(Path(folder).glob("*.whl"))
        for wheel in wheels:
            check(wheel)  # all of them before the first is unpacked
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(options.out)
            print(f"{' '.join(wheel.stem.split('-')[:2])} in {options.out}")
    return 0


def check(wheel: Path) -> None:
    """Raise ValueError if a wheel is not pure Python, or too large to travel."""
    name, version, *_, platform = wheel.stem.split("-")
    if platform != "any":
        raise ValueError(f"{name} {version} is built for {platform}: only pure Python can be carried")
    with zipfile.ZipFile(wheel) as archive:
        size = sum(member.file_size for member in archive.infolist()) / 2**20
    if size > MOST_MIB:
        raise ValueError(f"{name} {version} takes {size:.0f} MiB; at most {MOST_MIB:g} are carried")
