"""The implementations that compile, lay out or save: what they promise beyond a right result."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from correctness.checks.case import Check, cases
from correctness.checks.table import CHECKS, implementation
from correctness.checks.values import exact, values
from correctness.judging.compare import require_right
from correctness.problems.catalogue import SMALL
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs, Problem
from moe_impls import kernel_file, kernel_library, native, packed, recompute
from moe_impls.functional import activate
from moe_impls.interface import Experts, Prepared, Routing, dtype_name
from moe_impls.registry import resolve


def small(**changes) -> Inputs:
    return make_inputs(replace(SMALL, **changes))


@pytest.mark.parametrize("name", ["w_in", "b_in", "w_out", "b_out"])
@pytest.mark.parametrize("prepare", [packed.prepare, native.prepare], ids=["packed", "native"])
def test_prepared_weights_that_changed_are_refused_by_name(
    prepare: Callable[..., Prepared], name: str
) -> None:
    inputs = small()
    f = prepare(inputs.experts)
    f(inputs.x, inputs.routing)
    inputs.experts.tensors[name][1].zero_()
    with pytest.raises(RuntimeError, match=rf"{name} was written to after prepare\(experts\): call prepare"):
        f(inputs.x, inputs.routing)


def test_recompute_keeps_one_activation_beside_its_inputs() -> None:
    inputs = small().map(lambda t: t.requires_grad_())
    arguments = {t.data_ptr() for t in inputs.tensors.values()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in arguments:
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        recompute.forward(inputs.x, inputs.routing, inputs.experts)
    slots, features = inputs.routing.gates.numel(), inputs.experts.w_in.shape[1]
    # h; the order of the slots and their gates
    assert sum(t.nbytes for t in kept.values()) == slots * (features * inputs.x.itemsize + 8 + 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": "logsumexp"}, "combine of implementation recompute is 'logsumexp'; valid are sum"),
        (
            {"output_activation": "relu"},
            "output_activation of implementation recompute is 'relu'; valid are none",
        ),
    ],
)
def test_recompute_refuses_what_it_does_not_declare(changes: dict[str, str], message: str) -> None:
    inputs = small(**changes)
    with pytest.raises(ValueError, match=message):
        recompute.forward(*inputs[:3], combine=changes.get("combine", "sum"))


@pytest.mark.parametrize("constant_dy", [True, False])
@pytest.mark.parametrize("name", ["native", "recompute"])
def test_gradients_of_gradients_are_refused(name: str, constant_dy: bool) -> None:
    inputs = small().map(lambda t: t.requires_grad_())
    y = resolve(name).forward(*inputs[:3])
    loss = y.sum() if constant_dy else y.square().sum()
    with pytest.raises(RuntimeError, match=f"'{name}' has no gradients of gradients .* 'sorted_dispatch'"):
        torch.autograd.grad(loss, inputs.x, create_graph=True)


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("check", {c: 0 for c in CHECKS if not c.drawn}, ids=lambda c: c.name)
def test_recompute_is_right_on_cpus_that_multiply_a_dtype_and_on_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, check: Check, multiplies: bool
) -> None:
    monkeypatch.setattr(recompute, "multiplies", lambda dtype: multiplies or dtype.itemsize > 2)
    for case in cases([implementation(resolve("recompute"))], [check]):
        if case.skip is None and case.problem.T <= 100 and case.problem.dtype.itemsize == 2:
            case.run()


NATIVE = pytest.mark.parametrize("name", ["native", "native+prepared"])


LITTLE_MEMORY = """
import resource
from pathlib import Path

import torch

from moe_impls import Experts, Routing, native

native.AT_ONCE = 2**40
experts = Experts(torch.ones(1, 1, 1), None, torch.ones(1, 2**20, 1), None, "relu")
x, routing = torch.ones(200, 1), Routing(torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1))
native.forward(x[:1], Routing(*(t[:1] for t in routing)), experts)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1000 * 2**20,) * 2)
try:
    native.forward(x, routing, experts)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_memory_that_runs_out_in_the_kernel_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert "no memory for the hidden features and outputs of 200 slots" in done.stdout, done.stderr


