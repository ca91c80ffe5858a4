"""What the pattern of a wrong result says about the mistake behind it.

Two questions, answered apart. *Where*: what every wrong row has in common and no right one has (the tokens of
an expert, rows of unsorted ids). *How*: which other computation gives the numbers that are there (every gate
1, another activation, a constant factor). An answer is given only if it holds for all wrong rows, or as many
as are looked at, and is not likely to hold by chance; a question without such an answer gets none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from correctness.oracle.experts import Evaluation, evaluate
from correctness.problems.problem import Inputs
from moe_impls.interface import ACTIVATIONS, CLAMPED, GATED_ACTIVATIONS, OUTPUT_ACTIVATIONS, Clamp, Routing

# A property is reported only if the wrong rows could have been any of so many sets of rows, for each of the
# properties of one kind that are tried.
EVIDENCE = 100
MOST_WORK = 2**22  # products of numbers for the first of the rows on which a computation is tried
MOST_UNITS = 32  # wrong rows, or experts, on which one is tried
A_LITTLE = 2**-6  # of a row's scale; a lost token is more in any sum of less than 4000
TAILS = (2, 4, 8, 16, 32, 64, 128, 256)  # sizes that rows and features may be cut to multiples of


class Wrong(NamedTuple):
    """One tensor of a result that is not right.

    name, got: the tensor (of the experts ``kept``, where it is the gradient of a weight).
    want, scale: what is right, and its scale as `correctness.judging.budget` measures errors by.
    budget: the error allowed, a multiple of scale; 0 where results must be bit-equal.
    inputs, combine: what the right result was computed from.
    """

    name: str
    got: Tensor
    want: Tensor
    scale: Tensor
    budget: float
    inputs: Inputs
    combine: str
    kept: list[int]

    @property
    def is_weight(self) -> bool:
        return self.name not in ("y", "x", "gates")

    def agrees(self, other: Tensor, scale: Tensor, part: Any = ...) -> Tensor:
        """Tell which entries of ``got[part]`` are those of another computation: bool, as ``other``."""
        got = self.got[part]
        if self.budget == 0:
            return got == other.to(got.dtype)
        if other.dim() > scale.dim():
            scale = scale.unsqueeze(-1)
        return (got == other) | ((got.to(other.dtype) - other).abs() <= self.budget * scale)


def hint(wrong: Wrong) -> str:
    """Answer both questions; return an empty string if there is no answer."""
    entries = ~wrong.agrees(wrong.want, wrong.scale)
    has_columns = wrong.name not in ("gates", "b_in", "b_out")
    rows = entries.any(dim=-1) if has_columns else entries
    if not bool(rows.any()):
        return ""
    columns = _columns(entries, rows, wrong.want) if has_columns else ""
    looked_at = rows.unsqueeze(-1).expand_as(entries) if has_columns and not columns else entries
    answers = (_where(wrong, rows), columns, _how(wrong, rows, looked_at))
    return "; ".join(answer for answer in answers if answer)


def _where(wrong: Wrong, rows: Tensor) -> str:
    """Say what the wrong rows have in common and no right row has."""
    if bool(rows.all()):
        return "every row is wrong" if rows.numel() > 1 else ""
    found = _where_experts(wrong, rows) if wrong.is_weight else _where_slots(wrong, rows)
    same = f" (the same as {found[1]})" if found[1:] else ""
    return f"wrong: {found[0]}, and no other{same}" if found else ""


def _where_slots(wrong: Wrong, rows: Tensor) -> list[str]:
    """List what is common to wrong rows [T], each wrong if one of the token's slots is, or [T, K]."""
    ids, gates = wrong.inputs.routing
    T, K = ids.shape
    if wrong.name == "gates":
        slot, visit, token = "each slot", "each slot that visits", "each slot of a token"
    else:
        slot, visit, token = "each token with a slot", "each token that visits", "each token"
    t, k = torch.meshgrid(*(torch.arange(n, device=ids.device) for n in (T, K)), indexing="ij")
    ascends = (ids.diff(dim=1) > 0).all(dim=1, keepdim=True).expand(T, K)
    families = (  # of which one member at most is reported
        [(f"{slot} whose gate is zero", gates == 0)],
        [(f"{slot} whose gate is negative", gates < 0)],
        [(f"{token} whose expert ids do not ascend", ~ascends)],
        [(f"{visit} expert {e}", ids == e) for e in _first_visited(wrong, rows)],
        [(f"{slot} of choice {n}", k == n) for n in range(K)],
    )
    beginnings = (  # at some value of these
        (f"{token} from {{}} on", t),
        (f"{slot} from row {{}} of its expert on", _place_in_expert(ids)),
        (f"{visit} an expert from {{}} on", ids),
    )
    if wrong.name == "gates":
        right = ~rows & (wrong.want != 0)
        flags, values = families, beginnings
        return _common(rows, right, flags, values)
    found = []
    for counts in (torch.ones_like(ascends), _contributes(wrong)):
        flags = [[(text, (mask & counts).any(dim=1)) for text, mask in family] for family in families]
        values = [(text, value.where(counts, -1).amax(dim=1)) for text, value in beginnings]
        found += _common(rows, ~rows, flags, values)
    return list(dict.fromkeys(found))


