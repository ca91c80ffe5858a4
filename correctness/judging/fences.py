"""Tensors with a fence: more memory than they ask for, full of numbers that nobody may read or write."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from correctness.judging.finding import CheckFailed

ROOM = 2**14  # numbers before a tensor and after it: some rows of any
MAKING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "new_zeros")
MAKING += ("zeros", "zeros_like")


class _Fenced(NamedTuple):
    """A tensor's memory [ROOM + numbers + ROOM], and what it is."""

    memory: Tensor
    numbers: int
    what: str


class Fences(TorchDispatchMode):
    """Put a fence around every tensor that code in the block makes unwritten or of zeros.

    Who reads beyond a tensor and uses that has a wrong result if it is NaN, and who writes there is found by
    `require_intact` if it is not: NaN is what comes of NaN.

    Args:
        beyond: what is there; 1 in tensors of integers, which may be indices.
    """

    def __init__(self, beyond: float) -> None:
        super().__init__()
        self.beyond = beyond
        self.made: list[_Fenced] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile compile in the block; what its graphs make has no fence."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten" and (key := _own_kernel(func, args)):  # which makes tensors of its own
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        made = func(*args, **kwargs)
        if func._overloadpacket.__name__ not in MAKING or kwargs.get("out") is not None:
            return made
        return self.around(made, f"a tensor {list(made.shape)} that {func._overloadpacket.__name__} made")

    def around(self, t: Tensor, what: str) -> Tensor:
        """Copy a tensor to between two fences; one without numbers, which may grow, is left as it is."""
        if type(t) is not Tensor or t.layout != torch.strided or t.is_meta or not t.numel():
            return t
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        beyond = self.beyond if t.is_floating_point() else 1
        memory = torch.full((numbers + 2 * ROOM,), beyond, dtype=t.dtype, device=t.device)
        self.made.append(_Fenced(memory, numbers, what))
        # No view to autograd, which would treat a write to it as one to the fence.
        place = memory[ROOM : ROOM + numbers].as_strided(t.shape, t.stride()).detach()
        return place.copy_(t.detach()).requires_grad_(t.requires_grad)

    def require_intact(self) -> None:
        """Raise CheckFailed if a fence was written to."""
        for memory, numbers, what in self.made:
            beyond = memory.new_full((1,), self.beyond if memory.is_floating_point() else 1)
            for fence, where in ((memory[:ROOM], "before"), (memory[ROOM + numbers :], "after")):
                written = ~torch.isclose(fence, beyond, rtol=0, atol=0, equal_nan=True)
                if bool(written.any()):
                    first = int(written.nonzero()[0 if where == "after" else -1])
                    away = first + 1 if where == "after" else ROOM - first
                    raise CheckFailed(
                        f"memory {where} {what} was written to: {int(written.sum())} numbers, the nearest "
                        f"{away} from it"
                    )


def _own_kernel(func: Any, args: Any) -> torch._C.DispatchKey | None:
    """Return the key by which an operator's kernel for plain tensors is called, if it has one."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    if not tensors or any(t.layout != torch.strided for t in tensors):
        return None
    name = {"cpu": "CPU", "cuda": "CUDA"}.get(tensors[0].device.type)
    found = name and torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), name)
    return getattr(torch._C.DispatchKey, name) if name and found else None
