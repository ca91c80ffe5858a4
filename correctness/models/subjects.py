"""What the command line names: a checkpoint, a family of transformers, or a model that a function makes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from correctness.models import weights
from correctness.models.weights import Weights
from moe_impls.registry import load_function

FAMILY = "transformers:"
# Fields of a config that say nothing about the numbers.
COSMETIC = {
    "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache", "attn_implementation",
    "id2label", "label2id",
}  # fmt: skip


def formats() -> Any:
    """Import what knows transformers; only here, since a comparison of files does without.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        return importlib.import_module("correctness.models.formats")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("correctness", "moe_impls")):
            raise
        raise ValueError(f"a model needs {error.name}: pip install 'moe-impls[models]'") from error


@dataclass
class Checkpoint:
    """Tensors in files; with a config.json beside them a model that transformers can load."""

    name: str
    path: Path

    @property
    def runs(self) -> bool:
        return (self.path / "config.json").is_file()

    @property
    def config(self) -> Any:
        """The config by its class; None without one, or without transformers."""
        known = importlib.util.find_spec("transformers") is not None
        return formats().config_of(self.path) if self.runs and known else None

    @property
    def said(self) -> dict[str, Any]:
        """The fields of the config, with those that are left out where its class is known."""
        if not self.runs:
            return {}
        config = self.config
        return (
            json.loads((self.path / "config.json").read_text("utf-8")) if config is None else config.to_dict()
        )

    def tensors(self) -> Weights:
        return weights.of_files(self.path)

    def model(self, dtype: torch.dtype, experts: str | None = "eager") -> nn.Module:
        return formats().load(self.path, dtype, experts)


@dataclass
class Made:
    """A model that a user's function makes: called without arguments, or with the checkpoint's path."""

    name: str
    function: Any
    beside: Path | None = None
    made: nn.Module | None = None
    config: Any = None
    runs: bool = True

    def model(self, dtype: torch.dtype | None = None, experts: str | None = "eager") -> nn.Module:
        if self.made is None:
            wanted = [
                p for p in inspect.signature(self.function).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]  # fmt: skip
            if len(wanted) > 1 or (wanted and self.beside is None):
                asked = ", ".join(p.name for p in wanted)
                raise ValueError(
                    f"{self.name} asks for {asked}; it is called without arguments, or with the path of the"
                    " checkpoint that it is compared with"
                )
            torch.manual_seed(0)
            made = self.function(*([self.beside] if wanted else []))
            if not isinstance(made, nn.Module):
                raise ValueError(f"{self.name} returns a {type(made).__name__}; it must return an nn.Module")
            self.made = made
            self.config = made.config if hasattr(getattr(made, "config", None), "to_dict") else None
        return self.made

    @property
    def said(self) -> dict[str, Any]:
        return {} if self.config is None else self.config.to_dict()

    def tensors(self) -> Weights:
        return weights.of_model(self.model())


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """List the fields in which two configs differ, with both values; none if one has no config."""
    one, other = _flat(first), _flat(second)
    absent = "absent"
    return [
        f"{field} is {other.get(field, absent)!r}, in the reference {one.get(field, absent)!r}"
        for field in sorted({*one} | {*other} if one and other else ())
        if one.get(field, absent) != other.get(field, absent)
    ]


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if key in COSMETIC or str(key).startswith("_"):
            continue
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def find(name: str, beside: Path | None = None) -> Checkpoint | Made:
    """Find what a name means; a family is made by `saved`.

    Raises:
        ValueError: it is neither a path nor something that can be imported; says what is valid.
    """
    path = Path(name)
    if path.exists():
        return Checkpoint(name, path)
    if ":" not in name:
        raise ValueError(
            f"{name} does not exist; valid are a file or folder of safetensors, {FAMILY}<family>, "
            "path/file.py:function and package.module:Class"
        )
    _, function = load_function(name)
    return Made(name, function, beside)


@contextlib.contextmanager
def saved(family: str, dtype: torch.dtype) -> Iterator[Checkpoint]:
    """Make a tiny model of a family and save it, sharded, for as long as it is needed.

    Raises:
        ValueError: there is no such family, or it cannot be made or saved; with what it raised.
    """
    formats()
    families = importlib.import_module("correctness.models.families")
    folder = Path(tempfile.mkdtemp())
    try:
        config = families.find(family)
        try:
            families.make(config, dtype).save_pretrained(folder, max_shard_size="40KB")
        except Exception as error:
            raise ValueError(
                f"transformers:{family} cannot be made here: {type(error).__name__}: {error}"
            ) from error
        yield Checkpoint(FAMILY + family, folder)
    finally:
        shutil.rmtree(folder)
