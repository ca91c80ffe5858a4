"""A LoRA of PEFT, merged: each adapted matrix is held to ``W + alpha / r * B A``, and a wrong merge is named.

Of stacked experts PEFT keeps ``lora_A`` [r E, in] expert by expert, and ``lora_B`` [out, r E] rank by rank:
the column of rank i and expert e is i E + e.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from correctness.judging.budget import eps
from correctness.models.causes import ranges, within_budget
from correctness.models.comparison import Finding
from correctness.models.weights import Weight, Weights, of_files

REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
)
SHORTENED = re.compile(r"^base_model\.model\.|\.base_layer\b|\.default\b")


@dataclass(frozen=True)
class Adapter:
    """The pairs of a LoRA by the module that they belong to, and the right scale."""

    pairs: dict[str, list[tuple[Weight, Weight]]]
    rank: int
    alpha: float
    scale: float


def read(folder: Path) -> Adapter:
    """Read an adapter's folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: a file is missing, tensors have no partner, or the config asks for what is not covered.
    """
    said = folder / "adapter_config.json"
    if not said.is_file():
        raise ValueError(f"--adapter {folder} has no adapter_config.json")
    config = json.loads(said.read_text(encoding="utf-8"))
    if asked := [name for name in REFUSED if config.get(name)]:
        raise ValueError(
            f"--adapter {folder}: {', '.join(asked)} of its config is not covered; plain LoRA is"
        )
    tensors = of_files(folder / "adapter_model.safetensors")
    halves: dict[str, dict[str, Weight]] = defaultdict(dict)
    for name, weight in tensors.items():
        module, _, half = name.partition(".lora_")
        halves[module][half[:1]] = weight
    if alone := [module for module, one in halves.items() if {*one} != {"A", "B"}]:
        raise ValueError(f"--adapter {folder}: no pair of lora_A and lora_B for {', '.join(alone)}")
    pairs: dict[str, list[tuple[Weight, Weight]]] = defaultdict(list)
    for module, one in halves.items():
        pairs[SHORTENED.sub("", module)].append((one["A"], one["B"]))
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return Adapter(dict(pairs), rank, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def compare_merged(adapter: Adapter, reference: Weights, subject: Weights) -> tuple[list[Finding], set[str]]:
    """Compare the adapted tensors, and return which those are.

    Raises:
        ValueError: the adapter names modules that the reference lacks, or of other sizes; all at once.
    """
    found: list[Finding] = []
    adapted, lost = set(), []
    for module, pairs in adapter.pairs.items():
        for A, B in pairs:
            name = _target(adapter, module, A, B, reference)
            if name is None:
                lost.append(f"{module} (lora_A {list(A.shape)}, lora_B {list(B.shape)})")
                continue
            adapted.add(name)
            if name in subject:
                found += _merged(adapter, name, A, B, reference[name], subject[name])
    if lost:
        raise ValueError(
            f"the adapter belongs to tensors that the reference does not have: {', '.join(lost)}"
        )
    return found, adapted


def _target(adapter: Adapter, module: str, A: Weight, B: Weight, weights: Weights) -> str | None:
    """Find the tensor that a pair adapts: a module's weight, or the stack of those sizes in it."""
    if f"{module}.weight" in weights:
        fits = weights[f"{module}.weight"].shape == (B.shape[0], A.shape[1])
        return f"{module}.weight" if fits else None
    sizes = {A.shape[1], B.shape[0]}
    stacks = [
        name for name, w in weights.items()
        if name.rpartition(".")[0] == module and w.parts and {*w.shape[1:]} == sizes
        and w.shape[0] * adapter.rank == A.shape[0]
    ]  # fmt: skip
    return stacks[0] if len(stacks) == 1 else None


