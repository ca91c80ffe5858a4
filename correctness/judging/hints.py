"""What the pattern of a wrong result says about the mistake behind it.

Two questions, answered apart. *Where*: what every wrong row has in common and no right one has (the tokens of
an expert, rows of unsorted ids, the last rows of a tile). *How*: which other computation gives the numbers
that are there (the gate applied twice, another activation, a constant factor). Each answer is tried on all
wrong rows. It is given only if it holds for all of them and is not likely to hold by chance; a question
without such an answer gets none.
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
from moe_impls.interface import ACTIVATIONS, GATED_ACTIVATIONS, OUTPUT_ACTIVATIONS, Routing

TILES = (2, 4, 8, 16, 32, 64, 128, 256)
# A property is reported only if the wrong rows could have been any of so many sets of rows, for each of the
# properties of one kind that are tried.
EVIDENCE = 100
MOST = 2**22  # elements of a temporary tensor; what would need more is not looked at
A_LITTLE = 2**-6  # of a row's scale; a lost token is more in any sum of less than 4000


class Wrong(NamedTuple):
    """One tensor of a result that is not right.

    name, got: the tensor (of the experts ``kept``, where it is the gradient of a weight).
    want, scale: what is right, and its scale as `correctness.judging.compare` measures errors by.
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
        """Which entries of ``got[part]`` are those of another computation: bool, as ``other``."""
        got = self.got[part]
        if self.budget == 0:
            return got == other.to(got.dtype)
        if other.dim() > scale.dim():
            scale = scale.unsqueeze(-1)
        return (got == other) | ((got.to(other.dtype) - other).abs() <= self.budget * scale)


def hint(wrong: Wrong) -> str:
    """The answers to both questions, or an empty string."""
    entries = ~wrong.agrees(wrong.want, wrong.scale)
    has_columns = wrong.name not in ("gates", "b_in", "b_out")
    rows = entries.any(dim=-1) if has_columns else entries
    if not bool(rows.any()):
        return ""
    columns = _columns(entries, rows, wrong.want) if has_columns else ""
    looked_at = rows.unsqueeze(-1).expand_as(entries) if has_columns and not columns else entries
    answers = (_where(wrong, rows), columns, _how(wrong, rows, looked_at))
    return "; ".join(answer for answer in answers if answer)


class _Properties(NamedTuple):
    """What units (tokens, slots, experts, rows of a weight) may have in common.

    flags: families of (text, which units have it); of a family one member at most is reported.
    values: (text with a place for a number n, a value of each unit), for what begins at some value n.
    """

    flags: list[list[tuple[str, Tensor]]]
    values: list[tuple[str, Tensor]]

    def shared(self, wrong: Tensor, undecided: Tensor, repeats: int = 1) -> list[str]:
        """What all wrong units have and no right one; undecided units are right, but may have it as well.

        repeats: how often the same units are wrong.
        """
        count, total = int(wrong.sum()), int((~undecided).sum())

        def is_evidence(patterns: int) -> bool:
            return math.comb(total, count) ** repeats >= EVIDENCE * patterns

        found = []
        for family in self.flags:
            members = [text for text, mask in family if torch.equal(mask & ~undecided, wrong)]
            found += members[:1] if is_evidence(len(family)) else []
        for text, value in self.values if is_evidence(1) else ():
            right, least = value[~wrong & ~undecided], int(value[wrong].min())
            if not bool((right >= least).any()):
                found.append(text.format(n=least))
        return found


def _where(wrong: Wrong, rows: Tensor) -> str:
    """What the wrong rows have in common and no right row has."""
    if bool(rows.all()):
        return "every row is wrong" if rows.numel() > 1 else ""
    found = _where_weights(wrong, rows) if wrong.is_weight else _where_slots(wrong, rows)
    same = f" (the same as {found[1]})" if found[1:] else ""
    return f"wrong: {found[0]}, and no other{same}" if found else ""


