"""The command for a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.__main__ import main
from benchmarks.on_gpu import Step
from benchmarks.record import RecordError
from correctness.provenance import ROOT

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("step", on_gpu.steps("cpu", smoke=False), ids=lambda step: step.name)
def test_the_options_of_every_step_are_valid(step: Step, tmp_path: Path) -> None:
    last = ["--collect-only"] if step.command[0] == "pytest" else ["--help"]
    done = subprocess.run(
        [sys.executable, "-m", *step.command, *last],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_small_run_verifies_measures_profiles_and_reports(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["cuda", "--device", "cpu", "--smoke", "--minutes", "10", "--out", str(tmp_path)]
    assert main(command) == 0
    steps = json.loads((tmp_path / on_gpu.STEPS).read_text())
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(
        ("verify", "sweep", "profile"), "finished"
    )
    assert (tmp_path / steps["sweep"]["csv"]).is_file() and (tmp_path / "report.md").is_file()
    assert list((tmp_path / "profiles").rglob("*.csv"))
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"
    assert " passed" in (tmp_path / "verify.log").read_text()
    capfd.readouterr()
    assert main(command) == 0  # what is done is not done again
    assert "verify: finished before" in capfd.readouterr().out


def test_a_step_whose_time_is_up_is_ended_and_done_again_and_one_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "REPORT_S", 0.0)
    monkeypatch.setattr(on_gpu, "LEAST_S", 0.0)
    slow = Step("slow", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 0.05)
    wrong = Step("wrong", ("timeit", "1 // 0"), 0.9)
    monkeypatch.setattr(on_gpu, "steps", lambda device, smoke: [slow, wrong])
    told: list[str] = []
    assert not on_gpu.run(tmp_path, "cpu", 1.0, smoke=True, tell=told.append)
    assert [line.partition(" after")[0] for line in told] == ["slow: stopped", "wrong: failed"]
    told.clear()
    assert not on_gpu.run(tmp_path, "cpu", 1.0, smoke=True, tell=told.append)
    assert [line.partition(" after")[0] for line in told] == ["slow: stopped", "wrong: failed before"]


def test_a_damaged_list_of_steps_is_told(tmp_path: Path) -> None:
    (tmp_path / on_gpu.STEPS).write_text("[1")
    with pytest.raises(RecordError, match="is no list of steps: .*; remove it to begin anew"):
        on_gpu.run(tmp_path, "cpu", 1.0, smoke=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param([], "--device is cuda, but torch finds no CUDA device here", marks=no_gpu),
        (["--device", "cpu"], "--device is cpu; valid with --smoke only"),
        (["--device", "cpu:1", "--smoke"], "--device is cpu:1; valid are cpu, cpu:0 to cpu:0"),
        (["--device", "tpu"], "--device is 'tpu'; valid are cpu, cuda"),
        (["--device", "cpu", "--smoke", "--minutes", "0"], "--minutes is 0.0; it must be above 0"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cuda", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
