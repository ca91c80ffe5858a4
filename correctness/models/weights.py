"""The tensors of a checkpoint or a model by name, read one expert at a time: nothing is held."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import (  # pyright: ignore[reportMissingImports]
    SafetensorError,
    safe_open,
)
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# The two matrices of a gated expert that are one, first the gate, where experts are stacked.
PAIRS = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("gate", "up"))
STACKED = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "w2": "down_proj", "wi_0": "gate_up_proj"}
STACKED |= {"gate": "gate_up_proj", "down": "down_proj", "wo": "down_proj"}
OF_AN_EXPERT = re.compile(r"(?P<block>.*experts)\.(?P<expert>\d+)\.(?P<field>.+)")


@dataclass(frozen=True)
class Weight:
    """A named tensor: its shape and dtype, and what reads it.

    parts: readers by expert of a stack of experts, whose first dimension they are; None of another tensor.
    rows: reads rows [start, stop) of what is no stack.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: dict[int, Callable[[], Tensor]] | None = None
    rows: Callable[[int, int], Tensor] | None = None


Weights = dict[str, Weight]


def of_files(path: Path) -> Weights:
    """Open a file or a folder of safetensors; its index, if it has one, must agree with the files.

    Raises:
        ValueError: nothing there is in safetensors format, a file is damaged, or shards are missing, hold a
            tensor twice or not what the index says; all faults in one message.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path} holds no file *.safetensors; other formats are not read")
    found: Weights = {}
    places: dict[str, Path] = {}
    faults = []
    for file in files:
        try:
            opened = ExitStack().enter_context(safe_open(file, framework="pt"))  # open as long as it is read
        except (SafetensorError, OSError) as error:
            faults.append(f"{file.name}: {error}")
            continue
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            if name in found:
                faults.append(f"{name} is in {places[name].name} and in {file.name}")
            found[name], places[name] = _of_file(opened, name), file
    index = path / "model.safetensors.index.json"
    if path.is_dir() and index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in listed.items():
            if name not in places or places[name].name != file:
                faults.append(f"{name} is not in {file}, where the index has it")
        faults += [f"{name} is not in the index" for name in places if name not in listed]
    if faults:
        raise ValueError(f"{path} cannot be read:\n  " + "\n  ".join(faults))
    return found


def _of_file(opened: safe_open, name: str) -> Weight:
    view = opened.get_slice(name)
    shape, kind = tuple(view.get_shape()), view.get_dtype()
    if kind not in DTYPES:
        raise ValueError(f"{name} has dtype {kind}; valid are {', '.join(DTYPES)}")
    parts = None
    if len(shape) == 3:
        parts = {e: lambda e=e: opened.get_slice(name)[e] for e in range(shape[0])}
    rows = (lambda start, stop: opened.get_slice(name)[start:stop]) if len(shape) > 0 else None
    return Weight(shape, DTYPES[kind], lambda: opened.get_tensor(name), parts, rows)


def of_model(model: nn.Module) -> Weights:
    """List the parameters and kept buffers of a model, a tensor of several names under its first."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = of_tensor(tensor.detach())
    return found


def of_tensor(tensor: Tensor) -> Weight:
    """Wrap a tensor, without a copy."""
    parts = None
    if tensor.dim() == 3:
        parts = {e: lambda e=e: tensor[e] for e in range(len(tensor))}
    return Weight(
        tuple(tensor.shape), tensor.dtype, lambda: tensor, parts, lambda start, stop: tensor[start:stop]
    )


