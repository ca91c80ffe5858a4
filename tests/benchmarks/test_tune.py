"""``tune`` measures a table that ``auto`` reads, whole or not at all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import tune
from benchmarks.timing import measure
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls import auto
from moe_impls.interface import Implementation
from moe_impls.registry import resolve

PROBLEM = Problem("tune", T=8, D=16, H=8, O=16, E=4, K=2)
INPUTS = make_inputs(PROBLEM)


def test_a_cell_lists_who_takes_the_call_from_the_fastest_to_the_slowest(monkeypatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.01)
    monkeypatch.setattr(measure, "LEAST_LIMIT_S", 10.0)
    subjects = [resolve(name) for name in ("dense_mask", "sorted_dispatch", "native")]
    forward, backward = (
        tune.measure_cell(PROBLEM, mode, INPUTS, subjects) for mode in ("forward", "forward_backward")
    )
    assert set(forward.times_ms) == {"dense_mask", "sorted_dispatch", "native"}
    assert set(backward.times_ms) == {"dense_mask", "sorted_dispatch", "native"}
    assert list(forward.times_ms.values()) == sorted(forward.times_ms.values())
    assert (backward.gradients, backward.gated, backward.T, backward.E) == (True, True, 8, 4)


def test_the_table_is_one_that_auto_reads(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.01)
    monkeypatch.setattr(tune, "layers", lambda quick, device: [(PROBLEM, [(4, "forward"), (8, "forward")])])
    path = tmp_path / "auto.json"
    assert main(["tune", "--out", str(path)]) == 0
    cells = auto.read(path)
    assert [cell.T for cell in cells] == [4, 8] and all(cell.times_ms for cell in cells)
    assert str(path) in capsys.readouterr().out


def test_a_gpu_is_tuned_with_more_tokens_and_its_own_kernels() -> None:
    def most_tokens(device: str) -> int:
        return max(T for _, pairs in tune.layers(False, device) for T, _ in pairs)

    assert most_tokens("cuda:0") > most_tokens("cpu")
    assert all(problem.device == "cuda:0" for problem, _ in tune.layers(True, "cuda:0"))


def test_an_interrupted_tuning_leaves_the_old_table_and_goes_on_where_it_was(
    monkeypatch, tmp_path: Path
) -> None:
    measured: list[int] = []

    def measure_or_interrupt(problem: Problem, mode: str, inputs, implementations, first: str) -> auto.Cell:
        if measured == [4]:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(problem.T)
        firsts.append(first)
        return auto.Cell("cpu", "float32", False, True, problem.T, 16, 8, 4, 2, {"native": 1.5})

    firsts: list[str] = []
    path = tmp_path / "auto.json"
    path.write_text("old")
    cells = [(4, "forward"), (8, "forward")]
    monkeypatch.setattr(tune, "layers", lambda quick, device: [(PROBLEM, cells)])
    monkeypatch.setattr(tune, "measure_cell", measure_or_interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(path, quick=True)
    assert path.read_text() == "old"
    tune.tune(path, quick=True)
    assert measured == [4, 0, 8] and firsts == [auto.ALWAYS, "native"]
    assert [cell.T for cell in auto.read(path)] == [4, 8] and list(tmp_path.iterdir()) == [path]


def test_auto_is_no_candidate_and_neither_is_what_compiles_or_has_to_be_prepared() -> None:
    names = {subject.name for subject in tune.candidates()}
    assert {"sorted_dispatch", "padded"} <= names
    assert not names & {"auto", "compiled", "gathered", "native+prepared", "packed+prepared"}


def test_who_is_far_from_the_fastest_is_left_out(monkeypatch) -> None:
    def slow(x, routing, experts, *, combine):
        time.sleep(0.1)
        return fast.forward(x, routing, experts, combine=combine)

    fast = resolve("sorted_dispatch")
    cell = tune.measure_cell(PROBLEM, "forward", INPUTS, [Implementation("slow", slow), fast])
    assert list(cell.times_ms) == ["sorted_dispatch"]


def test_every_kind_of_call_is_measured_quick_or_not() -> None:
    for quick in (True, False):
        kinds = {(p.dtype, mode, p.F > p.H) for p, pairs in tune.layers(quick) for _, mode in pairs}
        assert len(kinds) == 2 * 2 * 2
