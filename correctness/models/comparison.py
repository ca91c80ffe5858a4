"""Compare two sets of tensors by name, one matrix at a time, and say what was done to those that differ."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from correctness.models.causes import Cause, Finder, Place, compare, order, ranges
from correctness.models.weights import OF_AN_EXPERT, Weight, Weights, in_order
from moe_impls.interface import dtype_name

SEVERAL = 5  # findings of one kind are told as one
BLOCK = 2**22  # numbers of a large tensor that are compared at a time
PAIR = re.compile(r"gate_up|gate_and_up|w13|wi\b|w_in|up_gate|input_linear|fc1|gate_proj_up")
ROLES = (
    (r"shared_expert|shared_mlp|\bshared\b|mlp_shared", "shared expert"),
    (r"correction_bias|expert_bias|bias_correction|e_score|selection_bias", "selection bias of the router"),
    (r"(\bgate|router|\bwg)(\.\w+)?\.(weight|bias)$|router(_weight)?$|\brouter\.", "router"),
    (r"experts", "experts"),
    (r"embed|wte", "embedding"),
    (r"lm_head", "head"),
    (r"norm", "norm"),
    (r"attn|attention", "attention"),
)
Reader = Callable[[], Tensor]


@dataclass(frozen=True)
class Finding:
    """Where two models differ, and how."""

    where: str
    words: str
    of_names: bool = False  # it tells of names and layouts alone, not of numbers

    def __str__(self) -> str:
        return f"{self.where}: {self.words}"


@dataclass
class Result:
    """What a comparison found: how many tensors it compared, findings in a model's order, remarks."""

    tensors: int = 0
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def role(name: str) -> str:
    """Say what a tensor is for, from its name; empty if that is not known."""
    return next((meaning for pattern, meaning in ROLES if re.search(pattern, name)), "")


def compare_weights(reference: Weights, subject: Weights, tied: dict[str, str] | None = None) -> Result:
    """Compare each tensor of two models, by name and bits; a stack of experts one expert at a time.

    A subject that is stored in one narrower dtype throughout must hold the rounded numbers.

    Args:
        tied: names that mean another tensor, and its name: they may be absent, and must not differ from it.
    """
    tied = tied or {}
    result = Result()
    reference, subject = dict(reference), _without_prefix(dict(subject), reference, result)
    for name, holder in tied.items():
        for side in (reference, subject):
            if name not in side and holder in side:
                side[name] = side[holder]
            elif holder not in side and name in side:
                side[holder] = side[name]
    common = [name for name in in_order(reference) if name in subject]
    result.tensors = len(common)
    excused = _dtypes(reference, subject, common, result)
    wrong: dict[str, dict[int | None, tuple[Reader, Reader]]] = defaultdict(dict)
    shapes = set()
    for name in common:
        mine, theirs = subject[name], reference[name]
        for place, got, want in _pairs(name, theirs, mine, result):
            if not _same(mine, theirs, place, got, want) or _narrower(mine, theirs, excused):
                wrong[name][place.expert] = (got, want)
                shapes.add(tuple(sorted(mine.shape if place.expert is None else mine.shape[1:])))
    missing = [name for name in in_order(reference) if name not in subject]
    extra = [name for name in in_order(subject) if name not in reference]
    for name in extra:
        shapes |= {tuple(sorted(shape)) for shape in (subject[name].shape, subject[name].shape[1:])}
    dtypes = {subject[name].dtype for name in [*wrong, *extra]}
    finder = Finder(_places(reference, shapes), dtypes) if wrong or (missing and extra) else None
    for name, experts in wrong.items():
        assert finder is not None
        causes = {}
        for expert, (got, want) in experts.items():
            causes[expert] = _cause(finder, Place(name, expert), got(), want())
        result.findings += _describe(name, subject[name], reference[name], causes)
    _unmatched(reference, subject, missing, extra, finder, result)
    result.findings = _merged(result.findings)
    return result


