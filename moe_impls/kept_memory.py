"""Memory for large results on a CPU that is kept when nobody uses it any more, for the next of the same size.

A page of memory that is new to a process is found and zeroed by the system when it is first written to. Where
experts have few rows each, that is a third of a training step: all weight gradients are new pages. PyTorch
keeps what was freed on a GPU, but not on a CPU.

As much is kept as was in use at one time, so the gradients of all layers of a model from one training step to
the next, up to a quarter of the memory that the process may have.

Whether a block is in use is what its count of references says, those of views, numpy arrays and other graphs
included. Memory that another process may see is not taken again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


def memory_of_process() -> int:
    """Return how many bytes this process may have: those of the machine, or of its control group."""
    if not hasattr(os, "sysconf"):  # not on every system
        return 2**33
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="ascii").strip() if group.exists() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine


LEAST_BYTES = 2**20  # less is kept by the C library
MOST_BYTES = memory_of_process() // 4  # of all blocks; what is beyond is freed when nobody uses it any more


class _Block(NamedTuple):
    storage: torch.UntypedStorage

    def users(self) -> tuple[int, int]:
        """Count the references to the storage and to its object in Python."""
        of_storage = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
        return of_storage(self.storage._cdata), sys.getrefcount(self.storage)

    @property
    def is_free(self) -> bool:
        nobodys = _Block(torch.UntypedStorage(1))
        return self.users() == nobodys.users() and not self.storage.is_shared()


_kept: list[_Block] = []
_lock = threading.Lock()


def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make an uninitialised CPU tensor, in a freed block of the same size if there is one.

    Where none is, all that is free is of sizes that are no longer asked for, and is given back.
    """
    made = torch.empty(0, dtype=dtype, device="cpu")
    size = torch.Size(shape).numel() * dtype.itemsize
    if type(made) is not Tensor or not LEAST_BYTES <= size <= MOST_BYTES:  # a fake tensor has no memory
        return torch.empty(shape, dtype=dtype, device="cpu")
    with _lock:
        for block in _kept:
            if block.storage.nbytes() == size and block.is_free:
                return made.set_(block.storage, 0, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
        _kept[:] = [block for block in _kept if not block.is_free]
        made = torch.empty(shape, dtype=dtype, device="cpu")
        if sum(block.storage.nbytes() for block in _kept) + size <= MOST_BYTES:
            _kept.append(_Block(made.untyped_storage()))
        return made


def release() -> None:
    """Give back all memory that nobody uses; what is in use is freed when it is no longer."""
    with _lock:
        _kept.clear()
