"""The oracle of the balance losses of whole layers: values, and gradients in the router's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from correctness.oracle import router
from correctness.oracle.layer import Sums, Terms, add_router, gates, logit_gradient, logits
from moe_impls.interface import check_choice
from moe_impls.layer_interface import LayerWeights

LOSSES = ("load_balancing_loss", "z_loss", "auxiliary_loss")


def loss(name: str, x: Tensor, ids: Tensor, weights: LayerWeights) -> Terms:
    """Compute one of LOSSES over tokens x [T, D], T > 0, visiting ``ids``: its value, "loss", and gradients.

    auxiliary_loss is cv²(importance) + cv²(load) with the load a count, without a coefficient.

    Raises:
        ValueError: the loss has no equation here.
    """
    check_choice("loss", name, LOSSES)
    z, spec = logits(x, weights), weights.router
    T, E = z.shape
    tokens = range(T)
    if name == "load_balancing_loss":
        value, size = router.load_balancing_loss(z, ids, tokens), 0.0
        f = ids.flatten().bincount(minlength=E).to(z) / ids.numel()
        p = z.softmax(dim=1)
        dz, dz_scale = (E / T * p * (f + sign * (f * p).sum(dim=1, keepdim=True)) for sign in (-1, 1))
    elif name == "z_loss":
        value, size = router.z_loss(z, tokens), 0.0
        dz = 2 / T * z.logsumexp(dim=1, keepdim=True) * z.softmax(dim=1)
        dz_scale = 2 / T * (1 + z.abs().amax(dim=1, keepdim=True)) * z.softmax(dim=1)
    else:
        g = gates(z, ids, spec)
        sums = router.importance(ids, g, E)
        load = ids.flatten().bincount(minlength=E).tolist()
        value = router.cv_squared(sums) + router.cv_squared(load)
        size = 1.0  # the squares of the mean, which cancel in a variance, over the square of the mean
        v = torch.tensor(sums, dtype=z.dtype)
        mean, variance = v.mean(), v.var() if E > 1 else v.new_zeros(())
        q, spread = mean.square() + 1e-10, max(1, E - 1)
        shift = variance * 2 * mean / E / q.square()
        d = 2 * (v - mean) / spread / q - shift
        d_scale = 2 * (v.abs() + mean.abs()) / spread / q + shift.abs()
        dz, dz_scale = logit_gradient(z, ids, spec, d[ids], d_scale[ids])
    sums = Sums(x.dtype, x.dtype)
    add_router(sums, x, weights, dz, dz_scale, dz)
    values, scale = sums.terms()
    values["loss"] = z.new_tensor(value)
    scale["loss"] = values["loss"].abs().clamp(min=size)
    return Terms({n: v for n, v in values.items() if n != "x"}, {n: v for n, v in scale.items() if n != "x"})
