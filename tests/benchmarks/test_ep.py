"""`python -m benchmarks ep`: what ranks send, counted, and figures of right results only."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.timing.traffic import Collective, waits
from reporting.provenance import ROOT

SMALL = ("--T=96", "--D=64", "--H=8", "--E=32", "--K=4", "--load=uniform", "--seconds=0.01")


def measured(folder: Path, *options: str) -> list[dict[str, Any]]:
    main(["ep", *SMALL, f"--out={folder}", *options])
    return rows(folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[Any] = pd.read_csv(folder / "ep.csv").to_dict("records")
    return found


def test_bytes_are_those_of_the_slots_and_merged_ones_half(tmp_path: Path) -> None:
    found = measured(tmp_path, "--ranks", "2", "4")
    assert len(found) == 2 * 2 * (2 + 4)  # implementations, modes and ranks
    assert {row["status"] for row in found} == {"ok"}
    plain, merged = (
        [row for row in found if row["implementation"] == f"expert_parallel{more}"]
        for more in ("", "_merged")
    )
    assert all(0.99 <= row["over_minimum"] <= 1.01 for row in plain)
    # Beside rows of 256 bytes 8 for each slot.
    assert all(1.0 <= row["over_merged_minimum"] <= 1.06 for row in merged)
    assert [sorted({row["collectives"] for row in of}) for of in (plain, merged)] == [[3, 5], [4, 7]]
    for ranks, share in ((2, 0.48), (4, 0.71)):  # expected of K = 4 of 32 experts
        sent = [sum(row["row_bytes"] for row in of if row["ranks"] == ranks) for of in (plain, merged)]
        assert sent[1] / sent[0] == pytest.approx(share, abs=0.06)
    page = (tmp_path / "ep.md").read_text(encoding="utf-8")
    assert page.count("| expert_parallel |") == 4 and "times are no figure" in page


def test_one_rank_sends_nothing(tmp_path: Path) -> None:
    found = measured(tmp_path, "--ranks=1", "--mode=forward", "--impl=expert_parallel")
    assert [(row["row_bytes"], row["minimum_bytes"], row["wait_s"]) for row in found] == [(0, 0, 0)]


def test_what_is_wrong_has_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(
        "from moe_impls.interface import Support\nfrom moe_impls import expert_parallel\n"
        "SUPPORT = Support(distributed=True)\n"
        "def forward(x, routing, experts, *, combine='sum', mesh, num_experts):\n"
        "    return 2 * expert_parallel.forward(x, routing, experts, mesh=mesh, num_experts=num_experts)\n",
        encoding="utf-8",
    )
    options = (f"--impl={tmp_path / 'wrong.py'}:forward", "--ranks=2", "--mode=forward")
    found = measured(tmp_path, *options)
    assert all(row["status"] == "incorrect" and math.isnan(row["step_s"]) for row in found)
    assert "y is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks=9",), "--ranks is 9; it must be from 1 to 4, or run under torchrun"),
        (("--E=3",), "--K is 4; it must not exceed E, here 3"),
        (("--E=2", "--K=2", "--ranks=4"), "--ranks is 4; it must not exceed E, here 2"),
        (("--dtype=int8",), "--dtype is 'int8'; valid are float64"),
        (("--load=lopsided",), "--load is 'lopsided'; valid are uniform"),
        (("--impl=sorted_dispatch",), "--impl is 'sorted_dispatch'; it must be distributed"),
    ],
)
def test_a_bad_request_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ep", *SMALL, f"--out={tmp_path}", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_rank_waits_for_the_last_to_come() -> None:
    def of(*seconds: float) -> list[Collective]:
        return [Collective("alltoall_base_", 0, True, s) for s in seconds]

    assert waits([of(1.0, 5.0), of(3.0, 2.0)]) == [3.0, 2.0]


def test_torchrun_measures_the_ranks_that_there_are(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--nproc-per-node=2", "-m", "benchmarks", "ep", *SMALL]
    options = ["--mode=forward", "--impl=expert_parallel", f"--out={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, *options], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert [(row["ranks"], row["rank"], row["status"]) for row in found] == [(2, 0, "ok"), (2, 1, "ok")]
    assert done.stdout.count("ep.csv") == 1
