"""What the CPU is called and of which dtypes it has instructions for products, as far as Linux tells."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
# By the names that Linux gives the instructions of x86 and of Arm.
INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


@functools.cache
def _said_of_first_cpu(path: Path, name: str) -> str:
    """Read what Linux says under this name, or nothing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def instructions() -> frozenset[str]:
    """Name the instructions that the CPU has, as Linux does; none on other systems."""
    return _instructions(CPU_INFO)


@functools.cache
def _instructions(path: Path) -> frozenset[str]:
    named = _said_of_first_cpu(path, "flags") or _said_of_first_cpu(path, "Features")
    return frozenset(named.split())


def processor() -> str:
    """Name the CPU."""
    return _said_of_first_cpu(CPU_INFO, "model name") or platform.processor() or platform.machine()


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether the CPU has instructions for products of this dtype; without, they convert on the way."""
    return dtype not in INSTRUCTIONS or not INSTRUCTIONS[dtype].isdisjoint(instructions())
