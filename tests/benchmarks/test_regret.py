"""``regret`` times what ``auto`` took beside the fastest, on layers and loads that are not in its table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import regret, tune
from benchmarks.sweep import journal
from benchmarks.timing import measure
from benchmarks.workloads import MODES, flops
from correctness.problems.inputs import make_inputs
from correctness.problems.loads import load_named
from correctness.problems.problem import Problem
from moe_impls.interface import Implementation
from moe_impls.registry import resolve

TINY = Problem("tiny", T=64, D=32, H=16, O=32, E=8, K=2, bias=False)
CELL = regret.Cell(
    "tiny", "zipf", "float32", "forward", 16, 32, 16, 8, 2, busiest=2.5, fastest="padded", fastest_ms=1.0,
    auto_took="padded", auto_ms=1.01, choice_regret=1.0, regret=1.01, low=1.0, high=1.02, rounds=8,
    times_ms="padded 1; auto 1.01",
)  # fmt: skip


def subjects() -> list[Implementation]:
    return [resolve(name) for name in ("sorted_dispatch", "index_add", "native", "recompute", "dense_mask")]


def times(cell: regret.Cell) -> dict[str, float]:
    return {name: float(ms) for name, ms in (item.rsplit(" ", 1) for item in cell.times_ms.split("; "))}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one layer in seconds."""
    monkeypatch.setattr(regret, "QUICK_LAYERS", (TINY,))
    monkeypatch.setattr(regret, "SECONDS", 0.01)
    monkeypatch.setattr(tune, "candidates", subjects)


