"""The report says what the CSVs say, and refuses what cannot be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.report import tables
from benchmarks.report.folder import write_report
from benchmarks.report.styles import styles_of
from benchmarks.sweep.record import RecordError, Row
from reporting.provenance import ROOT
from tests.benchmarks.test_record import failed_row, make_row, write


def grid(run_id: str = "run", time_utc: str = "2026-01-01T00:00:00Z", slow: float = 3.0) -> list[Row]:
    """Two implementations on T x E x K, where `a` takes T ms and `b` `slow` times as long."""
    return [
        make_row(
            run_id=run_id, time_utc=time_utc, implementation=name, T=T, E=E, K=K,
            median_ms=T * factor, min_ms=T * factor, p20_ms=T * factor * 0.9, p80_ms=T * factor * 1.1,
        )
        for T in (16, 32) for E in (4, 8) for K in (1, 2) for name, factor in (("a", 1.0), ("b", slow))
    ]  # fmt: skip


def test_the_fastest_of_each_cell_is_named_with_how_much_slower_the_next_is() -> None:
    best = tables.winners(tables.table_of(grid()))
    assert len(best) == 8 and set(best["fastest"]) == {"a"} and set(best["next"]) == {"b"}
    assert best["next_ratio"].tolist() == [3.0] * 8 and not any(best["tied"])


def test_overlapping_ranges_are_a_tie() -> None:
    assert all(tables.winners(tables.table_of(grid(slow=1.1)))["tied"])


def test_a_cell_is_shown_from_its_newest_run_alone() -> None:
    newer = [
        row for row in grid("newer", "2026-02-01T00:00:00Z") if row.T == 16 and row.implementation == "b"
    ]
    shown = tables.newest(tables.table_of(grid() + newer))
    assert set(shown[shown["T"] == 16]["run_id"]) == {"newer"}
    assert set(shown[shown["T"] == 16]["implementation"]) == {"b"}  # never beside another run's times
    assert set(shown[shown["T"] == 32]["run_id"]) == {"run"}


def test_the_report_holds_plots_winners_environment_and_failures(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", *grid(), failed_row("out_of_memory", "needs at least 90 GiB", T=64))
    text = write_report(tmp_path)[0].read_text()
    images = {line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert {i.split("-")[2] for i in images if i.startswith("time-against")} == {"T", "E", "K"}
    assert any(i.startswith("efficiency") for i in images)
    assert all((tmp_path / i).read_bytes().startswith(b"\x89PNG") for i in images)
    assert "needs at least 90 GiB" in text and "CPU, 2 cores" in text and "b (3x)" in text


def test_times_that_are_far_apart_in_one_call_are_told(tmp_path: Path) -> None:
    assert tables.unsteady(tables.table_of(grid())) == ""
    rows = [make_row(K=1, p20_ms=1.0, p80_ms=2.1), make_row(K=2, p20_ms=1.0, p80_ms=1.9), failed_row(K=3)]
    told = tables.unsteady(tables.table_of(rows))
    assert told.startswith("Something else kept this machine busy: in 1 of 2 cells the 80 % sample ")
    write(tmp_path / "r.csv", *rows)
    page, html = write_report(tmp_path)
    assert f"**{told}**" in page.read_text() and told in html.read_text()


def test_a_last_line_that_was_not_written_to_its_end_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", *grid())
    assert "not written to its end" not in write_report(tmp_path)[0].read_text()
    path.write_bytes(path.read_bytes()[:-5])
    assert "The last line of r.csv was not written to its end and is left out." in (
        write_report(tmp_path)[0].read_text()
    )


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", *grid())
    (tmp_path / "time-against-T-old.png").write_bytes(b"old")
    write_report(tmp_path)
    assert not (tmp_path / "time-against-T-old.png").exists()


def test_making_the_report_twice_gives_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", *grid())
    write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture) -> None:
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    with pytest.raises(RecordError, match=message):
        write_report(folder)
    assert main(["report", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (sorted(folder.iterdir()) if folder.is_dir() else []) == before


def test_folders_that_hold_nothing_to_compare_are_refused_in_one_line(tmp_path, capsys) -> None:
    refused(tmp_path / "none", "is no folder", capsys)
    refused(tmp_path, "holds no CSV file", capsys)
    write(tmp_path / "r.csv", failed_row())
    refused(tmp_path, "no row with status ok", capsys)


def test_a_file_without_a_column_is_refused_in_one_line(tmp_path, capsys) -> None:
    path = write(tmp_path / "r.csv", *grid())
    path.write_text(path.read_text().replace(",efficiency,", ",ceiling,"))
    refused(tmp_path, "has no column efficiency", capsys)


def test_colours_and_markers_tell_sixty_four_implementations_apart() -> None:
    styles = styles_of(f"{i:02}" for i in range(64))
    assert len(set(styles.values())) == 64
    assert len({colour for colour, _ in list(styles.values())[:8]}) == 8


def test_the_readmes_plot_and_table_are_those_of_a_committed_report() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (linked,) = re.findall(r"\[report\]\((results/\S+/report\.md)\)", readme)
    plots = re.findall(r"!\[[^]]*\]\((results/\S+\.png)\)", readme)
    assert all((ROOT / plot).is_file() for plot in plots)
    path = ROOT / linked
    (plot,) = (plot for plot in plots if Path(plot).parent == Path(linked).parent)
    assert f"]({Path(plot).name})" in path.read_text(encoding="utf-8")
    rows = [line for line in readme.partition(linked)[2].partition("```")[0].splitlines() if line[:1] == "|"]
    assert rows and set(rows) <= set(path.read_text(encoding="utf-8").splitlines())


def test_the_readmes_ratios_of_peers_are_those_of_the_committed_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition("<!-- begin: python -m benchmarks peers")[2].partition("<!-- end -->")[0]
    rows = [line for line in block.splitlines() if line[:1] == "|"]
    page = (ROOT / "results" / "peers.md").read_text(encoding="utf-8")
    assert "onnxruntime.moe" in page and len(rows) > 2 and set(rows) <= set(page.splitlines())


def test_the_readmes_ratios_of_models_are_those_of_the_committed_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = pd.read_csv(ROOT / "results" / "model.csv")
    uses = sorted(set(cells.use))
    wanted = set()
    for model, of_model in cells.sort_values("use").groupby("model"):
        texts = [
            f"{cell['ratio']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
            for cell in of_model.to_dict("records")
        ]
        wanted.add(f"| {model}, E = {of_model['E'].iloc[0]} | {' | '.join(texts)} |")
    assert f"| | {' | '.join(uses)} |" in readme.splitlines()
    assert {line for line in readme.splitlines() if ", E = " in line} == wanted