def _where_slots(wrong: Wrong, rows: Tensor) -> list[str]:
    """For rows [T], each wrong if one of the token's slots is, or [T, K]."""
    ids, gates = wrong.inputs.routing
    T, K = ids.shape
    if wrong.name == "gates":
        slot, visit, token = "each slot", "each slot that visits", "each slot of a token"
    else:
        slot, visit, token = "each token with a slot", "each token that visits", "each token"
    position, load = _positions(wrong.inputs)
    t, k = torch.meshgrid(*(torch.arange(n, device=ids.device) for n in (T, K)), indexing="ij")
    ascends = (ids.diff(dim=1) > 0).all(dim=1, keepdim=True).expand(T, K)
    flags = [
        [(f"{slot} whose gate is zero", gates == 0)],
        [(f"{slot} whose gate is negative", gates < 0)],
        [(f"{token} whose expert ids do not ascend", ~ascends)],
        [(f"{visit} expert {e}", ids == e) for e in _first_visited(wrong, rows)],
        [(f"{slot} in the last, incomplete tile of {m} rows of its expert", position >= load - load % m)
         for m in TILES],
        [(f"{slot} that is the first row of its expert", position == 0)],
        [(f"{slot} that is the last row of its expert", position == load - 1)],
        [(f"{visit} an expert with a number of rows that {m} divides", load % m == 0) for m in TILES],
        [(f"{slot} of choice {n}", k == n) for n in range(K)],
    ]  # fmt: skip
    values = [
        (f"{token} from {{n}} on", t),
        (f"{slot} from row {{n}} of its expert on", position),
        (f"{visit} an expert with at least {{n}} rows", load),
        (f"{visit} an expert from {{n}} on", ids),
    ]
    if wrong.name == "gates":
        return _Properties(flags, values).shared(rows, ~rows & (wrong.want == 0))
    nothing = torch.zeros_like(rows)
    found = []
    for counted in (torch.ones_like(ascends), _contributes(wrong)):
        of_tokens = _Properties(
            [[(text, (mask & counted).any(dim=1)) for text, mask in family] for family in flags],
            [(text, value.where(counted, -1).amax(dim=1)) for text, value in values],
        )
        found += of_tokens.shared(rows, nothing)
    return list(dict.fromkeys(found))


def _first_visited(wrong: Wrong, rows: Tensor) -> list[int]:
    """The experts of the first wrong row of a token or slot: one of these is to blame if one expert is."""
    first = tuple(rows.nonzero()[0])
    return wrong.inputs.routing.expert_ids[first].flatten().tolist()


def _load(inputs: Inputs) -> Tensor:
    """The number of rows of each expert: [E]."""
    return inputs.routing.expert_ids.flatten().bincount(minlength=len(inputs.experts.w_out))


def _positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """For each slot its place among its expert's rows, in the order of tokens, and how many these are."""
    ids, load = inputs.routing.expert_ids, _load(inputs)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    begin = (load.cumsum(0) - load)[flat[order]]
    position = torch.empty_like(flat).scatter_(0, order, torch.arange(len(flat), device=ids.device) - begin)
    return position.view_as(ids), load[ids]


def _contributes(wrong: Wrong) -> Tensor:
    """Which slots add anything but zeros to their token's row of y or of the gradient of x: bool [T, K]."""
    ids, gates = wrong.inputs.routing
    if wrong.combine != "sum" or ids.numel() * wrong.want.shape[1] > MOST:
        return gates != 0
    parts = _each_slot_apart(wrong.inputs, wrong.name != "y").values[wrong.name]
    return (parts != 0).any(dim=1).view_as(ids)


def _each_slot_apart(inputs: Inputs, gradients: bool) -> Evaluation:
    """The evaluation in which each slot is a token of its own, with K = 1."""
    x, (ids, gates), experts, dy = inputs
    x, dy = (tensor.repeat_interleave(ids.shape[1], dim=0) for tensor in (x, dy))
    one = (ids.reshape(-1, 1), gates.reshape(-1, 1))
    return evaluate(x, *one, experts, dy if gradients else None, "sum", keep=[])


