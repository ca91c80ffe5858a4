"""Each expert's rows by a small C++ kernel; the weights of an expert with few are read from memory once.

For few tokens the layer is bound by that reading, and products of one to a few dozen rows are what matrix
libraries are slowest at. Many tokens are computed in groups of slots, so that their hidden features take
memory that the process has already. ``prepare`` copies weights into tiles that are read in the order of use,
beside rows as they are. The wheel holds the kernel compiled; elsewhere the first call compiles it for the
processor at hand, in seconds, and keeps it in the user's cache directory. Sums and activations are in float32
in every dtype; hidden features are rounded to bfloat16 beside such weights, where the processor multiplies
pairs of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_impls.checking import watch_writes
from moe_impls.functional import activate, combine_slots
from moe_impls.interface import CLAMPED, Experts, Prepared, Routing, Support, dtype_name
from moe_impls.kernel_file import FLAGS, PACKAGED, SOURCE, compile_kernel, is_whole, level_of, source
from moe_impls.operators import as_one_node, operator
from moe_impls.processor import instructions

SUPPORT = Support(
    devices=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    gradients=False,
    fullgraph=True,
    exports=True,
)
# Numbers in hidden features at a time: memory of this size is taken again, more would be new pages.
GROUP = 2**22


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
        raise RuntimeError("implementation 'native' needs a C++ compiler: install g++ or set CXX")
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
# What the functions of native.cpp take and return.
FUNCTIONS = {
    **{
        f"products_{name}": ((*[POINTER] * 7, *[SIZE] * 3, THREADS), None)
        for name in map(dtype_name, SUPPORT.dtypes)
    },
    **{
        f"tiled_products_{name}": ((*[POINTER] * 6, *[SIZE] * 3, THREADS), None)
        for name in map(dtype_name, SUPPORT.dtypes)
    },
    "tile_features": ((), SIZE),
    "add_slots": ((*[POINTER] * 5, *[SIZE] * 3, *[FLAG] * 2, THREADS), None),
    "activate_rows": (
        (*[POINTER] * 2, FLAG, *[SIZE] * 2, FLAG, ctypes.c_int, *[ctypes.c_float] * 3, THREADS),
        None,
    ),
    "sort_slots": ((POINTER, *[SIZE] * 3, POINTER), FLAG),
    "packed_numbers": ((SIZE,) * 3, SIZE),
    "bfloat16_row_bytes": ((), ctypes.c_int),
}


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def _pointer(t: Tensor | None, first: int = 0) -> int | None:
    """Return the address of element `first`; None for None."""
    return None if t is None else t.data_ptr() + first * t.element_size()


def _sorted(expert_ids: Tensor, E: int) -> tuple[Tensor, ...]:
    """Find where each expert's slots begin [E + 1], the slot of each place and its token [T * K]."""
    T, K = expert_ids.shape
    found = expert_ids.new_empty(E + 1 + 2 * T * K)
    ids = expert_ids.contiguous()
    if not library().sort_slots(_pointer(ids), T * K, E, K, _pointer(found)):
        raise ValueError(f"expert_ids holds an id that is not in [0, {E})")
    return found.split([E + 1, T * K, T * K])