@pytest.mark.parametrize("check", {c: 0 for c in CHECKS if not c.drawn}, ids=lambda c: c.name)
@NATIVE
def test_native_is_right_in_several_calls_of_the_kernel_as_in_one(
    monkeypatch: pytest.MonkeyPatch, name: str, check: Check
) -> None:
    monkeypatch.setattr(native, "AT_ONCE", 0)
    for case in cases([implementation(resolve(name))], [check]):
        if case.skip is None and case.problem.T <= 100:
            case.run()


@pytest.mark.parametrize("D", [16, 37])  # one that is a whole number of vectors, and one that is not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@NATIVE
def test_native_is_right_for_every_number_of_rows_of_an_expert(name: str, dtype: torch.dtype, D: int) -> None:
    for rows in range(1, 150):
        layer = Problem(
            "rows", T=rows, D=D, H=11, O=D, E=1, K=1, activation="swiglu", dtype=dtype, exact=True
        )
        exact(resolve(name), layer)


@pytest.mark.parametrize("features", [1, 23, 24, 25, 47, 48, 49, 97])  # around the widths of tiles
def test_native_is_right_for_every_number_of_features(features: int) -> None:
    layer = Problem("features", T=7, D=features, H=features, O=features, E=3, K=2, exact=True)
    exact(resolve("native+prepared"), layer)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])  # in several streams, in one, and in groups