def _common(rows: Tensor, right: Tensor, flags: Any, values: Any) -> list[str]:
    """List the properties that all wrong rows have and no right one; what is neither may have them or not."""
    sets = math.comb(int((rows | right).sum()), int(rows.sum()))
    found = []
    for family in flags:
        members = [text for text, mask in family if torch.equal(mask & (rows | right), rows)]
        found += members[:1] if sets >= EVIDENCE * len(family) else []
    for text, value in values if sets >= EVIDENCE else ():
        least = int(value[rows].min())
        if not bool((value[right] >= least).any()):
            found.append(text.format(least))
    return found


def _first_visited(wrong: Wrong, rows: Tensor) -> list[int]:
    """List the experts of the first wrong token or slot: one of these is to blame if one expert is."""
    first = tuple(rows.nonzero()[0])
    return wrong.inputs.routing.expert_ids[first].flatten().tolist()


def _place_in_expert(ids: Tensor) -> Tensor:
    """Number the slots of each expert in the order of tokens: [T, K]."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    load = flat.bincount()
    begin = (load.cumsum(0) - load)[flat[order]]
    place = torch.empty_like(flat).scatter_(0, order, torch.arange(len(flat), device=ids.device) - begin)
    return place.view_as(ids)


def _contributes(wrong: Wrong) -> Tensor:
    """Tell which slots add anything but zeros to their token's row of y or of dx: bool [T, K]."""
    x, (ids, gates), experts, dy = wrong.inputs
    if wrong.combine != "sum" or ids.numel() * _work(wrong.inputs) > MOST_WORK:
        return gates != 0
    x, dy = (tensor.repeat_interleave(ids.shape[1], dim=0) for tensor in (x, dy))
    one = (ids.reshape(-1, 1), gates.reshape(-1, 1))  # each slot a token of its own
    apart = evaluate(x, *one, experts, None if wrong.name == "y" else dy, "sum", keep=[], scales=False)
    return (apart.values[wrong.name] != 0).any(dim=1).view_as(ids)


def _work(inputs: Inputs) -> int:
    """Count the products of one slot."""
    _, F, D = inputs.experts.w_in.shape
    _, O, H = inputs.experts.w_out.shape
    return F * D + O * H


def _where_experts(wrong: Wrong, rows: Tensor) -> list[str]:
    """Name the experts whose rows [experts, R] of a weight's gradient are wrong."""
    zero = (wrong.want == 0) if wrong.want.dim() == 2 else (wrong.want == 0).all(dim=-1)
    undecided = ~rows & zero
    expert_wrong = rows.any(dim=1)
    if bool((expert_wrong | undecided.all(dim=1)).all()):
        return []
    of = "all rows of" if bool((rows | undecided)[expert_wrong].all()) else "rows of"
    experts = torch.tensor(wrong.kept, device=rows.device)
    if not bool(torch.isin(experts[expert_wrong], wrong.inputs.routing.expert_ids).any()):
        return [f"{of} each expert without tokens"]
    listed = experts[expert_wrong].tolist()
    return [f"{of} expert{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"] if len(listed) <= 4 else []


def _columns(entries: Tensor, rows: Tensor, want: Tensor) -> str:
    """Name the columns that alone are wrong, if they are the same few in all of at least two wrong rows."""
    wrong = entries[rows].any(dim=0)
    right = (~entries & (want != 0))[rows].any(dim=0)
    columns = wrong.nonzero().flatten().tolist()
    if int(rows.sum()) < 2 or len(columns) > 4 or bool((wrong & right).any()) or not bool(right.any()):
        return ""
    return f"only in column{'s' * (len(columns) > 1)} {', '.join(map(str, columns))}"


def _how(wrong: Wrong, rows: Tensor, looked_at: Tensor) -> str:
    """Say which other numbers than the right ones the wrong rows hold, in the entries that are looked at."""
    got, want = wrong.got[looked_at].to(wrong.want.dtype), wrong.want[looked_at]
    if bool((got.isnan() & ~want.isnan()).any()):
        return "NaN: memory that was never written, an overflow, or a NaN in another row"
    if bool((got.isinf() & ~want.isinf()).any()):
        return "infinite: an overflow"
    if not bool(got.any()):
        return "they are zero"
    if not bool(want.any()):
        return "they should be zero"
    if factor := _factor(wrong, looked_at):
        return f"they are {factor} times the right ones"
    if found := list(_other_computations(wrong, rows, looked_at)):
        return f"they would be right {' or '.join(found)}" if len(found) <= 3 else ""
    return _a_little(wrong, rows)


