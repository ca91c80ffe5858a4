"""The comparison with other libraries: what is compared with what, and what a missing library does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import peers
from benchmarks.__main__ import main
from correctness.problems import Problem
from moe_impls.registry import PEERS

IS_INSTALLED = importlib.util.find_spec("transformers") is not None
with_transformers = pytest.mark.skipif(
    not IS_INSTALLED, reason="transformers, of the extra peers, is missing"
)


def growth(square: float) -> pd.DataFrame:
    return pd.DataFrame(
        [peers.Growth("E", E, "forward", "a", 1 + 0.1 * E + square * E**2) for E in (8, 16, 32, 64, 128, 256)]
    )


def test_a_quadratic_term_shows_in_the_growth() -> None:
    (linear,) = peers.quadratic_share(growth(0.0))["share"]
    (bent,) = peers.quadratic_share(growth(1e-3))["share"]
    assert linear.lstrip("-") == "0%"
    assert bent == f"{1e-3 * 256**2 / (1 + 25.6 + 65.536):.0%}"


def test_the_plan_holds_every_regime_for_every_layer_and_dtype_quick_or_not() -> None:
    for quick, layers in ((True, peers.QUICK_LAYERS), (False, peers.LAYERS)):
        planned = list(peers.planned(quick))
        assert [(p.name, p.dtype) for p, _ in planned] == [(p.name, d) for d in peers.DTYPES for p in layers]
        for whole, cells in planned:
            assert {regime.name for regime, _ in cells} == {regime.name for regime in peers.REGIMES}
            assert max(T for _, T in cells) == whole.T


@pytest.mark.skipif(IS_INSTALLED, reason="transformers is installed")
def test_without_the_library_the_extra_is_named_in_one_line(tmp_path: Path, capsys) -> None:
    assert main(["peers", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformers" in line and "[peers]" in line
    assert list(tmp_path.iterdir()) == []


@with_transformers
def test_the_best_of_each_side_are_compared_and_the_files_say_so(tmp_path: Path, monkeypatch) -> None:
    tiny = Problem("tiny", T=1, D=32, H=16, O=32, E=4, K=2, bias=False)
    for name, value in (
        ("QUICK_LAYERS", (tiny,)),
        ("DTYPES", (torch.float32,)),
        ("SECONDS", 0.01),
        ("GROWN", {"E": (4, 8), "K": (1, 2)}),
    ):
        monkeypatch.setattr(peers, name, value)
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
        assert cell["auto_took"] in times or cell["auto_took"] == "sorted_dispatch"
    page = (tmp_path / "peers.md").read_text()
    for figure in ("peers.png", "peers-growth.png"):
        assert f"]({figure})" in page and (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_the_first_tokens_of_a_call_are_a_call() -> None:
    from correctness.problems import SMALL, make_inputs
    from moe_impls.interface import check_inputs

    x, routing, experts, dy = make_inputs(SMALL).first(5)
    check_inputs(x, routing, experts)
    assert len(x) == len(dy) == 5
