"""What is left of the problems of routers, and what takes their place, for a router that declares less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from correctness.problems.routers import FieldProblem, RouterProblem, is_moderate
from moe_impls.interface import dtype_name
from moe_impls.router_interface import RouterSpec, RouterSupport, check_num_experts

MODERATE = 2.0  # spread of logits


def undeclared(support: RouterSupport, problem: RouterProblem) -> str | None:
    """Say what of a problem a router does not declare; None if it declares all of it."""
    spec = problem.spec
    if support.specs is not None and spec not in support.specs:
        return "another spec not declared"
    if problem.dtype not in support.dtypes:
        return f"dtype {dtype_name(problem.dtype)} not declared"
    if (problem.bias is not None) not in support.biases:
        return f"{'no ' * (problem.bias is None)}selection bias not declared"
    if isinstance(problem, FieldProblem) and (reason := undeclared(support, problem.other)):
        return reason
    if support.num_experts not in (None, problem.E):
        return f"E = {problem.E} not declared"
    if support.specs is not None:
        return None
    for name, declared in (
        ("score", support.scores),
        ("renormalise", support.renormalise),
        ("biased", support.biased if problem.bias is not None else (spec.biased,)),
        ("group_score", support.group_scores if spec.groups > 1 else (spec.group_score,)),
    ):
        if getattr(spec, name) not in declared:
            return f"{name} {getattr(spec, name)} not declared"
    plain = {field.name: field.default for field in fields(RouterSpec)}
    for name in ("groups", "scale", "epsilon"):
        if not getattr(support, name) and getattr(spec, name) != plain[name]:
            return f"{name} not declared"
    return None


def problems_for(support: RouterSupport, listed: Iterable[RouterProblem]) -> tuple[RouterProblem, ...]:
    """Return the problems of a check for a router that declares ``support``.

    Those that it does not declare stay, to be skipped by name, where it declares others. A router of some
    specs, or one that declares none of the problems, gets those specs, or the nearest that it declares, with
    the sizes, dtypes, biases and spreads of the listed ones.
    """
    listed = tuple(listed)
    of_fields = all(isinstance(p, FieldProblem) for p in listed)
    if of_fields or (support.specs is None and any(undeclared(support, p) is None for p in listed)):
        return listed
    specs = support.specs
    found: dict[RouterProblem, None] = {}
    for p in listed:
        for n, spec in enumerate([_nearest(support, p.spec)] if specs is None else specs):
            name = "declared" if specs is None or len(specs) == 1 else f"declared_{n + 1}"
            found[_of_spec(support, name, spec, p)] = None
    return tuple(found)


def _nearest(support: RouterSupport, spec: RouterSpec) -> RouterSpec:
    """Return the spec with the options that a router declares in place of others."""

    def one_of(value: object, declared: tuple) -> object:
        return value if value in declared else declared[0]

    score = one_of(spec.score, support.scores)
    plain = RouterSpec(spec.top_k)
    has_groups = support.groups and score != "sparsemixer"
    return replace(
        spec if has_groups else replace(spec, groups=1, keep_groups=1),
        score=score,
        renormalise=one_of(spec.renormalise, support.renormalise),
        biased=one_of(spec.biased, support.biased),
        group_score=one_of(spec.group_score, support.group_scores),
        scale=spec.scale if support.scale else plain.scale,
        epsilon=spec.epsilon if support.epsilon else plain.epsilon,
    )


def _of_spec(support: RouterSupport, name: str, spec: RouterSpec, like: RouterProblem) -> RouterProblem:
    """Make a problem of a spec, named after what it takes over from another problem."""
    E = support.num_experts or fitting(spec, like.E)
    if support.specs is None:  # not each of which fits the number of experts
        if E // spec.groups < 2 or E % spec.groups:
            spec = replace(spec, groups=1, keep_groups=1)
        spec = replace(spec, top_k=min(spec.top_k, E // spec.groups * spec.keep_groups))
    bias = like.bias
    if spec.score == "sparsemixer" or True not in support.biases:
        bias = None
    elif bias is None and False not in support.biases:
        bias = 0.0
    dtype = like.dtype if like.dtype in support.dtypes else support.dtypes[0]
    spread = min(like.spread, MODERATE) if is_moderate(spec) else like.spread
    said = {"E": E, "bias": bias, "T": like.T, "spread": spread}
    return RouterProblem("_".join([name, *(f"{key}_{value}" for key, value in said.items())]),
                         E, spec, bias, dtype, like.T, spread)  # fmt: skip


def fitting(spec: RouterSpec, E: int) -> int:
    """Return the number of experts, at least E, with which a spec can be carried out."""
    while True:
        try:
            check_num_experts(spec, E)
        except ValueError:
            E += 1
        else:
            return E