def _scale(wrong: Wrong) -> Tensor:
    """Return the scale of each entry."""
    scale = wrong.scale.unsqueeze(-1) if wrong.scale.dim() < wrong.want.dim() else wrong.scale
    return scale.expand_as(wrong.want)


def _factor(wrong: Wrong, looked_at: Tensor) -> str:
    """Write the one factor between the wrong entries and the right ones; empty if there is none."""
    want = wrong.want[looked_at]
    largest = int(want.abs().argmax())
    factor = float(wrong.got[looked_at][largest]) / float(want[largest])
    scale = _scale(wrong)[looked_at] * max(1, abs(factor))
    if len(want.unique()) == 1 or not bool(wrong.agrees(factor * want, scale, looked_at).all()):
        return ""
    simple = Fraction(factor).limit_denominator(16)
    return str(simple) if abs(simple - factor) <= 1e-4 * abs(factor) else f"{factor:.3g}"


def _a_little(wrong: Wrong, rows: Tensor) -> str:
    """Say that errors are everywhere, and none of a size that a wrong term would have."""
    error = float(((wrong.got.to(wrong.want.dtype) - wrong.want).abs() / _scale(wrong)).nan_to_num().max())
    if wrong.budget and error <= A_LITTLE and int(rows.sum()) >= max(10, rows.numel() / 2):
        return f"they are off by at most {error:.1g} of their scale: a lower precision or an approximation"
    return ""


# Of some tokens, with the gradients of some experts' weights.
Computation = Callable[[Tensor, list[int]], Evaluation]


