"""Tell which activation of the contract a function computes, by running it.

A name in a configuration says what was meant; the values say what is computed. The function is run in float64
over a range that reaches every clamp a released model has, and compared with each activation of its kind. One
that computes in float32 inside is held to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe_impls.functional import activate
from moe_impls.interface import ACTIVATIONS, CLAMPED, GATED_ACTIVATIONS, Clamp

NEAR, FAR = 0.125, 1e6  # on this and on the other side of every limit
WIDTH = 7  # H of the probe: odd, so that gate and up rows in another order are told from one another
EXACT, ROUNDED = 1e-12, 1e-6  # largest error, by the size of the arguments, of float64 and of float32

Activation = Callable[[Tensor], Tensor]  # [..., F] -> [..., H]


class UnknownActivation(ValueError):
    """A function that is no activation of the contract; the message says where it differs."""


def activation_of(
    function: Activation,
    *,
    gated: bool,
    interleaved: bool = False,
    numbers: Iterable[float] = (),
    device: torch.device | str = "cpu",
) -> tuple[str, Clamp]:
    """Return the name of the activation that ``function`` computes, and its clamp.

    Args:
        function: [..., F] -> [..., H] in the dtype of its argument; F = 2H if it is gated.
        interleaved: the columns of its argument are gate, up, gate, up, not all gates first.
        numbers: what a limit, alpha or offset may be, exactly; what is measured is rounded to
            four decimals where it is none of them.
        device: where the function can be run.

    Raises:
        UnknownActivation: it computes none of them, or cannot be run.
    """
    gate, up = (t.to(device) for t in (_gated_points() if gated else (_points(), _points()[:0])))
    found = _run(function, gate, up, gated, interleaved)
    rounded = bool((found == found.float().double()).all())
    clamp = _measure_clamp(function, interleaved, tuple(numbers), device) if gated else None
    size = (1 + gate.abs()) * (1 + up.abs()) if gated else 1 + gate.abs()
    near: tuple[float, str, int, float] = (math.inf, "", 0, 0.0)
    for name in (a for a in ACTIVATIONS if (a in GATED_ACTIVATIONS) == gated):
        if name == CLAMPED and clamp is None:
            continue
        right = _run(lambda h, name=name: activate(h, name, clamp or Clamp()), gate, up, gated, False)
        errors = ((found - right).abs() / size).nan_to_num(math.inf)
        if float(errors.max()) <= (ROUNDED if rounded else EXACT):
            return name, clamp if name == CLAMPED and clamp else Clamp()
        at = int(errors.argmax())
        near = min(near, (float(errors.mean()), name, at, float(right[at])))
    _, name, at, right = near
    where = f"gate {float(gate[at]):.4g} and up {float(up[at]):.4g}" if gated else f"{float(gate[at]):.4g}"
    stops = gated and float(found[gate == gate[-1]].sub(found[gate == gate[-1] / 10]).abs().max()) == 0
    raise UnknownActivation(
        f"at {where} it is {float(found[at]):.6g}; {name}, the nearest that is known, is {right:.6g}"
        + ("; it stops to grow with the gate: a limit after the activation?" if stops else "")
    )


def _points() -> Tensor:
    """Arguments, [N]: dense where activations bend, sparse far out; N is a multiple of WIDTH."""
    far = torch.tensor([20.0, 50.0, 100.0, 1e3, 1e4], dtype=torch.float64, device="cpu")
    near = torch.linspace(-12.5, 12.5, 242, dtype=torch.float64, device="cpu")
    return torch.cat([-far, near, far])


def _gated_points() -> tuple[Tensor, Tensor]:
    """Every pair of gates and of values that they multiply: two of [N], N a multiple of WIDTH."""
    ups = [-1e4, -60.0, -11, -6.5, -2.7, -0.4, 0, 0.9, 3.1, 6.9, 8.5, 11, 60.0, 1e4]
    gate, up = torch.meshgrid(_points(), _points().new_tensor(ups), indexing="ij")
    return gate.flatten(), up.flatten()


def _run(function: Activation, gate: Tensor, up: Tensor, gated: bool, interleaved: bool) -> Tensor:
    """Run a function of [..., F] on gates and ups [N]: float64 [N]."""
    gate = gate.view(-1, WIDTH)
    if gated:
        pair = (gate, up.view(-1, WIDTH))
        h = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    else:
        h = gate.clone()
    try:
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
            out = function(h)
    except Exception as error:  # it may be anything
        raise UnknownActivation(f"running it failed: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or out.shape != gate.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UnknownActivation(f"of {list(h.shape)} it makes {got}; it must be {list(gate.shape)}")
    return out.double().flatten()


def _measure_clamp(
    function: Activation, interleaved: bool, numbers: tuple[float, ...], device: torch.device | str
) -> Clamp | None:
    """Measure limit, alpha and offset of a clamped swiglu; None where the values are those of no such form.

    Of gate * sigmoid(alpha * gate) * (up + offset), which is linear in a small up: its slope tells alpha, its
    zero the offset, and an up beyond the limit the limit.
    """

    def value(gate: float, up: float) -> float:
        row = torch.ones(WIDTH, dtype=torch.float64, device=device)
        return float(_run(function, gate * row, up * row, True, interleaved)[0])

    at_zero = value(NEAR, 0.0)
    slope = (value(NEAR, NEAR) - at_zero) / NEAR
    sigmoid = slope / NEAR
    if not 0 < sigmoid < 1:
        return None
    offset = at_zero / slope
    limit = value(NEAR, FAR) / slope - offset
    limit = math.inf if not limit < FAR * (1 - ROUNDED) else limit
    alpha = math.log(sigmoid / (1 - sigmoid)) / NEAR
    return Clamp(*(_exactly(v, numbers) for v in (limit, alpha, offset)))


def _exactly(measured: float, numbers: tuple[float, ...]) -> float:
    """Return the number that was measured, without the error of the measurement."""
    if not math.isfinite(measured):
        return measured
    near = [n for n in numbers if abs(n - measured) <= 1e-4 * max(abs(n), 1)]
    return min(near, key=lambda n: abs(n - measured), default=round(measured, 4) + 0.0)
