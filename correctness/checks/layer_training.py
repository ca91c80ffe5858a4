"""What a whole layer is held to in training: noise, recomputation, and what a step leaves behind.

Where a random generator decides the output, a call is a function of its seed, and its gradients are those of
that function. A layer's file may hold ``routing(layer, x) -> Routing`` that reports, from the same seed, what
the call does with x [T, D]; output and gradients are then held to the oracle for that routing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from correctness.checks.case import Check
from correctness.judging import layer_reported
from correctness.judging.budget import allowed_by_differences, eps, roundings
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import COPIES, B, Bench, S, T, build, call_of, draw, trained
from correctness.judging.layer_steps import (
    SEEDS,
    Step,
    as_it_is,
    fresh,
    generators,
    gradients_of,
    held,
    is_noisy,
    put_back,
    require_gradients,
    same,
    seeded,
    step,
)
from correctness.problems.layers import LayerProblem
from correctness.problems.problem import LOW_PRECISION

MANY = COPIES * T + 1  # tokens, of which a tile of usual size leaves a rest
GROUPS = 16  # of parameters, whose gradients are compared with differences together
STEP = 2.0**-7  # of a difference, in units of the root mean square of what is moved


def training(bench: Bench) -> None:
    """Be right in training mode, with few tokens and many; with noise, for the function that a seed makes.

    That function is repeated bit by bit by its seed, finite, and its gradients are its derivatives; with
    `routing` in the file, output and gradients are right for the routing that it reports.
    """
    bench.layer.train()
    gradients = bench.subject.support.gradients
    if is_noisy(bench):
        _noisy(bench)
        return
    start = held(bench.layer)
    y = bench.call(bench.x.unflatten(0, (B, S)))
    bench.require_y(y.flatten(0, 1), context=" in training mode")
    put_back(bench.layer, start)  # a bias may have moved
    rows = call_of(T, MANY)[0]
    many = bench.call(bench.x[rows].unsqueeze(0)).squeeze(0)
    where = f" in training mode, with {len(many)} tokens"
    only = call_of(T, MANY)[1] if bench.subject.routing else slice(None)  # comparing a report takes long
    bench.require_y(many, rows, where, only=only)
    put_back(bench.layer, start)
    skewed = torch.cat([rows[:T], rows * (rows % 3 == 0)])  # two of three tokens are the same one
    y = bench.call(bench.x[skewed].unsqueeze(0)).squeeze(0)
    only = torch.arange(0, len(skewed), COPIES) if bench.subject.routing else slice(None)
    bench.require_y(y, skewed, f"{where}, most of them the same one", only=only)
    for tokens, x_wanted in ((T, True), (MANY, True), (T, False)) if gradients else ():
        context = " in training mode" if tokens == T else where
        context += "" if x_wanted else " where x needs none"
        put_back(bench.layer, start)
        dropping = bench.dropping(tokens)
        put_back(bench.layer, start)
        with during("in training mode"):
            found = gradients_of(dropping, tokens=tokens, x_wanted=x_wanted)
        require_gradients(dropping, found, context)


def training_only(bench: Bench) -> None:
    """Depend on each parameter that training_only names where noise decides what training computes.

    In y, or in what is returned beside it. A layer whose noise is turned off may keep its parameters.
    """
    layer = bench.layer.train()
    if not is_noisy(bench):
        return
    x, before = bench.x.repeat(8, 1).unsqueeze(0), held(layer)
    parameters, generator = dict(layer.named_parameters()), torch.Generator().manual_seed(9)

    def results() -> list[Tensor]:
        """Call the layer from each seed; all tensors that it returns."""
        found = []
        for seed in SEEDS:
            with torch.no_grad(), seeded(layer, seed):
                found += [t for t in pytree.tree_leaves(layer(x)) if isinstance(t, Tensor)]
            put_back(layer, {n: t for n, t in before.items() if n not in parameters})
        return found

    first = results()
    for name in bench.subject.read(layer).training_only:
        with torch.no_grad():
            parameters[name].copy_(draw(parameters[name], generator))
        if all(map(same, results(), first)):
            raise CheckFailed(f"training_only names {name}, on which nothing depends in training mode either")
        put_back(layer, before)


def _noisy(bench: Bench) -> None:
    """Hold a layer whose output a random generator decides to what its seed makes of it."""
    once, again = (_seeded_step(fresh(bench.subject, bench)) for _ in range(2))
    support = bench.subject.support
    if support.deterministic and not torch.equal(once.y, again.y):
        raise CheckFailed(
            "two calls in training mode from equal seeds differ: noise comes from where no seed of torch, "
            "Python or NumPy reaches, or memory is read that was not written"
        )
    if not bool(once.y.isfinite().all()):
        raise CheckFailed("y in training mode is not finite")
    if not support.gradients:
        return
    for name, got in once.grads.items():
        if got is not None and not bool(got.isfinite().all()):
            raise CheckFailed(f"the gradient of {name} in training mode is not finite")
    unseen = _seeded_step(fresh(bench.subject, bench), x_wanted=False)
    for name, got in unseen.grads.items():
        if (got is None) != (once.grads[name] is None):
            raise CheckFailed(f"the gradient of {name} is missing in training mode where x needs none")
    if layer_reported.can_tell(bench):
        layer_reported.require_as_reported(fresh(bench.subject, bench))
    elif bench.dtype not in LOW_PRECISION:  # whose numbers are too far apart for differences
        _differences(fresh(bench.subject, bench))


def _seeded_step(bench: Bench, dy: Tensor | None = None, *, x_wanted: bool = True, call=None) -> Step:
    x, dy = bench.x.unflatten(0, (B, S)), bench.expected.dy if dy is None else dy
    with during("a step in training mode"), seeded(bench.layer, 0):
        return step(bench, x, dy, x_wanted=x_wanted, call=call)


def _differences(bench: Bench) -> None:
    """Compare gradients with differences of the output under one seed, for the tokens whose routing stays."""
    x, dy, layer = bench.x, bench.expected.dy.double(), bench.layer
    before, leaves = held(layer), {"x": x, **trained(layer)}
    generator, names = torch.Generator().manual_seed(6), [*leaves]
    size = -(-len(names) // GROUPS)
    for group in ([*names[i : i + size]] for i in range(0, len(names), size)):
        along = {}
        for name in group:
            unit = leaves[name].detach().double().square().mean().sqrt().clamp(min=2.0**-6)
            along[name] = unit * torch.randn(leaves[name].shape, generator=generator, dtype=torch.float64)

        def outputs(h: float, along: dict[str, Tensor] = along) -> Tensor:
            """Compute dy · y for each token where the group is moved by h: [T]."""
            put_back(layer, before)
            moved = x + (h * along["x"]).to(x) if "x" in along else x
            with torch.no_grad(), seeded(layer, 0):
                for name in along.keys() - {"x"}:
                    leaves[name].add_((h * along[name]).to(leaves[name]))
                y = bench.call(moved.unflatten(0, (B, S)))
            return (y.flatten(0, 1).double().cpu() * dy).sum(dim=1)

        coarse, fine = ((outputs(h) - outputs(-h)) / (2 * h) for h in (STEP, STEP / 2))
        terms = (outputs(0).abs() + dy.norm(dim=1)).cpu()
        put_back(layer, before)
        # Where the routing or the side of a kink changes on the way, the two differ by as much as y jumps.
        steady = (coarse - fine).abs() <= 2.0**-5 * terms
        if int(steady.sum()) < T // 4:
            continue
        grads = _seeded_step(bench, torch.where(steady.unsqueeze(1), dy, 0.0).to(bench.expected.dy)).grads
        put_back(layer, before)
        got = sum(
            float((grad.flatten().double().cpu() * along[name].flatten()).sum())
            for name in group
            if (grad := grads[name]) is not None
        )
        allowed = allowed_by_differences(coarse[steady], fine[steady], terms[steady], STEP / 2, bench.dtype)
        want = float(fine[steady].sum())
        if not abs(got - want) <= allowed:
            missing = [name for name in group if grads[name] is None]
            raise CheckFailed(
                f"in training mode y changes by {want:.6g} along a change of {', '.join(group)}, and its "
                f"gradient says {got:.6g} (differences are exact to {allowed:.2g}): "
                + (
                    f"the gradient of {', '.join(missing)} is missing"
                    if missing
                    else "it is the gradient of something else than what was computed"
                )
            )


def recomputed(bench: Bench) -> None:
    """Give the same gradients when the call is recomputed, and count nothing twice.

    A backward moves no buffer that the call has moved already. Under torch.utils.checkpoint around the layer
    the recomputation draws the same noise and chooses the same experts; if `recompute` is declared, the
    buffers are moved as without it, too.
    """
    support = bench.subject.support
    plain, again = (fresh(bench.subject, bench) for _ in range(2))
    states = []

    def note() -> None:
        states.append(held(plain.layer))

    states.append(held(plain.layer))
    with during("a step in training mode"), seeded(plain.layer, 0):
        x, dy = plain.x.unflatten(0, (B, S)), plain.expected.dy
        right = step(plain, x, dy, between=note)
    start, called = states
    done = held(plain.layer)
    for name in done:
        if not same(start.get(name, called[name]), called[name]) and not same(called[name], done[name]):
            raise CheckFailed(
                f"{name} is moved by the call and again by its backward: what is recomputed counts twice"
            )
    declared = support.recompute
    moves = any(not same(start[name], done[name]) for name in start)  # others are made by the call
    if not declared and (moves or generators(plain.layer)):
        return

    def through(x: Tensor) -> Tensor:
        result = checkpoint(again.layer, x, use_reentrant=False)
        return result[0] if isinstance(result, tuple) else result

    with during("a step under torch.utils.checkpoint"), seeded(again.layer, 0):
        found = step(again, x, dy, call=through)
    for name, got in found.grads.items():
        if not _as_good(bench, name, got, right.grads[name]):
            raise CheckFailed(
                f"the gradient of {name} is another under torch.utils.checkpoint: the recomputation "
                "draws other noise or chooses other experts"
            )
    after = held(again.layer)
    for name in done if declared else ():
        if not same(done[name], after[name]):
            raise CheckFailed(f"{name} is moved otherwise under torch.utils.checkpoint than without it")


def _as_good(bench: Bench, name: str, got: Tensor | None, want: Tensor | None) -> bool:
    if got is None or want is None:
        return got is want
    known = bench.expected.allowed.get(name)
    unknown = roundings(eps(bench.dtype)) * want.abs().max()
    allowed = unknown if known is None else known.to(want).flatten()
    return bool(((got - want).abs().flatten() <= allowed).all())


def after_training(bench: Bench) -> None:
    """Depend in eval mode on parameters and buffers alone, and on what a state dict holds, after training.

    With those that training moved put back, the output is what it was; and a new layer that loads the state
    dict of the trained one computes the same.
    """
    layer, x = bench.layer, bench.x.unflatten(0, (B, S))
    before = held(layer)
    layer.train()
    for seed in range(3):
        with during(f"call {seed + 1} in training mode"), seeded(layer, seed):
            if bench.subject.support.gradients:
                step(bench, x, bench.expected.dy)
            else:
                bench.call(x)
        if bench.subject.update_bias:
            with during("update_bias(layer)"), torch.no_grad():
                bench.subject.update_bias(layer)
    layer.eval()
    trained_y = bench.call(x).detach()
    now = as_it_is(bench)
    now.require_y(now.call(now.x.unflatten(0, (B, S))).flatten(0, 1), context=" in eval mode after training")
    other = build(bench.subject, bench.dtype, seed=7)
    with during("load_state_dict of a trained layer"):
        other.load_state_dict(layer.state_dict())
    with during("a new layer with the state dict of a trained one"):
        y = replace(bench, layer=other).call(x)
    if not _close(bench, y, trained_y):
        raise CheckFailed(
            "a new layer with the state dict of a trained one gives another output: training has changed "
            "something that the state dict does not hold"
        )
    put_back(layer, before)
    bench.require_y(
        bench.call(x).flatten(0, 1),
        context=" in eval mode after training, with all parameters and buffers as they were",
    )


def _close(bench: Bench, got: Tensor, want: Tensor) -> bool:
    allowed = bench.expected.allowed["y"].to(want.device)
    return bool(((got - want).flatten(0, 1).abs() <= allowed).all())


_FLOAT32 = (LayerProblem(),)

TRAINING = (
    Check(training, _FLOAT32, needs="training"),
    Check(recomputed, _FLOAT32, needs="training and gradients"),
    Check(after_training, _FLOAT32, needs="training"),
    Check(training_only, _FLOAT32, needs="training and training_only"),
)