def _other_computations(wrong: Wrong, rows: Tensor, looked_at: Tensor) -> Iterator[str]:
    """Try the equations of the layer on other inputs: for one wrong unit, and then for more of them."""
    ids = wrong.inputs.routing.expert_ids
    units = (rows.any(dim=1) if rows.dim() == 2 else rows).nonzero().flatten()  # tokens or experts
    slots = ids.shape[1]
    if wrong.is_weight:
        load = ids.flatten().bincount(minlength=len(wrong.inputs.experts.w_in))[wrong.kept][units]
        if not bool(load.all()):
            return
        units, slots = units[load.argsort()], int(load.min()) * ids.shape[1]
    if int(looked_at.sum()) < 3 or slots * _work(wrong.inputs) > MOST_WORK:
        return
    more = units[:: -(-len(units) // MOST_UNITS)]

    def gives(other: Computation, units: Tensor) -> bool:
        keep = [wrong.kept[i] for i in units.tolist()] if wrong.is_weight else []
        visits = torch.isin(ids, torch.tensor(keep, device=ids.device)).any(dim=1)
        result = other(visits.nonzero().flatten() if wrong.is_weight else units, keep)
        value, scale = result.values[wrong.name], result.scale[wrong.name]
        return bool(wrong.agrees(value, scale, units)[looked_at[units]].all())

    for text, other in _changes(wrong, rows):
        if gives(other, units[:1]) and gives(other, more):
            yield text


def _changes(wrong: Wrong, rows: Tensor) -> Iterator[tuple[str, Computation]]:
    """List mistakes that are the right layer for other inputs."""
    inputs, (ids, gates), experts = wrong.inputs, wrong.inputs.routing, wrong.inputs.experts
    K = ids.shape[1]

    def of(inputs: Inputs, combine: str = wrong.combine) -> Computation:
        def compute(tokens: Tensor, keep: list[int]) -> Evaluation:
            x, (ids, gates), experts, dy = inputs
            rows = None if wrong.name == "y" else dy[tokens]
            return evaluate(x[tokens], ids[tokens], gates[tokens], experts, rows, combine, keep=keep)

        return compute

    def routed(ids: Tensor, gates: Tensor) -> Computation:
        return of(inputs._replace(routing=Routing(ids, gates)))

    def made_of(**changes: Any) -> Computation:
        return of(inputs._replace(experts=replace(experts, **changes)))

    gates = gates.double()
    yield "with every gate 1", routed(ids, torch.ones_like(gates))
    yield "with each gate applied twice", routed(ids, gates.square())
    if wrong.name == "y" and wrong.combine == "sum":
        yield "with each gate applied to the expert's input", functools.partial(_gated_inputs, wrong)
    yield "with gates that sum to one", routed(ids, gates / gates.sum(dim=1, keepdim=True))
    yield "with sorted expert ids and unsorted gates", routed(ids.sort(dim=1).values, gates)
    yield "with the gate of the first choice for all", routed(ids, gates[:, :1].expand_as(gates))
    order = ids.flatten().argsort(stable=True)
    in_order = torch.empty_like(gates.flatten()).scatter_(0, order, gates.flatten()).view_as(gates)
    yield "with slots sorted by expert and unsorted gates", routed(ids, in_order)
    load = ids.flatten().bincount(minlength=len(experts.w_out))  # [E]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    rank, own = rank.view_as(ids), load[ids]  # of each slot among all, by expert; rows of its expert
    position = rank - (load.cumsum(0) - load)[ids]  # among its expert's rows
    for m in TAILS:
        yield (
            f"without the last, incomplete tile of {m} rows of each expert",
            routed(ids, gates.where(position < own - own % m, 0)),
        )
        yield (
            f"without the last, incomplete tile of {m} slots in the order of experts",
            routed(ids, gates.where(rank < ids.numel() - ids.numel() % m, 0)),
        )
    for k in range(K) if 1 < K <= 8 else ():
        yield f"for choice {k} alone", routed(ids, gates.where(torch.arange(K, device=ids.device) == k, 0))
    for e in _first_visited(wrong, rows) if not wrong.is_weight else ():
        yield f"without expert {e}", routed(ids, gates.where(ids != e, 0))
    if bool((gates >= 0).all()):
        other = "logsumexp" if wrong.combine == "sum" else "sum"
        yield f"for combine {other!r}", of(inputs, other)
    for name in ("b_in", "b_out"):
        bias = getattr(experts, name)
        if bias is not None:
            yield f"without {name}", made_of(**{name: torch.zeros_like(bias)})
    for activation in OUTPUT_ACTIVATIONS:
        yield f"for output_activation {activation!r}", made_of(output_activation=activation)
    gated = experts.activation in GATED_ACTIVATIONS
    for activation in ACTIVATIONS:
        if (activation in GATED_ACTIVATIONS) == gated:
            yield f"for activation {activation!r}", made_of(activation=activation)
    clamp = experts.clamp
    others = {"the numbers of gpt-oss": Clamp(), "no limit": clamp._replace(limit=math.inf),
              "alpha 1": clamp._replace(alpha=1.0), "offset 0": clamp._replace(offset=0.0)}  # fmt: skip
    for text, other in others.items() if experts.activation == CLAMPED else ():
        yield f"for a clamp with {text}", made_of(clamp=other)
    if experts.w_in.numel() > MOST_WORK:
        return
    for text, size, cut in (
        ("features of x", inputs.x.shape[1], lambda part: of(inputs._replace(x=inputs.x.where(part, 0)))),
        (
            "hidden features",
            experts.w_out.shape[2],
            lambda part: made_of(w_out=experts.w_out.where(part, 0)),
        ),
    ):
        for n in dict.fromkeys(size // m * m for m in TAILS if size % m):
            yield f"without {text} from {n} on", cut(torch.arange(size, device=ids.device) < n)
    H = experts.w_out.shape[2]
    if gated and wrong.name not in ("w_in", "b_in"):
        for text, order in (
            ("gate and up rows exchanged", torch.arange(2 * H).roll(H)),
            ("gate and up rows taken alternately", torch.arange(2 * H).view(H, 2).T.flatten()),
        ):
            b_in = None if experts.b_in is None else experts.b_in[:, order]
            yield f"with {text}", made_of(w_in=experts.w_in[:, order], b_in=b_in)
    if experts.w_in.shape[1] == experts.w_in.shape[2] and wrong.name != "w_in":
        yield "with w_in transposed", made_of(w_in=experts.w_in.mT)
    if experts.w_out.shape[1] == H and wrong.name != "w_out":
        yield "with w_out transposed", made_of(w_out=experts.w_out.mT)


def _gated_inputs(wrong: Wrong, tokens: Tensor, keep: list[int]) -> Evaluation:
    """Multiply each gate with what goes into its expert instead of what comes out; of y in a sum alone."""
    x, (ids, gates), experts, _ = wrong.inputs
    T, K = ids[tokens].shape
    rows = gates[tokens].double().unsqueeze(2) * x[tokens].double().unsqueeze(1)  # [T, K, D]
    one = Routing(ids[tokens].view(-1, 1), torch.ones(T * K, 1, device=x.device))
    apart = evaluate(rows.flatten(0, 1), *one, experts, None, "sum", keep=keep)
    y = apart.values["y"].view(T, K, -1).sum(dim=1)
    return Evaluation({"y": y}, {"y": apart.scale["y"].view(T, K).square().sum(dim=1).sqrt()}, keep)
