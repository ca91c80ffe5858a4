"""Runs leave one summary each, and a step in them is found where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.commands import history
from benchmarks.options import HISTORY
from benchmarks.sweep.record import RecordError
from tests.benchmarks.test_record import failed_row, make_row, write


def test_a_run_becomes_the_geometric_mean_of_each_implementation(tmp_path: Path) -> None:
    rows = [
        make_row(efficiency=0.2),
        make_row(efficiency=0.8, T=32),
        make_row(implementation="b"),
        failed_row(),
    ]
    path = history.add(write(tmp_path / "r.csv", *rows), tmp_path / "history")
    table = pd.read_csv(path).to_dict(orient="records")
    assert [(row["implementation"], row["cells"]) for row in table] == [("a", 2), ("b", 1)]
    assert table[0]["efficiency"] == pytest.approx(0.4)
    assert path.name == "run.csv"


@pytest.mark.parametrize("place", [4, 10, 15])
@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_step_is_found_where_it_is(place: int, factor: float) -> None:
    noise = np.exp(np.random.default_rng(place).normal(0, 0.02, 20))
    series = 0.5 * noise * np.where(np.arange(20) < place, 1, factor)
    assert history.steps(series) == [place]


def test_noise_alone_has_few_steps() -> None:
    noise = [np.exp(np.random.default_rng(seed).normal(0, 0.03, 20)) for seed in range(100)]
    assert sum(bool(history.steps(series)) for series in noise) <= 10


def test_the_plot_marks_steps_and_the_page_lists_them(tmp_path: Path) -> None:
    for number in range(12):
        row = make_row(
            run_id=f"2026{number:02}", time_utc=f"2026-01-{number + 1:02}T00:00:00Z",
            efficiency=(0.5 if number < 6 else 0.3) * (1 + 0.01 * (number % 3)),
        )  # fmt: skip
        history.add(write(tmp_path / f"{number}.csv", row), tmp_path / "history")
    assert main(["history", "plot", "--folder", str(tmp_path / "history")]) == 0
    page = (tmp_path / "history" / "history.md").read_text()
    assert "12 runs" in page and "| 202606 |" in page
    assert (tmp_path / "history" / "history.png").stat().st_size > 10_000


def test_what_is_no_history_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["history", "plot", "--folder", str(tmp_path)]) == 2
    assert "holds no summary" in capsys.readouterr().err
    with pytest.raises(RecordError, match="no row with status ok"):
        history.add(write(tmp_path / "r.csv", failed_row()), tmp_path / "history")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecordError, match="x.csv has columns a, b; valid are"):
        history.read(tmp_path / "." if (tmp_path / "r.csv").unlink() is None else tmp_path)


def test_summaries_among_the_files_to_add_are_passed_over(tmp_path: Path) -> None:
    sweep, summaries = write(tmp_path / "r.csv", make_row(run_id="mine")), sorted(HISTORY.glob("*.csv"))
    assert main(["history", "add", *map(str, [*summaries, sweep]), f"--folder={tmp_path / 'kept'}"]) == 0
    assert summaries and [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.csv"]
