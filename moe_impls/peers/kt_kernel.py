"""The experts of KTransformers' kt-kernel on a CPU: SwiGLU in bfloat16, on worker threads of its own.

Weights are copied into its layout by ``prepare``. Only its compiled extension is loaded, the one that its own
code chooses for the processor: ``import kt_kernel`` needs packages that read checkpoints. Its threads are as
many as torch's, bound to cores of the first NUMA node, and wait busily for 50 ms after a call. What it prints
while it makes a layer is thrown away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_impls.checking import watch_writes
from moe_impls.interface import Experts, Prepared, Routing, Support


def _load() -> Any:
    """Load the extension that suits the processor.

    Raises:
        ImportError: the package is missing, or has none for this CPU or this version of Python.
    """
    found = importlib.util.find_spec("kt_kernel")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'kt_kernel'", name="kt_kernel")
    path = Path(found.submodule_search_locations[0], "_cpu_detect.py")
    spec = importlib.util.spec_from_file_location("kt_kernel_cpu_detect", path)
    assert spec and spec.loader
    detect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detect)
    extension, _ = detect.initialize()
    return extension


extension = _load()
SUPPORT = Support(
    devices=("cpu",),
    dtypes=(torch.bfloat16,),
    activations=("swiglu",),
    output_activations=("none",),
    combines=("sum",),
    biases=(False,),
    gradients=False,
    multiple_of=32,  # the width of its tiles where the processor has AVX512
    same_width=True,
)
MOST_TOKENS = 4096  # of one call to it, for which memory is reserved; more are computed in pieces
USUAL_K = 8  # for which ``prepare`` makes a layer, which takes any smaller number, too
_printing = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Throw away what C++ prints to the standard output."""
    libc = ctypes.CDLL(None)
    with _printing:
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


@functools.cache
def _workers(threads: int) -> Any:
    config = extension.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return extension.CPUInfer(config)


def _layer(experts: Experts, most: int, K: int) -> Any:
    """Make a layer of the library with copies of the weights, for so many tokens and experts of a token."""
    w_in, w_out = experts.w_in.detach().contiguous(), experts.w_out.detach().contiguous()
    E, F, D = w_in.shape
    gates, ups = w_in.unflatten(1, (2, -1)).unbind(1)
    moe = extension.moe
    kind = moe.AMXBF16_MOE if hasattr(moe, "AMXBF16_MOE") else moe.AVX2BF16_MOE  # as its own code prefers
    config = moe.MOEConfig(E, K, D, F // 2)
    config.max_len = most
    config.gate_projs, config.up_projs, config.down_projs = (
        [[weight.data_ptr() for weight in weights]] for weights in (gates, ups, w_out)
    )
    with _quiet():
        config.pool = _workers(torch.get_num_threads()).backend_
        layer = kind(config)
        layer.load_weights()
    return layer


def _compute(layer: Any, x: Tensor, routing: Routing) -> Tensor:
    x, y = x.contiguous(), x.new_empty(x.shape)
    gates, ids = routing.gates.float().contiguous(), routing.expert_ids.contiguous()
    for first in range(0, len(x), MOST_TOKENS):  # no call for no tokens, in which it reads one
        T = min(MOST_TOKENS, len(x) - first)
        length = torch.tensor([T], dtype=torch.int32)
        rows = (t[first : first + T].data_ptr() for t in (ids, gates, x, y))
        layer.forward(length.data_ptr(), ids.shape[1], *rows, False)
    return y


@torch.no_grad()
def moe(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
    """Compute x [T, D] -> y [T, O]; see ``moe_impls.interface`` for the contract."""
    if len(x) == 0:
        return torch.empty_like(x)
    return _compute(_layer(experts, min(len(x), MOST_TOKENS), routing.gates.shape[1]), x, routing)


@torch.no_grad()
def prepare(experts: Experts) -> Prepared:
    """Copy weights for ``f(x, routing, *, combine="sum") -> y``.

    Raises:
        RuntimeError: by ``f``, if a weight was written to since.
    """
    check_unwritten = watch_writes(experts)
    layer = functools.lru_cache(maxsize=2)(functools.partial(_layer, experts, MOST_TOKENS))
    usual = min(USUAL_K, len(experts.w_in))
    layer(usual)

    @torch.no_grad()
    def f(x: Tensor, routing: Routing, *, combine: str = "sum") -> Tensor:
        check_unwritten()
        return _compute(layer(max(usual, routing.gates.shape[1])), x, routing)

    return f


BACKENDS = {"moe": (moe, SUPPORT, prepare)}