def _without_prefix(subject: Weights, reference: Weights, result: Result) -> Weights:
    """Take off what all names begin with on one side, if no name is common otherwise, and say so."""
    if {*subject} & {*reference} or not subject or not reference:
        return subject
    for name in reference:
        longer = next((n for n in subject if n.endswith(f".{name}")), None)
        prefix = longer.removesuffix(name) if longer else ""
        if prefix and all(n.startswith(prefix) for n in subject):
            result.findings.append(
                Finding("all names", f"begin with {prefix} in the subject; compared without it")
            )
            return {n.removeprefix(prefix): weight for n, weight in subject.items()}
    return subject


def _pairs(name: str, theirs: Weight, mine: Weight, result: Result) -> Iterator[tuple[Place, Reader, Reader]]:
    """Yield what is to be compared of two tensors of one name, and note what has no counterpart."""
    if theirs.parts is None or mine.parts is None:
        yield Place(name), mine.read, theirs.read
        return
    for what, one, other in (("missing", theirs, mine), ("more than the reference has", mine, theirs)):
        assert one.parts is not None and other.parts is not None
        if lacking := [e for e in one.parts if e not in other.parts]:
            result.findings.append(Finding(_where(name), f"{_experts(lacking)} {_are(lacking)} {what}"))
    for e in theirs.parts:
        if e in mine.parts:
            yield Place(name, e), mine.parts[e], theirs.parts[e]


def _experts(several: Sequence[int]) -> str:
    return f"expert{'s' * (len(several) > 1)} {ranges([*several])}"


def _are(several: Sequence) -> str:
    return "are" if len(several) > 1 else "is"


