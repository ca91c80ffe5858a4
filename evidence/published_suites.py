"""The tolerance rules and problem sets of published MoE tests, as data; `evidence.published` applies them.

Written from the public files named in each ``source``. Nothing of those files runs here: their rules are a
line each, and their inputs are `make_inputs` at the scales that the files give.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from correctness.problems.problem import Problem

Rule = Callable[[Tensor, Tensor], bool]  # rule(got, want): whether a suite accepts a tensor


def allclose(got: Tensor, want: Tensor, *, atol: float, rtol: float) -> bool:
    """Accept entries within atol + rtol |want|, of equal shape and dtype; NaN is never close."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.allclose(got, want, atol=atol, rtol=rtol)


def allclose_as_float32(got: Tensor, want: Tensor, *, atol: float, rtol: float) -> bool:
    """Apply `allclose` to both after a cast, so to any dtype."""
    return allclose(got.float(), want.float(), atol=atol, rtol=rtol)


def allclose_relative_to_result(got: Tensor, want: Tensor, *, atol: float, rtol: float) -> bool:
    """Apply `allclose` with the two exchanged: the relative part is of the result."""
    return allclose(want, got, atol=atol, rtol=rtol)


def largest_error(got: Tensor, want: Tensor, *, below: float) -> bool:
    """Accept a largest |got - want| below a limit."""
    return bool((got - want).abs().max() < below)


def sqnr(got: Tensor, want: Tensor, *, at_least: float) -> bool:
    """Accept a norm of the result over that of its error of so many dB: one figure for the whole tensor."""
    signal, noise = torch.linalg.vector_norm(got), torch.linalg.vector_norm(got - want)
    return bool(20 * torch.log10(signal / noise) >= at_least)


def matched(got: Tensor, want: Tensor, *, atol: float, rtol: float, ratio: float) -> bool:
    """Accept finite entries of equal shape and dtype, at most 1 - ratio of them off by both measures."""
    if got.shape != want.shape or got.dtype != want.dtype or not bool(torch.isfinite(got).all()):
        return False
    error = (got.float() - want.float()).abs()
    off = (error > atol) & (error / (want.float().abs() + 1e-8) > rtol)
    return 1 - int(off.sum()) / off.numel() >= ratio


