"""Sparsely-gated mixture-of-experts layers: one signature, many ways to compute it."""

from moe_impls.dispatcher import SparseDispatcher, sort_by_expert
from moe_impls.interface import (
    Experts,
    Implementation,
    LayerWeights,
    RouterSpec,
    Routing,
    Support,
    check_inputs,
)
from moe_impls.layer import MoE, from_notebook_state_dict, to_notebook_state_dict
from moe_impls.losses import auxiliary_loss, cv_squared, load_balancing_loss, z_loss
from moe_impls.registry import IMPLEMENTATIONS, resolve
from moe_impls.router import count_load, importance, noisy_top_k, route, smooth_load

__all__ = [
    "IMPLEMENTATIONS",
    "Experts",
    "Implementation",
    "LayerWeights",
    "MoE",
    "RouterSpec",
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
    "z_loss",
]
