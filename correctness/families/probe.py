"""Tell what a block's router does by running it: the simplest `RouterSpec` that explains 400 tokens.

The block's experts are called with the tokens, the expert ids and the gates; what they are called with is
compared with `moe_impls.router.route` under every combination of what released models do. Nothing is read
from a name or from a config.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from correctness.families.tiny import D
from correctness.judging.layer_bench import draw
from moe_impls import router_interface
from moe_impls.interface import Routing
from moe_impls.router import route
from moe_impls.router_interface import RouterSpec

TOKENS = 400
TOLERANCE = 2e-5  # of gates, which the block makes in float32
EPSILONS = (1e-5, 1e-6, 1e-8, 0.0)  # of a norm before the router
TINY = 1e-3  # times the usual x is one that shows them
# Logits that show what is added to the sum of the gates, by score; exp of them is above zero in float32.
SMALL = {"sigmoid": (-2.0, -48.0), "sqrtsoftplus": (-2.0, -96.0)}


class NotInTheContract(ValueError):
    """A block that `LayerWeights` cannot say; the message is the reason."""


@dataclass(frozen=True)
class Trace:
    """What a block and its children did with tokens x [T, D]."""

    x: Tensor
    experts_x: Tensor
    routing: Routing
    routed: Tensor  # [T, O], of the experts
    y: Tensor
    outputs: dict[str, Tensor]  # [T, O], of the other children


@dataclass(frozen=True)
class Router:
    """The names of a router's parameters and buffers, and what becomes of the logits."""

    spec: RouterSpec
    weight: str
    roles: dict[str, str]  # router_bias, selection_bias or expert_scale: the name of a tensor
    norm: str = ""
    norm_scale: float = 1.0
    norm_epsilon: float = 1e-6

    def normed(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.norm:
            return x
        root = (x.square().mean(dim=-1, keepdim=True) + self.norm_epsilon).sqrt()
        return x / root * named(block)[self.norm].to(x) * self.norm_scale

    def logits(self, block: nn.Module, x: Tensor) -> Tensor:
        """Compute the logits of tokens x [T, D]."""
        z = self.normed(block, x) @ named(block)[self.weight].to(x).T
        bias = self.vector(block, "router_bias")
        return z if bias is None else z + bias.to(x)

    def vector(self, block: nn.Module, role: str) -> Tensor | None:
        """Find the tensor [E] with that role."""
        name = self.roles.get(role)
        return None if name is None else named(block)[name].flatten()

    def route(self, block: nn.Module, x: Tensor) -> Routing:
        """Route tokens as this says."""
        ids, gates = route(
            self.logits(block, x), self.spec, selection_bias=self.vector(block, "selection_bias")
        )
        scale = self.vector(block, "expert_scale")
        return Routing(ids, gates if scale is None else gates * scale.to(gates)[ids])


def named(block: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers by name."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def randomise(block: nn.Module, seed: int = 0) -> nn.Module:
    """Draw parameters as the bench does, and buffers of floats small; in eval mode and float32."""
    generator = torch.Generator().manual_seed(seed)
    block = block.eval().float()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(parameter, generator))
        for buffer in block.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return block


def experts_name(block: nn.Module) -> str:
    """Find the experts of a block: the module with weights of three dimensions that are no shared ones."""
    for name, module in block.named_modules():
        stacked = any(p.ndim == 3 for p in module.parameters(recurse=False))
        if stacked and hasattr(module, "down_proj") and not name.startswith("shared"):
            return name
    raise NotInTheContract("no module of it holds the weights of all experts")


@torch.no_grad()
def trace(block: nn.Module, experts: str, x: Tensor) -> Trace:
    """Call a block on tokens x [T, D], as one sequence, and record what its experts are called with."""
    seen: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}

    def on_experts(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        seen["args"], seen["out"] = (*args, *kwargs.values()), out

    def on_child(name: str) -> Any:
        def record(module: nn.Module, args: tuple, out: Any) -> None:
            if isinstance(out, Tensor) and out.numel() == x.numel():
                outputs[name] = out.reshape(x.shape)

        return record

    hooks = [block.get_submodule(experts).register_forward_hook(on_experts, with_kwargs=True)]
    hooks += [m.register_forward_hook(on_child(n)) for n, m in block.named_children() if n != experts]
    try:
        y = block(x.clone().unsqueeze(0))
    finally:
        for hook in hooks:
            hook.remove()
    y = y[0] if isinstance(y, tuple) else y
    if len(seen.get("args", ())) < 3:
        raise NotInTheContract("its experts are not called with expert ids and gates for each token")
    inputs, ids, gates = seen["args"][:3]
    if ids.is_floating_point():
        ids, gates = gates, ids
    return Trace(
        x, inputs.reshape(-1, inputs.shape[-1]), Routing(ids.long(), gates), seen["out"].reshape(len(x), -1),
        y.reshape(len(x), -1), outputs,
    )  # fmt: skip


@torch.no_grad()
def find_router(block: nn.Module, experts: str) -> tuple[Router, Trace]:
    """Find the simplest router that explains what a block's experts are called with.

    Raises:
        NotInTheContract: none does.
    """
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))
    seen = trace(block, experts, x)
    ids, _ = seen.routing
    if ids.shape[0] != TOKENS or bool((ids.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise NotInTheContract("the ids of some tokens are not distinct, or are not one row a token")
    best, at = 0.0, ""
    for guess in _guesses(block, experts, ids):
        got = guess.route(block, x.double())
        share = float((got.expert_ids.sort().values == ids.sort().values).all(dim=1).double().mean())
        if share > best:
            best, at = share, f"{guess.weight} by {guess.spec.score}"
        if share == 1 and (scale := _scale(got, seen.routing)):
            found = replace(guess, spec=replace(guess.spec, scale=scale))
            found = _with_norm_epsilon(block, experts, found, TINY * x)
            return _with_epsilon(block, experts, found), seen
    if best == 1:
        raise NotInTheContract("the choice of experts is explained, no rule explains the gates")
    raise NotInTheContract(
        f"no rule explains the choice of experts; the best, {at or 'none'}, explains {best:.0%} of tokens"
    )


def _guesses(block: nn.Module, experts: str, ids: Tensor) -> Iterator[Router]:
    """Yield what a router may be, the simplest first."""
    tensors = {
        n: t for n, t in named(block).items() if not n.startswith(experts + ".") and t.is_floating_point()
    }
    down: Any = block.get_submodule(experts).down_proj
    K, E = ids.shape[1], len(down)
    weights = [n for n, t in tensors.items() if t.ndim == 2 and t.shape == (E, D)]
    vectors = [n for n, t in tensors.items() if t.numel() == E and "shared" not in n]
    norms = [n for n, t in tensors.items() if t.shape == (D,) and "shared" not in n]
    roles: tuple[str, ...] = ("router_bias", "selection_bias", "expert_scale")
    chosen: list[dict[str, str]] = [
        dict(zip(rs, vs, strict=True))
        for n in range(len(vectors) + 1)
        for vs in itertools.combinations(vectors, n)
        for rs in itertools.permutations(roles, n)
    ]
    normed = [("", 1.0), *itertools.product(norms, (1.0, D**-0.5))]
    for weight, (norm, scale), vector, spec in itertools.product(weights, normed, chosen, list(_specs(E, K))):
        if norm and norm.partition(".")[0] != weight.partition(".")[0]:  # of another module
            continue
        has_bias = "selection_bias" in vector
        if spec.score == "sparsemixer" and has_bias:
            continue
        for biased in router_interface.BIASED if has_bias else ("score",):
            yield Router(replace(spec, biased=biased), weight, vector, norm, scale)


def _specs(E: int, K: int) -> Iterator[RouterSpec]:
    groups = [(1, 1, "max")]
    for g in range(2, E // 2 + 1):
        if E % g == 0:
            kept = (k for k in range(1, g) if E // g * k >= K)
            groups += [(g, k, how) for k in kept for how in router_interface.GROUP_SCORES]
    for g, kept, how in groups:
        for score, renormalise in itertools.product(router_interface.SCORES, (False, True)):
            if not (renormalise and score == "topk_softmax") and (score != "sparsemixer" or g == 1):
                yield RouterSpec(K, score, renormalise, 1.0, g, kept, how)


def _by_id(routing: Routing) -> Tensor:
    return routing.gates.double().gather(1, routing.expert_ids.sort().indices)


def _scale(got: Routing, want: Routing) -> float | None:
    """Return the number that makes the gates equal, to six digits; None if there is none."""
    ratio = _by_id(want) / _by_id(got)
    middle = float(ratio.median())
    if not bool(((ratio - middle).abs() <= TOLERANCE * abs(middle)).all()):
        return None
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 8))
    return next(r for r in rounded if abs(r - middle) <= TOLERANCE / 5 * abs(middle))


def _with_norm_epsilon(block: nn.Module, experts: str, router: Router, x: Tensor) -> Router:
    """Choose the epsilon of the norm before the router by which a small x has the gates that it has."""
    if not router.norm:
        return router
    want = trace(block, experts, x).routing

    def error(guess: Router) -> float:
        got = guess.route(block, x.double())
        differ = got.expert_ids.sort().values != want.expert_ids.sort().values
        return float(differ.sum()) + float((_by_id(got) - _by_id(want)).abs().max())

    return min((replace(router, norm_epsilon=epsilon) for epsilon in EPSILONS), key=error)


def _with_epsilon(block: nn.Module, experts: str, router: Router) -> Router:
    """Measure what is added to the sum that gates are divided by, on tokens with scores near zero."""
    if not router.spec.renormalise or router.spec.score not in SMALL or router.norm:
        return router
    weight = named(block)[router.weight].double()
    bias = router.vector(block, "router_bias")
    generator = torch.Generator().manual_seed(2)
    wanted = torch.linspace(*SMALL[router.spec.score], TOKENS, dtype=torch.float64).unsqueeze(1)
    wanted = wanted + torch.rand(TOKENS, len(weight), generator=generator, dtype=torch.float64)
    x = (wanted if bias is None else wanted - bias) @ torch.linalg.pinv(weight).T
    seen = trace(block, experts, x.float())
    z = router.logits(block, x).gather(1, seen.routing.expert_ids)
    scores = z.sigmoid() if router.spec.score == "sigmoid" else torch.nn.functional.softplus(z).sqrt()
    total, kept = scores.sum(dim=1), seen.routing.gates.double().sum(dim=1) / router.spec.scale
    tells = (kept > 0.1) & (kept < 0.9)
    if not bool(tells.any()):
        return router
    epsilon = float((total * (1 / kept - 1))[tells].median())
    return replace(router, spec=replace(router.spec, epsilon=float(f"{epsilon:.2g}")))
