"""Experts over many ranks on paper: near to what is published and to what was measured, and what decides."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.sweep.predicted import (
    H800,
    Cluster,
    Links,
    against_deepep,
    busiest_slots,
    fit,
    predict,
    rates,
    visited,
)
from moe_impls.models import MODELS
from reporting.provenance import ROOT

V3 = MODELS["deepseek-v3"]
PLAIN = Cluster("plain", 4, Links(0, 4.0, 1.0), Links(0, 4.0, 1.0), 1.0, 1.0, lambda rows: 1e9, 1e12)


def test_the_published_table_of_deepep_is_within_six_per_cent() -> None:
    found = against_deepep(V3)
    assert len(found) == 10
    assert all(abs(predicted / published - 1) <= 0.06 for published, predicted in found.values())


def test_what_stays_on_its_rank_takes_no_time_and_what_leaves_its_node_decides() -> None:
    assert predict(V3, 1, 128, PLAIN).dispatch_s == 0
    n_bytes = 128 * V3.K * V3.D
    for ranks, share in ((4, 3 / 4 / 4.0), (8, 4 / 8 / 1.0)):  # three of four inside; four of eight outside
        found = predict(V3, ranks, 128, PLAIN)
        assert found.dispatch_s == pytest.approx(found.busiest * n_bytes * share)


def test_a_step_adds_up_or_overlaps_and_a_backward_takes_three_products_and_twice_the_way() -> None:
    cluster = replace(H800, sync_s=1e-3)
    forward, step = (predict(V3, 16, 128, cluster, backward=backward) for backward in (False, True))
    assert forward.step_s == pytest.approx(1e-3 + forward.local_s + forward.dispatch_s + forward.combine_s)
    assert (step.local_s, step.dispatch_s) == pytest.approx((3 * forward.local_s, 2 * forward.dispatch_s))
    overlapping = predict(V3, 16, 128, cluster, overlap=True)
    moving = forward.dispatch_s + forward.combine_s
    longer, shorter = max(forward.local_s, moving), min(forward.local_s, moving)
    assert overlapping.step_s == pytest.approx(1e-3 + longer + shorter / 2)


def test_merged_rows_are_those_of_the_ranks_that_a_token_visits() -> None:
    assert [round(visited(32, 4, ranks) / 4, 3) for ranks in (2, 4)] == [0.475, 0.705]
    assert visited(8, 2, 8) == pytest.approx(2) and visited(8, 8, 2) == 2
    merged, plain = (predict(V3, 16, 128, PLAIN, merged=merged) for merged in (True, False))
    assert merged.dispatch_s / plain.dispatch_s == pytest.approx(visited(256, 8, 16) / 8)


def test_a_skewed_load_makes_one_rank_busier_and_its_expert_gets_each_token_once_at_most() -> None:
    even, skewed = (predict(V3, 32, 128, H800, load=load) for load in ("uniform", "zipf_1"))
    assert 1 <= even.busiest < 1.2 < skewed.busiest
    assert busiest_slots(64, 8, 8, 1000, "zipf_3").max() <= 1.05 * 8 * 1000


def test_rates_are_those_measured_and_links_those_of_the_measured_cells() -> None:
    rate = rates([(1, 1e9), (100, 1e11)])
    assert [rate(rows) for rows in (0.1, 1, 10, 1000)] == pytest.approx([1e9, 1e9, 1e10, 1e11])
    links = fit([(3, 100, 3 * 2.0 + 100 / 50), (5, 400, 5 * 2.0 + 400 / 50)])
    assert links == pytest.approx((2.0, 50))


def test_the_command_writes_its_table_page_and_plot(tmp_path: Path) -> None:
    sweep = min((ROOT / "results").glob("*-cpus/*-default.csv"))
    options = ("--model", "deepseek-v3", "switch-base-8", f"--local={sweep}", "--load=zipf_0.5")
    assert main(["ep-model", *options, f"--out={tmp_path}"]) == 0
    rows: list[dict[str, Any]] = pd.read_csv(tmp_path / "ep-model.csv").to_dict("records")  # pyright: ignore[reportAssignmentType]
    assert [row["ranks"] for row in rows] == [*(2**n for n in range(9)), 1, 2, 4, 8]
    text = (tmp_path / "ep-model.md").read_text(encoding="utf-8")
    assert "The largest error is\n4.9%." in text and f"rates of {sweep.name}" in text
    assert (tmp_path / "ep-model.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model=gpt-5",), "--model is 'gpt-5'; valid are switch-base-8"),
        (("--tokens=0",), "--tokens is 0; it must be at least 1"),
        (("--load=bursts",), "load is 'bursts'; valid are uniform and zipf_<exponent>"),
        ((f"--local={ROOT / 'results' / 'ep.csv'}",), "--local: .*ep.csv has no right rows of forward calls"),
    ],
)
def test_a_bad_request_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ep-model", *options, f"--out={tmp_path}"]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