def same_shape(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape


def exists(got: Tensor | None, want: Tensor) -> bool:
    return got is not None


def describe(rule: Rule) -> str:
    """Write a rule as it is called: allclose(atol=0.01, rtol=0.01)."""
    if isinstance(rule, partial):
        return f"{rule.func.__name__}({', '.join(f'{k}={v:g}' for k, v in rule.keywords.items())})"
    return getattr(rule, "__name__", repr(rule))


@dataclass(frozen=True)
class Comparison:
    """One call that a suite makes and the tensors that it compares.

    problem: with D and H divided where the published ones are too large; weights are then multiplied by the
        root of the same factor, so that hidden values and outputs keep their size.
    rules: the rule of each tensor that is compared: y, and gradients by the name of their tensor.
    published: D and H of the public file.
    incoming: what flows into y: "none" (forward only), "dy" (random), "sum" (the loss is y.sum()), "mse"
        (the mean squared distance of y from one) or "sum_and_balance" (y.sum() with a balance loss that
        reaches x and the gates by another way).
    padded: weights are the leading columns of wider rows.
    compiled: through torch.compile(fullgraph=True), of implementations that declare it.
    new_process: a subject has forgotten all earlier calls.
    """

    problem: Problem
    rules: Mapping[str, Rule]
    published: tuple[int, int]
    incoming: str = "none"
    padded: bool = False
    compiled: bool = False
    new_process: bool = False

    @property
    def id(self) -> str:
        p = self.problem
        parts = [f"T{p.T}", f"D{p.D}", f"H{p.H}", f"E{p.E}", f"K{p.K}", p.id.partition("-")[2]]
        parts += ["padded"] * self.padded + ["compiled"] * self.compiled
        return "-".join([*parts, self.incoming] if self.incoming != "none" else parts)


@dataclass(frozen=True)
class Suite:
    """Published tests of one project.

    source: the public files: repository, path and commit, or package and version.
    weights: the standard deviation of weights as a function of the features that they are summed over.
    biases, dy: standard deviations.
    score, logits: how gates come from router logits (see `RouterSpec`), and the logits' standard deviation.
    reference: what results are compared with: "plain", a plain computation that rounds to the dtype of x;
        "float32", a plain computation in float32, cast at the end; "base", the very code that a mutant was
        made of, so that a right result is equal to the last bit.
    reference_first: the reference is computed before the subject is called; otherwise after it, from what
        the subject left in the same tensors.
    calls: how often each comparison calls the subject; all results are compared, and each is overwritten
        with zeros before the next call.
    no_grad: forward calls are made under torch.no_grad().
    keeps_inputs: the inputs of earlier calls stay alive, so that new ones lie elsewhere.
    keeps_weights: only x and the routing are new in each comparison.
    recreated, not_recreated, beyond: in words, and what the suite tests that this comparison cannot show.
    """

    name: str
    source: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    weights: Callable[[int], float]
    recreated: str
    not_recreated: str
    beyond: str
    biases: float = 0.5
    dy: float = 1.0
    score: str = "topk_softmax"
    logits: float = 1.0
    reference: str = "plain"
    reference_first: bool = True
    calls: int = 1
    no_grad: bool = False
    keeps_inputs: bool = False
    keeps_weights: bool = False


def _gradients(rule: Rule, bias: bool = False) -> dict[str, Rule]:
    return dict.fromkeys(("x", "gates", "w_in", "w_out", *(("b_in", "b_out") if bias else ())), rule)


def _small(n: int) -> float:
    return 0.02


def _tenth(n: int) -> float:
    return 0.1


def _unit(n: int) -> float:
    return n**-0.5


def _linear(n: int) -> float:
    """Deviate as torch.nn.Linear: uniform in ±1/√n."""
    return (3 * n) ** -0.5


_SCATTERMOE = partial(largest_error, below=1e-4)
SCATTERMOE = Suite(
    name="scattermoe",
    source=("shawntan/scattermoe tests/test_mlp.py @2d15f31",),
    weights=_small,
    biases=0.02,
    score="softmax",
    reference_first=False,
    comparisons=tuple(
        Comparison(
            Problem("", T=T, D=D, H=4 * D // K, O=D, E=8, K=K, activation="gelu", bias=bias, seed=seed),
            {"y": _SCATTERMOE, **_gradients(_SCATTERMOE, bias)},
            (D, 4 * D // K),
            "dy",
        )
        for seed, (bias, T, D, K) in enumerate(
            itertools.product((False, True), (1, 256, 512), (128, 256, 512, 600, 100), (2, 3, 4))
        )
        if D < 256 or (T == 1 and (D < 512 or K == 4))
    ),
    recreated="the rule, all lengths, K, biases and scales in the published order, random dy, the gradients "
    "of x, gates, weights and biases, and that the reference runs after the subject on the same tensors.",
    not_recreated="widths 256, 512 and 600 at lengths 256 and 512; widths 512 and 600 with K of 2 and 3.",
    beyond="the Triton kernels themselves.",
)


_DEFAULT = partial(allclose, atol=1e-8, rtol=1e-5)
_MEGABLOCKS = Problem("", T=16384, D=64, H=64, O=64, E=1, K=1, activation="gelu", bias=False, low_gates=True,
                      dtype=torch.bfloat16)  # fmt: skip
# tokens, hidden size, experts, top_k of the parametrised tests, one of each
_MEGABLOCKS_SHAPES = (
    (512, 1, 1), (512, 2, 1), (512, 4, 1), (512, 8, 1), (512, 2, 2), (512, 4, 2), (512, 4, 4), (512, 8, 2),
    (512, 8, 4), (512, 8, 8), (128, 1, 1),
)  # fmt: skip
MEGABLOCKS = Suite(
    name="megablocks",
    source=(
        "databricks/megablocks tests/layers/dmoe_test.py @1526174",
        "databricks/megablocks tests/layers/moe_test.py @1526174",
    ),
    weights=_tenth,
    score="softmax",
    logits=2.3,
    reference="base",
    comparisons=(
        *(  # test_dmoe_forward, test_dmoe_forward_backward: the shape, and that x has a gradient
            Comparison(
                replace(_MEGABLOCKS, T=128, D=D // 8, H=D // 4, O=D // 8, E=E, K=K, seed=seed),
                rules,
                (D, 2 * D),
                incoming,
            )
            for seed, (D, E, K) in enumerate(_MEGABLOCKS_SHAPES)
            for incoming, rules in (
                ("none", {"y": same_shape}),
                ("sum_and_balance", {"y": same_shape, "x": exists}),
            )
        ),
        *(  # test_dmoe_forward_vs_moe, which never passes top_k
            Comparison(
                replace(_MEGABLOCKS, D=D // 8, H=D // 8, O=D // 8, E=E, seed=42), {"y": _DEFAULT}, (D, D)
            )
            for D, E in ((128, 1), (512, 1), (512, 2), (512, 4), (512, 8))
        ),
        *(  # test_dmoe_forward_vs_baseline, test_moe_forward_vs_dense, test_moe_forward_backward_vs_dense
            Comparison(replace(_MEGABLOCKS, H=128, dtype=dtype, seed=seed), rules, (512, 1024), incoming)
            for seed, (dtype, incoming, rules) in enumerate(
                (
                    (torch.bfloat16, "none", {"y": _DEFAULT}),
                    (torch.float16, "none", {"y": _DEFAULT}),
                    (torch.float16, "sum", {"w_in": _DEFAULT, "w_out": _DEFAULT}),
                )
            )
        ),
    ),
    recreated="the rule, 16,384 tokens, all numbers of experts, one expert for each token wherever numbers "
    "are compared, y.sum() as the loss, weight gradients of one expert only; for all other shapes that the "
    "call runs, that the shape is right and that x has a gradient (with 128 tokens).",
    not_recreated="D and H are divided by 8; gelu is by erf, not tanh; the glu tests, which have no routing. "
    "The rule asks for equal bits in bfloat16 and float16, which two CPU computations do not give each "
    "other, so each mutant is compared with the code that it was made of. Their tests compare two GPU "
    "kernels of their own.",
    beyond="unit tests of sort, histogram, gather, scatter and topology kernels; expert parallelism.",
)


_SONIC = Problem("", T=8192, D=96, H=128, O=96, E=32, K=2, dtype=torch.bfloat16, x_scale=0.02, seed=42)


def _sonic(problem: Problem, H: int, *, compiled: bool = False) -> Comparison:
    gradients = partial(allclose_as_float32, atol=2e-2, rtol=2e-2)
    rules = {"y": partial(allclose_as_float32, atol=1.4e-2, rtol=2e-2), **_gradients(gradients, problem.bias)}
    return Comparison(problem, rules, (768, H), "dy", compiled=compiled)


SONIC_MOE = Suite(
    name="sonic-moe",
    source=(
        "Dao-AILab/sonic-moe tests/moe_test.py @cbcb12a",
        "Dao-AILab/sonic-moe sonicmoe/moe.py @115c576",
    ),
    weights=_small,
    biases=0.01,
    dy=0.02,
    logits=0.0115,
    comparisons=(
        *(_sonic(replace(_SONIC, T=128, bias=bias), 1024) for bias in (False, True) * 6),
        *(_sonic(replace(_SONIC, T=128, bias=bias), 1024, compiled=True) for bias in (False, True)),
        _sonic(_SONIC, 1024),
        _sonic(replace(_SONIC, H=64, E=64, K=4), 512),
        _sonic(replace(_SONIC, T=1024, H=32, E=128, K=8), 256),
    ),
    recreated="the rules, the scales of x, weights, biases and dy, near-uniform gates, 8,192 tokens and 512 "
    "rows for each expert with two pairs of E and K, with biases; fewer without; gradients of x, weights and "
    "biases, and that torch.compile makes one graph.",
    not_recreated="D and H are divided by 8; the shapes with D of 1,536 and 4,096, and 256 experts; 128 "
    "experts have 1,024 tokens only; 14 calls with 128 tokens stand for the tests left out. The gradient of "
    "the gates stands for that of the router's weight.",
    beyond="the router and its gradient; further test files for FP8, metadata and expert parallelism.",
)


_LIGER_FORWARD = {
    torch.float32: partial(allclose, atol=1e-3, rtol=1e-4),
    torch.bfloat16: partial(allclose, atol=1e-1, rtol=1e-2),
}


def _liger(T: int, E: int, D: int, H: int, K: int, dtype: torch.dtype = torch.float32, **more) -> Comparison:
    problem = Problem("", T=T, D=D, H=H, O=D, E=E, K=K, bias=False, dtype=dtype, low_gates=True, **more)
    return Comparison(problem, {"y": _LIGER_FORWARD[dtype]}, (D, H))


def _liger_backward(T: int, E: int, D: int, H: int, K: int) -> Comparison:
    rules = _gradients(partial(allclose, atol=3e-3, rtol=1e-2))
    return replace(_liger(T, E, D, H, K, seed=42), rules=rules, incoming="sum")


LIGER = Suite(
    name="Liger-Kernel",
    source=("linkedin/Liger-Kernel test/transformers/test_fused_moe.py @1ebd058 (as in liger-kernel 0.8.5)",),
    weights=_small,
    comparisons=(
        *itertools.chain.from_iterable(
            (
                _liger(*shape, seed=42),
                _liger_backward(*shape),
                _liger(*shape, dtype=torch.bfloat16, seed=42),
            )
            for shape in (
                (7, 4, 64, 32, 2),
                (512, 8, 256, 128, 2),
                (512, 8, 97, 47, 2),
                (512, 7, 128, 64, 3),
                (512, 8, 256, 64, 1),
                (128, 8, 256, 64, 8),
            )
        ),
        _liger(32, 8, 64, 32, 2, load="same_experts"),
        _liger(1, 4, 32, 16, 2, seed=42),
        _liger(16, 4, 32, 16, 4, seed=42),
    ),
    recreated="all numeric tests at their true sizes and scales, in the published order: forward in float32 "
    "and bfloat16, gradients in float32 with y.sum() as the loss, one token, K = E, and all tokens at the "
    "same experts.",
    not_recreated="where all tokens go to one expert twice, they go to two experts here; the regression test "
    "of 140,000 tokens that asks for finite results only.",
    beyond="invariants of the routing metadata (inverse permutation, counts, offsets), and offsets beyond "
    "2^31 bytes.",
)


_VLLM = {"y": partial(allclose, atol=2e-2, rtol=0.0)}


def _vllm(T: int, H: int, D: int, E: int, K: int, padded: bool, *, of: tuple[int, int]) -> Comparison:
    problem = Problem("", T=T, D=D, H=H, O=D, E=E, K=K, bias=False, dtype=torch.bfloat16, x_scale=0.1, seed=7)
    return Comparison(problem, _VLLM, of, padded=padded)


VLLM = Suite(
    name="vLLM",
    source=("vllm-project/vllm tests/kernels/moe/test_moe.py @9ba7fb9",),
    weights=_tenth,
    score="softmax",
    calls=2,
    comparisons=(
        *(
            _vllm(T, 64, 64, E, K, padded, of=(128, H))
            for T, H in ((1, 128), (1, 2048), (33, 2048))
            for E in (8, 64, 192)
            for K in (2, 6)
            for padded in (True, False)
        ),
        *(
            _vllm(T, 64, 73 if D == 511 else 64, E, K, False, of=(D, H))
            for T, H, D in ((1, 128, 128), (1, 2048, 128), (2, 2048, 128), (2, 2048, 511))
            for E in (128, 256)
            for K in (1, 2)
        ),
        _vllm(32768, 64, 73, 8, 2, True, of=(511, 2048)),
        _vllm(40000, 64, 64, 64, 2, False, of=(1024, 1024)),
    ),
    recreated="the rule, the scales, gates that do not sum to one, up to 40,000 tokens, padded weights, two "
    "calls for each comparison (two entry points run on the same tensors), each result overwritten with "
    "zeros before the next call, as before the replay of a CUDA graph; all sizes with up to 33 tokens of "
    "test_fused_moe, half of those of test_naive_block_assignment_moe.",
    not_recreated="D and H are divided by 2 to 32; all but two of the 24 combinations with "
    "32,768 and 40,000 tokens; expert maps, CUDA graphs, the comparison of Mixtral with transformers.",
    beyond="expert parallelism, chunking, quantised weights of many formats (tests in the same folder).",
)


_MATCHED = {"y": partial(matched, atol=1e-2, rtol=1e-2, ratio=0.95)}
FLASHINFER_BENCH = Suite(
    name="flashinfer-bench",
    source=(
        "flashinfer-ai/flashinfer-bench flashinfer_bench/bench/eval_config.yaml @3c8bc1b",
        "flashinfer-ai/flashinfer-bench flashinfer_bench/bench/utils.py @00a1ec8",
        "flashinfer-ai/flashinfer-bench flashinfer_bench/bench/evaluators/default.py @06323a4",
        "flashinfer-ai/flashinfer-bench flashinfer_trace/definitions/moe/moe_bf16_topk8_e256_h2048_i256.json "
        "@2c687ad",
    ),
    weights=_unit,
    reference="float32",
    no_grad=True,
    keeps_inputs=True,
    comparisons=tuple(
        Comparison(
            Problem("", T=T, D=64, H=32, O=64, E=256, K=8, bias=False, dtype=torch.bfloat16, seed=seed),
            _MATCHED,
            (2048, 256),
        )
        for T, trials in (
            *((T, 3) for T in (1, 7, 14, 15, 16, 32, *range(52, 60), 62, 80, 901)),
            (14107, 1),
        )
        for seed in range(trials)
    ),
    recreated="the rule with its gates of shape, dtype and finite values, the one bfloat16 MoE definition, "
    "three trials on new inputs, and the token counts of the FP8 workload.",
    not_recreated="D is divided by 32 and H by 8; 11,948 tokens; one trial of 14,107. Weights and outputs "
    "have unit scale here. At the scale of the published workload (standard normal everywhere) outputs are "
    "so large that only the relative part counts, and the project's own kernel has been reported as "
    "incorrect (flashinfer-bench#178, flashinfer-bench-starter-kit#20).",
    beyond="FP8 and FP4 definitions, captured routing, latency.",
)


_TORCHAO = {
    "y": partial(sqnr, at_least=23.0),
    "x": partial(sqnr, at_least=29.0),
    **dict.fromkeys(("gates", "w_in", "w_out"), partial(sqnr, at_least=22.0)),
}
TORCHAO = Suite(
    name="torchao",
    source=(
        "pytorch/ao test/prototype/moe_training/test_training.py @00ee982",
        "pytorch/ao test/prototype/moe_training/reference_moe.py @2f480fa",
    ),
    weights=_small,
    score="sigmoid",
    logits=1.43,
    comparisons=tuple(
        Comparison(
            Problem("", T=T, D=80, H=H, O=80, E=8, K=1, bias=False, dtype=torch.bfloat16, seed=42),
            _TORCHAO,
            (5120, 8192),
            "mse",
        )
        for T, H in (*((512, 64),) * 11, (16384, 128))
    ),
    recreated="the strictest limits of the recipes, 16,384 tokens, 8 experts, one for each token, sigmoid "
    "gates, the squared distance from one as the loss, gradients of x and weights; 11 calls with 512 tokens "
    "stand for the tests of the other recipes and targets.",
    not_recreated="D and H are divided by 64 (H by 128 with 512 tokens); quantisation, which the limits are "
    "made for; gates on the input instead of the output; the shared expert, whose exact output raises their "
    "figure for y; torch.compile without fullgraph. The gradient of the gates stands for that of the "
    "router's weight, and the two halves of w_in are one tensor.",
    beyond="FP8 and MXFP8 training, distributed training, many kernel tests.",
)


_TRANSFORMERS = Problem("", T=91, D=32, H=32, O=32, E=8, K=2, bias=False, x_scale=0.02, low_gates=True)
TRANSFORMERS = Suite(
    name="transformers",
    source=("transformers 5.24.0 (sdist) tests/test_modeling_common.py",),
    weights=_small,
    logits=0.0023,
    no_grad=True,
    comparisons=tuple(
        Comparison(
            replace(_TRANSFORMERS, dtype=dtype, seed=seed),
            {"y": partial(allclose, atol=tolerance, rtol=tolerance)},
            (32, 32),
        )
        for dtype, tolerance in ((torch.float16, 1e-3), (torch.float32, 1e-4), (torch.bfloat16, 5e-3))
        for seed in range(8)
    ),
    recreated="the rule that batched and grouped experts must agree with the loop, in three dtypes under "
    "no_grad, at the sizes and scales of the tiny Mixtral of its tests (x and weights of 0.02).",
    not_recreated="the model around the layer: y itself is compared, not hidden states and logits. In those "
    "tiny models the experts add about 1e-6 to hidden states of 0.02, and experts that return zeros pass the "
    "same comparison (measured with transformers 5.24.0 for Mixtral and Qwen3-MoE in all three dtypes).",
    beyond="that the backend that was asked for is the one that ran, models saved and loaded again, "
    "generation, integration tests with released weights.",
)


KERNELBENCH = Suite(
    name="KernelBench",
    source=(
        "ScalingIntelligence/KernelBench src/kernelbench/eval.py @0d12226",
        "ScalingIntelligence/KernelBench scripts/run_and_check.py @1058878",
    ),
    weights=_linear,
    biases=0.05,
    no_grad=True,
    keeps_weights=True,
    comparisons=tuple(
        Comparison(
            Problem("", T=512, D=128, H=256, O=128, E=8, K=2, dtype=dtype, seed=seed),
            {"y": partial(allclose_relative_to_result, atol=tolerance, rtol=tolerance)},
            (128, 256),
            new_process=seed == 0,
        )
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-2))
        for seed in range(5)
    ),
    recreated="the rule, no_grad, five trials in each dtype on new inputs at the addresses of the last ones, "
    "the same weights for all, as torch.nn.Linear makes them.",
    not_recreated="KernelBench holds no MoE problem: the sizes are of this suite's choice, and inputs are "
    "normal. float16 and bfloat16 are tested there only on request.",
    beyond="a static checker for reward hacking, a flag for improbable speedups, adversarial kernels as "
    "tests of the harness.",
)

SUITES = (
    SCATTERMOE,
    MEGABLOCKS,
    SONIC_MOE,
    LIGER,
    VLLM,
    FLASHINFER_BENCH,
    TORCHAO,
    TRANSFORMERS,
    KERNELBENCH,
)