@NATIVE
def test_native_is_right_for_a_few_long_rows(name: str, rows: int) -> None:
    values(resolve(name), Problem("long", T=rows, D=9001, H=3, O=5, E=1, K=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@NATIVE
def test_native_is_right_where_the_rows_of_an_expert_are_more_than_a_cache_holds(
    name: str, dtype: torch.dtype
) -> None:
    layer = Problem("wide", T=450, D=1501, H=9, O=30, E=2, K=1, activation="swiglu", dtype=dtype)
    values(resolve(name), layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("sizes", [(1300, 19, 9, 21, 1), (6, 2048, 1024, 40, 2)], ids=["sums", "gradients"])
def test_native_is_right_for_long_sums_and_for_gradients_that_no_cache_holds(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    T, D, H, O, E = sizes
    values(resolve("native"), Problem("long", T=T, D=D, H=H, O=O, E=E, K=1, activation="swiglu", dtype=dtype))


@pytest.mark.parametrize("wanted", ["x", "gates", "w_in", "b_in", "w_out", "b_out"])
@pytest.mark.parametrize("name", ["native", "recompute"])
def test_one_gradient_alone_is_the_same_as_among_all(name: str, wanted: str) -> None:
    x, routing, experts, _ = small(output_activation="none")
    leaves = {"x": x, "gates": routing.gates, **experts.tensors}

    def gradients(*names: str) -> dict[str, Tensor]:
        own = {n: t.detach().clone().requires_grad_(n in names) for n, t in leaves.items()}
        of_experts = replace(experts, **{n: own[n] for n in experts.tensors})
        y = resolve(name).forward(own["x"], routing._replace(gates=own["gates"]), of_experts)
        return dict(zip(names, torch.autograd.grad(y.sum(), [own[n] for n in names]), strict=True))

    assert torch.equal(gradients(wanted)[wanted], gradients(*leaves)[wanted])


@pytest.mark.parametrize("numbers", [1, 30, 400, 5000])  # from one slot at a time to a few experts
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
@pytest.mark.parametrize("load", ["uniform", "one_hot_expert", "half_empty"])
@NATIVE
def test_native_is_right_for_groups_of_slots_of_any_size(
    monkeypatch: pytest.MonkeyPatch, name: str, load: str, combine: str, numbers: int
) -> None:
    monkeypatch.setattr(native, "AT_ONCE", 0)
    monkeypatch.setattr(native, "GROUP", numbers)
    values(resolve(name), replace(SMALL, T=100, load=load, combine=combine))


def turned(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("names", [("w_in",), ("w_out",), ("w_in", "w_out")], ids="+".join)
def test_native_is_right_for_weights_that_lie_turned_in_memory(
    dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    own = resolve("native").forward

    def forward(x: Tensor, routing: Routing, experts: Experts, *, combine: str = "sum") -> Tensor:
        experts = replace(experts, **{name: turned(experts.tensors[name]) for name in names})
        return own(x, routing, experts, combine=combine)

    for layer in (SMALL, replace(SMALL, D=37, H=11, O=23, load="zipf", combine="logsumexp")):
        values(replace(resolve("native"), forward=forward), replace(layer, T=100, dtype=dtype, bias=True))


def test_gradients_of_turned_weights_lie_turned_too() -> None:
    inputs = small(T=50).map(lambda t: (turned(t) if t.dim() == 3 else t).requires_grad_())
    found = torch.autograd.grad(
        resolve("native").forward(*inputs[:3]).sum(), [inputs.experts.w_in, inputs.experts.w_out]
    )
    assert all(native._is_turned(gradient) for gradient in found)


def test_the_groups_of_native_hold_every_slot_of_every_expert_once() -> None:
    begin = torch.tensor([0, 0, 3, 3, 30, 31, 36, 36])
    for numbers in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "GROUP", numbers)
            groups, of_whole = (native._groups(begin, 36, width=5, whole=whole) for whole in (False, True))
        for some in (groups, of_whole):
            assert [place for g in some for place in held(g)] == held(native._Group(0, 0, 36, begin))
        assert all(g.stop - g.start <= max(numbers // 5, 1) for g in groups)
        assert [e for g in of_whole for e, _, _ in g.of_experts()] == list(range(7))


def held(group: native._Group) -> list[tuple[int, int]]:
    """The experts and slots of a group."""
    bounds = group.begin.tolist()
    assert (bounds[0], bounds[-1]) == (group.start, group.stop)
    slots = [range(*pair) for pair in itertools.pairwise(bounds)]
    return [(group.first + e, n) for e, of_expert in enumerate(slots) for n in of_expert]


LIBRARY, MISSING = kernel_library.library.__wrapped__, kernel_library.missing.__wrapped__


def without_library(monkeypatch: pytest.MonkeyPatch, cache: object, compiler: str) -> None:
    """Forget the kernel, and let there be this compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(kernel_library, "PACKAGED", Path("no wheel"))
    monkeypatch.setattr(kernel_library, "library", LIBRARY)
    monkeypatch.setattr(kernel_library, "missing", MISSING)


@pytest.mark.parametrize("wrong", [-1, SMALL.E])
def test_native_refuses_ids_of_no_expert_before_it_reads_a_weight(wrong: int) -> None:
    inputs = small()
    inputs.routing.expert_ids[3, 1] = wrong
    with pytest.raises(ValueError, match=rf"expert_ids holds an id that is not in \[0, {SMALL.E}\)"):
        native.forward(*inputs[:3])


def test_native_without_a_compiler_says_what_is_missing(monkeypatch, tmp_path) -> None:
    without_library(monkeypatch, tmp_path, "no-such-compiler")
    inputs = small()
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler: install g\\+\\+ or set CXX"):
        native.forward(*inputs[:3])


def test_native_takes_a_compiler_with_options(monkeypatch, tmp_path) -> None:
    without_library(monkeypatch, tmp_path, "env g++ -DUSED")
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "enough")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="failed: enough"):
        kernel_library.library()
    assert asked[0][0].endswith("/env") and asked[0][1:3] == ["g++", "-DUSED"]


def test_native_passes_on_what_the_compiler_says_and_keeps_nothing(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    without_library(monkeypatch, tmp_path / "cache", str(compiler))
    with pytest.raises(RuntimeError, match=r"compiling native.cpp failed: no such flag"):
        kernel_library.library()
    assert list((tmp_path / "cache" / "moe_impls").iterdir()) == []


def test_native_that_cannot_be_compiled_is_not_available(monkeypatch, tmp_path) -> None:
    without_library(monkeypatch, tmp_path, "false")
    assert not kernel_library.is_available()
    with pytest.raises(RuntimeError, match=r"compiling native.cpp failed: .*false ended with status 1"):
        kernel_library.library()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel, compiled once."""
    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        without_library(patch, folder, "g++")
        kernel_library.library()
    (path,) = (folder / "moe_impls").iterdir()
    return path


@pytest.fixture
def whole(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it where it is looked for, and of the same again where it is compiled anew."""
    without_library(monkeypatch, tmp_path / "cache", "g++")

    def copy(compiler: object, flags: object, folder: str) -> Path:
        return Path(shutil.copy(kernel, folder))

    monkeypatch.setattr(kernel_library, "compile_kernel", copy)
    path = tmp_path / "cache" / "moe_impls" / kernel.name
    path.parent.mkdir(parents=True)
    return Path(shutil.copy(kernel, path))


@pytest.mark.parametrize("torn", [b"torn", b"", slice(None, -1), slice(5000), slice(40, None)], ids=str)
def test_a_torn_kernel_is_ignored_named_and_compiled_anew(whole: Path, torn: bytes | slice) -> None:
    content = whole.read_bytes()
    whole.write_bytes(content[torn] if isinstance(torn, slice) else torn)
    with pytest.warns(
        UserWarning, match=re.escape(f"{whole} is ignored: it is torn, or compiled from another")
    ):
        kernel_library.library()
    assert kernel_file.is_whole(whole)


def test_a_kernel_of_another_source_is_ignored_and_named(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_file, "source", lambda: b"// of another version")
    monkeypatch.setattr(kernel_library, "compile_kernel", None)
    with (
        pytest.warns(UserWarning, match=f"{whole.name} is ignored: .* another source"),
        pytest.raises(TypeError),
    ):
        kernel_library.library()


def test_what_is_whole_and_cannot_be_loaded_is_ignored_and_named(whole: Path) -> None:
    whole.write_bytes(b"no library" + kernel_file._digest(b"no library"))
    with pytest.warns(UserWarning, match=f"{whole.name} is ignored: .*"):
        kernel_library.library()


def test_native_is_compiled_where_nothing_can_be_kept(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole))  # no directory
    kernel_library.library()


def test_the_kernel_of_the_wheel_for_this_processor_needs_no_compiler(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_library(monkeypatch, tmp_path / "empty", "no-such-compiler")
    monkeypatch.setattr(kernel_library, "PACKAGED", tmp_path)
    monkeypatch.setattr(kernel_library, "instructions", lambda: kernel_file.LEVELS["x86-64-v3"].needed)
    assert "install g++" in kernel_library.missing()
    (tmp_path / "x86-64-v4.so").write_bytes(whole.read_bytes())  # for a processor that has more
    assert "install g++" in kernel_library.missing()
    (tmp_path / "x86-64-v3.so").write_bytes(whole.read_bytes())
    assert kernel_library.is_available()
    inputs = small()
    require_right({"y": native.forward(*inputs[:3])}, SMALL, inputs)
    monkeypatch.setattr(kernel_library, "instructions", lambda: frozenset({"sse2"}))  # older than any of them
    assert "install g++" in kernel_library.missing()


def test_a_processor_gets_the_kernel_that_uses_most_of_what_it_has() -> None:
    levels = {name: level.needed for name, level in kernel_file.LEVELS.items()}
    assert [kernel_file.level_of(needed | {"fpu"}) for needed in levels.values()] == list(levels)
    v3 = levels["x86-64-v3"]
    assert kernel_file.level_of(levels["x86-64-v4"] - {"avx512vl"} | {"avx512_bf16"}) == "x86-64-v3"
    assert {kernel_file.level_of(v3 - {instruction}) for instruction in v3} == {None}


def test_native_is_compiled_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole.unlink()
    kernel_library.library()
    monkeypatch.setattr(kernel_library, "compile_kernel", None)
    kernel_library.library()
    assert list(whole.parent.iterdir()) == [whole]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_native_is_right_and_bit_equal_across_thread_counts(dtype: torch.dtype) -> None:
    # Several panels of each expert, and enough outputs that threads share their sums.
    problem = replace(SMALL, T=300, O=150, dtype=dtype)
    inputs = make_inputs(problem)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native.forward(*inputs[:3]))
            require_right({"y": results[-1]}, problem, inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("H", [1, 7, 8, 33, 1000])
@pytest.mark.parametrize("activation", native.KERNELS_OWN)
def test_the_activations_of_the_kernel_are_those_of_the_contract(activation: str, H: int) -> None:
    _, gated = native.KERNELS_OWN[activation]
    problem = replace(SMALL, H=H, activation=activation)
    experts = make_inputs(problem).experts
    h = torch.randn(60, H * (1 + gated), generator=torch.Generator().manual_seed(0))
    h *= torch.logspace(-6, 2, 60).unsqueeze(1)
    right = activate(h.double(), activation, experts.clamp)
    hidden = native._hidden(h, experts, torch.float32)
    # Far below zero little is left of 1 + tanh, and a clamped factor may cancel its offset.
    torch.testing.assert_close(hidden.double(), right, rtol=1e-6, atol=1e-6)
    assert torch.equal(native._hidden(h, experts, torch.bfloat16), hidden.to(torch.bfloat16))


@pytest.mark.parametrize("activation", native.KERNELS_OWN)
def test_the_activations_of_the_kernel_take_extreme_numbers_as_those_of_torch(activation: str) -> None:
    _, gated = native.KERNELS_OWN[activation]
    extreme = [0.0, 1e38, -1e38, -88.5, 88.5, -100.0, torch.inf, -torch.inf, torch.nan]
    h = torch.tensor([extreme + gated * other for other in ([2.0] * len(extreme), extreme)])
    experts = make_inputs(replace(SMALL, H=len(extreme), activation=activation)).experts
    torch.testing.assert_close(
        native._hidden(h, experts, torch.float32),
        activate(h, activation, experts.clamp),
        rtol=1e-6,
        atol=1e-30,
        equal_nan=True,
    )


@pytest.mark.parametrize("activation", native.KERNELS_OWN)
def test_natives_own_derivatives_of_activations_are_torchs(activation: str) -> None:
    _, gated = native.KERNELS_OWN[activation]
    numbers = torch.tensor([0.0, 1e14, -1e14, -88.5, 88.5, 7.0, 7.5, -7.5, *torch.linspace(-12, 12, 97)])
    h = torch.cat([numbers, numbers.flip(0)] if gated else [numbers]).unsqueeze(0).requires_grad_()
    clamp = make_inputs(SMALL).experts.clamp
    for of_feature in (1.5, torch.inf):  # what comes back to features that are off is nothing, even then
        da = torch.full([1, len(numbers)], of_feature)
        gates, d_gates = torch.tensor([[0.5]]), torch.empty(1, 1)
        group = native._Group(0, 0, 1, torch.tensor([0, 1]))
        options = gates, torch.tensor([0]), d_gates, group, activation, clamp
        dh, a = native._hidden_backward(h.detach(), da, *options)
        wanted = activate(h.double(), activation, clamp)
        (wanted_dh,) = torch.autograd.grad(wanted, h, 0.5 * da.double())
        finite = wanted_dh.isfinite()
        torch.testing.assert_close(dh[finite], wanted_dh[finite], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(a.double(), 0.5 * wanted.detach(), rtol=1e-6, atol=1e-6)
        of_gates = (da.double() * wanted.detach()).sum(1).float()
        torch.testing.assert_close(d_gates[0], of_gates, equal_nan=True)


@pytest.mark.parametrize("sizes", [{"H": 0}, {"O": 0}], ids=str)
def test_native_has_the_gradients_of_nothing_where_a_dimension_is_empty(sizes: dict[str, int]) -> None:
    def gradients(name: str) -> tuple[Tensor, ...]:
        D, H, O = 5, sizes.get("H", 3), sizes.get("O", 4)
        torch.manual_seed(0)
        weights = torch.randn(2, H, D), torch.randn(2, H), torch.randn(2, O, H), torch.randn(2, O)
        leaves = torch.randn(6, D), torch.rand(6, 1), *weights
        x, gates, w_in, b_in, w_out, b_out = (t.requires_grad_() for t in leaves)
        routing = Routing(torch.tensor([[0], [1], [0], [1], [1], [1]]), gates)
        y = resolve(name).forward(x, routing, Experts(w_in, b_in, w_out, b_out))
        return torch.autograd.grad(y.square().sum(), leaves)

    gradients("native")  # whose memory is taken again
    for found, wanted in zip(gradients("native"), gradients("dense_mask"), strict=True):
        torch.testing.assert_close(found, wanted)
