"""What a whole layer holds, in the terms of this suite, and what one declares that it can do.

Part of the contract of ``moe_impls.interface``, in whose notation it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_impls.interface import DTYPES, Experts, Support, check_choice, check_declared
from moe_impls.router_interface import RouterSpec

GATES_ON = ("output", "input")
LEADING = ("any", "batch_sequence")
ROUTER_DTYPES = ("float32", "input")


@dataclass(frozen=True)
class BiasRule:
    """How training moves the selection bias by the load, so that no loss has to balance the experts.

    bias[e] += rate * sign(mean load - load[e]), where a load counts the visits of an expert since the last
    update (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    centred: the mean of the change over all experts is then taken off it, as torchtitan does.
    """

    rate: float
    centred: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rate, int | float) or isinstance(self.rate, bool) or not self.rate > 0:
            raise ValueError(f"rate of BiasRule is {self.rate!r}; it must be a number above 0")


@dataclass(frozen=True)
class LayerWeights:
    """What a whole layer holds, in the terms of this suite: what a file's ``read(layer)`` returns.

    Its tensors are the layer's parameters and buffers, or views, stacks and transposes of them made with
    autograd on, so that gradients can be followed back to the parameters. ``correctness.oracle.layer`` has
    the equations.

    experts: the routed experts.
    router: what becomes of the logits, n(x) @ router_weightᵀ + router_bias, where n is the identity.
    router_weight, router_bias: [E + Z, D], [E + Z] or None; Z is identity_experts.
    selection_bias: [E + Z], added to the scores for the choice of experts only, never to the gates.
    shared: S experts that every token visits; their outputs are added to the combined ones.
    shared_gate: [S, D], then shared expert s counts sigmoid(x @ shared_gate[s]) times; once if None.
    combine: of the routed experts.
    training_only: names of parameters that evaluation does not use, such as those of the gate's noise.
    expert_scale: [E], multiplies the gates of expert e after all that the router does (Gemma 4).
    gates_on: output, or input: f_e(gate * x) in place of gate * f_e(x) (Llama 4); of routed experts alone.
    router_norm, router_norm_epsilon: [D] or None, then n(x) = router_norm * x / sqrt(mean(x²) + epsilon).
    identity_experts: Z, as many further experts, E to E + Z - 1, that return x itself (LongCat-Flash).
    bias_rule: how training moves selection_bias; None: not said.
    """

    experts: Experts
    router: RouterSpec
    router_weight: Tensor
    router_bias: Tensor | None = None
    selection_bias: Tensor | None = None
    shared: Experts | None = None
    shared_gate: Tensor | None = None
    combine: str = "sum"
    training_only: tuple[str, ...] = ()
    expert_scale: Tensor | None = None
    gates_on: str = "output"
    router_norm: Tensor | None = None
    router_norm_epsilon: float = 1e-6
    identity_experts: int = 0
    bias_rule: BiasRule | None = None

    def __post_init__(self) -> None:
        check_choice("gates_on", self.gates_on, GATES_ON)
        if not isinstance(self.identity_experts, int) or self.identity_experts < 0:
            raise ValueError(f"identity_experts is {self.identity_experts!r}; it must be an int, at least 0")
        if not isinstance(self.router_norm_epsilon, int | float) or self.router_norm_epsilon < 0:
            raise ValueError(f"router_norm_epsilon is {self.router_norm_epsilon!r}; it must be at least 0")


@dataclass(frozen=True)
class LayerSupport:
    """What a whole layer declares that it can do. The suite tests all of it and nothing else.

    A layer's file may hold ``SUPPORT = LayerSupport(...)``; without one, every default below is claimed. With
    ``Support(...)`` in its place the layer declares the fields that the two share.

    dtypes: of x, with parameters in the same one.
    gradients: of x and every parameter that is trained; without them the output alone is tested.
    deterministic: equal inputs give bit-equal outputs in evaluation.
    leading: any ([..., D]), or batch_sequence: x is [B, S, D] and nothing else.
    router_dtype: float32: logits are made in at least float32, whatever the dtype of x is. input: they are
        made and rounded in the dtype of x; tokens whose choice of experts that rounding may change are then
        judged in float32 and float64 alone.
    no_tokens: x may hold none.
    every_gradient: every parameter that is trained gets a gradient, of zeros where no token reaches it or
        there is none, as torch.nn.parallel.DistributedDataParallel waits for.
    training: it can be called in training mode, and y then has the gradients of what was computed, noise
        included.
    recompute: under torch.utils.checkpoint around the layer a training step moves every buffer as it does
        without. Not said of a layer that moves any, that step is not compared.
    autocast: under torch.autocast logits are still made in float32, and the output is right to the autocast
        dtype and has the dtype of x.
    fullgraph: torch.compile takes it as one graph, and does not compile again for another number of tokens.
    exports: torch.export takes it.
    """

    dtypes: tuple[torch.dtype, ...] = DTYPES
    gradients: bool = True
    deterministic: bool = True
    leading: str = "any"
    router_dtype: str = "float32"
    no_tokens: bool = True
    every_gradient: bool = False
    training: bool = True
    recompute: bool = False
    autocast: bool = False
    fullgraph: bool = False
    exports: bool = False

    def __post_init__(self) -> None:
        check_declared("dtypes of LayerSupport", self.dtypes, DTYPES)
        check_choice("leading of LayerSupport", self.leading, LEADING)
        check_choice("router_dtype of LayerSupport", self.router_dtype, ROUTER_DTYPES)

    @property
    def any_leading(self) -> bool:
        """Whether x may have any leading dimensions."""
        return self.leading == "any"

    @classmethod
    def of(cls, declared: object) -> LayerSupport:
        """Return a layer's declaration, or keep of an implementation's what a layer can declare.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(declared, LayerSupport):
            return declared
        if not isinstance(declared, Support):
            raise TypeError(
                f"SUPPORT is a {type(declared).__name__}; it must be a moe_impls.LayerSupport or Support"
            )
        return cls(**{f.name: getattr(declared, f.name) for f in fields(cls) if hasattr(declared, f.name)})
