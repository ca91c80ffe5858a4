"""Problems that nobody thought of: sizes, options, loads and gates drawn by Hypothesis.

Sizes lean towards those at which kernels go wrong (next to powers of two, multiples of 16, primes). A failing
problem shrinks to small sizes and to the defaults of `Problem`: what is left of it is what makes it fail.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from correctness.oracle.experts import act, act_derivative, hidden_and_output
from correctness.problems.declared_routers import fitting
from correctness.problems.gates import GATES
from correctness.problems.inputs import make_inputs
from correctness.problems.loads import LOADS, TRAPS
from correctness.problems.problem import (
    EXACT_CLAMP,
    LEAST_WITHOUT_BIAS,
    LOW_PRECISION,
    Problem,
    exact_activations,
    possible,
    resize,
)
from correctness.problems.routers import RouterProblem, is_moderate
from moe_impls.interface import CLAMPED, Clamp, Support
from moe_impls.router_interface import RouterSpec, RouterSupport

# Sizes are below 2**n, with n from here. One size of a problem may be larger, which keeps each one fast.
USUAL = {"T": 6, "D": 6, "H": 6, "O": 6, "E": 4, "K": 3}
LARGEST = {"T": 10, "D": 8, "H": 8, "O": 8, "E": 7, "K": 5}


def _octave(n: int) -> list[int]:
    """List sizes from 2**n to 2**(n+1) - 1: all of the small ones, of the others mostly boundaries."""
    every = range(2**n, 2 ** (n + 1))
    if n < 4:
        return list(every)
    edges = [2**n, 2**n + 1, 2 ** (n + 1) - 1]
    multiples = [size for size in every if size % 16 == 0]
    primes = [size for size in every if all(size % d for d in range(2, int(size**0.5) + 1))]
    spread = [size for kind in (multiples, primes, every) for size in kind[:: -(-len(kind) // 6)]]
    return sorted([*edges, *edges, *spread])


# Not so long that Hypothesis would prefer their beginning, as it does for more than 256 choices.
LADDERS = {name: [size for n in range(end) for size in _octave(n)] for name, end in LARGEST.items()}


def _choose(draw: st.DrawFn, name: str, options: Iterable[Any], plain: Any = None) -> Any:
    """Draw one of the options, of which the first is the simplest, or ``plain`` where that is among them.

    The name keeps choices apart: most of the examples that Hypothesis makes are copies of others in which
    one choice is repeated at another place, unless no two places choose from equal values.
    """
    ordered = sorted(options, key=lambda option: option != plain)
    return draw(st.sampled_from([(name, option) for option in ordered]))[1]


@st.composite
def problems(draw: st.DrawFn, support: Support, device: str = "cpu") -> Problem:
    """Draw any problem that an implementation declares to take, each a matter of milliseconds.

    Implementations that compile for each combination of options get one combination, and no size that a
    compiler would take for a constant.
    """
    p = Problem("generated", T=1, D=1, H=1, O=1, E=1, K=1, device=device)
    if support.compiles_per_case:
        support = _one_combination(support, p)
    exact_of = exact_activations(support)
    if exact_of and "sum" in support.combines:
        p = replace(p, exact=_choose(draw, "exact", (False, True)))
    declared = {
        "activation": exact_of if p.exact else support.activations,
        "output_activation": support.output_activations,
        "combine": ("sum",) if p.exact else support.combines,
        "bias": support.biases,
        "dtype": support.dtypes,
    }
    p = replace(p, **{name: _choose(draw, name, of, getattr(p, name)) for name, of in declared.items()})
    size = draw(_sizes(p.F))
    if support.compiles_per_case:
        size = {name: max(2, n) for name, n in size.items()}
    if p.combine == "logsumexp":  # of a single slot rounds almost nothing, which says little about a budget
        size |= {name: max(2, size[name]) for name in ("E", "K")}
    p = resize(replace(p, **size), support)
    if p.exact and p.output_activation == "relu" and not p.bias:
        p = replace(p, exact=False)
    if p.activation == CLAMPED:
        p = replace(p, clamp=EXACT_CLAMP) if p.exact else draw(_clamped(p, support))
    if not possible(p):
        p = replace(p, D=max(p.D, LEAST_WITHOUT_BIAS), H=max(p.H, LEAST_WITHOUT_BIAS))
    # A gate of zero may have a gradient that float16 cannot hold.
    may_be_low = p.dtype == torch.bfloat16 or (p.dtype == torch.float16 and p.combine == "sum")
    gates = [g for g in GATES if possible(replace(p, gates=g))]
    if p.combine == "logsumexp":
        gates.remove("zero_rows")  # whose gradients are no numbers
    p = replace(
        p,
        load=_choose(draw, "load", LOADS | TRAPS, p.load),
        gates=_choose(draw, "gates", gates, p.gates),
        low_gates=_choose(draw, "low_gates", (False, True)) if may_be_low else False,
        seed=draw(st.integers(0, 999)),
    )
    if p.exact and first_rounded(p):
        wide = [dtype for dtype in support.dtypes if dtype not in LOW_PRECISION]
        p = replace(p, exact=bool(wide), dtype=wide[0] if wide else p.dtype, low_gates=False)
        if p.activation == CLAMPED and not p.exact:  # beside real numbers so large an alpha is a step
            p = replace(p, clamp=support.clamps[0] if support.clamps else Clamp())
    return p


@st.composite
def _clamped(draw: st.DrawFn, p: Problem, support: Support) -> Problem:
    """Draw the numbers of swiglu_clamped, and an x that reaches its limits where that may be large."""
    may_be_large = p.combine == "sum" and p.dtype != torch.float16
    if support.clamps is None:
        limits = (0.5, 1.5, 7.0, 10.0) if may_be_large else (0.5, 1.5)
        clamp = Clamp(
            _choose(draw, "limit", limits, 1.5),
            _choose(draw, "alpha", (1.0, 1.702, 0.5, 2.5)),
            _choose(draw, "offset", (1.0, 0.0, 0.25, -1.5)),
        )
    else:
        clamp = _choose(draw, "clamp", support.clamps)
    large = may_be_large and clamp.limit > 3
    return replace(p, clamp=clamp, x_scale=_choose(draw, "x_scale", (8.0, 1.0, 8.0) if large else (1.0,)))


def _one_combination(support: Support, plain: Problem) -> Support:
    """Narrow the support to the plain option of each kind, or the first where that is not declared."""
    kinds = {"activations": plain.activation, "output_activations": plain.output_activation,
             "combines": plain.combine, "biases": plain.bias, "dtypes": plain.dtype}  # fmt: skip
    declared = {kind: getattr(support, kind) for kind in kinds}
    return replace(
        support, **{kind: (o if o in declared[kind] else declared[kind][0],) for kind, o in kinds.items()}
    )


@st.composite
def _sizes(draw: st.DrawFn, rows_per_hidden: int) -> dict[str, int]:
    """Draw T, D, H, O, E, K; often some of D, H, O and F are equal."""
    large = _choose(draw, "large", ("", *LARGEST))
    size = {}
    for name, ladder in LADDERS.items():
        is_large = name == large or (name == "E" and large == "K")
        usual = bisect.bisect_left(ladder, 2 ** USUAL[name])
        size[name] = _choose(draw, name, ladder if is_large else ladder[:usual])
    equal = _choose(draw, "equal", ("", "", "DHO", "DO", "DF"))
    if equal == "DF":
        size["H"] = max(size["H"], size["D"] // rows_per_hidden)
        size["D"] = size["H"] * rows_per_hidden
    else:
        size |= dict.fromkeys(equal, max((size[name] for name in equal), default=0))
    size["K"] = (size["K"] - 1) % size["E"] + 1
    if _choose(draw, "K = E", [False] * 7 + [True]):
        size["E"] = size["K"] = min(size["E"], 2 ** LARGEST["K"] - 1)
    if _choose(draw, "without tokens", [False] * 19 + [True]):
        size["T"] = 0
    return size


def first_rounded(problem: Problem) -> str:
    """Name what an exact problem holds first that its dtype cannot; empty if nothing is rounded."""
    for name, value in _stored(problem):
        value = torch.where(value.abs() < 1e-40, 0.0, value)  # what a saturated unit leaves underflows
        if not torch.equal(value, value.to(problem.dtype).double()):
            return name
    return ""


def _stored(problem: Problem) -> Iterator[tuple[str, Tensor]]:
    """Yield what a right implementation may store: inputs, and of each expert what flows to and fro."""
    inputs = make_inputs(problem).map(torch.Tensor.double)
    yield from {**inputs.tensors, "dy": inputs.dy}.items()
    x, (ids, gates), experts, dy = inputs
    for expert in ids.unique().tolist():
        tokens, slots = torch.where(ids == expert)
        h, out = hidden_and_output(x[tokens], experts, expert)
        a, gate = act(h, problem.activation, problem.clamp), gates[tokens, slots].unsqueeze(1)
        yield from {"h": h, "h without bias": x[tokens] @ experts.w_in[expert].T, "a": a}.items()
        yield from {"out": out, "out without bias": a @ experts.w_out[expert].T}.items()
        yield from {"gate * a": gate * a, "gate * out": gate * out}.items()
        d_out = gate * dy[tokens] * ((out > 0) if problem.output_activation == "relu" else 1)
        da = d_out @ experts.w_out[expert]
        dh = act_derivative(h, problem.activation, problem.clamp) * da.repeat(1, h.shape[1] // a.shape[1])
        yield from {"d_out": d_out, "da": da, "dh": dh, "dx": dh @ experts.w_in[expert]}.items()


@st.composite
def router_problems(draw: st.DrawFn, support: RouterSupport) -> RouterProblem:
    """Draw any router that is declared, on few tokens."""
    spec, E = _drawn_spec(draw, support) if support.specs is None else _listed_spec(draw, support)
    dtype = _choose(draw, "dtype", support.dtypes, torch.float32)
    moderate = dtype == torch.float16 or is_moderate(spec)
    with_bias = spec.score != "sparsemixer" and True in support.biases
    biases = (None,) * (False in support.biases or not with_bias) + (0.0, -3.0, 12.0) * with_bias
    return RouterProblem(
        "generated",
        E=E,
        spec=spec,
        bias=_choose(draw, "bias", biases),
        dtype=dtype,
        T=_choose(draw, "T", LADDERS["K"]),
        spread=_choose(draw, "spread", (2.0, 0.5) if moderate else (2.0, 0.5, 8.0)),
        seed=draw(st.integers(0, 999)),
    )


def _listed_spec(draw: st.DrawFn, support: RouterSupport) -> tuple[RouterSpec, int]:
    """Draw one of the declared specs, and a number of experts with which it can be carried out."""
    assert support.specs is not None
    spec = support.specs[_choose(draw, "spec", range(len(support.specs)))]
    return spec, support.num_experts or fitting(spec, _choose(draw, "E", LADDERS["D"]))


def _drawn_spec(draw: st.DrawFn, support: RouterSupport) -> tuple[RouterSpec, int]:
    """Draw a spec of what is declared, and a number of experts."""
    E = support.num_experts
    score = _choose(draw, "score", support.scores)
    has_groups = support.groups and score != "sparsemixer"
    groups = _choose(draw, "groups", (1, 1, 2, 3, 4, 8)) if has_groups else 1
    groups = groups if E is None or E % groups == 0 else 1
    group_size = (
        E // groups if E else _choose(draw, "group size", LADDERS["D"] if groups == 1 else LADDERS["K"])
    )
    keep_groups = _choose(draw, "kept groups", range(1, groups + 1))
    group_scores = [s for s in support.group_scores if group_size > 1 or s != "top2_sum"]
    if groups > 1 and not group_scores:
        groups, keep_groups, group_size = 1, 1, groups * group_size
    spec = RouterSpec(
        top_k=min(_choose(draw, "K", LADDERS["K"]), keep_groups * group_size),
        score=score,
        renormalise=_choose(draw, "renormalise", support.renormalise, False),
        scale=_choose(draw, "scale", (1.0, 2.5, 0.25, 16.0)) if support.scale else 1.0,
        groups=groups,
        keep_groups=keep_groups,
        group_score=_choose(draw, "group score", group_scores if groups > 1 else ("max",)),
        epsilon=_choose(draw, "epsilon", (0.0, 1e-20, 1e-6, 0.1)) if support.epsilon else 0.0,
        biased=_choose(draw, "biased", support.biased),
    )
    return spec, groups * group_size
