"""The checks of the balance losses of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor

from correctness.checks.layer_balance import BEYOND
from correctness.judging.budget import entry_budgets, eps, roundings
from correctness.judging.finding import CheckFailed
from correctness.judging.layer_bench import B, Bench, S, T, build, onto_parameters, trained, weights_of
from correctness.oracle import layer_losses as oracle
from correctness.oracle.layer_losses import LOSSES
from moe_impls.interface import dtype_name
from moe_impls.registry import one_line


def losses(bench: Bench) -> None:
    """Return the oracle's balance losses and gradients from `losses`, without padding and with."""
    subject, right, dtype = bench.subject, bench.expected, bench.dtype
    assert subject.losses
    twin = build(subject, dtype).to("cpu", torch.float64)
    weights = weights_of(subject, twin)
    parameters = trained(bench.layer)
    real = torch.rand(T, generator=torch.Generator().manual_seed(4)) < 0.6
    for mask in (None, torch.ones(T, dtype=torch.bool), real):
        x, kept = bench.x, slice(None) if mask is None else mask
        if mask is not None:
            x[~mask] *= -3  # what padding holds has no effect
        shaped = None if mask is None else mask.to(x.device).reshape(B, S)
        how = "without a mask" if mask is None else f"with {int((~mask).sum())} of {T} tokens masked"
        try:
            found = dict(subject.losses(bench.layer, x.unflatten(0, (B, S)), shaped))
        except Exception as error:
            raise CheckFailed(f"losses(layer, x, mask) {how} raises {one_line(error)}") from error
        if not found or not found.keys() <= set(LOSSES):
            raise CheckFailed(f"losses returns {list(found)}; valid are {', '.join(LOSSES)}")
        for name, got in found.items():
            if not isinstance(got, Tensor) or got.shape != () or not got.requires_grad:
                raise CheckFailed(f"{name} must be a scalar tensor that requires a gradient")
            x64, ids = right.x[kept].double(), right.ids[kept]
            terms = oracle.loss(name, x64, ids, weights)
            plain = oracle.loss(name, x64.float(), ids, weights)
            allowed = entry_budgets(terms, plain, torch.float32)
            bench.require(name, got, terms.values["loss"], allowed["loss"], f" {how}")
            grads = torch.autograd.grad(got, list(parameters.values()), allow_unused=True, retain_graph=True)
            want = onto_parameters(subject, twin, terms.values, allowed)
            for parameter, grad in zip(parameters, grads, strict=True):
                if parameter in want:
                    grad = torch.zeros_like(parameters[parameter]) if grad is None else grad
                    bench.require(
                        f"the gradient of {parameter} from {name}", grad, *want[parameter], f" {how}"
                    )
                elif grad is not None and bool(grad.any()):
                    raise CheckFailed(f"{name} gives {parameter} a gradient; only the router is to have one")


def losses_of_many_visits(bench: Bench) -> None:
    """Count beyond 256 visits of an expert in 16 bits, in the losses, too.

    Of the same tokens many times over, a loss is what it is of them once, as far as the oracle's is.
    """
    subject, right = bench.subject, bench.expected
    assert subject.losses
    weights = right.weights
    E, K = len(weights.router_weight), weights.router.top_k
    times = -(-BEYOND * E // (K * T))
    with torch.no_grad():
        once, many = (
            subject.losses(bench.layer, bench.x.repeat(n, 1).unflatten(0, (-1, S)), None) for n in (1, times)
        )
    for name, got in many.items():
        few, all_ = (
            oracle.loss(name, right.x.double().repeat(n, 1), right.ids.repeat(n, 1), weights)
            for n in (1, times)
        )
        moved = float(got) - float(once[name])
        allowed = 2 * roundings(eps(bench.dtype)) * float(all_.scale["loss"])
        if not abs(moved - float(all_.values["loss"] - few.values["loss"])) <= allowed:
            raise CheckFailed(
                f"{name} is {float(once[name]):.4g} of {T} tokens in {dtype_name(bench.dtype)}, and "
                f"{float(got):.4g} of the same {times} times over: does a count stop at 256?"
            )
