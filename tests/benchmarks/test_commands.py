"""What every command does alike: help, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.commands import cuda
from benchmarks.sweep import journal
from reporting.provenance import ROOT
from tests.benchmarks.test_record import make_row, write

# What a machine with a GPU may lack: packages of the extras that no measurement needs.
MAY_BE_MISSING = ("check_jsonschema", "playwright", "ruptures", "transformers", "vl_convert")
BLOCKER = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def found(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else find_spec(name, path, target)


PathFinder.find_spec = classmethod(found)
"""
GRID = ("--T=4", "--D=8", "--H=8", "--E=4", "--K=2", "--seconds=0.001", "--impl=sorted_dispatch")


@pytest.fixture
def without_packages(tmp_path: Path) -> dict[str, str]:
    """An environment in whose processes, and theirs, MAY_BE_MISSING cannot be imported."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=set(MAY_BE_MISSING)), encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def passes(environment: dict[str, str], *arguments: str) -> str:
    done = python(environment, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_without_the_library_of_a_peer_its_extra_is_named_in_one_line(
    without_packages: dict[str, str], tmp_path: Path
) -> None:
    done = python(without_packages, "benchmarks", "peers", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "transformers" in line and "[peers]" in line
    assert not list((tmp_path / "out").glob("*"))


def test_help_names_every_command_without_importing_torch() -> None:
    code = (
        "import sys\nfrom benchmarks.__main__ import parser\nparser('').print_help()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        f"    {name}" in done.stdout.splitlines() or f"    {name} " in done.stdout for name in COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks {command} [-h]" in capsys.readouterr().out


def test_an_unknown_command_is_one_line_that_lists_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["figures"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and all(name in line for name in ("figures", *COMMANDS))


@pytest.mark.parametrize("place", ["a_file/out", "a_file/deeper/out", "a_folder"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("compare", "--csv"),
        ("compare", "--markdown"),
        ("gate --base HEAD", "--csv"),
        ("peers", "--out"),
        ("tune", "--out"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    command: str, option: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").write_text("")
    path = tmp_path / place
    (tmp_path / "a_folder" / "peers.csv").mkdir(parents=True)
    assert main([*command.split(), option, str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: {path}")
    why = "Is a directory" if place == "a_folder" else "Not a directory"
    assert line.endswith(f" cannot be written: {why}")


def test_every_command_starts_where_packages_are_missing(without_packages: dict[str, str]) -> None:
    code = "import sys\nfrom benchmarks.__main__ import COMMANDS, parser\nprint(*map(parser, COMMANDS))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=without_packages, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_for_a_gpu_verifies_measures_profiles_and_reports_where_packages_are_missing(
    without_packages: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("cuda", "--device", "cpu", "--smoke", "--minutes", "10", "--out", str(tmp_path / "out"))
    passes(without_packages, "benchmarks", *command)
    out = tmp_path / "out"
    done = {row.step: row for row in journal.read(out / cuda.STEPS, cuda.Done)}
    assert list(done) == ["verify", "sweep", "profile"]
    assert {row.status for row in done.values()} == {"finished"}
    assert (out / done["sweep"].csv).is_file() and list((out / "profiles").rglob("*.csv"))
    assert (out / "report.md").is_file() and list(out.glob("*.png")) and not (out / "report.html").exists()
    assert json.loads((out / "environment.json").read_text())["device"] == "cpu"
    assert " passed" in (out / "verify.log").read_text()
    assert main(list(command)) == 0  # what is done is not done again
    assert "verify: finished before" in capfd.readouterr().out


def test_verifying_runs_where_packages_are_missing(without_packages: dict[str, str]) -> None:
    told = passes(
        without_packages, "pytest", "correctness", "--impl=sorted_dispatch", "-k", "exact and integers_hot",
        "-p", "no:xdist", "-q",
    )  # fmt: skip
    assert " passed" in told


def test_a_sweep_runs_where_packages_are_missing(without_packages: dict[str, str], tmp_path: Path) -> None:
    told = passes(
        without_packages, "pytest", "benchmarks", "--grid=smoke", *GRID, f"--out={tmp_path}", "-p", "no:xdist"
    )
    assert "2 passed" in told and "report.html is not made: it needs vl-convert-python" in told


def test_a_command_that_needs_what_is_missing_names_the_extra_in_one_line(
    without_packages: dict[str, str], tmp_path: Path
) -> None:
    for number in range(6):
        csv = write(tmp_path / f"{number}.csv", make_row(run_id=f"run{number}"))
        assert main(["history", "add", str(csv), f"--folder={tmp_path / 'kept'}"]) == 0
    done = python(without_packages, "benchmarks", "history", "plot", f"--folder={tmp_path / 'kept'}")
    assert done.returncode == 2
    assert done.stderr == "error: history needs ruptures: pip install 'moe-impls[suite]'\n"


def test_ours_beside_others_names_the_extra_of_a_missing_library(
    without_packages: dict[str, str], tmp_path: Path
) -> None:
    done = python(without_packages, "benchmarks", "peers", "--quick", "--out", str(tmp_path / "peers"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: transformers.eager needs transformers: pip install 'moe-impls[peers]'"
    ]