def routing(p: Problem) -> torch.Tensor:
    return load_named(p.load)(p, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quick", [True, False])
def test_the_plan_holds_every_layer_under_every_load_and_none_that_takes_too_long(quick: bool) -> None:
    planned = list(regret.planned(quick, torch.float32))
    assert len(planned) == (2 * 3 if quick else 4 * 6) == len({(p.name, p.load) for p, _ in planned})
    for p, cells in planned:
        assert {mode for _, mode in cells} == set(MODES) and max(T for T, _ in cells) == p.T
        assert all(flops(replace(p, T=T), mode) <= tune.MAX_FLOPS["cpu"] for T, mode in cells)
        assert quick or {16, 256} <= {T for T, _ in cells} <= {16, 256, 2048}


def test_neither_the_layers_nor_the_loads_are_those_of_the_table() -> None:
    tuned = {sizes[:4] for sizes in tune.LAYERS}
    assert not tuned & {(p.D, p.H, p.E, p.K) for p in regret.LAYERS}
    assert [p.name for p in regret.LAYERS] == [
        "qwen3-30b-a3b, 32 experts", "mixtral-8x7b, a quarter", "notebook, half", "small"
    ]  # fmt: skip
    assert all(p.load == "uniform" for p, _ in tune.layers(quick=False))
    for p, _ in regret.planned(False, torch.float32):
        assert regret.busiest_over_mean(routing(p), p.E) > 1.15, p


def test_a_quarter_of_the_experts_has_all_tokens() -> None:
    used = {}
    for p, _ in regret.planned(False, torch.float32):
        if p.load.startswith("experts_"):
            used[p.name] = routing(p).unique().tolist()
    assert [len(ids) for ids in used.values()] == [8, 2, 4, 12]
    assert all(ids == list(range(len(ids))) for ids in used.values())


def test_a_router_of_clustered_tokens_gives_each_token_distinct_experts_and_some_far_more_rows() -> None:
    for layer in regret.LAYERS:
        p = replace(layer, load="router", T=2048)
        ids = routing(p)
        assert ids.shape == (p.T, p.K) and ids.dtype == torch.int64
        assert all(len(row) == p.K for row in map(set, ids.tolist()))
        even = regret.busiest_over_mean(routing(replace(p, load="uniform")), p.E)
        assert regret.busiest_over_mean(ids, p.E) > 1.2 * even


def test_the_busiest_expert_is_told_in_multiples_of_the_mean() -> None:
    assert regret.busiest_over_mean(torch.tensor([[0, 1], [1, 2], [1, 3], [1, 0]]), E=8) == 4 * 8 / 8
    assert regret.busiest_over_mean(torch.tensor([[0], [1]]), E=2) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("load", ["uniform", "one_hot_expert"])
def test_a_row_says_what_was_called_who_was_fastest_and_what_auto_lost(tiny, mode: str, load: str) -> None:
    p = replace(TINY, load=load)
    cell = regret.measure_cell(p, mode, make_inputs(p), subjects())
    assert (cell.layer, cell.load, cell.dtype, cell.mode) == ("tiny", load, "float32", mode)
    assert (cell.T, cell.D, cell.H, cell.E, cell.K) == (64, 32, 16, 8, 2)
    assert all(value not in ("", None) for value in asdict(cell).values())
    assert cell.busiest == 4 if load == "one_hot_expert" else 1 <= cell.busiest < 2
    found = times(cell)
    own = {name: ms for name, ms in found.items() if name != "auto"}
    assert cell.fastest == min(own, key=lambda name: own[name])
    assert found[cell.fastest] == cell.fastest_ms and found["auto"] == cell.auto_ms
    assert cell.choice_regret == 1 if cell.fastest == cell.auto_took else cell.choice_regret > 0
    assert cell.low <= cell.regret <= cell.high and cell.rounds >= regret.ROUNDS


def test_what_auto_took_is_timed_though_others_are_far_faster(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_first(calls, first: str, **options):
        assert options == {"hopeless": 1.5}  # as for the table
        return {name: call for name, call in calls.items() if name == "instant"}

    monkeypatch.setattr(measure, "near_the_fastest", without_the_first)
    monkeypatch.setattr(regret, "taken", lambda *_: "index_add")
    instant = Implementation("instant", lambda x, routing, experts, *, combine: x)
    cell = regret.measure_cell(TINY, "forward", make_inputs(TINY), [instant])
    assert times(cell).keys() == {"instant", "index_add", "auto"}
    assert (cell.fastest, cell.auto_took) == ("instant", "index_add") and cell.choice_regret > 1.5


def test_nothing_is_lost_by_a_choice_that_is_the_fastest(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "near_the_fastest", lambda calls, first, **_: {first: calls[first]})
    cell = regret.measure_cell(TINY, "forward", make_inputs(TINY), subjects())
    assert cell.fastest == cell.auto_took and cell.choice_regret == 1


def test_the_page_tells_the_mean_the_worst_and_how_many_are_close(tmp_path: Path) -> None:
    lost = replace(
        CELL, load="one_hot_expert", T=256, fastest="native", choice_regret=1.21, regret=1.25,
        low=1.2, high=1.3, times_ms="native 1; padded 1.21; auto 1.25",
    )  # fmt: skip
    near = replace(CELL, T=2048, choice_regret=1.025, regret=0.99, low=0.98)
    training = replace(CELL, mode="forward_backward", regret=1.0)
    made = regret._made(True, "bfloat16")
    cells = pd.DataFrame([made | asdict(cell) for cell in (CELL, lost, near, training)])
    csv, page = regret.write(tmp_path, cells, made)
    assert [file.name for file in (csv, page)] == ["regret.csv", "regret.md"]
    forward, backward = regret.summary(cells, "mode").to_dict(orient="records")
    assert forward == {
        "mode": "forward",
        "cells": 3,
        "choice_regret, geometric mean": f"{(1.21 * 1.025) ** (1 / 3):.3f}",
        "worst": "1.21",
        "where": "tiny, one_hot_expert, forward, T=256: took padded, fastest native",
        "up to 1.02": "33%",
        "up to 1.03": "67%",
        "regret, geometric mean": f"{(1.01 * 1.25 * 0.99) ** (1 / 3):.3f}",
        "surely slower": 1,
    }
    assert (backward["cells"], backward["worst"], backward["up to 1.02"]) == (1, "1.00", "100%")
    text = page.read_text()
    assert "`python -m benchmarks regret --quick --dtype bfloat16`" in text
    assert all(str(value) in text for value in forward.values())
    assert all(str(made[name])[:12] in text for name in ("git_commit", "torch_version", "table"))
    assert "| tiny | one_hot_expert | forward | 256 | 2.5 | native |" in text
    read = pd.read_csv(csv)
    assert set(read.columns) == {*made, *journal.columns(regret.Cell)} and len(read) == 4


def test_an_interrupted_run_is_continued(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure_cell = regret.measure_cell

    def interrupted(problem: Problem, mode: str, *rest):
        if len(measured) == 3:
            measured.append("interrupt")
            raise KeyboardInterrupt
        measured.append((problem.load, problem.T, mode))
        return measure_cell(problem, mode, *rest)

    monkeypatch.setattr(regret, "measure_cell", interrupted)
    assert main(["regret", "--quick", "--out", str(tmp_path)]) == 130
    part = tmp_path / regret.PART
    begun = pd.read_csv(part)
    kept = [part.name, journal.plan_path(part).name]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept and len(begun) == 3
    assert main(["regret", "--quick", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 2  # another plan
    assert main(["regret", "--quick", "--out", str(tmp_path)]) == 0
    cells = pd.read_csv(tmp_path / "regret.csv")
    assert [cell for cell in measured if cell != "interrupt"] == list(
        zip(cells["load"], cells["T"], cells["mode"], strict=True)
    )
    assert begun.equals(cells.head(3)[begun.columns])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["regret.csv", "regret.md"]


def test_bad_options_are_one_line_that_says_what_is_valid(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["regret", "--dtype", "int8", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --dtype is 'int8'; valid are float32, bfloat16\n"
    (tmp_path / "a_file").write_text("")
    assert main(["regret", "--out", str(tmp_path / "a_file" / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --out: {tmp_path / 'a_file'}") and "cannot be written" in line
    assert [file.name for file in tmp_path.iterdir()] == ["a_file"]
