"""What only transformers knows: the class of a checkpoint, and what its names on disk become in the model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers.conversion_mapping import (  # pyright: ignore[reportMissingImports]
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (  # pyright: ignore[reportMissingImports]
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from correctness.models.weights import OF_AN_EXPERT, Weight, Weights, of_files
from moe_impls.transformers import register

transformers.utils.logging.disable_progress_bar()

KINDS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def config_of(folder: Path) -> Any:
    """Read a folder's config.json by the class of its model type.

    Raises:
        ValueError: the model type is one that transformers does not have.
    """
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if said.get("model_type") not in known:
        raise ValueError(
            f"{folder}: model_type is {said.get('model_type')!r}; transformers has no such family"
        )
    return transformers.AutoConfig.from_pretrained(folder)


def class_of(config: Any) -> Any:
    """Choose the class of a config: the one that it names, else for causal language models, else the base."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for kind in KINDS:
        auto = getattr(transformers, kind)
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    package = type(config).__module__.replace(".configuration_", ".modeling_")
    for found in vars(importlib.import_module(package)).values():
        owned = inspect.isclass(found) and getattr(found, "config_class", None) is type(config)
        if owned and not found.__name__.endswith("PreTrainedModel"):
            return found
    raise ValueError(f"transformers has no model of {type(config).__name__}")


def load(folder: Path, dtype: torch.dtype, experts: str | None = "eager") -> nn.Module:
    """Load a checkpoint through transformers.

    Raises:
        ValueError: its tensors do not fit the model; all that are missing, left over or of another shape, by
            their names on disk where it is in the form that transformers saves.
    """
    config = config_of(folder)
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    given = {} if experts is None else {"experts_implementation": experts}
    kind = class_of(config)
    if experts is not None and experts.startswith("moe_impls:"):
        register()
    try:
        _, info = found = kind.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True, **given,
        )  # fmt: skip
    except RuntimeError as error:  # a conversion failed, such as a concatenation of unlike shapes
        faults = _misfits(folder, config) or [str(error).partition("\n")[0]]
        raise ValueError(f"{folder} does not fit {kind.__name__}:\n  " + "\n  ".join(faults)) from error
    finally:
        transformers.logging.set_verbosity(quiet)
    model: nn.Module = found[0]
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} belongs to nothing" for name in sorted(info["unexpected_keys"])]
    faults += [
        f"{name} has shape {[*has]}, the model's has {[*wants]}"
        for name, has, wants in sorted(info["mismatched_keys"])
    ]
    faults += [str(message) for message in info["error_msgs"]]
    if faults:
        faults = _misfits(folder, config) or faults
        raise ValueError(f"{folder} does not fit {kind.__name__}:\n  " + "\n  ".join(faults))
    return model.eval()


def _misfits(folder: Path, config: Any) -> list[str]:
    """List how a checkpoint differs on disk from what transformers would save of that config.

    Nothing if its experts are in another form.
    """
    model = skeleton(config)
    right = revert_weight_conversion(model, model.state_dict())
    has, may_lack = of_files(folder), {*tied(model)}
    experts = [name for name in right if OF_AN_EXPERT.fullmatch(name)]
    if experts and not any(name in has for name in experts):
        return []
    faults = [f"{name} is missing" for name in right if name not in has and name not in may_lack]
    faults += [f"{name} belongs to nothing" for name in has if name not in right and name not in may_lack]
    return faults + [
        f"{name} has shape {[*has[name].shape]}, the model's has {[*tensor.shape]}"
        for name, tensor in right.items()
        if name in has and has[name].shape != tuple(tensor.shape)
    ]


def skeleton(config: Any) -> Any:
    """Make the model of a config without memory for its weights."""
    with torch.device("meta"):
        return class_of(config)(copy.deepcopy(config))


def as_modules(weights: Weights, model: Any) -> Weights:
    """Give the tensors of a checkpoint the names and the layout that transformers loads them into.

    Stacks of experts that lie apart on disk stay readable one expert at a time.

    Args:
        model: the skeleton of its config.
    """
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: Weights = {}
    groups: dict[str, dict[str, str]] = defaultdict(dict)  # target: disk name: pattern
    for name in sorted(weights, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if pattern is None:
            found[target] = weights[name]
        else:
            groups[target][name] = pattern
    for target, patterns in groups.items():
        converter = of_pattern[next(iter(patterns.values()))]
        found |= _converted(weights, target, patterns, converter, model)
    return found


def _converted(
    weights: Weights, target: str, patterns: dict[str, str], converter: WeightConverter, model: Any
) -> Weights:
    """Convert a group of tensors of a checkpoint, by expert where the mapping stacks them."""

    def convert(names: list[str], meta: bool = False) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for name in names:
            tensor = (
                torch.empty(weights[name].shape, dtype=weights[name].dtype, device="meta")
                if meta
                else weights[name].read()
            )
            own.add_tensor(target, name, patterns[name], tensor)  # type: ignore[arg-type]
        made = own.convert(target, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    stacks = any(type(op).__name__ == "MergeModulelist" for op in converter.operations)
    experts: dict[int, list[str]] = defaultdict(list)
    for name in patterns:
        number = re.search(r"(?:experts|\bexpert\w*)\.(\d+)\.", name)
        experts[int(number[1]) if number and stacks else 0].append(name)
    found = {}
    if not stacks or len({len(names) for names in experts.values()}) > 1:
        for name, one in convert([*patterns], meta=True).items():
            whole = lambda name=name: convert([*patterns])[name]  # noqa: E731
            found[name] = Weight(tuple(one.shape), one.dtype, whole)
        return found
    for name, one in convert(experts[min(experts)], meta=True).items():
        parts = {e: lambda e=e, name=name: convert(experts[e])[name][0] for e in experts}
        shape = (max(experts) + 1, *one.shape[1:])
        found[name] = Weight(
            shape, one.dtype, lambda parts=parts: torch.stack([p() for p in parts.values()]), parts
        )
    return found


def tied(model: Any) -> dict[str, str]:
    """Name the tensors of a model that are another one: {name: the name that holds it}."""
    if not getattr(
        model.config.get_text_config(),
        "tie_word_embeddings",
        getattr(model.config, "tie_word_embeddings", False),
    ):
        return {}
    with contextlib.suppress(AttributeError):
        return dict(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or {})
    return {}