def _where_weights(wrong: Wrong, rows: Tensor) -> list[str]:
    """For rows [experts, R] of a weight's gradient."""
    undecided = ~rows & ((wrong.want == 0) if wrong.want.dim() == 2 else (wrong.want == 0).all(dim=-1))
    expert_wrong = rows.any(dim=1)
    numbers = torch.tensor(wrong.kept, device=rows.device)
    if bool((expert_wrong | undecided.all(dim=1)).all()):
        return _where_rows(wrong, rows, undecided)

    of = "all rows of" if bool((rows | undecided)[expert_wrong].all()) else "rows of"
    load = _load(wrong.inputs)[numbers]
    found = _Properties(
        flags=[
            [(f"{of} each expert with a single token", load == 1)],
            [(f"{of} each expert with a number of tokens that {m} divides", (load > 0) & (load % m == 0))
             for m in TILES],
            [(f"{of} each expert with a number of tokens that {m} does not divide", load % m > 0)
             for m in TILES],
        ],
        values=[
            (f"{of} each expert with at least {{n}} tokens", load),
            (f"{of} each expert from {{n}} on", numbers),
        ],
    ).shared(expert_wrong, undecided.all(dim=1))  # fmt: skip
    listed = numbers[expert_wrong].tolist()
    if torch.equal(load == 0, expert_wrong):
        found.insert(0, f"{of} each expert without tokens")
    elif len(listed) <= 4:
        found.insert(0, f"{of} expert{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}")
    return found


def _where_rows(wrong: Wrong, rows: Tensor, undecided: Tensor) -> list[str]:
    """The same where every expert is wrong: in the same rows of each, perhaps."""
    R = rows.shape[1]
    row_wrong = rows.any(dim=0)
    if not bool((rows | undecided)[:, row_wrong].all()):
        return []
    index = torch.arange(R, device=rows.device)
    is_up = index >= R // 2
    gated = wrong.name in ("w_in", "b_in") and wrong.inputs.experts.activation in GATED_ACTIVATIONS
    return _Properties(
        flags=[[("each gate row of every expert", ~is_up)], [("each up row of every expert", is_up)]] * gated,
        values=[("each row from {n} on, of every expert", index)],
    ).shared(row_wrong, undecided.all(dim=0), repeats=len(rows))


def _columns(entries: Tensor, rows: Tensor, want: Tensor) -> str:
    """Which columns alone are wrong, if they are the same in all of at least two wrong rows."""
    wrong = entries[rows].any(dim=0)
    right = (~entries & (want != 0))[rows].any(dim=0)
    if int(rows.sum()) < 2 or bool(right.all()) or bool((wrong & right).any()) or not bool(right.any()):
        return ""
    columns = wrong.nonzero().flatten().tolist()
    if columns == list(range(columns[0], len(wrong))) and columns[0] > 0:
        return f"only in columns from {columns[0]} on"
    listed = ", ".join(map(str, columns))
    return f"only in column{'s' * (len(columns) > 1)} {listed}" if len(columns) <= 4 else ""


def _how(wrong: Wrong, rows: Tensor, looked_at: Tensor) -> str:
    """Which other numbers than the right ones the wrong rows hold, in the entries [..] that are looked at."""
    got, want = wrong.got[looked_at].to(wrong.want.dtype), wrong.want[looked_at]
    if bool((got.isnan() & ~want.isnan()).any()):
        return "NaN: memory that was never written, an overflow, or a NaN in another row"
    if bool((got.isinf() & ~want.isinf()).any()):
        return "infinite: an overflow"
    if not bool(got.any()):
        return "they are zero"
    if not bool(want.any()):
        return "they should be zero"
    found = [f"are {text}" for text in _itself(wrong, looked_at)]
    if others := [*_other_rows(wrong, rows), *_other_computations(wrong, rows, looked_at)]:
        found.append(f"would be right {' or '.join(others)}")
    if not found:
        return _a_little(wrong, rows)
    return f"they {' or '.join(found)}" if len(others) <= 3 else ""


