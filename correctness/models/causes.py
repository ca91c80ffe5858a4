"""What was done to a tensor: a hypothesis counts as a cause only if it gives the tensor's own numbers.

Each matrix that differs is turned back by what converters, exporters and loaders get wrong, and looked up
among all of the reference by its bits; if it is nowhere, it is compared with the one of its own place.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from correctness.judging.budget import allowed_error, eps, roundings
from moe_impls.interface import dtype_name

NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
LEAST = 4  # numbers that a tensor must hold for its bits to tell where it comes from
LOW = 4  # a difference has low rank if its rank is at most a LOW-th of the full one


@dataclass(frozen=True)
class Place:
    """A tensor of the reference, or of a stack the matrix of one expert."""

    name: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(frozen=True)
class Cause:
    """What was done: in words, and the place of the reference that the numbers come from, if it is known."""

    words: str = ""
    source: Place | None = None


def digest(tensor: Tensor) -> bytes:
    """Digest a tensor's shape and bits; zeros of either sign are alike."""
    tensor = tensor.contiguous()
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = tensor + 0.0
    made = hashlib.blake2b(str((tuple(tensor.shape), tensor.dtype)).encode(), digest_size=16)
    made.update(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    return made.digest()


def is_telling(tensor: Tensor) -> bool:
    """Whether a tensor's numbers say where it comes from: they are several, and not all the same."""
    return tensor.numel() >= LEAST and bool((tensor != tensor.flatten()[0]).any())


def undone(tensor: Tensor, pair: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield what may have been done to a tensor, each with what turns it back.

    Args:
        pair: it holds a gate and an up matrix.
    """
    yield "", lambda: tensor
    matrices = [("", tensor)]
    if tensor.dim() == 2:
        yield "transposed", lambda: tensor.T
        matrices.append(("transposed and ", tensor.T))
    for before, matrix in matrices if pair else ():  # of others, `compare` tells of rows in another order
        for dim in range(matrix.dim()):
            if matrix.shape[dim] < 2 or matrix.shape[dim] % 2:
                continue
            along = f" along dimension {dim}" if dim and not before else ""
            for words, back in _HALVES.items():
                yield f"{before}gate and up {words}{along}", functools.partial(back, matrix, dim)


def _joined(matrix: Tensor, dim: int, first: int, second: int) -> Tensor:
    """Put every second row together: those from ``first`` on, then those from ``second``."""
    places = torch.arange(0, matrix.shape[dim], 2)
    return matrix.index_select(dim, torch.cat([places + first, places + second]))


def _mixed(matrix: Tensor, dim: int, turned: bool) -> Tensor:
    halves = matrix.chunk(2, dim)
    return torch.stack([*reversed(halves)] if turned else [*halves], dim + 1).reshape(matrix.shape)


_HALVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "swapped": lambda matrix, dim: torch.cat([*reversed(matrix.chunk(2, dim))], dim),
    "interleaved": lambda matrix, dim: _joined(matrix, dim, 0, 1),
    "swapped and interleaved": lambda matrix, dim: _joined(matrix, dim, 1, 0),
    "no longer interleaved": lambda matrix, dim: _mixed(matrix, dim, turned=False),
    "no longer interleaved, and swapped": lambda matrix, dim: _mixed(matrix, dim, turned=True),
}


class Finder:
    """Finds where matrices come from, by the digests of the whole reference."""

    def __init__(
        self, places: Iterator[tuple[Place, Callable[[], Tensor]]], dtypes: set[torch.dtype]
    ) -> None:
        self.places: dict[bytes, list[Place]] = defaultdict(list)
        for place, read in places:
            tensor = read()
            for dtype in dtypes:
                stored = tensor.to(dtype)
                if is_telling(stored):
                    self.places[digest(stored)].append(place)
        self.last = ""  # what explained the last one: most likely explains the next

    def find(self, got: Tensor, own: Place, pair: bool) -> Cause | None:
        """Find the place of which a tensor holds the numbers, and what was done to them."""
        if not is_telling(got):
            return None
        ways = sorted(undone(got, pair), key=lambda way: way[0] != self.last)
        ways.sort(key=lambda way: way[0] != "")
        for words, back in ways:
            if found := self.places.get(digest(back())):
                near = sorted(found, key=lambda p: (p != own, p.name != own.name, p.expert != own.expert))
                self.last = words
                return Cause(words, near[0])
        return None


def compare(got: Tensor, want: Tensor) -> Cause:
    """Say what makes a tensor differ from the one of its place, of one shape, if no place has its numbers."""
    if not got.is_floating_point() or not want.is_floating_point():
        return Cause("other numbers")
    wide, right = got.double(), want.double()
    if not bool(wide.isfinite().all()):
        return Cause(f"{int((~wide.isfinite()).sum())} numbers are NaN or infinite")
    if not bool(wide.any()):
        return Cause("all zeros")
    if got.dtype == want.dtype and (narrow := _rounded(got, want)):
        return Cause(f"rounded to {narrow}")
    if words := _by_a_factor(wide, right, eps(got.dtype)) or _by_an_offset(wide, right, eps(got.dtype)):
        return Cause(words)
    if got.dim() == 2:
        for words, one, other in (("rows", wide, right), ("columns", wide.T, right.T)):
            if words := _by_rows(words, one, other, eps(got.dtype)):
                return Cause(words)
        if rank := _rank(wide - right, eps(got.dtype), right):
            return Cause(f"differs by a matrix of rank {rank}: a LoRA that one of them has merged")
    elif got.dim() == 1 and sorted(wide.tolist()) == sorted(right.tolist()) and is_telling(got):
        return Cause(f"its numbers in another order: {order(_matches(wide[:, None], right[:, None]))}")
    error = float((wide - right).norm() / right.norm()) if bool(right.any()) else math.inf
    if error < math.sqrt(eps(got.dtype)):
        return Cause(f"off by {error:.1e} of its norm, as by another order of roundings")
    alike = float((wide * right).sum() / (wide.norm() * right.norm())) if bool(right.any()) else 0.0
    return Cause(f"other numbers: off by {error:.2g} of its norm, correlation {alike:.2f}")


def _rounded(got: Tensor, want: Tensor) -> str:
    """Name the narrower dtype through which the numbers went."""
    for narrow in NARROW:
        if torch.finfo(narrow).bits < torch.finfo(want.dtype).bits and torch.equal(
            want.to(narrow).to(got.dtype), got
        ):
            return dtype_name(narrow)
    return ""


def _close(got: Tensor, want: Tensor, precision: float) -> bool:
    """Whether numbers agree to the roundings of one operation: eps of their own size for each."""
    return bool(((got - want).abs() <= roundings(precision) * want.abs()).all())


def _by_a_factor(got: Tensor, want: Tensor, precision: float) -> str:
    norm = float((want * want).sum())
    factor = float((got * want).sum()) / norm if norm else 0.0
    if not factor or not _close(got, factor * want, precision) or got.numel() < LEAST:
        return ""
    if abs(factor - 1) <= roundings(precision):
        return f"off by roundings only, at most {float((got - want).abs().max()):.1e}"
    if factor == -1:
        return "its sign is turned"
    return f"scaled by {_number(factor, precision)}"


def _number(factor: float, precision: float) -> str:
    """Write a factor as a fraction where that is short and as exact as it is known."""
    for below in range(1, 65):
        above = round(factor * below)
        if above and abs(above / below - factor) <= roundings(precision) * abs(factor) and abs(above) <= 64:
            return str(above) if below == 1 else f"{above}/{below} ({factor:.6g})"
    return f"{factor:.6g}"


def _by_an_offset(got: Tensor, want: Tensor, precision: float) -> str:
    off = (got - want).mean()
    size = torch.maximum(want.abs(), got.abs()) + off.abs()
    near = bool(((got - want - off).abs() <= roundings(precision) * size).all())
    told = near and got.numel() >= LEAST and float(off.abs()) > roundings(precision) * float(size.max())
    return f"{float(off):+.6g} added to every number" if told else ""


def _by_rows(what: str, got: Tensor, want: Tensor, precision: float) -> str:
    """Tell what happened to rows as a whole: another order, zeros, or factors of their own."""
    same = (got == want).all(dim=1)
    matches = _matches(got, want)
    if None not in matches and not bool(same.all()):
        moved = sorted(matches) == list(range(len(matches)))  # type: ignore[type-var]
        return f"{what} {'in another order' if moved else 'repeated and lost'}: {order(matches)}"
    wrong = [int(i) for i in (~same).nonzero().flatten()]
    where = f"{what} {ranges(wrong)} of {len(got)}"
    if len(wrong) < len(got):
        if not bool(got[wrong].any()):
            return f"{where} are zeros"
        if inside := _by_a_factor(got[wrong], want[wrong], precision):
            return f"{where}: {inside}"
        return f"{where} hold other numbers"
    norms = (want * want).sum(dim=1, keepdim=True)
    factors = torch.where(norms > 0, (got * want).sum(dim=1, keepdim=True) / norms, 0)
    if min(got.shape) >= LEAST and _close(got, factors * want, precision):
        least, most = float(factors.min()), float(factors.max())
        return f"{what} scaled, each by a factor of its own ({least:.4g} to {most:.4g})"
    return ""


def _matches(got: Tensor, want: Tensor) -> list[int | None]:
    """Find for each row the one of the reference that has its numbers, its own place before others."""
    places: dict[bytes, int] = {}
    for i, row in enumerate(want):
        places.setdefault(digest(row), i)
    return [i if torch.equal(row, want[i]) else places.get(digest(row)) for i, row in enumerate(got)]


def _rank(difference: Tensor, precision: float, want: Tensor) -> int:
    """Find the rank of a difference of two rounded matrices; 0 if it is not low."""
    if min(difference.shape) < LOW or max(difference.shape) > 16384:
        return 0
    values = torch.linalg.svdvals(difference)
    # What rounding each number of a matrix of that size adds to any singular value, at most.
    noise = precision * float(want.abs().max()) * math.sqrt(difference.numel())
    rank = int((values > noise).sum())
    return rank if 0 < rank <= min(difference.shape) // LOW else 0


def order(matches: list) -> str:
    """Write a mapping of places as ``0<-3, 1<-0``, without what is in its own place."""
    moved = [f"{i}<-{j}" for i, j in enumerate(matches) if i != j]
    return ", ".join(moved[:8]) + (f", ... ({len(moved)})" if len(moved) > 8 else "")


def ranges(numbers: list[int]) -> str:
    """Write numbers in order as ``0-3, 7``."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def within_budget(got: Tensor, exact: Tensor, plain: Tensor) -> bool:
    """Whether a tensor is as near to the exact one as a plain computation of its dtype."""
    scale = exact.square().mean().sqrt()
    allowed = allowed_error((plain.double() - exact).abs() / scale, got.dtype, got.dtype)
    return bool(((got.double() - exact).abs() <= allowed * scale).all())
