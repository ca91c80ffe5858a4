"""The comparison with other libraries: what is compared with what, and what a missing library does."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import peers
from benchmarks.report import peers as report
from benchmarks.sweep import journal
from benchmarks.timing import load, measure
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from moe_impls.registry import IMPLEMENTATIONS, PEERS, resolve


def growth(square: float) -> pd.DataFrame:
    return pd.DataFrame(
        [peers.Growth("E", E, "forward", "a", 1 + 0.1 * E + square * E**2) for E in (8, 16, 32, 64, 128, 256)]
    )


def test_a_quadratic_term_shows_in_the_growth() -> None:
    (linear,) = report.quadratic_share(growth(0.0))["share"]
    (bent,) = report.quadratic_share(growth(1e-3))["share"]
    assert linear.lstrip("-") == "0%"
    assert bent == f"{1e-3 * 256**2 / (1 + 25.6 + 65.536):.0%}"


def test_the_plan_holds_every_regime_for_every_layer_and_dtype_quick_or_not() -> None:
    for quick, layers in ((True, peers.QUICK_LAYERS), (False, peers.LAYERS)):
        planned = list(peers.planned(quick, peers.DTYPES, peers.REGIMES))
        assert [(p.name, p.dtype) for p, _ in planned] == [(p.name, d) for d in peers.DTYPES for p in layers]
        for whole, cells in planned:
            assert {regime.name for regime, _ in cells} == {regime.name for regime in peers.REGIMES}
            assert max(T for _, T in cells) == whole.T


TINY = Problem("tiny", T=1, D=32, H=16, O=32, E=4, K=2, bias=False)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """A run of one layer in seconds."""
    for name, value in (
        ("QUICK_LAYERS", (TINY,)),
        ("DTYPES", (torch.float32,)),
        ("SECONDS", 0.01),
        ("QUICK_GROWN", {"E": (4, 8, 16), "K": (1, 2, 4)}),
    ):
        monkeypatch.setattr(peers, name, value)


@pytest.fixture
def without_libraries(monkeypatch) -> None:
    ours, others = (
        [resolve(name) for name in names]
        for names in (("auto", "sorted_dispatch", "index_add"), ("einsum.capacity",))
    )
    monkeypatch.setattr(peers, "subjects", lambda: (ours, others))


def test_auto_is_timed_beside_who_is_near_the_fastest_and_does_not_take_their_place(
    tiny, without_libraries, monkeypatch
) -> None:
    monkeypatch.setattr(peers, "HOPELESS", 1.0)  # so near is the fastest alone
    monkeypatch.setattr(measure, "LEAST_LIMIT_S", 0.0)
    ours, others = peers.subjects()
    timed = peers.samples(TINY, "forward", make_inputs(TINY), [ours, others])
    assert {"auto", "einsum.capacity"} <= timed.keys() and timed.keys() & {"sorted_dispatch", "index_add"}


def test_an_interrupted_run_is_continued(tiny, without_libraries, tmp_path: Path, monkeypatch) -> None:
    measured = []
    measure_cell = peers.measure_cell

    def interrupted(regime, problem, *rest):
        if len(measured) == 2:
            measured.append("interrupt")
            raise KeyboardInterrupt
        measured.append((regime.name, problem.T))
        return measure_cell(regime, problem, *rest)

    monkeypatch.setattr(peers, "measure_cell", interrupted)
    assert main(["peers", "--quick", "--out", str(tmp_path)]) == 130
    begun = pd.read_csv(tmp_path / peers.PART)
    kept = [peers.PART, journal.plan_path(tmp_path / peers.PART).name]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept and len(begun) == 2
    assert main(["peers", "--quick", "--out", str(tmp_path)]) == 0
    cells = pd.read_csv(tmp_path / "peers.csv")
    assert [pair for pair in measured if pair != "interrupt"] == list(
        zip(cells["regime"], cells["T"], strict=True)
    )
    assert begun.equals(cells.head(2)[begun.columns])
    assert not any((tmp_path / name).exists() for name in kept)


def test_what_was_begun_by_another_version_is_not_continued(
    tiny, without_libraries, tmp_path: Path, capsys
) -> None:
    part = tmp_path / peers.PART
    with journal.opened(part, peers.Cell, peers._made(True, ["float32"]) | {"git_commit": "abc"}):
        before = part.read_text()
    assert main(["peers", "--quick", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(part) in line and "git_commit abc" in line and part.read_text() == before


def test_one_dtype_and_some_regimes_can_be_asked_for_and_the_page_says_so(
    tiny, without_libraries, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(peers, "DTYPES", (torch.float32, torch.bfloat16))
    asked = ["--dtype", "float32", "--regime", "few tokens", "--regime", "training"]
    assert main(["peers", "--quick", *asked, "--out", str(tmp_path)]) == 0
    cells = pd.read_csv(tmp_path / "peers.csv")
    assert set(cells["dtype"]) == {"float32"} and list(cells["regime"].unique()) == ["few tokens", "training"]
    written_by = 'peers --quick --dtype float32 --regime "few tokens" --regime "training"`'
    assert written_by in (tmp_path / "peers.md").read_text()
    assert main(["peers", "--quick", "--dtype", "int8", "--out", str(tmp_path)]) == 2
    assert "--dtype is 'int8'; valid are float32, bfloat16" in capsys.readouterr().err
    assert main(["peers", "--quick", "--regime", "none", "--out", str(tmp_path)]) == 2
    assert "--regime is 'none'; valid are few tokens, many tokens" in capsys.readouterr().err


def test_the_best_of_each_side_are_compared_and_the_files_say_so(tiny, tmp_path: Path) -> None:
    assert main(["peers", "--quick", "--out", str(tmp_path)]) == 0
    cells = pd.read_csv(tmp_path / "peers.csv")
    assert len(cells) == sum(len(regime.quick) for regime in peers.REGIMES)
    for cell in cells.to_dict(orient="records"):
        times = {n: float(ms) for n, ms in (item.rsplit(" ", 1) for item in cell["times_ms"].split("; "))}
        theirs = {n: ms for n, ms in times.items() if n in PEERS}
        own = {n: ms for n, ms in times.items() if n not in PEERS and n != "auto"}
        assert cell["peer"] == min(theirs, key=lambda n: theirs[n])
        assert cell["ours"] == min(own, key=lambda n: own[n])
        assert cell["low"] <= cell["ratio"] <= cell["high"] and cell["rounds"] >= peers.ROUNDS
        assert cell["auto_took"] in IMPLEMENTATIONS  # whose first try may have been slow by chance
    conditions = {(cell["pause_ms"], cell["busy"]) for cell in cells.to_dict(orient="records")}
    assert conditions == {(0, 0), (50, 0), (0, 1), (0, 2)}
    page = (tmp_path / "peers.md").read_text()
    for figure in ("peers.png", "peers-growth.png"):
        assert f"]({figure})" in page and (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_a_pause_is_made_before_each_call_and_not_timed(tiny, without_libraries) -> None:
    ours, others = peers.subjects()
    begun = time.perf_counter()
    timed = peers.samples(TINY, "forward", make_inputs(TINY), [ours, others], pause_s=0.01)
    calls = sum(map(len, timed.values()))
    assert time.perf_counter() - begun > 0.01 * calls
    assert all(min(samples) < 0.01 for samples in timed.values())


def test_other_work_computes_beside_and_ends_with_the_block() -> None:
    own = psutil.Process()
    with load.busy(2):
        children = [p for p in own.children() if "spawn" in " ".join(p.cmdline())]
        workers = [p for p in children if "resource_tracker" not in " ".join(p.cmdline())]
        before = [p.cpu_times().user for p in workers]
        time.sleep(0.5)
        assert len(workers) == 2
        assert all(p.cpu_times().user > s for p, s in zip(workers, before, strict=True))
    assert not any(p.is_running() for p in workers)


def test_the_first_tokens_of_a_call_are_a_call() -> None:
    from correctness.problems.catalogue import SMALL
    from correctness.problems.inputs import make_inputs
    from moe_impls.checking import check_inputs

    x, routing, experts, dy = make_inputs(SMALL).first(5)
    check_inputs(x, routing, experts)
    assert len(x) == len(dy) == 5
