"""The compiled kernel of ``native``: which file it is, made where there is none, and its functions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_impls.interface import dtype_name
from moe_impls.kernel_file import FLAGS, PACKAGED, SOURCE, compile_kernel, is_whole, level_of, source
from moe_impls.processor import instructions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights


def _processor() -> str:
    """Name what the kernel is compiled for; a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    first = info.read_text(encoding="utf-8").partition("\n\n")[0] if info.exists() else platform.processor()
    return "\n".join(line for line in first.splitlines() if "MHz" not in line)


@functools.cache
def missing() -> str:
    """Say why there is no kernel here; nothing where there is one. Tried once."""
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return ""


def is_available() -> bool:
    """Tell whether the kernel is compiled, or can be."""
    return not missing()


@functools.cache
def library() -> ctypes.CDLL:
    """Load the kernel: that of the wheel, or one that was compiled here before, or is now.

    A file that is torn, or of another source, is ignored with a warning that names it.

    Raises:
        RuntimeError: there is no kernel for this processor, and no C++ compiler, or it or the loader fails;
            the message holds what it says.
    """
    if (found := _of_the_wheel()) is not None:
        return found
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]  # which may hold options, as of ccache
    if (compiler := shutil.which(command[0])) is None:
        named = f", which is {command[0]!r} and not there" if os.environ.get("CXX") else ""
        raise RuntimeError(f"implementation 'native' needs a C++ compiler: install g++ or set CXX{named}")
    command[0] = compiler
    made_by = "\0".join([*FLAGS, *command, _processor()]).encode()
    key = hashlib.sha256(source() + made_by).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_impls"
    path = cache / f"native-{key}.so"
    if (found := _whole(path)) is not None:
        return found
    with contextlib.suppress(OSError):  # a home that cannot be written to: compiled again in the next process
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(compile_kernel(command, ("-march=native",), folder), path)
        return _loaded(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _loaded(compile_kernel(command, ("-march=native",), folder))
        except OSError as error:
            raise RuntimeError(f"the compiled {SOURCE.name} cannot be loaded: {error}") from error


def _of_the_wheel() -> ctypes.CDLL | None:
    """Load the kernel that came with the package for processors like this one, if one did."""
    level = level_of(instructions())
    return None if level is None else _whole(PACKAGED / f"{level}.so")


def _whole(path: Path) -> ctypes.CDLL | None:
    """Load a kernel if it is there, whole and of this source."""
    try:
        if is_whole(path):
            return _loaded(path)
        why = "it is torn, or compiled from another source"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = str(error)
    warnings.warn(f"{path} is ignored: {why}", stacklevel=2)
    return None


POINTER, SIZE, FLAG, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool, ctypes.c_int
FEATURES = FLAG, ctypes.c_int, *[ctypes.c_float] * 3


class Layer(ctypes.Structure):
    """A call for a whole layer: addresses of tensors, and sizes; as in native_kernel/layer.h."""

    _fields_ = (
        *[(name, POINTER) for name in ("x", "w_in", "b_in", "w_out", "b_out", "ids", "gates", "y")],
        *[(name, SIZE) for name in "TKEDFHO"],
        *zip(("gated", "activation", "limit", "alpha", "offset"), FEATURES, strict=True),
        ("positive", FLAG),
        ("tiled", FLAG),
        ("threads", THREADS),
    )


class Outcome(IntEnum):
    """What a call for a whole layer returns."""

    DONE, WRONG_ID, NO_MEMORY = range(3)


# How many pointers those functions of native.cpp take that there are for each dtype of weights.
OF_DTYPES = {"products": 7, "tiled_products": 6, "products_along": 6, "products_of_rows": 7}
# What the functions take and return.
FUNCTIONS = {
    **{
        f"{function}_{dtype_name(dtype)}": ((*[POINTER] * pointers, *[SIZE] * 3, THREADS), None)
        for function, pointers in OF_DTYPES.items()
        for dtype in DTYPES
    },
    **{f"layer_{dtype_name(dtype)}": ((ctypes.POINTER(Layer),), ctypes.c_int) for dtype in DTYPES},
    "tile_features": ((), SIZE),
    "add_slots": ((*[POINTER] * 5, *[SIZE] * 3, *[FLAG] * 2, THREADS), None),
    "activate_rows": ((*[POINTER] * 2, FLAG, *[SIZE] * 2, *FEATURES, THREADS), None),
    "activate_rows_backward": ((*[POINTER] * 7, *[SIZE] * 2, *FEATURES, THREADS), None),
    "sum_rows": ((*[POINTER] * 6, *[SIZE] * 2, THREADS), None),
    "add_dots": ((*[POINTER] * 6, *[SIZE] * 2, THREADS), None),
    "sort_slots": ((POINTER, *[SIZE] * 3, POINTER), FLAG),
    "packed_numbers": ((SIZE,) * 3, SIZE),
    "packed_numbers_of_rows": ((SIZE,) * 2, SIZE),
    "bfloat16_row_bytes": ((), ctypes.c_int),
}


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def of_dtype(name: str, dtype: torch.dtype) -> Any:
    """Return a function of the kernel that there is for each dtype of weights."""
    return getattr(library(), f"{name}_{dtype_name(dtype)}")


def pointer(t: Tensor | None, first: int = 0) -> int | None:
    """Return the address of element `first`; None for None."""
    return None if t is None else t.data_ptr() + first * t.element_size()