def _itself(wrong: Wrong, looked_at: Tensor) -> Iterator[str]:
    """What is right times one factor, or transposed."""
    want = wrong.want[looked_at]
    largest = int(want.abs().argmax())
    factor = float(wrong.got[looked_at][largest]) / float(want[largest])
    scale = wrong.scale.unsqueeze(-1) if wrong.scale.dim() < wrong.want.dim() else wrong.scale
    scale = scale.expand_as(wrong.want)[looked_at] * max(1, abs(factor))
    if len(want.unique()) > 1 and bool(wrong.agrees(factor * want, scale, looked_at).all()):
        simple = Fraction(factor).limit_denominator(16)
        exact = abs(simple - factor) <= 1e-4 * abs(factor)
        yield f"{simple if exact else f'{factor:.3g}'} times the right ones"
    square = wrong.name in ("w_in", "w_out") and wrong.want.shape[1] == wrong.want.shape[2]
    if square and bool(wrong.agrees(wrong.want.mT, wrong.scale.mT)[looked_at].all()):
        yield "the right ones transposed"


def _other_rows(wrong: Wrong, rows: Tensor) -> Iterator[str]:
    """Rows of other tokens or experts."""
    if wrong.name == "gates" or (wrong.want.dim() == 2 and wrong.want.shape[1] < 2):
        return
    per_token = wrong.name in ("y", "x")
    index = (rows if per_token else rows.any(dim=1)).nonzero().flatten()
    if len(index) < 2 or len(index) * wrong.want.numel() > MOST:
        return
    got = wrong.got[index].unsqueeze(1).expand(-1, len(wrong.want), *wrong.want.shape[1:])
    scale = wrong.scale.expand(len(index), *wrong.scale.shape)
    same = wrong._replace(got=got).agrees(wrong.want.expand_as(got), scale)
    same = same.flatten(2).all(dim=2)  # [wrong rows, rows]
    if bool(same.any(dim=1).all()):
        whose = "tokens" if per_token else "experts"
        yield f"for other {whose}"


def _a_little(wrong: Wrong, rows: Tensor) -> str:
    """Errors everywhere, none of a size that a wrong term would have."""
    scale = wrong.scale.unsqueeze(-1) if wrong.scale.dim() < wrong.want.dim() else wrong.scale
    error = float(((wrong.got.to(wrong.want.dtype) - wrong.want).abs() / scale).nan_to_num().max())
    if wrong.budget and error <= A_LITTLE and int(rows.sum()) >= max(10, rows.numel() / 2):
        return f"they are off by at most {error:.1g} of their scale: a lower precision or an approximation"
    return ""


# Of some tokens, with the gradients of some experts' weights.
Computation = Callable[[Tensor, list[int]], Evaluation]


def _other_computations(wrong: Wrong, rows: Tensor, looked_at: Tensor) -> Iterator[str]:
    """What the equations of the layer give for other inputs: for one wrong unit, and then for all."""
    ids = wrong.inputs.routing.expert_ids
    units = (rows.any(dim=1) if rows.dim() == 2 else rows).nonzero().flatten()  # tokens or experts
    if wrong.is_weight:
        load = _load(wrong.inputs)[wrong.kept][units]
        if not bool(load.all()):
            return
        units = units[load.argsort()]
    if int(looked_at.sum()) < 3:
        return

    def gives(other: Computation, units: Tensor) -> bool:
        keep = [wrong.kept[i] for i in units.tolist()] if wrong.is_weight else []
        visits = torch.isin(ids, torch.tensor(keep, device=ids.device)).any(dim=1)
        result = other(visits.nonzero().flatten() if wrong.is_weight else units, keep)
        value, scale = result.values[wrong.name], result.scale[wrong.name]
        return bool(wrong.agrees(value, scale, units)[looked_at[units]].all())

    for text, other in _changes(wrong, rows):
        if gives(other, units[:1]) and gives(other, units):
            yield text


