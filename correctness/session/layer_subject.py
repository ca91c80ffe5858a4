"""Layers under test: a stranger's, found by name, and the project's own."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from correctness.checks.case import Subject
from correctness.checks.layers import layer
from correctness.judging.layer_bench import Layer, build
from correctness.judging.layer_weights import check_weights
from correctness.session.families import FAMILIES, family_layer
from moe_impls.interface import Routing
from moe_impls.layer import MoE
from moe_impls.layer_interface import LayerSupport, LayerWeights
from moe_impls.registry import ResolveError, asking, check_signature, load_function
from moe_impls.router_interface import RouterSpec


def resolve_layer(name: str) -> Subject:
    """Make the subject that ``path/file.py:Class`` or ``package.module:function`` means; construct it once.

    ``transformers:FAMILY`` means a block of that family of transformers, see `correctness.families`; the name
    of one of `own_layers` that one.

    Raises:
        ResolveError: missing file, failing import, no such class, no ``read``, a layer that cannot be
            constructed, or a ``read`` that returns something else than the layer's weights.
    """
    own = {subject.name: subject for subject in own_layers()}
    if name in own:
        return own[name]
    if name.startswith(FAMILIES):
        return layer(name, family_layer(name))
    if ":" not in name:
        raise ResolveError(
            f"--layer is {name!r}; it must be path/file.py:Class, package.module:function or "
            f"{FAMILIES}FAMILY, or one of {', '.join(own)}"
        )
    module, make = load_function(name)
    check_signature(name, make, 0, ())
    place = name.rpartition(":")[0]
    if not callable(getattr(module, "read", None)):
        raise ResolveError(f"{name}: {place} has no function read(layer) that returns moe_impls.LayerWeights")
    check_signature(f"{place}:read", module.read, 1, ())
    optional = {"losses": 3, "routing": 2, "update_bias": 1}
    found = {function: getattr(module, function, None) for function in optional}
    for function, arguments in optional.items():
        if found[function] is not None:
            check_signature(f"{place}:{function}", found[function], arguments, ())
    try:
        support = LayerSupport.of(getattr(module, "SUPPORT", LayerSupport()))
    except TypeError as error:
        raise ResolveError(f"{name}: {error}") from error
    tested = Layer(make, module.read, support=support, **found)
    file = getattr(module, "__file__", None)
    with asking(f"{name}: {name.rpartition(':')[2]}() failed", file):
        made = tested.make()
    if not isinstance(made, nn.Module):
        raise ResolveError(f"{name}: the layer is a {type(made).__name__}; it must be a torch.nn.Module")
    with asking(f"{place}:read", file):
        check_weights(tested.read(made), made)
    with asking(f"{name}: drawing new parameters failed", file):
        build(tested, torch.float32)
    return layer(name, tested)


def read_moe(moe: MoE) -> LayerWeights:
    """Read the weights of a `moe_impls.MoE`."""
    return LayerWeights(
        moe.experts, moe.router, moe.w_gate.T, combine=moe.combine, training_only=("w_noise",)
    )


def moe_losses(moe: MoE, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Return the auxiliary loss of a `moe_impls.MoE` without its coefficient."""
    return {"auxiliary_loss": moe(x if mask is None else x[mask], 1.0)[1]}


def moe_routing(moe: MoE, x: Tensor) -> Routing:
    """Return what a `moe_impls.MoE` does with x [T, D] in its present mode."""
    return moe.gate(x)[0]


def _moe(name: str, router: RouterSpec | None = None, in_graphs: bool = False, **options: Any) -> Subject:
    sizes = {"input_size": 12, "output_size": 7, "num_experts": 6, "hidden_size": 10, "k": 2}
    options = sizes | {"noisy_gating": router is None, "router": router} | options
    make, support = functools.partial(MoE, **options), LayerSupport(fullgraph=in_graphs, exports=in_graphs)
    made = Layer(make, read_moe, moe_losses, support, routing=None if router else moe_routing)
    return replace(layer(f"moe_{name}", made), share=OWN_SHARE)


OWN_SHARE = 1 / 3  # of the drawn histories: one class in seven forms
_SWIGLU: dict[str, Any] = {"activation": "swiglu", "output_activation": "none"}
_GROUPS: dict[str, Any] = {"groups": 4, "keep_groups": 2, "group_score": "top2_sum"}


def own_layers() -> list[Subject]:
    """Make `MoE` a subject with several routers and experts; two of them, as it takes longest, in graphs."""
    return [
        _moe("defaults", in_graphs=True),
        _moe("mixtral", RouterSpec(2, renormalise=True), bias=False, **_SWIGLU),
        _moe("qwen", RouterSpec(3), implementation="index_add", **_SWIGLU),
        _moe("switch", RouterSpec(1), implementation="dense_mask", output_activation="none"),
        _moe("renormalised_at_one", RouterSpec(1, "topk_softmax"), bias=False, **_SWIGLU),
        _moe("grouped", RouterSpec(3, "sigmoid", True, 2.5, **_GROUPS), True, num_experts=12, **_SWIGLU),
        _moe("logsumexp", RouterSpec(2, scale=0.5), combine="logsumexp", activation="gelu"),
    ]
