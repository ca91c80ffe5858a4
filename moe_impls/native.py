"""Each expert's rows by a small C++ kernel that reads the weights of an active expert from memory once.

For few tokens the layer is bound by that reading, and products of one to a few dozen rows are what matrix
libraries are slowest at. ``native.cpp`` is compiled by the first call for the processor at hand, in seconds,
and kept in the user's cache directory. Sums and activations are in float32 in every dtype; hidden features
are rounded to bfloat16 beside such weights, where the processor multiplies pairs of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_impls.functional import activate, combine_slots
from moe_impls.interface import Experts, Routing, Support, dtype_name

SUPPORT = Support(devices=("cpu",), dtypes=(torch.float32, torch.bfloat16, torch.float16), gradients=False)
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=c++17", "-fno-math-errno", "-Wno-psabi")


def _processor() -> str:
    """What the kernel is compiled for; a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    first = info.read_text(encoding="utf-8").partition("\n\n")[0] if info.exists() else platform.processor()
    return "\n".join(line for line in first.splitlines() if "MHz" not in line)


@functools.cache
def is_available() -> bool:
    """Whether the kernel can be compiled here, or is; tries it, once."""
    try:
        library()
    except RuntimeError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel, from the cache directory if it is there.

    Raises:
        RuntimeError: there is no C++ compiler, or it or the loader fails; the message holds what it says.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("implementation 'native' needs a C++ compiler: install g++ or set CXX")
    text = SOURCE.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([text, *FLAGS, compiler, _processor()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_impls"
    path = cache / f"native-{key}.so"
    with contextlib.suppress(OSError):  # none is there, or what is there was torn
        return _loaded(path)
    with contextlib.suppress(OSError):  # a home that cannot be written to: compiled again in the next process
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(_compiled(compiler, folder), path)
        return _loaded(path)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compiled(compiler, folder)
        try:
            return _loaded(compiled)
        except OSError as error:
            raise RuntimeError(f"the compiled {SOURCE.name} cannot be loaded: {error}") from error


def _compiled(compiler: str, folder: str) -> Path:
    # Compiled with OpenMP and linked without: its symbols are those of the runtime that torch has loaded, so
    # that both share one set of threads.
    object_, shared = f"{folder}/native.o", f"{folder}/native.so"
    for command in (
        [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", object_],
        [compiler, "-shared", object_, "-o", shared],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()[-500:] or f"{compiler} ended with status {done.returncode}"
            raise RuntimeError(f"compiling {SOURCE.name} failed: {said}")
    return Path(shared)


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.sort_slots.restype = ctypes.c_bool
    return found


def _pointer(t: Tensor | None) -> ctypes.c_void_p | None:
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def _sorted(expert_ids: Tensor, E: int) -> tuple[Tensor, ...]:
    """Where each expert's slots begin [E + 1], the token of each place and the place of each slot [T * K]."""
    T, K = expert_ids.shape
    found = torch.empty(E + 1 + 2 * T * K, dtype=torch.int64)
    ids = expert_ids.contiguous()
    sizes = [ctypes.c_int64(size) for size in (T * K, E, K)]
    if not library().sort_slots(_pointer(ids), *sizes, _pointer(found)):
        raise ValueError(f"expert_ids holds an id that is not in [0, {E})")
    return found.split([E + 1, T * K, T * K])


def _products(
    rows: Tensor, index: Tensor | None, begin: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """rows [N', D], index [N] of those to take or None, begin [E + 1] -> [N, F] float32."""
    E, features, D = weight.shape
    kernels, name = library(), dtype_name(weight.dtype)
    pairs = weight.dtype == torch.bfloat16 and kernels.bfloat16_row_bytes() == 2
    rows = rows.to(torch.bfloat16 if pairs else torch.float32).contiguous()
    count = len(rows) if index is None else len(index)
    out = torch.empty(count, features, dtype=torch.float32)
    step = kernels.widest_step()
    packed = torch.empty(count, -(-D // step) * step, dtype=rows.dtype)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    pointers = [_pointer(t) for t in (rows, index, begin, weight, bias, out, packed)]
    sizes = [ctypes.c_int64(size) for size in (E, features, D)]
    getattr(kernels, f"products_{name}")(*pointers, *sizes, torch.get_num_threads())
    return out


def _combine_sum(out: Tensor, places: Tensor, gates: Tensor, positive: bool) -> Tensor:
    """out [T * K, O], places [T * K], gates [T, K] -> y [T, O] float32."""
    (T, K), O = gates.shape, out.shape[1]
    y = torch.empty(T, O, dtype=torch.float32)
    gates = gates.to(torch.float32).contiguous()
    pointers = [_pointer(t) for t in (out, places, gates, y)]
    sizes = [ctypes.c_int64(size) for size in (T, K, O)]
    library().combine_sum(*pointers, *sizes, ctypes.c_bool(positive), torch.get_num_threads())
    return y


@torch.no_grad()
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    T, K = routing.expert_ids.shape
    E, O, _ = experts.w_out.shape
    begin, tokens, places = _sorted(routing.expert_ids, E)
    h = _products(x, tokens, begin, experts.w_in, experts.b_in)  # [T * K, F]
    a = activate(h, experts.activation)  # [T * K, H]
    out = _products(a, None, begin, experts.w_out, experts.b_out)  # [T * K, O]
    positive = experts.output_activation == "relu"
    if combine == "sum":
        return _combine_sum(out, places, routing.gates, positive).to(x.dtype)
    out = F.relu(out) if positive else out
    return combine_slots(out[places].view(T, K, O), routing.gates, combine).to(x.dtype)