def _changes(wrong: Wrong, rows: Tensor) -> Iterator[tuple[str, Computation]]:
    """Mistakes that are the right layer for other inputs."""
    inputs, (ids, gates), experts = wrong.inputs, wrong.inputs.routing, wrong.inputs.experts
    E, O, H = experts.w_out.shape
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
    yield "with the sizes of the gates, without their signs", routed(ids, gates.abs())
    yield "with gates that sum to one", routed(ids, gates / gates.sum(dim=1, keepdim=True))
    yield "with sorted expert ids and unsorted gates", routed(ids.sort(dim=1).values, gates)
    yield "with gates in reverse order", routed(ids, gates.flip(1))
    yield "with the gate of the first choice for all", routed(ids, gates[:, :1].expand_as(gates))
    order = ids.flatten().argsort(stable=True)
    in_order = torch.empty_like(gates.flatten()).scatter_(0, order, gates.flatten()).view_as(gates)
    yield "with slots sorted by expert and unsorted gates", routed(ids, in_order)
    for k in range(K) if 1 < K <= 8 else ():
        chosen = torch.arange(K, device=ids.device) == k
        yield f"for choice {k} alone", routed(ids, gates.where(chosen, 0))
        if K > 2:
            yield f"without choice {k}", routed(ids, gates.where(~chosen, 0))
    for e in _first_visited(wrong, rows) if not wrong.is_weight else ():
        yield f"without expert {e}", routed(ids, gates.where(ids != e, 0))
    position, load = _positions(inputs)
    yield "without the first row of each expert", routed(ids, gates.where(position > 0, 0))
    yield "without the last row of each expert", routed(ids, gates.where(position < load - 1, 0))
    for m in TILES:
        tail = position >= load - load % m
        yield f"without the last, incomplete tiles of {m} rows", routed(ids, gates.where(~tail, 0))
        yield f"without rows from {m} of each expert on", routed(ids, gates.where(position < m, 0))
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
    D = inputs.x.shape[1]
    for n in dict.fromkeys(D // m * m for m in TILES if D % m):
        part = torch.arange(D, device=ids.device) < n
        yield f"without features of x from {n} on", of(inputs._replace(x=inputs.x.where(part, 0)))
    if experts.w_in.numel() > MOST:
        return
    for n in dict.fromkeys(H // m * m for m in TILES if H % m):
        part = torch.arange(H, device=ids.device) < n
        yield f"without hidden features from {n} on", made_of(w_out=experts.w_out.where(part, 0))
    if gated and wrong.name not in ("w_in", "b_in"):
        for text, order in (
            ("gate and up rows exchanged", torch.arange(2 * H).roll(H)),
            ("gate and up rows taken alternately", torch.arange(2 * H).view(H, 2).T.flatten()),
        ):
            b_in = None if experts.b_in is None else experts.b_in[:, order]
            yield f"with {text}", made_of(w_in=experts.w_in[:, order], b_in=b_in)
    if experts.w_in.shape[1] == experts.w_in.shape[2] and wrong.name != "w_in":
        yield "with w_in transposed", made_of(w_in=experts.w_in.mT)
    if O == H and wrong.name != "w_out":
        yield "with w_out transposed", made_of(w_out=experts.w_out.mT)
    if not wrong.is_weight and E > 1:
        yield "for experts in reverse order", routed(E - 1 - ids, gates)
        yield "for the next expert", routed((ids + 1) % E, gates)
        yield "for the expert before", routed((ids - 1) % E, gates)


def _gated_inputs(wrong: Wrong, tokens: Tensor, keep: list[int]) -> Evaluation:
    """Each gate multiplies what goes into its expert instead of what comes out; of y in a sum alone."""
    x, (ids, gates), experts, dy = wrong.inputs
    T, K = ids[tokens].shape
    rows = gates[tokens].double().unsqueeze(2) * x[tokens].double().unsqueeze(1)  # [T, K, D]
    one = Routing(ids[tokens].view(-1, 1), torch.ones(T * K, 1, device=x.device))
    apart = evaluate(rows.flatten(0, 1), *one, experts, None, "sum", keep=keep)
    y = apart.values["y"].view(T, K, -1).sum(dim=1)
    return Evaluation({"y": y}, {"y": apart.scale["y"].view(T, K).square().sum(dim=1).sqrt()}, keep)
