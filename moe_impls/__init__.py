"""Sparsely-gated mixture-of-experts layers: one signature, many ways to compute it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_impls.checking import check_inputs
    from moe_impls.dispatcher import SparseDispatcher, sort_by_expert
    from moe_impls.interface import Clamp, Experts, Implementation, Routing, Support
    from moe_impls.layer import MoE
    from moe_impls.layer_interface import BiasRule, LayerSupport, LayerWeights
    from moe_impls.losses import auxiliary_loss, cv_squared, load_balancing_loss, z_loss
    from moe_impls.notebook_state import from_notebook_state_dict, to_notebook_state_dict
    from moe_impls.registry import IMPLEMENTATIONS, resolve
    from moe_impls.router import (
        count_load,
        importance,
        noisy_top_k,
        route,
        smooth_load,
        without_sentinels,
    )
    from moe_impls.router_interface import RouterSpec, RouterSupport

__all__ = [
    "IMPLEMENTATIONS",
    "BiasRule",
    "Clamp",
    "Experts",
    "Implementation",
    "LayerSupport",
    "LayerWeights",
    "MoE",
    "RouterSpec",
    "RouterSupport",
    "Routing",
    "SparseDispatcher",
    "Support",
    "auxiliary_loss",
    "check_inputs",
    "count_load",
    "cv_squared",
    "from_notebook_state_dict",
    "importance",
    "load_balancing_loss",
    "noisy_top_k",
    "resolve",
    "route",
    "smooth_load",
    "sort_by_expert",
    "to_notebook_state_dict",
    "without_sentinels",
    "z_loss",
]

# Imported when they are first asked for: torch takes seconds, and `moe-impls --help` does not need it.
_MODULES = (
    "interface",
    "checking",
    "router_interface",
    "layer_interface",
    "registry",
    "router",
    "losses",
    "dispatcher",
    "layer",
    "notebook_state",
)


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"moe_impls.{module}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    raise AttributeError(f"module 'moe_impls' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
