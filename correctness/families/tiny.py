"""Tiny blocks of the families of transformers: random weights, the family's own config and classes.

A family is a folder of ``transformers/models``. It has a block for each class of experts in it: the class
whose constructor makes the experts, router and all. Sizes are set by the names of the config's attributes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_impls.registry import ResolveError

VERSION = "5.23"  # of transformers; what the blocks were verified with
E, K, D, H = 8, 2, 16, 24
# Attributes of a config by the end of their name, and what they are set to. None is a size left open.
SIZES = (
    (r"hidden_size|d_model", D),
    (r"intermediate_size|ffn_hidden_size|ffn_dim|d_ff|expert_dim", H),
    (r"(?<!shared_)(?<!shared)experts", E),
    (r"experts_per_tok(en)?|topk|top_k|top_k_experts|moe_k", K),
    (r"shared_experts", 1),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"zero_expert_num", 2),
    (r"expert_capacity", 1 << 20),  # no token is dropped
)
# Blocks whose experts are not on transformers' interface for experts, by family; `beside` reads them.
BESIDE = {
    "dbrx": "DbrxFFN",
    "doge": "DogeCDMoE",
    "jetmoe": "JetMoeMoE",
    "llama4": "Llama4TextMoe",
    "longcat_flash": "LongcatFlashMoE",
    "nllb_moe": "NllbMoeSparseMLP",
    "step3p7": "Step3p7SparseMoeBlock",
    "switch_transformers": "SwitchTransformersSparseMLP",
    "vitpose_backbone": "VitPoseBackboneMoeMLP",
}
# What the names do not tell, by family: attributes of the config.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe": {"shared_expert_intermediate_size": H},  # which its config of the talker lacks
    "vitpose_backbone": {"part_features": E},
}
_DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)", re.MULTILINE)


class Pair(nn.Module):
    """A router and experts that a decoder layer owns without a block between: both are given the same x."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        _, gates, ids = self.router(tokens)
        return self.experts(tokens, ids, gates).reshape(x.shape)


# Families whose blocks return y in another shape than that of x.
OTHER_SHAPE = ("ernie4_5_vl_moe", "llama4")


class Shaped(nn.Module):
    """A block whose y is brought to the shape of x."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0].reshape(x.shape)


@functools.cache
def _folder() -> Path:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ResolveError(
            f"transformers:... needs transformers: pip install 'moe-impls[peers]' ({error})"
        ) from error
    if not transformers.__version__.startswith(f"{VERSION}."):
        warnings.warn(
            f"transformers {transformers.__version__} was not tested; families were with {VERSION}",
            stacklevel=2,
        )
    return Path(str(transformers.__file__)).parent / "models"


@functools.cache
def classes() -> dict[str, tuple[str, ...]]:
    """Find the classes of experts (of BESIDE: of blocks) of each family, in the source of its models."""
    found = {}
    for file in sorted(_folder().glob("*/modeling_*.py")):
        family = file.parent.name
        if names := _DECORATED.findall(file.read_text(encoding="utf-8")):
            found[family] = tuple(names)
        elif family in BESIDE:
            found[family] = (BESIDE[family],)
    return found


def blocks(family: str) -> list[str]:
    """List the blocks of a family, or of ``family.Class``, or of "all", each as it is named alone.

    Raises:
        ResolveError: there is no such family; the message lists those that there are.
    """
    known = classes()
    if family == "all":
        return [block for name in known for block in blocks(name)]
    name, _, wanted = family.partition(".")
    if name not in known and name.isidentifier() and any(_folder().glob(f"{name}/modeling_*.py")):
        raise ResolveError(
            f"the family {name!r} of transformers has no MoE block; those with one are "
            f"{', '.join(sorted(known))}; all means each of them"
        )
    if name not in known or (wanted and wanted not in known[name]):
        raise ResolveError(
            f"transformers has no family {family!r} with experts; it has {', '.join(sorted(known))}; "
            "all means each of them"
        )
    several = len(known[name]) > 1
    return [f"{name}.{c}" if several else name for c in known[name] if wanted in ("", c)]


def make(block: str, **settings: Any) -> nn.Module:
    """Make the tiny block that `blocks` names so, in float32; ``settings`` are attributes of its config.

    Raises:
        ResolveError: no config class of the family fits, with what each raised.
    """
    family, _, wanted = block.partition(".")
    name = wanted or classes()[family][0]
    modeling = next(
        importlib.import_module(f"transformers.models.{family}.{file.stem}")
        for file in _folder().glob(f"{family}/modeling_*.py")
        if f"class {name}(" in file.read_text(encoding="utf-8")
    )
    errors = []
    for config in _configs(family, SETTINGS.get(family, {}) | settings):
        try:
            made = _owner(modeling, name, config)
            return Shaped(made) if family in OTHER_SHAPE else made
        except Exception as error:
            errors.append(f"{type(config).__name__}: {type(error).__name__}: {error}")
    raise ResolveError(f"transformers:{block} cannot be made: {'; '.join(errors)}")


def _configs(family: str, settings: dict[str, Any]) -> Iterator[Any]:
    """Make a small config of each config class of a family."""
    base = importlib.import_module("transformers").PretrainedConfig
    for file in sorted((_folder() / family).glob("configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        for cls in _own(module, base):
            config = cls()
            if getattr(config, "is_heterogeneous", False):
                config = config.per_layer_config[-1]
            yield shrink(config, settings)


def shrink(config: Any, settings: dict[str, Any]) -> Any:
    """Set the sizes of a config by the names of its attributes."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "attribute_map"):  # a config in a config
            shrink(value, {})
        for ending, size in SIZES:
            if re.search(f"(^|_)({ending})$", name):
                if isinstance(value, list | tuple):
                    setattr(config, name, [size] * len(value))
                elif value is None or type(value) is int:
                    setattr(config, name, size)
    for name, value in settings.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    return config


def _own(module: Any, base: type) -> list[type]:
    return [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]


def _owner(modeling: Any, name: str, config: Any) -> nn.Module:
    """Make the block of class ``name``, or the one whose constructor makes experts of that class."""
    cls = getattr(modeling, name)
    if name in BESIDE.values():
        return _construct(cls, config)
    makers = [c for c in _own(modeling, nn.Module) if name in _names(c)]
    for maker in makers:
        if not any("Attention" in made for made in _names(maker)):  # else it is a decoder layer
            return _construct(maker, config)
    routers = [c for c in _own(modeling, nn.Module) if c.__name__.endswith("Router")]
    return Pair(_construct(routers[0], config), _construct(cls, config))


def _names(cls: type) -> tuple[str, ...]:
    """Names that the constructor of a class refers to."""
    return inspect.unwrap(cls.__init__).__code__.co_names if "__init__" in vars(cls) else ()


def _construct(cls: type, config: Any) -> nn.Module:
    """Call a constructor with the config and, by the names of its other parameters, layer and size."""
    arguments = {}
    for parameter in list(inspect.signature(inspect.unwrap(cls.__init__)).parameters.values())[2:]:
        if parameter.name == "layer_idx":
            arguments["layer_idx"] = config.num_hidden_layers - 1
        elif "size" in parameter.name or "dim" in parameter.name:
            arguments[parameter.name] = H
    return cls(config, **arguments)