def _same(mine: Weight, theirs: Weight, place: Place, got: Reader, want: Reader) -> bool:
    if (
        place.expert is None
        and mine.shape == theirs.shape
        and mine.rows
        and theirs.rows
        and len(mine.shape) > 1
    ):
        step = max(1, BLOCK // max(1, mine.shape[1]))
        starts = range(0, mine.shape[0], step)
        return all(_equal(mine.rows(i, i + step), theirs.rows(i, i + step)) for i in starts)
    return _equal(got(), want())


def _equal(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.equal(got, want.to(got.dtype))


def _dtypes(reference: Weights, subject: Weights, names: list[str], result: Result) -> bool:
    """Remark on dtypes that differ; return whether the subject is the reference in one narrower dtype."""
    kinds = Counter(
        (reference[n].dtype, subject[n].dtype) for n in names if subject[n].dtype.is_floating_point
    )
    changed = {pair: count for pair, count in kinds.items() if pair[0] != pair[1]}
    for (theirs, mine), count in changed.items():
        result.remarks.append(
            f"dtype: {count} of {len(names)} tensors are {dtype_name(mine)}, "
            f"in the reference {dtype_name(theirs)}"
        )
    return len(kinds) == 1


def _narrower(mine: Weight, theirs: Weight, excused: bool) -> bool:
    """Whether one tensor alone was rounded, where the others kept their dtype."""
    if excused or not (mine.dtype.is_floating_point and theirs.dtype.is_floating_point):
        return False
    return torch.finfo(mine.dtype).bits < torch.finfo(theirs.dtype).bits


def _places(weights: Weights, shapes: set[tuple[int, ...]]) -> Iterator[tuple[Place, Reader]]:
    """List the tensors and matrices of these shapes, in any order of dimensions."""
    for name, weight in weights.items():
        if weight.parts is None and tuple(sorted(weight.shape)) in shapes:
            yield Place(name), weight.read
        if weight.parts is not None and tuple(sorted(weight.shape[1:])) in shapes:
            yield from ((Place(name, e), read) for e, read in weight.parts.items())


def _cause(finder: Finder, place: Place, got: Tensor, want: Tensor) -> Cause:
    if got.shape == want.shape and torch.equal(got, want.to(got.dtype)):
        return Cause(f"rounded to {dtype_name(got.dtype)}, where others keep their dtype")
    if found := finder.find(got, place, bool(PAIR.search(place.name))):
        square = found.words == "transposed" and len(set(got.shape)) == 1
        return (
            Cause(f"{found.words} (square, so that its shape does not tell)", found.source)
            if square
            else found
        )
    if got.shape != want.shape:
        return Cause(f"has shape {list(got.shape)}, in the reference {list(want.shape)}")
    return compare(got, want)


def _where(name: str) -> str:
    meaning = role(name)
    return f"{name} ({meaning})" if meaning and meaning not in name else name


def _describe(name: str, mine: Weight, theirs: Weight, causes: dict[int | None, Cause]) -> list[Finding]:
    """Put into words what was done to a tensor, or to the experts of a stack together."""
    shape = ""
    if mine.shape[1:] != theirs.shape[1:] if mine.parts else mine.shape != theirs.shape:
        shape = f"; has shape {list(mine.shape)}, in the reference {list(theirs.shape)}"
    if None in causes:
        cause = causes[None]
        words = cause.words
        if cause.source is not None and cause.source != Place(name):
            words = f"holds {cause.source}" + (f", {words}" if words else "")
        return [Finding(_where(name), words + (shape if "has shape" not in words else ""))]
    groups: dict[tuple[str, str | None], dict[int, int]] = defaultdict(dict)
    for expert, cause in causes.items():
        assert expert is not None
        other, source = None, expert
        if cause.source is not None:
            other, source = cause.source.name, -1 if cause.source.expert is None else cause.source.expert
        groups[cause.words, other][expert] = source
    found = []
    for (words, other), sources in groups.items():
        several = _experts([*sources])
        if other not in (None, name):
            text = f"{several} {'hold' if len(sources) > 1 else 'holds'} {_listed(other, sources)}"
        elif any(e != source for e, source in sources.items()):
            text = _mapping(sources, mine.shape[0])
        else:
            found.append(
                Finding(_where(name), f"{several}: {words}" + (shape if "has shape" not in words else ""))
            )
            continue
        found.append(Finding(_where(name), text + (f"; {words}" if words else "") + shape))
    return found


def _listed(name: str | None, sources: dict[int, int]) -> str:
    chosen = [*sources.values()]
    return (
        str(name)
        if chosen == [-1] * len(chosen)
        else f"{name}[{', '.join(map(str, chosen[:8]))}{', ...' * (len(chosen) > 8)}]"
    )


def _mapping(sources: dict[int, int], E: int) -> str:
    """Say which expert of the reference stands where."""
    full = [sources.get(e, e) for e in range(E)]
    if sorted(full) == [*range(E)]:
        return f"experts permuted: {order(full)}"
    if len({*full}) == 1:
        return f"every expert is expert {full[0]} of the reference: one was written for all"
    for ranks in range(2, E // 2 + 1):
        share = E // ranks
        if E % ranks == 0 and full == [full[0] + e % share for e in range(E)]:
            again = ranges([*range(full[0], full[0] + share)])
            return f"experts {again} stand {ranks} times: each of {ranks} ranks has the same"
    lost = [e for e in range(E) if e not in full]
    return f"experts repeated: {order(full)}; {ranges(lost)} {_are(lost)} lost"


def _unmatched(
    reference: Weights,
    subject: Weights,
    missing: list[str],
    extra: list[str],
    finder: Finder | None,
    result: Result,
) -> None:
    """List tensors of one side only: under another name with the same numbers, missing, or left over."""
    moved: dict[str, str] = {}
    found: list[Finding] = []
    for name in extra if finder else ():
        weight = subject[name]
        readers = {None: weight.read} if weight.parts is None else weight.parts
        pair = bool(PAIR.search(name))
        causes = {e: finder.find(read(), Place(name, e), pair) for e, read in readers.items()}  # type: ignore
        known = {e: c for e, c in causes.items() if c is not None and c.source is not None}
        places = {c.source.name for c in known.values() if c.source is not None}
        if len(places) == 1 and len(known) == len(causes) and places <= {*missing} - {*moved.values()}:
            (place,) = places
            moved[name] = place
            found.append(Finding(_where(place), f"named {name} in the subject"))
            done = {e: c for e, c in known.items() if c.words or c.source != Place(place, e)}
            found += _describe(place, weight, reference[place], done) if done else []
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in missing:
        if name not in moved.values():
            of_one = OF_AN_EXPERT.fullmatch(name) is not None
            kinds[("tensors of experts", _block(name)) if of_one else (role(name), "")].append(name)
    for (kind, _), names in kinds.items():
        bias = all(name.endswith("bias") for name in names) and kind != "selection bias of the router"
        what = f"bias of the {kind}" if bias and kind else kind or "tensor"
        found.append(Finding(_block(names[0]), f"{what} missing: {', '.join(names)}"))
    if left := [name for name in extra if name not in moved]:
        found.append(Finding(_block(left[0]), f"not in the reference: {', '.join(left)}"))
    result.findings += [replace(finding, of_names=True) for finding in found]


def _block(name: str) -> str:
    """Name the layer that a tensor belongs to."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _merged(findings: list[Finding]) -> list[Finding]:
    """Put findings of one block with the same words into one, all in a model's order."""
    together: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for finding in findings:
        name, _, what = finding.where.partition(" (")
        block = name.rpartition(".")[0] if "experts" in name and not what else name
        together[block, finding.words, finding.of_names].append(finding.where)
    found = []
    for (block, words, of_names), wheres in together.items():
        fields = [where.removeprefix(f"{block}.") for where in wheres]
        where = wheres[0] if len(wheres) == 1 else f"{block} ({', '.join(fields)})"
        found.append(Finding(where, words, of_names))
    found = _alike(_exchanged(found))
    rank = {name: i for i, name in enumerate(in_order({f.where for f in found}))}
    return sorted((_relabelled(f, found) for f in found), key=lambda finding: rank[finding.where])


def _exchanged(findings: list[Finding]) -> list[Finding]:
    """Tell of layers, where several tensors of one are those of another."""
    layers: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        name = finding.where.partition(" (")[0]
        source = re.fullmatch(r"(?:experts? [\d, -]+ )?holds? ([^\s[]+)(?:\[[^]]*\])?", finding.words)
        other = _block(source[1]) if source else ""
        if source and name != source[1] == other + name.removeprefix(_block(name)):
            layers[_block(name), other].append(finding)
    told = [
        Finding(layer, f"holds what belongs to {other}: {len(several)} tensors")
        for (layer, other), several in layers.items()
        if len(several) >= SEVERAL
    ]
    gone = [f for several in layers.values() if len(several) >= SEVERAL for f in several]
    return [f for f in findings if f not in gone] + told


def _alike(findings: list[Finding]) -> list[Finding]:
    """Tell once what was done to several tensors alike, with the names of the first."""
    words = Counter(f.words for f in findings)
    found = [f for f in findings if words[f.words] < SEVERAL]
    for said in (said for said, count in words.items() if count >= SEVERAL):
        several = [f for f in findings if f.words == said]
        names = in_order({f.where for f in several})
        also = f" and {len(names) - 1} more"
        found.append(Finding(names[0] + also, said, several[0].of_names))
    return found


def _relabelled(finding: Finding, findings: list[Finding]) -> Finding:
    """Add to permuted experts whether the rows of their router stand in the same order."""
    _, permuted, moves = finding.words.partition("experts permuted: ")
    same = any(f.words == f"rows in another order: {moves}" and "(router)" in f.where
               and _block(f.where) == _block(finding.where) for f in findings)  # fmt: skip
    if not permuted or not same:
        return finding
    return replace(finding, words=f"{finding.words}, as the router's rows are: the block computes the same")