def stacked(weights: Weights) -> Weights:
    """Gather ``experts.0.gate_proj.weight``, ... into stacks as ``experts.gate_up_proj``.

    The gate's rows come first, then those of up, as in ``Experts.w_in``. Biases of stacked experts become
    stacks of vectors.
    """
    found: Weights = {}
    apart: dict[tuple[str, str], dict[int, Weight]] = defaultdict(dict)
    for name, weight in weights.items():
        match = OF_AN_EXPERT.fullmatch(name)
        if match:
            apart[match["block"], match["field"]][int(match["expert"])] = weight
        else:
            found[name] = weight
    for first, second in PAIRS:
        for block, field in list(apart):
            other = re.sub(rf"^{first}\b", second, field)
            if re.match(rf"{first}\b", field) and (block, other) in apart:
                gates, ups = apart.pop((block, field)), apart.pop((block, other))
                whole = {e: _pair(gates[e], ups[e]) for e in gates if e in ups}
                found[f"{block}.{_field(field)}"] = _stack(whole)
                # Where one is missing, the other stays by itself.
                for e in {*gates} ^ {*ups}:
                    name, weight = (field, gates[e]) if e in gates else (other, ups[e])
                    found[f"{block}.{e}.{name}"] = weight
    for (block, field), experts in apart.items():
        found[f"{block}.{_field(field)}"] = _stack(experts)
    for name, weight in found.items():  # biases of stacks
        block = name.rpartition(".")[0]
        sizes = {w.shape[0] for n, w in found.items() if n.rpartition(".")[0] == block and w.parts}
        if (
            "experts" in block
            and len(weight.shape) == 2
            and weight.parts is None
            and weight.shape[0] in sizes
        ):
            assert weight.rows is not None
            parts = {e: lambda e=e, rows=weight.rows: rows(e, e + 1)[0] for e in range(weight.shape[0])}
            found[name] = Weight(weight.shape, weight.dtype, weight.read, parts, weight.rows)
    return found


def uneven(first: Weights, second: Weights) -> set[str]:
    """Name the tensors of experts that cannot be stacked: they lack a tensor, or have one of another shape.

    Others of their block on the same side, or the same expert of the other side, have it.
    """
    sides = [_apart(weights) for weights in (first, second)]
    odd: set[tuple[str, str]] = set()
    for side in sides:
        for block, experts in side.items():
            ((usual, _),) = Counter(frozenset(shapes.items()) for shapes in experts.values()).most_common(1)
            odd |= {(block, e) for e, shapes in experts.items() if {*shapes.items()} != usual}
    one, other = sides
    for block in one.keys() & other.keys():
        for e in one[block].keys() & other[block].keys():
            mine, theirs = one[block][e].keys(), other[block][e].keys()
            if mine < theirs or theirs < mine:
                odd.add((block, e))
    return {f"{block}.{e}.{field}" for side in sides for block, e in odd for field in side[block][e]}


def _apart(weights: Weights) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """List the shapes of experts that lie apart, by block, expert and field."""
    found: dict[str, dict[str, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, weight in weights.items():
        if match := OF_AN_EXPERT.fullmatch(name):
            found[match["block"]][match["expert"]][match["field"]] = weight.shape
    return found


def _field(field: str) -> str:
    first, _, rest = field.partition(".")
    return STACKED.get(first, first) + (
        "_bias" if rest == "bias" else "" if rest == "weight" else f".{rest}" * bool(rest)
    )


def _pair(gate: Weight, up: Weight) -> Weight:
    shape = (gate.shape[0] + up.shape[0], *gate.shape[1:])
    return Weight(shape, gate.dtype, lambda: torch.cat([gate.read(), up.read()]))


def _stack(experts: dict[int, Weight]) -> Weight:
    one = next(iter(experts.values()))
    parts = {e: experts[e].read for e in sorted(experts)}
    return Weight(
        (max(experts, default=-1) + 1, *one.shape), one.dtype,
        lambda: torch.stack([parts[e]() for e in parts]), parts,
    )  # fmt: skip


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as a model runs: numbers by value, embeddings first, the head last."""

    def place(name: str) -> tuple:
        first = (
            0
            if "embed" in name or "wte" in name
            else 2
            if re.search(r"lm_head|layers\.\D|^(model\.)?norm", name)
            else 1
        )
        return first, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return sorted(names, key=place)
