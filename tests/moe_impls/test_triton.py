"""What `triton_fused` refuses and what it keeps; what it computes is checked under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness.judging import calling, compare
from correctness.judging.finding import CheckFailed
from correctness.problems import catalogue
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls import triton_fused
from moe_impls.interface import ACTIVATIONS, GATED_ACTIVATIONS, Clamp, dtype_name
from moe_impls.registry import resolve

not_interpreted = pytest.mark.skipif(triton_fused.INTERPRETED, reason="Triton's kernels are interpreted")
interpreted = pytest.mark.skipif(not triton_fused.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@not_interpreted
def test_tensors_on_the_cpu_are_refused_with_what_to_use_instead() -> None:
    x, routing, experts, _ = make_inputs(catalogue.SMALL)
    with pytest.raises(
        RuntimeError, match="needs CUDA tensors and x is on cpu: use 'grouped_mm', or set TRITON"
    ):
        triton_fused.forward(x, routing, experts)


def test_without_triton_an_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_fused._kernels.cache_clear()
    assert not triton_fused.is_available()
    with pytest.raises(RuntimeError, match="needs triton: pip install triton, or use 'grouped_mm'"):
        triton_fused._kernels()


@pytest.mark.parametrize(
    ("dtype", "E", "error", "message"),
    [
        (torch.float64, 4, TypeError, "x has dtype torch.float64; 'triton_fused' takes torch.float32, "),
        (torch.float32, 65536, ValueError, "E is 65536; 'triton_fused' takes at most 65535 experts"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, E: int, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(triton_fused, "INTERPRETED", True)
    with pytest.raises(error, match=message):
        triton_fused._check(torch.zeros(2, 3, dtype=dtype), E)


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    sizes = triton_fused.candidates(2, torch.float32)[0]
    plan = triton_fused._plan(torch.zeros(4, 1, dtype=torch.int64), 2, sizes)
    with pytest.raises(ValueError, match="need .* programs; 'triton_fused' takes at most 2147483647"):
        triton_fused._grid(plan, 2**40)


@interpreted
@pytest.mark.parametrize(
    "problem",
    [
        catalogue.SMALL,
        replace(catalogue.SMALL, T=0),
        replace(catalogue.SMALL, output_activation="relu", combine="logsumexp"),
    ],
)
def test_both_operators_are_to_torch_what_they_declare(problem: Problem) -> None:
    x, routing, experts, dy = make_inputs(problem)
    leaves = (x, routing.gates, experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    x, gates, *weights = (None if t is None else t.detach().float().requires_grad_() for t in leaves)
    tensors = (x, routing.expert_ids, gates, *weights)
    options = (problem.activation, *problem.clamp, problem.output_activation, problem.combine)
    torch.library.opcheck(triton_fused._forward, (*tensors, *options, True))
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(triton_fused._forward, (*detached, *options, False))
    _, *kept = triton_fused._forward(*detached, *options, True)
    for wanted in ([leaf is not None for leaf in leaves], [leaf is x for leaf in leaves]):
        torch.library.opcheck(triton_fused._backward, (dy.float(), *detached, *kept, *options, wanted))


@interpreted
def test_tiles_are_chosen_for_the_arguments_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, routing, experts, _ = make_inputs(replace(catalogue.SMALL, activation="swiglu_clamped"))
    experts = replace(experts, clamp=Clamp(2.0))
    asked: list[tuple[Any, ...]] = []
    blocks = triton_fused._blocks_for
    monkeypatch.setattr(triton_fused, "_blocks_for", lambda *given: asked.append(given) or blocks(*given))
    triton_fused.forward(x.requires_grad_(), routing, experts).sum().backward()
    named = (x, routing.expert_ids, experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    assert len(asked) == 2  # forward and backward
    for *tensors, activation, clamp in asked:
        assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in named if t is not None]
        assert (activation, clamp) == ("swiglu_clamped", Clamp(2.0))


@pytest.mark.parametrize("counts", [[5, 0, 300, 1], [0, 0, 0, 64], [128, 128], [1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiles_hold_every_row_of_every_expert_once(counts: list[int], dtype: torch.dtype) -> None:
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    sizes = triton_fused.candidates(len(ids) / len(counts), dtype)[0]
    plan = triton_fused._plan(ids.flip(0), len(counts), sizes)
    seen = []
    for e, begin in zip(plan.tile_expert.tolist(), plan.tile_begin.tolist(), strict=True):
        if e < len(counts):
            rows = range(begin, min(begin + plan.blocks.m, int(plan.ends[e])))
            assert len(rows) > 0
            seen += [(e, row) for row in rows]
    assert seen == [(e, row) for row, e in enumerate(ids.flatten().tolist())]


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize(("D", "H"), [(4096, 14336), (2048, 768), (2048, 1024)])
def test_no_more_is_kept_for_the_backward_than_the_rows_of_the_two_products(
    activation: str, D: int, H: int
) -> None:
    T, E, K = 64, 8, 2
    F = 2 * H if activation in GATED_ACTIVATIONS else H
    with FakeTensorMode():
        x, ids, gates = torch.empty(T, D), torch.empty(T, K, dtype=torch.int64), torch.empty(T, K)
        w_in, w_out = torch.empty(E, F, D), torch.empty(E, D, H)
        _, pre, outputs = torch.ops.moe_impls.triton_fused(
            x, ids, gates, w_in, None, w_out, None, activation, *Clamp(), "none", "sum", True
        )
    assert pre.numel() + outputs.numel() <= T * K * (D + H)


# What a block of a GPU of this compute capability may take of shared memory, in bytes (CUDA C++ Programming
# Guide, technical specifications), and the instruction in PTX that multiplies matrices of 16-bit numbers.
TARGETS = {
    80: (163 * 1024, "mma.sync"),
    90: (227 * 1024, "wgmma"),
    120: (99 * 1024, "mma.sync"),
}
CompileFor = Callable[[int, Problem], dict[str, list[Any]]]


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> CompileFor:
    """Run a problem's forward and backward with every launch of a kernel compiled for a GPU, but not made.

    Returns what was compiled, by the name of the kernel.
    """
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.runtime.driver import driver  # pyright: ignore[reportMissingImports]

    kernels = importlib.import_module("moe_impls.triton_kernels")
    compiled: dict[str, list[Any]] = {}

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: object, **constants: object) -> None:
                made = getattr(kernels, self.name).warmup(*arguments, grid=grid, **constants)
                compiled.setdefault(self.name, []).append(made)

            return launch

    launches = {name: Launch(name) for name in dir(kernels) if name.endswith("_kernel")}
    monkeypatch.setattr(triton_fused, "_kernels", lambda: SimpleNamespace(**launches))
    monkeypatch.setattr(triton_fused, "_check", lambda *arguments: None)

    def run(capability: int, problem: Problem) -> dict[str, list[Any]]:
        gpu = SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
        monkeypatch.setattr(driver, "_active", gpu)
        calling.run(triton_fused.forward, make_inputs(problem), problem.combine, gradients=True)
        return compiled

    return run


compiled_for_gpus = pytest.mark.skipif(
    triton_fused.INTERPRETED or not triton_fused.is_available(),
    reason="Triton is missing or interprets its kernels",
)
USUAL = Problem("usual", T=512, D=64, H=64, O=64, E=4, K=2, activation="swiglu", bias=True)


@compiled_for_gpus
@pytest.mark.parametrize("tokens", [8, 128, 512])  # each with tiles of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", TARGETS)
def test_every_kernel_compiles_for_a_gpu_and_fits_its_shared_memory(
    compile_for: CompileFor, capability: int, dtype: torch.dtype, tokens: int
) -> None:
    shared_bytes, product = TARGETS[capability]
    compiled = compile_for(capability, replace(USUAL, T=tokens, dtype=dtype))
    assert len(compiled) == 5 and sum(map(len, compiled.values())) == 7
    for name, versions in compiled.items():
        for version in versions:
            assert version.metadata.shared <= shared_bytes
            assert "tf32" not in version.asm["ptx"]
            if name != "combine_kernel" and tokens > 8:
                assert (product in version.asm["ptx"]) == (dtype != torch.float32)


@compiled_for_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_is_multiplied_as_tf32_where_torch_was_told_to(
    compile_for: CompileFor, dtype: torch.dtype
) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        compiled = compile_for(80, replace(USUAL, dtype=dtype))
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, versions in compiled.items():
        is_product_of_float32 = name != "combine_kernel" and dtype == torch.float32
        assert all(("tf32" in v.asm["ptx"]) == is_product_of_float32 for v in versions)


def tried() -> list[Any]:
    """Every tile that is tried beside the usual one, with a number of tokens of USUAL and a dtype."""
    cases = itertools.product((8, 128, 512), (torch.float32, torch.bfloat16))
    return [
        pytest.param(tokens, dtype, sizes, id=f"{tokens}-{dtype_name(dtype)}-{sizes}")
        for tokens, dtype in cases
        for sizes in triton_fused.candidates(tokens * USUAL.K / USUAL.E, dtype)[1:]
    ]


@compiled_for_gpus
@pytest.mark.parametrize("tokens, dtype, sizes", tried())
def test_tiles_that_are_tried_fit_the_gpu_with_the_least_shared_memory(
    monkeypatch: pytest.MonkeyPatch, compile_for: CompileFor, tokens: int, dtype: torch.dtype, sizes: Any
) -> None:
    monkeypatch.setattr(triton_fused, "candidates", lambda rows, dtype: (sizes,))
    least = min(TARGETS, key=lambda capability: TARGETS[capability][0])
    for versions in compile_for(least, replace(USUAL, T=tokens, dtype=dtype)).values():
        assert all(version.metadata.shared <= TARGETS[least][0] for version in versions)


def choose(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> list[Any]:
    """The tiles of one call after another of a problem, where the narrowest of them are the fastest."""
    asked: list[Any] = []
    monkeypatch.setattr(triton_fused, "_CHOSEN", {})
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    monkeypatch.setattr(triton_fused, "_hidden", lambda x, plan, *rest, **options: (x, x))
    monkeypatch.setattr(triton_fused, "_product", lambda rows, plan, *rest: asked.append(plan.blocks))

    def milliseconds(call: Callable[[], None]) -> float:
        call()
        return float(asked[-1].n)

    monkeypatch.setattr(triton_fused, "_milliseconds", milliseconds)
    x, (ids, _), e, _ = make_inputs(problem)
    arguments = (x, ids, e.w_in, e.b_in, e.w_out, e.b_out, e.activation, e.clamp)
    return [
        triton_fused._blocks_for(*arguments),
        len(asked),
        triton_fused._blocks_for(*arguments),
        len(asked),
    ]


def test_the_first_large_call_tries_every_tile_and_the_fastest_is_taken_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_fused, "LARGE", 1)
    first, tries, second, tries_then = choose(monkeypatch, USUAL)
    few = triton_fused.candidates(USUAL.T * USUAL.K / USUAL.E, USUAL.dtype)
    assert first == second == min(few, key=lambda sizes: sizes.n)
    assert tries == tries_then == len(few)
    assert list(triton_fused.choices().values()) == [first]


def test_a_small_call_takes_the_usual_tiles_and_tries_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first, tries, *_ = choose(monkeypatch, USUAL)
    assert first == triton_fused.candidates(USUAL.T * USUAL.K / USUAL.E, USUAL.dtype)[0]
    assert tries == 0
    assert not triton_fused.choices()


@compiled_for_gpus
@pytest.mark.parametrize("problem", [
    *(replace(USUAL, activation=activation, dtype=torch.float16) for activation in ACTIVATIONS),
    replace(USUAL, T=1, D=1, H=1, O=1, E=1, K=1),  # of sizes of 1 Triton makes constants
    replace(USUAL, bias=False, combine="logsumexp", output_activation="relu"),
    replace(USUAL, H=128, dtype=torch.bfloat16),  # what is activated is computed again
], ids=str)  # fmt: skip
def test_the_kernels_of_every_option_compile(compile_for: CompileFor, problem: Problem) -> None:
    assert {"hidden_kernel", "product_kernel", "hidden_grad_kernel", "weight_grad_kernel"} <= set(
        compile_for(90, problem)
    )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    not (triton_fused.INTERPRETED or DEVICE == "cuda"), reason="needs a GPU or TRITON_INTERPRET=1"
)
# Full tiles, tails and empty experts of every size of tile, along rows, columns and depth.
TILED = Problem("tiled", T=0, D=140, H=132, O=136, E=3, K=2, gates="unnormalised", device=DEVICE)
# The interpreter cuts bfloat16 off where GPUs round it.
WIDTHS = (torch.float32, torch.float16) if triton_fused.INTERPRETED else triton_fused.SUPPORT.dtypes
EVERY_TILE = [
    pytest.param(dtype, sizes, id=f"{dtype_name(dtype)}-{'-'.join(map(str, sizes))}")
    for dtype in WIDTHS
    for sizes in triton_fused.configurations(dtype)
]


@runs_kernels
@pytest.mark.parametrize("dtype, sizes", EVERY_TILE)
def test_every_configuration_is_right_and_not_only_the_one_that_is_fastest_here(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: Any
) -> None:
    monkeypatch.setattr(triton_fused, "candidates", lambda rows, dtype: (sizes,))
    problem = replace(TILED, T=2 * sizes.m + 9, dtype=dtype)  # full tiles and a tail of the busiest expert
    if dtype == torch.float16:
        problem = replace(problem, activation="gelu", output_activation="relu", bias=False)
    assert max(compare.require_right_calls(resolve("triton_fused"), problem).values()) <= 1


ACTIVATED = Problem("activated", T=23, D=9, H=10, O=7, E=3, K=2, gates="unnormalised")
CLAMPED = replace(ACTIVATED, activation="swiglu_clamped", clamp=catalogue.DEEPSEEK_V4, x_scale=8.0)
NEAR = replace(CLAMPED, clamp=catalogue.NEAR, x_scale=1.0)
GELU, GEGLU, RELU2 = (replace(ACTIVATED, activation=name) for name in ("gelu", "geglu_tanh", "relu2"))


def of_another(activation: str) -> Callable[[Any], Any]:
    """Make a function of the kernels that computes another activation."""
    return lambda right: lambda *given: right(*given[:-1], activation)


def with_number(place: int, number: float) -> Callable[[Any], Any]:
    """Make one that has a number of its own for limit (2), alpha (3) or offset (4)."""
    return lambda right: lambda *given: right(*given[:place], number, *given[place + 1 :])


def below_too(right: Any) -> Any:
    def clamped(gate: Any, up: Any, limit: Any) -> tuple[Any, Any]:
        return right(up, gate, limit)[1], right(gate, up, limit)[1]

    return clamped


WRONG = {
    "the limit of the gate ignored": (
        "_clamped", lambda right: lambda g, u, l: (g, right(g, u, l)[1]), CLAMPED),
    "the limit of the value ignored": (
        "_clamped", lambda right: lambda g, u, l: (right(g, u, l)[0], u), CLAMPED),
    "the limit of the value from above only": (
        "_clamped", lambda right: lambda g, u, l: (right(g, u, l)[0], right(u, u, l)[0]), CLAMPED),
    "the limit of the gate from below too": ("_clamped", below_too, NEAR),
    "the limit of gpt-oss for all": ("_activated", with_number(2, 7.0), CLAMPED),
    "the alpha of gpt-oss for all": ("_activated", with_number(3, 1.702), NEAR),
    "the offset of gpt-oss for all": ("_activated", with_number(4, 1.0), CLAMPED),
    "alpha ignored": ("_activated", with_number(3, 1.0), NEAR),
    "slopes beyond the limits": ("_slopes", with_number(2, 1e30), CLAMPED),
    "slopes of another alpha": ("_slopes", with_number(3, 1.0), NEAR),
    "slopes of another offset": ("_slopes", with_number(4, 0.0), NEAR),
    "erf for tanh": ("_tanh_cdf", lambda right: kernels()._normal_cdf, GEGLU),
    "tanh for erf": ("_normal_cdf", lambda right: kernels()._tanh_cdf, GELU),
    "the slope of erf for that of tanh": ("_gelu_tanh_slope", lambda right: kernels()._gelu_slope, GEGLU),
    "no square": ("_activated", of_another("relu"), RELU2),
    "no slope of the square": ("_slopes", of_another("relu"), RELU2),
}  # fmt: skip


def kernels() -> Any:
    return triton_fused._kernels()


@interpreted
@pytest.mark.parametrize("problem", [CLAMPED, NEAR, GELU, GEGLU, RELU2], ids=lambda p: p.id)
def test_the_kernels_activate_as_the_oracle_does(problem: Problem) -> None:
    assert max(compare.require_right_calls(resolve("triton_fused"), problem).values()) <= 1


@interpreted
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_activation_of_the_kernels_is_found(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    name, wrong, problem = WRONG[mistake]
    monkeypatch.setattr(kernels(), name, wrong(getattr(kernels(), name)))
    with pytest.raises(CheckFailed, match="wrong|NaN"):
        compare.require_right_calls(resolve("triton_fused"), problem)


TINY = Problem("tiny", T=5, D=3, H=4, O=5, E=3, K=2, gates="unnormalised", dtype=torch.float16)


@interpreted
@pytest.mark.parametrize(
    "problem",
    [
        replace(TINY, dtype=torch.float32),
        replace(TINY, activation="gelu", output_activation="relu", dtype=torch.float32),
        replace(TINY, combine="logsumexp", bias=False),
    ],
    ids=lambda problem: problem.id,
)
def test_no_result_depends_on_what_a_masked_load_holds(
    monkeypatch: pytest.MonkeyPatch, problem: Problem
) -> None:
    """The interpreter loads zeros where a mask says no and nothing is given for it; a GPU loads anything."""
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def load_or_all_bits(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if other is None and mask.data.size > 1:  # of a single number the interpreter drops an `other` of 0
            other = load(self, pointers, mask, other, *options)
            other.data.view(np.uint8)[...] = 0xFF  # NaN of every floating dtype, and -1
        return load(self, pointers, mask, other, *options)

    monkeypatch.setattr(builder, "create_masked_load", load_or_all_bits)
    results = calling.run(triton_fused.forward, make_inputs(problem), problem.combine)
    compare.require_right(results, problem)


@interpreted
@pytest.mark.parametrize(
    ("activation", "name", "dimension"),
    [
        *(("gelu", name, dimension) for name in ("w_in", "w_out") for dimension in range(3)),
        *(("gelu", name, dimension) for name in ("b_in", "b_out") for dimension in range(2)),
        *(("swiglu", name, 1) for name in ("w_in", "b_in")),
    ],
)
def test_weights_may_lie_further_apart_than_32_bits_count(activation: str, name: str, dimension: int) -> None:
    inputs = make_inputs(replace(TINY, activation=activation))
    near = getattr(inputs.experts, name)
    strides = list(near.stride())
    strides[dimension] = 2**31 // (near.shape[dimension] - 1) + 1
    far = torch.empty_strided(near.shape, strides, dtype=near.dtype)  # its untouched pages take no memory
    far.copy_(near)
    moved = inputs._replace(experts=replace(inputs.experts, **{name: far}))
    want, results = (calling.run(triton_fused.forward, i, TINY.combine) for i in (inputs, moved))
    for tensor in want:
        assert torch.equal(results[tensor], want[tensor]), tensor


SMALL = replace(catalogue.SMALL, device=DEVICE)


@runs_kernels
@pytest.mark.parametrize("name", ["integers_gated", "integers_clamped", "zero_gates"])
def test_what_few_combinations_of_options_leave_out_is_right(name: str) -> None:
    """Gates and hidden values of zero, values at a limit: not tried of what compiles for each combination."""
    problem = replace(catalogue.named(name), device=DEVICE)
    compare.require_right(calling.run(triton_fused.forward, make_inputs(problem), problem.combine), problem)


@runs_kernels
@pytest.mark.parametrize("name", ["b_in", "b_out", "gates"])
def test_one_gradient_alone_is_what_it_is_beside_the_others(name: str) -> None:
    inputs = make_inputs(SMALL)
    every = calling.run(triton_fused.forward, inputs, SMALL.combine)
    alone = calling.run(triton_fused.forward, inputs, SMALL.combine, wanted=(name,))
    assert torch.equal(alone[name], every[name])


@runs_kernels
def test_the_gradient_of_the_gates_is_summed_in_float32_whatever_the_default_dtype_is() -> None:
    inputs = make_inputs(SMALL)
    right = calling.run(triton_fused.forward, inputs, SMALL.combine)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = calling.run(triton_fused.forward, inputs, SMALL.combine)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found["gates"], right["gates"])


class _GivesNoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None: ...  # type: ignore[override]


@runs_kernels
def test_no_gradient_of_y_is_none_of_x() -> None:
    x, routing, experts, _ = make_inputs(SMALL)
    x.requires_grad_()
    _GivesNoGradient.apply(triton_fused.forward(x, routing, experts)).sum().backward()  # pyright: ignore
    assert x.grad is None


@runs_kernels
def test_a_nan_of_the_first_token_stays_out_of_the_weights_of_experts_it_does_not_visit() -> None:
    inputs = make_inputs(SMALL)
    inputs.x[0] = torch.nan
    found = calling.run(triton_fused.forward, inputs, SMALL.combine)
    others = torch.ones(SMALL.E, dtype=torch.bool)
    others[inputs.routing.expert_ids[0].cpu()] = False
    for name in ("w_in", "w_out"):
        assert bool(found[name].cpu()[others].isfinite().all()), name
