"""Rows survive the way to the file and back; files that are not right are refused with the place."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.sweep import journal, plan, record
from benchmarks.sweep.record import RecordError, Row
from moe_impls.interface import Routing
from reporting.pages import slug, write_atomically
from reporting.provenance import ROOT


def make_row(**changes: object) -> Row:
    values: dict = {
        "run_id": "run", "git_commit": "c0ffee", "machine": "m", "device": "cpu",
        "device_name": "CPU, 2 cores",
        "torch_version": "2.13.0", "threads": 2, "threads_wait": "default", "cache": "warm",
        "time_utc": "2026-01-01T00:00:00Z",
        "implementation": "a",
        "workload": "sweep", "T": 16, "D": 8, "H": 4, "O": 8, "E": 4, "K": 2, "activation": "swiglu",
        "output_activation": "none", "combine": "sum", "bias": False, "dtype": "float32", "load": "uniform",
        "seed": 0, "routing_checksum": "0123456789ab", "mode": "forward", "status": "ok", "reason": "",
        "rounds": 2, "calls_per_sample": 1, "median_ms": 1.5, "min_ms": 1.0, "p20_ms": 1.2, "p80_ms": 1.8,
        "tokens_per_s": 10666.7, "flops": 12288, "tflop_per_s": 8.192e-06,
        "gemm_square_tflop_per_s": 0.1, "gemm_experts_tflop_per_s": 0.05, "read_gb_per_s": 10.0,
        "copy_gb_per_s": 8.0, "touched_experts": 4, "read_bytes": 4096, "written_bytes": 512,
        "compute_limit_ms": 0.5, "traffic_limit_ms": 0.25, "limit_ms": 0.5, "efficiency": 0.333333,
        "compile_ms": 0.0, "peak_memory_bytes": 4096, "saved_for_backward_bytes": 0,
        "worst_error_fraction": 0.1, "samples_ms": (1.0, 2.0),
    }  # fmt: skip
    values.update(changes)
    return Row(**values)


def failed_row(status: str = "error", reason: str = "broke", **changes: object) -> Row:
    return make_row(**{**dict.fromkeys(record.MEASURED), "status": status, "reason": reason, **changes})


def write(path: Path, *rows: Row) -> Path:
    journal.create(path, Row)
    for row in rows:
        journal.append(path, row)
    return path


def edited(path: Path, column: str, value: str) -> Path:
    """The file with one value of its first row replaced."""
    lines = list(csv.reader(path.open(newline="")))
    lines[1][lines[0].index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [make_row(), failed_row(), failed_row("unsupported", "dtype float16 not declared")]
    assert record.read(write(tmp_path / "r.csv", *rows)) == rows


def test_a_reason_of_several_lines_stays_one_line_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", failed_row(reason='two\nlines, "quoted"'))
    assert len(path.read_text().splitlines()) == 2
    assert record.read(path)[0].reason == 'two lines, "quoted"'


def test_a_row_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv")
    for count in (1, 2, 3):
        journal.append(path, make_row())
        assert len(record.read(path)) == count


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", make_row())
    with pytest.raises(FileExistsError):
        journal.create(path, Row)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("T", "many", "line 2: T is 'many'; it must be an integer"),
        ("median_ms", "nan", "line 2: median_ms is nan; it must be finite"),
        ("median_ms", "-1", "line 2: median_ms is -1.0; it must be finite and not negative"),
        ("median_ms", "", "line 2: median_ms is empty in a row with status ok"),
        ("samples_ms", "1.0;x", "line 2: samples_ms is '1.0;x'"),
        ("status", "fine", "line 2: status is 'fine'; it must be 'ok' or 'incorrect'"),
        ("status", "error", "in a row with status error; it must be empty"),
        ("schema_version", "99", "line 2: schema_version is '99'; this version reads 4"),
        ("bias", "maybe", "line 2: bias is 'maybe'; it must be True or False"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_line(tmp_path, column, value, message) -> None:
    path = edited(write(tmp_path / "r.csv", make_row()), column, value)
    with pytest.raises(RecordError, match=message.replace("(", r"\(")):
        record.read(path)


def with_columns(path: Path, **texts: str | None) -> Path:
    """The file with these columns added, or without those that are None."""
    table = list(csv.DictReader(path.open(newline="")))
    left = [name for name in table[0] if texts.get(name, "") is not None]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*left, *(n for n in texts if n not in table[0])], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows([{**row, **texts} for row in table])
    return path


@pytest.mark.parametrize("name", ["run_id", "workload", "flops", "median_ms", "efficiency"])
def test_a_missing_column_is_named_if_rows_cannot_be_without_it(tmp_path: Path, name: str) -> None:
    path = with_columns(write(tmp_path / "r.csv", make_row()), **{name: None})
    with pytest.raises(RecordError, match=f"has no column {name}$"):
        record.read(path)


def test_a_column_that_was_added_since_is_empty_in_an_older_file(tmp_path: Path) -> None:
    rows = [make_row(gpu_clock_mhz=1410), make_row(gpu_clock_mhz=None)]
    path = with_columns(write(tmp_path / "r.csv", *rows), gpu_clock_mhz=None, gpu_clock_limits=None)
    assert record.read(path) == [make_row(), make_row()]


def test_a_column_of_a_newer_version_is_told_and_left_out(tmp_path: Path) -> None:
    path = with_columns(write(tmp_path / "r.csv", make_row()), watts="250")
    with pytest.warns(UserWarning, match=r"r.csv: unknown columns are left out: watts"):
        assert record.read(path) == [make_row()]


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv")
    path.write_text(path.read_text().replace("p20_ms", "p80_ms"))
    with pytest.raises(RecordError, match="has repeated columns"):
        record.read(path)


def test_a_row_that_is_not_right_has_no_timings() -> None:
    with pytest.raises(ValueError, match="efficiency is 0.5 in a row with status timeout; it must be empty"):
        failed_row("timeout", efficiency=0.5)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.plan.json")), ids=lambda path: path.stem)
def test_the_measurements_of_this_repository_are_readable(path: Path) -> None:
    done, planned = plan.progress(csv_of(path)) or (0, 1)
    assert done == planned


def csv_of(plan_path: Path) -> Path:
    return plan_path.with_name(plan_path.name.replace(".plan.json", ".csv"))


def test_a_last_line_that_was_not_written_to_its_end_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", make_row(), make_row())
    path.write_text(path.read_text()[:-20])
    assert record.read(path) == [make_row()]


def test_a_torn_line_among_others_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", make_row(), make_row())
    path.write_text(path.read_text()[:-200] + "\n")
    with pytest.raises(RecordError, match="line 3"):
        record.read(path)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        record.read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("setting", "recorded"), [(None, "default"), ("PASSIVE", "passive"), ("", "default")]
)
def test_what_threads_do_while_they_wait_is_recorded(setting, recorded: str, monkeypatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", setting)
    assert record.environment("cpu", "default").threads_wait == recorded


def test_the_checksum_tells_routings_apart() -> None:
    routing = Routing(torch.tensor([[0, 1], [2, 1]]), torch.ones(2, 2))
    same = Routing(routing.expert_ids.clone(), routing.gates.clone())
    swapped = Routing(routing.expert_ids.flip(1), routing.gates)
    weighted = Routing(routing.expert_ids, routing.gates * 2)
    sums = [record.routing_checksum(r) for r in (routing, same, swapped, weighted)]
    assert sums[0] == sums[1] and len(set(sums)) == 3


def test_the_environment_names_the_processor_and_not_the_host() -> None:
    import platform

    found = record.environment("cpu", "smoke")
    assert found.device_name and slug(found.device_name) in found.machine
    assert platform.node() not in found.machine
    assert found.threads == torch.get_num_threads() and found.torch_version == torch.__version__


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_the_dictionary_of_columns_is_what_the_fields_say() -> None:
    assert record.PAGE.read_text(encoding="utf-8") == record.page(), f"run {record.COMMAND}"
    assert "| `T` | tokens | in one call |" in record.dictionary()
    assert "None" not in record.COLUMNS.values()


def test_a_file_of_an_earlier_schema_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("schema_version,run_id\n1,old\n")
    with pytest.raises(RecordError, match=r"r.csv, line 2: schema_version is '1'; this version reads 4"):
        record.read(path)
