"""The listed problems of implementations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from correctness.problems.problem import EXACT_CLAMP, LOW_PRECISION, Problem, fit
from moe_impls.interface import ACTIVATIONS, CLAMPED, COMBINES, DTYPES, OUTPUT_ACTIVATIONS, Clamp, Support
from moe_impls.models import MODELS

SMALL = Problem("small", T=37, D=12, H=10, O=7, E=5, K=2, gates="unnormalised")

# Forms of others in this list, with which problems are taken in turn and not every one of them.
IN_TURN = ("gelu_tanh", "relu2", "geglu_tanh")
DEEPSEEK_V4 = Clamp(10.0, 1.0, 0.0)
NEAR = Clamp(1.5, 0.75, 0.25)  # which inputs of unit scale reach


def clamped(p: Problem) -> Problem:
    """Choose the numbers of swiglu_clamped, and an x that reaches the limits of gate and value on every side.

    Those of gpt-oss with biases and of DeepSeek-V4 without, as in the models, where outputs may be large.
    """
    if p.activation != CLAMPED:
        return p
    if p.combine == "logsumexp" or p.output_activation == "relu":
        return replace(p, clamp=NEAR)
    return replace(p, clamp=Clamp() if p.bias else DEEPSEEK_V4, x_scale=8.0)


_OPTIONS = (DTYPES, ACTIVATIONS, OUTPUT_ACTIVATIONS, COMBINES, (True, False))


def _half(*numbers: int) -> bool:
    """Tell whether a combination, by the numbers of its choices, is of the half with all of any but one."""
    return sum(numbers) % 2 == 1


# Options on one small problem: every combination of any four of the five. Of float64 first, where an error is
# the same on every processor.
OPTIONS = tuple(
    clamped(replace(SMALL, activation=a, output_activation=o, combine=c, bias=b, dtype=d))
    for d, a, o, c, b in itertools.product(*_OPTIONS)
    if _half(*(of.index(choice) for of, choice in zip(_OPTIONS, (d, a, o, c, b), strict=True)))
)

# Inputs far beyond the limits of swiglu_clamped, and outputs whose exp overflows float32.
LARGE = (*(replace(SMALL, activation=CLAMPED, x_scale=60.0, dtype=d) for d in DTYPES[:2]),) + tuple(
    replace(SMALL, activation=a, combine="logsumexp", x_scale=300.0, dtype=d)
    for a in ("silu", "relu", "gelu", "gelu_tanh")
    for d in (torch.float64, torch.float32, torch.bfloat16)
)

# Sizes and loads at which indices, tails and empty groups go wrong, with smooth activations.
_SIZES = (
    Problem("all_ones", T=1, D=1, H=1, O=1, E=1, K=1, activation="gelu"),
    Problem("no_tokens", T=0, D=5, H=3, O=4, E=3, K=2),
    Problem("one_token", T=1, D=9, H=6, O=5, E=7, K=3),
    Problem("one_feature", T=21, D=1, H=4, O=1, E=3, K=2, activation="silu", gates="unnormalised"),
    Problem("one_expert", T=65, D=8, H=17, O=9, E=1, K=1, activation="geglu", gates="unnormalised"),
    Problem("one_choice", T=130, D=17, H=8, O=11, E=9, K=1, bias=False, gates="unnormalised"),
    Problem("all_experts", T=33, D=10, H=14, O=6, E=4, K=4, activation="gelu"),
    Problem("zero_gates", T=70, D=11, H=9, O=13, E=6, K=3, gates="one_zero"),
    Problem("one_hot_expert", T=1000, D=20, H=12, O=24, E=10, K=2, load="one_hot_expert"),
    Problem("same_experts", T=257, D=16, H=32, O=15, E=12, K=2, activation="silu", load="same_experts"),
    Problem("half_empty", T=96, D=24, H=16, O=20, E=16, K=4, bias=False, load="half_empty"),
    Problem("zipf", T=513, D=33, H=31, O=29, E=17, K=3, activation="geglu", load="zipf"),
    Problem("many_experts", T=300, D=19, H=10, O=23, E=129, K=8, load="zipf"),
    Problem("more_than_512_experts", T=700, D=8, H=6, O=10, E=521, K=8, activation="gelu", load="bursts"),
    # Sizes that tiles divide, and D = H = O, where transposed or aliased tensors have the right shape.
    Problem("aligned", T=256, D=64, H=64, O=64, E=16, K=4, gates="unnormalised"),
    Problem("aligned_one_choice", T=128, D=32, H=32, O=32, E=8, K=1, bias=False, gates="unnormalised"),
    Problem("aligned_all_experts", T=64, D=16, H=16, O=16, E=8, K=8, activation="gelu", load="zipf"),
    Problem("wide", T=40, D=521, H=263, O=519, E=3, K=2),
    Problem("thousands", T=4500, D=48, H=40, O=56, E=11, K=2, load="zipf", seed=1),
)
# At sizes that kernels split into tiles.
_LARGER = (
    Problem("larger", T=150, D=40, H=36, O=44, E=12, K=3, load="zipf", gates="unnormalised"),
    Problem("larger_still", T=1100, D=130, H=70, O=100, E=9, K=2, load="router"),
)
# For kernels that have a path for one token, for many, and for sizes that their tiles divide.
_PATHS = (
    Problem("decode", T=1, D=19, H=16, O=15, E=7, K=3),
    Problem("prefill", T=3_001, D=15, H=14, O=13, E=4, K=2),
    Problem("all_128", T=40, D=128, H=128, O=128, E=3, K=2),
    Problem("tiles_of_64", T=40, D=192, H=128, O=256, E=3, K=2),
    Problem("decode_of_many", T=2, D=14, H=12, O=11, E=64, K=2),
)


def _with_each_activation(
    problems: tuple[Problem, ...], others: Callable[[int, int], dict]
) -> Iterator[Problem]:
    """Yield each problem with each activation, output activations in turn, and ``others`` by number."""
    for (i, activation), (j, p) in itertools.product(enumerate(ACTIVATIONS), enumerate(problems)):
        output_activation = OUTPUT_ACTIVATIONS[(i + j) % len(OUTPUT_ACTIVATIONS)]
        if activation not in IN_TURN or j % len(IN_TURN) == IN_TURN.index(activation):
            p = replace(p, activation=activation, output_activation=output_activation, **others(i, j))
            yield clamped(p)


_LOW_GATES = Problem("low_gates", T=90, D=14, H=18, O=13, E=8, K=3, gates="unnormalised", low_gates=True)
# log Σ g exp(f) is -inf where all gates of a token are zero, so one_zero needs K > 1 there; see zero_gates.
SIZES = tuple(
    replace(p, combine=c, dtype=d)
    for p in _SIZES
    for (i, c), (j, d) in itertools.product(enumerate(COMBINES), enumerate(DTYPES))
    if _half(i, j)
) + (
    Problem("power_of_two", T=5, D=4_096, H=16, O=4_096, E=3, K=2),  # exact ones are sparse
    Problem("power_of_two_hidden", T=5, D=16, H=4_096, O=8, E=3, K=2),
    Problem("signed_gates", T=90, D=14, H=18, O=13, E=8, K=3, gates="signed"),
    *(replace(SMALL, name="wide_gates", gates="wide", combine=c, dtype=d) for c in COMBINES for d in DTYPES),
    *(replace(_LOW_GATES, gates="signed", dtype=d) for d in LOW_PRECISION),
    *(replace(_LOW_GATES, combine="logsumexp", dtype=d) for d in LOW_PRECISION),
    *_with_each_activation(
        _LARGER,
        lambda i, j: {"combine": COMBINES[i // 2 % len(COMBINES)], "dtype": DTYPES[(i + j) % len(DTYPES)]},
    ),
    *_with_each_activation(
        _PATHS,
        lambda i, j: {"combine": COMBINES[(i + j) // 2 % len(COMBINES)], "bias": (i + j) % 3 > 0},
    ),
)

_INTEGERS = Problem("integers", T=41, D=13, H=9, O=11, E=6, K=2, activation="relu", exact=True)
_EXACT = (
    _INTEGERS,
    replace(_INTEGERS, name="integers_out_relu", output_activation="relu"),
    replace(_INTEGERS, name="integers_gated", K=3, activation="reglu", bias=False, seed=1),
    replace(_INTEGERS, name="integers_silu", activation="silu"),
    replace(_INTEGERS, name="integers_gelu", activation="gelu", bias=False),
    replace(_INTEGERS, name="integers_swiglu", K=3, activation="swiglu", bias=False),
    replace(_INTEGERS, name="integers_geglu", K=3, activation="geglu", bias=False),
    replace(_INTEGERS, name="integers_gelu_tanh", activation="gelu_tanh", bias=False),
    replace(_INTEGERS, name="integers_relu2", activation="relu2", bias=False),
    replace(_INTEGERS, name="integers_clamped", K=3, activation=CLAMPED, bias=False, clamp=EXACT_CLAMP),
    replace(_INTEGERS, name="integers_hot", T=1025, D=16, H=8, O=24, E=7, K=4, load="one_hot_expert"),
    replace(
        _INTEGERS,
        name="integers_empty",
        T=130,
        D=24,
        H=16,
        O=9,
        E=32,
        K=3,
        load="half_empty",
        gates="one_zero",
    ),
    replace(_INTEGERS, name="integers_cancelling", T=24, D=6, H=5, O=16, E=5, K=3, gates="cancelling"),
    replace(_INTEGERS, name="integers_cancelling_pairs", T=60, D=6, H=5, O=16, E=7, K=6, gates="cancelling"),
    replace(_INTEGERS, name="integers_12_choices", T=30, D=6, H=5, O=16, E=13, K=12, gates="cancelling"),
    replace(_INTEGERS, name="integers_all_but_one", T=37, E=5, K=5, load="one_differs"),
    replace(_INTEGERS, name="integers_many", T=600, D=10, H=6, O=7, E=300, K=2, bias=False, load="zipf"),
)
_CANCELLING = tuple(p for p in _EXACT if p.gates == "cancelling")
# Sizes beyond the tiles, counters and grids of most kernels. Sums over so many tokens need float32.
_BEYOND = tuple(
    replace(_INTEGERS, name=f"integers_{name}", **sizes)
    for name, sizes in {
        "512_tokens": {"T": 512, "D": 6, "H": 5, "O": 7, "E": 9},
        "1024_tokens": {"T": 1_024, "D": 5, "H": 4, "O": 6, "E": 7, "K": 3},
        "4096_tokens": {"T": 4_096, "D": 4, "H": 3, "O": 5, "E": 5},
        "8192_tokens": {"T": 8_192, "D": 4, "H": 3, "O": 5, "E": 8, "K": 1},
        "20000_tokens": {"T": 20_011, "D": 5, "H": 4, "O": 6, "E": 5},
        "33000_tokens": {"T": 33_001, "D": 3, "H": 3, "O": 4, "E": 16, "K": 1},  # beyond 15 bits
        "66000_slots": {"T": 16_501, "D": 3, "H": 3, "O": 4, "E": 16, "K": 4},  # beyond 16 bits
        "10000_rows": {"T": 10_007, "D": 4, "H": 3, "O": 5, "E": 3, "K": 1, "load": "same_experts"},
        "1000_experts": {"T": 2_311, "D": 6, "H": 5, "O": 7, "E": 1_031, "K": 3},
        "40_choices": {"T": 150, "D": 7, "H": 6, "O": 5, "E": 48, "K": 40},
        "wide_input": {"T": 70, "D": 2_111, "H": 6, "O": 7},
        "wide_hidden": {"T": 70, "D": 6, "H": 2_111, "O": 7},
        "wide_output": {"T": 70, "D": 6, "H": 7, "O": 2_111},
        "7168_input": {"T": 9, "D": 7_168, "H": 6, "O": 7},  # of DeepSeek-V3
        "7168_hidden": {"T": 9, "D": 6, "H": 7_168, "O": 7},
        "7168_output": {"T": 9, "D": 6, "H": 7, "O": 7_168},
        "aligned": {"T": 2_048, "D": 16, "H": 16, "O": 16, "E": 64, "K": 8},
    }.items()
)
# The (E, K) of released models, for which kernels have branches of their own.
_RELEASED = tuple(
    replace(_INTEGERS, name=f"integers_{E}_experts_{K}", T=70, E=E, K=K)
    for E, K in dict.fromkeys((model.E, model.K) for model in MODELS.values())
)
# Sums along D and along H, of y and of dx, that a product in parts keeps in float32 only.
_OPPOSED = tuple(
    replace(_INTEGERS, name=f"integers_opposed_{name}", T=20, opposed=True, dtype=d, **{name: 2_212})
    for name in ("D", "H")
    for d in DTYPES
)
# Numbers that float16 holds and bfloat16, with three bits less, does not; at most one token for each expert.
_FINE = replace(
    _INTEGERS, name="integers_fine", T=8, E=60, K=1, bias=False, dtype=torch.float16, x_scale=383.0, seed=0
)
EXACT = (
    *(replace(p, dtype=d) for p in _EXACT for d in DTYPES),
    _FINE,
    *_OPPOSED,
    replace(_INTEGERS, low_gates=True, dtype=torch.float64),
    # Gates in low precision, whose sums over K and over tokens are still kept in float32.
    *(replace(p, low_gates=True, dtype=d) for p in _CANCELLING for d in LOW_PRECISION),
    *_BEYOND,
    *_RELEASED,
)

# Where y is defined and gradients are not, or cannot be held to the budget: tokens whose gates are all zero;
# gates of zero beside outputs beyond what exp can hold; float32 gates of a float64 layer.
OUTPUT = (
    *(replace(SMALL, T=61, combine="logsumexp", gates="zero_rows", dtype=d) for d in DTYPES),
    replace(SMALL, activation="silu", combine="logsumexp", gates="one_zero", x_scale=100.0),
    *(replace(SMALL, combine=c, low_gates=True, dtype=torch.float64) for c in COMBINES),
)


def named(name: str) -> Problem:
    """Find the first problem of that name among EXACT and SIZES, in float32."""
    return next(p for p in (*EXACT, *SIZES) if p.name == name and p.dtype == torch.float32)


GRADCHECK = tuple(
    Problem("gradcheck", T=4, D=3, H=3, O=2, E=4, K=2, activation=a, output_activation=o, combine=c,
            dtype=torch.float64, gates="unnormalised", load="half_empty", clamp=NEAR)
    for i, a in enumerate(ACTIVATIONS)
    for n, (o, c) in enumerate(itertools.product(OUTPUT_ACTIVATIONS, COMBINES))
    # Two of the four with each, in turn: what is before the output does not know what is after it.
    if (n // 2 + n + i) % 2 == 0
)  # fmt: skip

# What an implementation that compiles anew for each case is tested on: every dtype, activation, combine,
# output activation and bias setting; with the first of these all sizes, loads and gates; and exact sums in
# float16, since Triton's interpreter cuts bfloat16 off where GPUs round it.
REPRESENTATIVE = tuple(
    replace(SMALL, activation=activation, output_activation=output, combine=combine, bias=bias, dtype=dtype)
    for activation, output, combine, bias, dtype in (
        ("swiglu", "none", "sum", True, torch.float32),
        ("relu", "none", "sum", True, torch.float16),
        ("gelu", "none", "logsumexp", False, torch.float64),
        ("geglu", "none", "logsumexp", True, torch.bfloat16),
        ("silu", "relu", "sum", False, torch.float32),
        ("reglu", "none", "sum", True, torch.bfloat16),
    )
)
# And every other activation, with biases and without, the clamped one with the numbers of both models.
REPRESENTATIVE += tuple(
    p
    for p in OPTIONS
    if p.activation not in {other.activation for other in REPRESENTATIVE}
    and (p.output_activation, p.combine) == ("none", "sum")
    and p.dtype in (torch.float32, torch.float64)
)


@functools.cache
def representatives(support: Support) -> tuple[tuple, ...]:
    """Fit REPRESENTATIVE to what ``support`` declares, as every problem is."""
    return tuple(dict.fromkeys(_choices(fit(p, support)) for p in REPRESENTATIVE))


def is_representative(problem: Problem, support: Support) -> bool:
    """Tell whether an implementation that compiles for each case is tested on this problem."""
    if problem.low_gates or _choices(problem) not in representatives(support):
        return False
    return not _is_degenerate(problem) or _is_first(problem, support)


def is_plain(problem: Problem, support: Support) -> bool:
    """Whether an implementation that compiles for each case runs it without gradients, too."""
    return _is_first(problem, support) and not _is_degenerate(problem)


def _is_first(problem: Problem, support: Support) -> bool:
    return _choices(problem) == representatives(support)[0]


def _choices(p: Problem) -> tuple:
    clamp = p.clamp if p.activation == CLAMPED else None
    return p.activation, clamp, p.output_activation, p.combine, p.bias, p.dtype


def _is_degenerate(p: Problem) -> bool:
    """Tell whether a problem has a size that compilers specialise."""
    return min(p.T, p.D, p.H, p.O, p.E, p.K) < 2


# One of the two with each activation, and every combination with some: a second derivative takes seconds.
SECOND_ORDER = tuple(GRADCHECK[2 * i + i // 2 % 2] for i in range(len(ACTIVATIONS)))
