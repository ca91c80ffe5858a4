"""The check of how training moves a whole layer's selection bias: by its rule, or towards balance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from correctness.checks.case import Check
from correctness.checks.layer_bias import made_of
from correctness.judging.budget import eps, roundings
from correctness.judging.finding import CheckFailed, during
from correctness.judging.layer_bench import Bench, S, T, weights_of
from correctness.judging.layer_steps import as_it_is, held, is_noisy, seeded, step
from correctness.oracle import layer as oracle
from correctness.problems.layers import LayerProblem
from correctness.problems.problem import LOW_PRECISION
from moe_impls.interface import dtype_name
from moe_impls.layer_interface import BiasRule

MOST = 1024  # tokens of a step
BEYOND = 600  # visits of an expert; bfloat16 counts to 256


def bias_update(bench: Bench) -> None:
    """Move the selection bias in training by its rule, and without one so that the balance improves.

    The bias moves in the call, or by `update_bias(layer)` in the layer's file, for all calls in training mode
    since the last: those of an evaluation between two steps do not count.
    Without `bias_rule`, a bias that moves raises the least loaded expert over the most loaded. In 16 bits,
    too, where each expert has more visits than bfloat16 counts, but for experts near the average load.
    """
    layer, subject = bench.layer, bench.subject
    if is_noisy(replace(bench, layer=layer.train())):
        return
    is_low = bench.dtype in LOW_PRECISION
    if is_low:  # a bias that is large next to its step would lose it
        with torch.no_grad():
            for name in made_of(bench):
                dict((*layer.named_parameters(), *layer.named_buffers()))[name].zero_()
    K, E = subject.read(layer).router.top_k, len(subject.read(layer).router_weight)
    most = 2 * T if is_low else MOST
    bench = as_it_is(bench, tokens=min(most, max(2 * T, 16 * E // K // S * S)))
    turns: list[tuple[Callable[[Tensor, Tensor], Tensor], ...]] = [(_all,), (_uneven,), (_one,)]
    for turn in [*turns, (_all, _of_the_least)] if subject.update_bias else turns:
        before = _bias(bench)
        load = torch.stack([_train(bench, pick, least=is_low * BEYOND * E // K) for pick in turn]).sum(0)
        seen = torch.zeros_like(load)
        if subject.update_bias:
            seen = _evaluate(bench)
            with during("update_bias(layer)"), torch.no_grad():
                subject.update_bias(layer)
        moved, rule = _bias(bench) - before, subject.read(layer).bias_rule
        _require_moved(moved, load, rule, before, bench.dtype, seen)


def _bias(bench: Bench) -> Tensor:
    bias = bench.subject.read(bench.layer).selection_bias
    assert bias is not None
    return bias.detach().cpu().clone()


def _all(visits: Tensor, mass: Tensor) -> Tensor:
    """Pick all tokens."""
    return torch.ones(len(visits), dtype=torch.bool)


def _one(visits: Tensor, mass: Tensor) -> Tensor:
    """Pick one token, of those that leave the last experts empty."""
    last = (visits * torch.arange(visits.shape[1])).amax(dim=1).argmin()
    return torch.arange(len(visits)) == last


def _uneven(visits: Tensor, mass: Tensor) -> Tensor:
    """Pick tokens whose gates [T, E] weigh experts more, and others less, than their visits [T, E] do."""
    drawn = torch.rand(256, len(visits), generator=torch.Generator().manual_seed(10)) < 0.4
    by_visits, by_mass = (
        (drawn.double() @ t - (drawn.double() @ t).mean(dim=1, keepdim=True)).sign() for t in (visits, mass)
    )
    return drawn[(by_visits != by_mass).sum(dim=1).argmax()]


def _of_the_least(visits: Tensor, mass: Tensor) -> Tensor:
    """Pick two tokens of the expert that all of them visit least, which two more leave so."""
    of = visits[:, visits.sum(dim=0).argmin()] > 0
    return of & (of.cumsum(0) <= 2)


def _train(bench: Bench, pick: Callable[[Tensor, Tensor], Tensor], least: int = 0, calls: int = 1) -> Tensor:
    """Do a training step on tokens whose choice is clear, as picked, and count their visits: [E].

    least: tokens of the step; those that are picked are repeated. calls: of the step, with the same x.
    """
    weights, rows = weights_of(bench.subject, bench.layer), bench.expected.x
    ids, clear = oracle.choose(rows, weights)
    rows, ids, dy = rows[clear], ids[clear], bench.expected.dy[clear]
    gates = oracle.gates(oracle.logits(rows.double(), weights), ids, weights.router)
    empty = torch.zeros(len(rows), len(weights.router_weight), dtype=torch.float64)
    visits = empty.scatter(1, ids, 1.0)
    picked = pick(visits, empty.scatter(1, ids, gates)).nonzero().squeeze(1)
    picked = picked.repeat(max(1, -(-least // len(picked))))
    x = rows[picked].unsqueeze(0).to(bench.device)

    def called(given: Tensor) -> Tensor:
        return torch.stack([bench.call(given) for _ in range(calls)]).sum(dim=0)

    with during("a step in training mode"), seeded(bench.layer, 0):
        if bench.subject.support.gradients:
            step(bench, x, dy[picked], call=called)
        else:
            called(x)
    return calls * visits[picked].sum(dim=0)


def _evaluate(bench: Bench) -> Tensor:
    """Call in evaluation on as many tokens as a step has, all of one kind; count their visits: [E]."""
    weights, rows = weights_of(bench.subject, bench.layer), bench.expected.x
    ids, clear = oracle.choose(rows, weights)
    x = rows[clear][:1].expand(len(rows), -1).unsqueeze(0).contiguous().to(bench.device)
    bench.layer.eval()
    with during("a call in evaluation"), torch.no_grad():
        bench.call(x)
    bench.layer.train()
    visits = torch.zeros(len(weights.router_weight), dtype=torch.float64)
    return visits.index_fill(0, ids[clear][0], float(len(rows)))


def _require_moved(
    moved: Tensor, load: Tensor, rule: BiasRule | None, before: Tensor, dtype: torch.dtype, seen: Tensor
) -> None:
    """Raise CheckFailed unless the biases [E] moved as they must for the load [E] of a step.

    dtype: of the layer. What rounding to it may do to a load decides nothing. seen: the visits [E] of an
    evaluation since, which must not count.
    """
    moved, low, high = moved.double(), int(load.argmin()), int(load.argmax())
    told = f"of {int(load.sum())} visits, {float(load.mean()):.4g} for each expert on average"
    if rule is None:
        if bool(moved.any()) and load[low] < load[high] and not moved[low] > moved[high]:
            raise CheckFailed(
                f"{told}, expert {low} has {int(load[low])} and its bias moves by {moved[low]:+.3g}, "
                f"expert {high} has {int(load[high])} and moves by {moved[high]:+.3g}: that balances nothing"
            )
        return
    want = rule.rate * (load.mean() - load).sign()
    want = want - want.mean() if rule.centred else want
    allowed = roundings(max(eps(before.dtype), eps(torch.float32))) * (before.double().abs() + rule.rate)
    if dtype in LOW_PRECISION:
        allowed[(load - load.mean()).abs() <= roundings(eps(dtype)) * load.max()] = torch.inf
    if bool(((moved - want).abs() <= allowed).all()):
        return
    e = int(((moved - want).abs() / allowed).argmax())
    finding = (
        f"{told}, expert {e} has {int(load[e])}: by bias_rule its bias moves by {want[e]:+.3g}, and it "
        f"moves by {moved[e]:+.3g}"
    )
    also = load + seen
    if bool(seen.any()) and torch.equal(moved.sign(), (also.mean() - also).sign()):
        finding += "; that is for the visits of an evaluation since, too: count in training mode alone"
    elif not moved.any():
        finding += "; no bias moves at all: is update_bias(layer) missing in the file?"
    elif bool((moved[load > 0] < 0).all()):
        finding += "; that of each expert in use falls: is a count compared with a fraction?"
    elif bool((moved == -want).all()):
        finding += "; all move the other way"
    raise CheckFailed(finding)


def counts(bench: Bench) -> None:
    """Count beyond 256 visits of an expert in 16 bits, too, and tokens that come again at the same address.

    In each buffer that counts the visits of one step in float32.
    """
    subject = bench.subject
    wide = torch.float32 if torch.float32 in subject.support.dtypes else bench.dtype
    E, K = len(bench.expected.weights.router_weight), bench.expected.weights.router.top_k
    found: dict[str, Tensor] = {}
    turns = [(wide, 0, "")]
    if subject.update_bias or not subject.moves_bias:  # by which a second call would choose other experts
        turns.append((wide, 0, " of two calls on the same tokens and one on some of them"))
    if bench.dtype in LOW_PRECISION:
        turns.append((bench.dtype, BEYOND * E // K, ""))
    for dtype, least, again in turns:
        counting = Bench.of(subject, dtype)
        before = held(counting.layer.train())
        loads = [_train(counting, _all, least, calls=1 + bool(again))]
        if again:
            loads.append(_train(counting, _uneven))
        after, load = held(counting.layer), torch.stack(loads).sum(0)
        moved = {n: (after[n] - t).double().cpu() for n, t in before.items()}
        if not again and not least:
            found = {n: t for n, t in moved.items() if t.shape == load.shape and torch.equal(t, load)}
        for name in found:
            short = (moved[name] - load).abs() > roundings(eps(dtype)) * load
            is_of_the_last = bool(again) and torch.equal(moved[name], loads[-1])
            if bool(short.any()) and not is_of_the_last:
                e = int((moved[name] - load).abs().argmax())
                raise CheckFailed(
                    f"{name}[{e}] counts {moved[name][e]:g} of {int(load[e])} visits{again} in "
                    f"{dtype_name(dtype)}"
                )


_FLOAT32 = (LayerProblem(),)
_BFLOAT16 = (LayerProblem(torch.bfloat16),)

BALANCE = (
    Check(bias_update, _FLOAT32 + _BFLOAT16, needs="training and moves_bias"),
    Check(counts, _FLOAT32 + _BFLOAT16, needs="training and counters"),
)