def _merged(adapter: Adapter, name: str, A: Weight, B: Weight, base: Weight, got: Weight) -> list[Finding]:
    causes: dict[str, list[int]] = defaultdict(list)
    readers = [(0, base.read, got.read)] if base.parts is None else [
        (e, read, got.parts[e]) for e, read in base.parts.items() if got.parts and e in got.parts
    ]  # fmt: skip
    a, b = A.read().double(), B.read().double()
    for e, want, have in readers:
        ways = list(_deltas(a, b, e, base, adapter.rank))
        if words := _what(have(), want(), ways, adapter):
            causes[words].append(e)
    if base.parts is None:
        return [Finding(name, words) for words in causes]
    return [
        Finding(name, f"expert{'s' * (len(es) > 1)} {ranges(es)}: {words}") for words, es in causes.items()
    ]


def _deltas(a: Tensor, b: Tensor, e: int, base: Weight, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the product of a pair for one matrix: as it is right first, then as it is misread."""
    if base.parts is None:
        yield "", b @ a
        yield "lora_A and lora_B of the two halves swapped", torch.cat([*reversed((b @ a).chunk(2))])
        return
    E = base.shape[0]
    mine = a.reshape(E, rank, -1)[e]  # [r, in]
    by_rank, by_expert = b.reshape(len(b), rank, E)[:, :, e], b.reshape(len(b), E, rank)[:, e]
    by_rank_a = a.reshape(rank, E, -1)[:, e]
    readings = (
        ("", by_rank, mine),
        ("the columns of lora_B taken expert by expert; they lie rank by rank", by_expert, mine),
        ("the rows of lora_A taken rank by rank; they lie expert by expert", by_rank, by_rank_a),
    )
    for words, right, left in readings:
        delta = right @ left  # [out, in]
        # In stacks [E, in, out] it is transposed. A square one is held to both: only its numbers can tell.
        if tuple(delta.shape) == base.shape[1:]:
            yield words, delta
        if tuple(delta.T.shape) == base.shape[1:]:
            yield words, delta.T
        if words == "" and len(delta) % 2 == 0:
            yield (
                "its halves, gate and up, swapped",
                torch.cat([*reversed(delta.chunk(2))]).reshape(base.shape[1:]),
            )


def _what(got: Tensor, base: Tensor, ways: list[tuple[str, Tensor]], adapter: Adapter) -> str:
    """Say how a merged matrix differs from the right one; empty if it does not."""
    if got.shape != base.shape:
        return f"has shape {list(got.shape)}, in the reference {list(base.shape)}"
    wide = base.double()

    def agrees(delta: Tensor, scale: float) -> bool:
        plain = base.to(got.dtype) + (delta * scale).to(got.dtype)
        return within_budget(got, wide + scale * delta, plain)

    if any(agrees(delta, adapter.scale) for words, delta in ways if not words):
        return ""
    if torch.equal(got, base.to(got.dtype)):
        return "the LoRA is not merged"
    for words, delta in ways:
        if words and agrees(delta, adapter.scale):
            return words
        change = got.double() - wide
        fitted = float((change * delta).sum() / (delta * delta).sum())
        if abs(fitted) > eps(got.dtype) and agrees(delta, fitted):
            name, scale = _meaning(fitted, adapter)
            also = f"; {words}" if words else ""
            return f"the LoRA is merged with scale {scale:.4g}{name}; {adapter.scale:g} is right{also}"
    return "other numbers than those of the merged LoRA"


def _meaning(scale: float, adapter: Adapter) -> tuple[str, float]:
    """Find what a fitted scale stands for, and its exact value."""
    known = {
        "1": 1.0, "alpha": adapter.alpha, "1 / r": 1 / adapter.rank,
        "r / alpha": adapter.rank / adapter.alpha, "alpha / r": adapter.alpha / adapter.rank,
        "alpha / sqrt(r)": adapter.alpha / math.sqrt(adapter.rank),
        "twice the right one": 2 * adapter.scale, "minus the right one": -adapter.scale,
    }  # fmt: skip
    near = (
        (f" ({name})", value) for name, value in known.items() if math.isclose(scale, value, rel_tol=1e-2)
    )
    return next(near, ("", scale))
