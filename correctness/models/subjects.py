"""What the command line names: a checkpoint, a family of transformers, or a model that a function makes."""

from __future__ import annotations

import contextlib
import importlib
import inspect
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
    def config(self) -> Any:
        has = self.path.is_dir() and (self.path / "config.json").is_file()
        return formats().config_of(self.path) if has else None

    @property
    def runs(self) -> bool:
        return self.path.is_dir() and (self.path / "config.json").is_file()

    def tensors(self) -> Weights:
        return weights.of_files(self.path)

    def model(self, dtype: torch.dtype, experts: str | None = "eager") -> nn.Module:
        return formats().load(self.path, dtype, experts)


@dataclass
class Made:
    """A model that a function or class of a user makes: called without arguments, or with the checkpoint's path."""

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
                raise ValueError(
                    f"{self.name} asks for {', '.join(p.name for p in wanted)}; it is called without arguments, or"
                    " with the path of the checkpoint that it is compared with"
                )
            torch.manual_seed(0)
            made = self.function(*([self.beside] if wanted else []))
            if not isinstance(made, nn.Module):
                raise ValueError(f"{self.name} returns a {type(made).__name__}; it must return an nn.Module")
            self.made = made
        return self.made

    def tensors(self) -> Weights:
        return weights.of_model(self.model())


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
            raise ValueError(f"transformers:{family} cannot be made here: {type(error).__name__}: {error}") from error
        yield Checkpoint(FAMILY + family, folder)
    finally:
        shutil.rmtree(folder)
