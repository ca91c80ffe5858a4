"""``native.cpp`` as a compiled file: how it is made, for which processors, and whether all of it is there.

At its end stands a digest of it and of the source, so that a file that is torn, or of another source, is
known without being loaded. Imports nothing but the standard library: the wheel is built with it.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "native_kernel" / "native.cpp"
FLAGS = ("-O3", "-fPIC", "-std=c++17", "-fno-math-errno", "-Wno-psabi", "-pthread", "-shared")
PACKAGED = Path(__file__).with_name("_native")  # holds <level>.so, in the wheel
_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])


class Level(NamedTuple):
    """A kind of processors: of which machine, the compiler's flags, and instructions as Linux names them."""

    machine: str
    flags: tuple[str, ...]
    needed: frozenset[str]


# What wheels hold kernels for, the best of a machine first.
LEVELS = {
    "x86-64-v4-bfloat16": Level("x86_64", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    "x86-64-v4": Level("x86_64", ("-march=x86-64-v4",), _V4),
    "x86-64-v3": Level("x86_64", ("-march=x86-64-v3",), _V3),
    "armv8-a": Level("aarch64", ("-march=armv8-a",), frozenset(["asimd"])),
}


def source() -> bytes:
    """Read ``native.cpp`` and what lies beside it, which it includes."""
    return b"\0".join(
        file.read_bytes() for file in sorted(SOURCE.parent.iterdir()) if file.suffix in (".cpp", ".h")
    )


def _digest(kernel: bytes) -> bytes:
    return hashlib.sha256(source() + kernel).digest()


def is_whole(path: Path) -> bool:
    """Tell whether a file is a kernel that was compiled from this source, and all of it is there."""
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return content[-size:] == _digest(content[:-size])


def compile_kernel(compiler: Sequence[str], flags: Sequence[str], folder: str | Path) -> Path:
    """Compile ``native.cpp`` into a file in a folder.

    Raises:
        RuntimeError: the compiler fails; the message holds what it says.
    """
    shared = Path(folder) / "native.so"
    command = [*compiler, *FLAGS, *flags, str(SOURCE), "-o", str(shared), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip()[-500:] or f"{shlex.join(compiler)} ended with status {done.returncode}"
        raise RuntimeError(f"compiling {SOURCE.name} failed: {said}")
    content = shared.read_bytes()
    shared.write_bytes(content + _digest(content))
    return shared


def level_of(instructions: frozenset[str]) -> str | None:
    """Name the best of LEVELS that a processor with these instructions can run."""
    return next((name for name, level in LEVELS.items() if level.needed <= instructions), None)
