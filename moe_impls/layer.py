"""The layer: parameters, gating, losses and leading dimensions around any implementation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_impls import expert_parallel, sharding
from moe_impls.checking import check_inputs, check_supported
from moe_impls.functional import accumulation_dtype, needs_gradients
from moe_impls.interface import (
    CLAMPED,
    GATED_ACTIVATIONS,
    Clamp,
    Experts,
    Implementation,
    Routing,
    check_choice,
    check_positive,
    dtype_name,
)
from moe_impls.losses import auxiliary_loss
from moe_impls.registry import resolve
from moe_impls.router import check_noise, count_load, importance, noisy_top_k, route
from moe_impls.router_interface import RouterSpec
from moe_impls.shards import as_if_all, check_mesh, check_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoE(nn.Module):
    """Sparsely-gated mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Defaults are the paper's and the notebook's: noisy top-k gating, experts of two layers with biases and a
    ReLU after each, combined linearly.

    Args:
        input_size, output_size, num_experts, hidden_size: D, O, E and H.
        noisy_gating: add learned noise to the logits while training.
        k: experts per token, K.
        implementation: what computes the experts: a name that `moe_impls.registry.resolve` takes, or an
            `Implementation`. "auto" takes the one that was measured to be fastest for the call.
        combine: sum | logsumexp.
        activation: of the hidden layer, one of `moe_impls.interface.ACTIVATIONS`.
        output_activation: relu | none, applied to each expert's output.
        clamp: the numbers of the activation "swiglu_clamped".
        bias: whether both layers of the experts have biases.
        router: how logits become gates, in place of ``RouterSpec(k, score="topk_softmax")``; its ``top_k`` is
            then K, and ``k`` is not read. Routers with groups need ``noisy_gating=False``.
        generator: draws the gate's noise, so that a run can be repeated; None is torch's global generator.
        mesh: a one-dimensional DeviceMesh over whose ranks the experts are spread, in DTensors. Each rank
            gives its own tokens and makes the same calls; see `moe_impls.sharding`.
        device, dtype: of the parameters.

    Attributes:
        w_gate, w_noise: [D, E]. Both start at zero, as in the paper, so that at first the noise alone
            decides. Without noise nothing would tell the experts apart and all tokens would visit the same
            K, so with ``noisy_gating=False`` w_gate starts as the weight of an ``nn.Linear``.
        w_in, b_in, w_out, b_out: the experts' stacked weights, as in `Experts`. Each expert starts like two
            ``nn.Linear`` layers: uniform within ± 1 / sqrt(inputs).
        last_implementation: the name of what computed the latest call, None before the first.

    Raises:
        TypeError, ValueError: an argument is not valid, or the implementation does not declare it.
    """

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_experts: int,
        hidden_size: int,
        noisy_gating: bool = True,
        k: int = 4,
        *,
        implementation: str | Implementation = "auto",
        combine: str = "sum",
        activation: str = "relu",
        output_activation: str = "relu",
        clamp: Clamp = Clamp(),
        bias: bool = True,
        router: RouterSpec | None = None,
        generator: torch.Generator | None = None,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "output_size": output_size}
        sizes |= {"num_experts": num_experts, "hidden_size": hidden_size, "k": k}
        for name, value in sizes.items():
            check_positive(name, value)
        for name, value in {"noisy_gating": noisy_gating, "bias": bias}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        for name, value, kinds in (
            ("implementation", implementation, (str, Implementation)),
            ("router", router, (RouterSpec, type(None))),
            ("generator", generator, (torch.Generator, type(None))),
        ):
            if not isinstance(value, kinds):
                valid = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} is {value!r}; it must be of type {valid}")
        if router is None and k > num_experts:
            raise ValueError(f"k is {k}; it must be at most num_experts, {num_experts}")

        self.input_size, self.output_size = input_size, output_size
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.noisy_gating = noisy_gating
        self.router = router or RouterSpec(k, score="topk_softmax")
        self.k = self.router.top_k
        self.combine = combine
        self.activation, self.output_activation, self.clamp = activation, output_activation, clamp
        self.generator = generator
        if mesh is not None:
            check_mesh(mesh)
            check_ranks(num_experts, mesh.size())
        self.mesh = mesh
        self.implementation = implementation
        self._resolved = self._resolve()
        self.last_implementation: str | None = None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        def of_experts(*shape: int) -> nn.Parameter:
            if mesh is None:
                return parameter(*shape)
            return nn.Parameter(sharding.empty(mesh, *shape, device=device, dtype=dtype))

        D, O, E, H = input_size, output_size, num_experts, hidden_size
        F = 2 * H if activation in GATED_ACTIVATIONS else H
        self.w_gate, self.w_noise = parameter(D, E), parameter(D, E)
        self.w_in, self.w_out = of_experts(E, F, D), of_experts(E, O, H)
        self.register_parameter("b_in", of_experts(E, F) if bias else None)
        self.register_parameter("b_out", of_experts(E, O) if bias else None)
        self._check_configuration()
        self.reset_parameters()

    def _resolve(self) -> Implementation:
        given = self.implementation
        if isinstance(given, str):
            given = resolve(given, distributed=True)
        if self.mesh is None and given.support.distributed:
            raise ValueError(f"mesh is None; implementation {given.name!r} needs a DeviceMesh")
        return given if self.mesh is None or given.support.distributed else expert_parallel.around(given)

    def _check_configuration(self) -> None:
        """Check all that does not depend on the input: here, once.

        `check_inputs` also reads the values of a routing: in each call that would cost 0.8 ms for 2,048
        tokens and K = 8 on two CPU cores, and a wait for the device on CUDA, to find what `route` guarantees.
        """
        name, support = self._resolved.name, self._resolved.support
        if self.mesh is not None and support.even_experts and self.num_experts % self.mesh.size():
            raise ValueError(
                f"num_experts of implementation {name} is {self.num_experts}; "
                f"it must be a multiple of {self.mesh.size()} ranks"
            )
        check_choice(f"dtype of implementation {name}", self.w_in.dtype, support.dtypes)
        x = self.w_gate.new_empty(0, self.input_size)  # no tokens, so there are no values to read
        routing = route(x @ self.w_gate, self.router)
        if self.noisy_gating:
            check_noise(self.router)
        everyone = as_if_all(self.experts, self.num_experts)
        check_inputs(x, routing, everyone, self.combine)
        check_supported(name, support, everyone, self.combine)

    def reset_parameters(self) -> None:
        """Draw the initial parameters, from torch's global generator."""
        for weight, bias, inputs in (
            (self.w_in, self.b_in, self.input_size),
            (self.w_out, self.b_out, self.hidden_size),
        ):
            for drawn in (weight, bias):
                if drawn is not None and self.mesh is None:
                    nn.init.uniform_(drawn, -(inputs**-0.5), inputs**-0.5)
                elif drawn is not None:
                    sharding.uniform_(drawn, inputs**-0.5)
        nn.init.zeros_(self.w_noise)
        if self.noisy_gating:
            nn.init.zeros_(self.w_gate)
        else:
            nn.init.uniform_(self.w_gate, -(self.input_size**-0.5), self.input_size**-0.5)
        if self.mesh is not None:
            sharding.replicate_(self.mesh, self.w_gate)

    @property
    def experts(self) -> Experts:
        """Return the experts' parameters in the form that implementations take: on a mesh this rank's."""
        options = self.activation, self.output_activation, self.clamp
        whole = Experts(self.w_in, self.b_in, self.w_out, self.b_out, *options)
        return whole if self.mesh is None else whole.map(sharding.local)

    def gate(self, x: Tensor) -> tuple[Routing, Tensor]:
        """Route tokens x [T, D], and estimate the load of each expert [E].

        Logits are computed in at least float32, under autocast too. The load is the smooth estimate while
        training with noise and K < E, and otherwise a count (int64), which has no gradient.
        """
        dtype = accumulation_dtype(x.dtype)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device)  # not on the meta device
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            wide = x.to(dtype)
            clean = wide @ self.w_gate.to(dtype)  # [T, E]
            if self.noisy_gating and self.training:
                raw_scale = wide @ self.w_noise.to(dtype)
                noise = None if self.mesh is None else sharding.own_noise(self.mesh, clean, self.generator)
                return noisy_top_k(clean, raw_scale, self.router, generator=self.generator, noise=noise)
            routing = route(clean, self.router)
            return routing, count_load(routing, self.num_experts)

    def forward(self, x: Tensor, loss_coef: float = 1e-2) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: [..., D] with any leading dimensions, in the dtype of the parameters.
            loss_coef: weight of the auxiliary loss.

        Returns:
            y [..., O] in the dtype of x, and the scalar loss
            loss_coef * (cv²(importance) + cv²(load)) over all tokens, on a mesh those of all ranks, in at
            least float32.

        Raises:
            TypeError, ValueError: x is no tensor, or its width, dtype or device does not fit. These checks
                read no values and cost microseconds; all else was checked by the constructor.
            RuntimeError: the implementation has no gradients, and they would be needed.
        """
        self._check_input(x)
        tokens = x.reshape(-1, self.input_size)  # [T, D]
        routing, load = self.gate(tokens)
        experts, taken = self.experts, self._resolved
        if taken.choose is not None and not torch.compiler.is_compiling():
            taken = taken.choose(tokens, routing, experts, combine=self.combine)
        leaves = (tokens, routing.gates, *experts.tensors.values())
        if not taken.support.gradients and needs_gradients(*leaves):
            raise RuntimeError(
                f"implementation {taken.name!r} has no gradients: call the layer under torch.no_grad(), or "
                "make it with implementation='auto'"
            )
        self.last_implementation = taken.name
        spread = {} if self.mesh is None else {"mesh": self.mesh, "num_experts": self.num_experts}
        y = taken.forward(tokens, routing, experts, combine=self.combine, **spread)  # [T, O]
        weight = importance(routing, self.num_experts)
        if self.mesh is not None:
            weight, load = sharding.total(self.mesh, weight, load)
        loss = auxiliary_loss(weight, load, loss_coef)
        return y.reshape(*x.shape[:-1], self.output_size), loss

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x is a {type(x).__name__}; it must be a tensor of shape [..., {self.input_size}]"
            )
        if x.ndim == 0 or x.shape[-1] != self.input_size:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [..., {self.input_size}]")
        if x.device != self.w_in.device:
            raise ValueError(f"x is on {x.device}; it must be on the device of the layer, {self.w_in.device}")
        if x.dtype != self.w_in.dtype:
            raise TypeError(f"x has dtype {x.dtype}; it must have the dtype of the layer, {self.w_in.dtype}")
        support, name = self._resolved.support, self._resolved.name
        check_choice(f"device of implementation {name}", x.device.type, support.devices)
        check_choice(f"dtype of implementation {name}", x.dtype, support.dtypes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if self.mesh is not None:
            names = {f"{prefix}{name}": self.get_parameter(name) for name in self.experts.tensors}
            state_dict = state_dict | {
                name: sharding.own_part(name, state_dict[name], parameter)
                for name, parameter in names.items()
                if name in state_dict
            }
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        # An implementation given by name is pickled by name: a function from a file has no importable module.
        return {name: value for name, value in super().__getstate__().items() if name != "_resolved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolved = self._resolve()

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.output_size}, {self.num_experts}, {self.hidden_size}"
        return (
            f"{sizes}, noisy_gating={self.noisy_gating}, k={self.k}, implementation={self._resolved.name!r}, "
            f"combine={self.combine!r}, activation={self.activation!r}, "
            f"output_activation={self.output_activation!r}, "
            f"{f'clamp={self.clamp}, ' if self.activation == CLAMPED else ''}bias={self.b_in is not None}, "
            f"dtype={dtype_name(self.w_in.dtype)}"
        )
