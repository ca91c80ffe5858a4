"""A sweep that ends early loses nothing that it measured, and goes on where it ended."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.sweep import journal, plan, record
from benchmarks.sweep.record import MEASURED, RecordError, Row
from reporting.provenance import ROOT
from tests.benchmarks.test_record import make_row, write

pytestmark = pytest.mark.xdist_group("durable")
TINY = ("--T=4", "--T=8", "--T=16", "--D=8", "--H=4", "--E=4", "--K=2", "--seconds=0.001",
        "--impl=dense_mask", "--impl=sorted_dispatch")  # fmt: skip
CELLS = 3 * 2 * 2
DIFFERS = {*MEASURED, "worst_error_fraction", "run_id", "time_utc"}


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def csv_in(folder: Path) -> Path:
    (path,) = folder.glob("*.csv")
    return path


def facts(path: Path) -> list[dict]:
    """The rows of a file without what differs from run to run, in an order of their own."""
    rows = [{n: v for n, v in vars(row).items() if n not in DIFFERS} for row in record.read(path)]
    return sorted(rows, key=repr)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], float]:
    """What an uninterrupted sweep writes, and the seconds until its first row and from there to its end."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(*TINY, f"--out={folder}")
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    path = csv_in(folder)
    assert plan.progress(path) == (CELLS, CELLS)
    return facts(path), path.stat().st_mtime - journal.plan_path(path).stat().st_mtime


@pytest.mark.timeout(0)
def test_a_sweep_that_is_killed_again_and_again_ends_like_one_that_is_not(
    tmp_path: Path, uninterrupted: tuple[list[dict], float]
) -> None:
    whole, seconds = uninterrupted
    moments = random.Random(0)
    arguments, kept = [*TINY, f"--out={tmp_path}"], []
    for _ in range(20):
        process = start(*arguments)
        while process.poll() is None and not list(tmp_path.glob("*.lock")):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds / 5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if files := list(tmp_path.glob("*.csv")):
            now = record.read(files[0])
            assert now[: len(kept)] == kept
            kept, arguments = now, [f"--resume={files[0]}"]
    last = start(*arguments)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    path = csv_in(tmp_path)
    assert facts(path) == whole
    assert record.read(path)[: len(kept)] == kept
    assert len({row.run_id for row in record.read(path)}) == 1


def test_a_last_line_that_is_not_whole_is_no_row_and_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", make_row(), make_row())
    whole = path.read_bytes()
    for end in (len(whole) - 1, len(whole) - 7, len(whole) - 150):  # of the last number, too
        path.write_bytes(whole[:end])
        assert record.read(path) == [make_row()]
        assert journal.repair(path)
        assert path.read_bytes() == whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 1]
        assert not journal.repair(path)


def test_any_other_damage_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", make_row(), make_row(), make_row())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:40] + "\n", lines[3]]))
    with pytest.raises(RecordError, match="line 3: .* values in .* columns"):
        record.read(path)


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    exit_status: int | None = None


def test_a_journal_of_any_rows_is_continued_with_its_plan_and_no_other(tmp_path: Path) -> None:
    path, first = tmp_path / "steps.journal", Step("verify", 1.5, 0)
    with journal.opened(path, Step, {"commit": "a", "quick": False}) as begun:
        begun.append(first)
        assert journal.read(path, Step) == begun.rows == [first]
    path.write_text(path.read_text() + "sweep,2.")
    with journal.opened(path, Step, {"commit": "a", "quick": False}) as begun:
        assert begun.was_torn and begun.rows == [first]
        begun.append(Step("sweep", 2.5))
    assert journal.read(path, Step) == [first, Step("sweep", 2.5, None)]
    with (
        pytest.raises(RecordError, match=r"was begun with commit a, this run is with b: delete it"),
        journal.opened(path, Step, {"commit": "b", "quick": False}),
    ):
        pass
    with (
        pytest.raises(RecordError, match="has other columns than this version writes"),
        journal.opened(path, Row, {"commit": "a", "quick": False}),
    ):
        pass
    journal.discard(path)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv")
    with journal.locked(path):
        with pytest.raises(RecordError, match="is being written to by another run"), journal.locked(path):
            pass
        assert FileLock(f"{path}.lock").lock_file
    with journal.locked(path):
        pass
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume={path}", "--grid=smoke"], "--grid cannot be given with --resume"),
        (["--resume={path}", "--out=x"], "--out cannot be given with --resume"),
        (["--resume={path}.gone"], "does not exist or is no file"),
        (["--resume={path}"], "cannot be continued: its plan r.plan.json"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = write(tmp_path / "r.csv")
    refused = start(*(argument.format(path=path) for argument in arguments))
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode == 4 and message in output


def test_a_sweep_of_another_commit_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    with journal.opened(path, Row, {"options": {}, "cells": {}}) as begun:
        begun.append(make_row(threads=1))
    refused = start(f"--resume={path}")
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode == 4 and "was measured with machine m, this is" in output