def _row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the rows that the kernel takes beside weights of a dtype."""
    pairs = dtype == torch.bfloat16 and library().bfloat16_row_bytes() == 2
    return torch.bfloat16 if pairs else torch.float32


# Which the kernel computes itself, by its names for them, and whether gates are multiplied with others.
KERNELS_OWN = {
    "relu": (0, False),
    "relu2": (1, False),
    "silu": (2, False),
    "gelu_tanh": (3, False),
    "reglu": (0, True),
    "swiglu": (2, True),
    CLAMPED: (2, True),
    "geglu_tanh": (3, True),
}


def _hidden(h: Tensor, experts: Experts, dtype: torch.dtype) -> Tensor:
    """Compute the hidden features of h [N, F] float32: [N, H] in the dtype of the rows that follow.

    By the threads of the kernel: those of torch would look for more work for milliseconds after it, on the
    processors that the kernel needs next.
    """
    if experts.activation not in KERNELS_OWN:
        return activate(h, experts.activation, experts.clamp).to(dtype).contiguous()
    function, gated = KERNELS_OWN[experts.activation]
    N, features = h.shape
    to = h.new_empty(N, features // 2 if gated else features, dtype=dtype)
    numbers = experts.clamp if experts.activation == CLAMPED else (math.inf, 1.0, 0.0)
    shape = dtype == torch.bfloat16, *to.shape
    library().activate_rows(
        _pointer(h), _pointer(to), *shape, gated, function, *numbers, torch.get_num_threads()
    )
    return to


class _Group(NamedTuple):
    """The places [start, stop) of the slots of some experts from the first on; begin [n + 1] of each."""

    first: int
    start: int
    stop: int
    begin: Tensor


def _groups(begin: Tensor, places: int, width: int) -> list[_Group]:
    """Group all places, as many together as have about GROUP numbers in rows of this width."""
    most = max(GROUP // max(width, 1), 1)
    if places <= most:
        return [_Group(0, 0, places, begin)]
    groups: list[_Group] = []
    first, cuts = 0, [0]

    def end() -> None:
        groups.append(_Group(first, cuts[0], cuts[-1], begin.new_tensor(cuts)))

    for e, stop in enumerate(begin[1:].tolist()):
        while stop - cuts[0] > most:
            if len(cuts) == 1:  # an expert with more of them
                cuts.append(cuts[0] + most)
            end()
            first, cuts = e, cuts[-1:]
        cuts.append(stop)
    end()
    return groups


class _Tiles(NamedTuple):
    """Weights of a shape [E, F, D], laid out in the tiles of ``tiles.h``, one expert's after the other's."""

    tiles: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor) -> _Tiles:
        E, features, D = weight.shape
        width, pair = library().tile_features(), 4 // _row_dtype(weight.dtype).itemsize
        tiles = weight.new_empty(E, -(-features // width), -(-D // pair), width, pair)
        for of_expert, w in zip(tiles, weight, strict=True):
            whole = F.pad(w, (0, -D % pair, 0, -features % width))
            of_expert.copy_(whole.reshape(-1, width, tiles.shape[2], pair).transpose(1, 2))
        return cls(tiles, weight.shape)


def _products(
    rows: Tensor, index: Tensor | None, weight: Tensor | _Tiles, bias: Tensor | None, group: _Group
) -> Tensor:
    """Multiply a group's rows [N, D], or those that index [T * K] holds: [N, F] in float32."""
    first, start, stop, begin = group
    (_, features, D), experts, count = weight.shape, len(begin) - 1, stop - start
    kernels = library()
    out = rows.new_empty(count, features, dtype=torch.float32)
    of_rows = _pointer(rows), _pointer(index, start), _pointer(begin)
    of_bias, sizes = _pointer(bias, first * features), (experts, features, D, torch.get_num_threads())
    if isinstance(weight, _Tiles):
        tiles = weight.tiles
        products = getattr(kernels, f"tiled_products_{dtype_name(tiles.dtype)}")
        products(*of_rows, _pointer(tiles, first * tiles.stride(0)), of_bias, _pointer(out), *sizes)
    else:
        packed = rows.new_empty(kernels.packed_numbers(experts, count, D))
        products = getattr(kernels, f"products_{dtype_name(weight.dtype)}")
        of_weight = _pointer(weight, first * features * D)
        products(*of_rows, of_weight, of_bias, _pointer(out), _pointer(packed), *sizes)
    return out


def _add_slots(
    out: Tensor, slots: Tensor, tokens: Tensor, gates: Tensor, y: Tensor, group: _Group, positive: bool
) -> None:
    """Add a group's out [N, O], or its positive part, times the gates [T, K] of its slots to y [T, O].

    The first group finds y as it was allocated.
    """
    start = group.start
    pointers = _pointer(out), _pointer(slots, start), _pointer(tokens, start), _pointer(gates), _pointer(y)
    library().add_slots(*pointers, len(out), *y.shape, start == 0, positive, torch.get_num_threads())


def _compute(
    x: Tensor, routing: Routing, experts: Experts, w_in: Tensor | _Tiles, w_out: Tensor | _Tiles, combine: str
) -> Tensor:
    """Compute y [T, O] with weights that are contiguous, or in tiles."""
    (T, K), (E, features, D), (_, O, _) = routing.expert_ids.shape, w_in.shape, w_out.shape
    begin, slots, tokens = _sorted(routing.expert_ids, E)
    row_dtype = _row_dtype(experts.w_in.dtype)
    rows = x.to(row_dtype).contiguous()
    gates = routing.gates.to(torch.float32).contiguous()
    b_in, b_out = (None if b is None else b.contiguous() for b in (experts.b_in, experts.b_out))
    positive = experts.output_activation == "relu"
    sums = combine == "sum"
    y = x.new_empty(T if sums else T * K, O, dtype=torch.float32)  # of tokens, or of their slots
    for group in _groups(begin, T * K, max(D, features)):
        h = _products(rows, tokens, w_in, b_in, group)
        out = _products(_hidden(h, experts, row_dtype), None, w_out, b_out, group)
        if sums:
            _add_slots(out, slots, tokens, gates, y, group, positive)
        else:
            y[slots[group.start : group.stop]] = out.relu_() if positive else out
    return (y if sums else combine_slots(y.view(T, K, O), routing.gates, combine)).to(x.dtype)


@operator(SUPPORT)
@torch.no_grad()
def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    return _compute(x, routing, experts, experts.w_in.contiguous(), experts.w_out.contiguous(), combine)


@torch.no_grad()
def prepare(experts: Experts) -> Prepared:
    """Lay the weights out for ``f(x, routing, *, combine="sum") -> y``, without gradients.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    w_in, w_out = _Tiles.of(experts.w_in), _Tiles.of(experts.w_out)

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        return _compute(x, routing, experts, w_in, w_out, combine)

    return as_one_node(f, w_out.shape[1])


@operator(SUPPORT, "native_prepared")
def forward_prepared(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O] on weights that are laid out anew; see ``moe_impls.interface``."""
    return prepare(experts)(x, routing, combine=combine)
