"""The command for a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main, parser
from benchmarks.commands import cuda, limits, profile
from benchmarks.commands.cuda import Step
from benchmarks.sweep import journal
from benchmarks.sweep.record import RecordError
from benchmarks.timing import roofline
from reporting import provenance
from reporting.provenance import ROOT
from tests.benchmarks.test_record import failed_row, write
from tests.correctness.test_child import is_gone

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    "step", cuda.steps("cpu", False, ["einsum.capacity"], all_configs=True), ids=lambda step: step.name
)
def test_the_options_of_every_step_are_valid(step: Step, tmp_path: Path) -> None:
    if step.command[:2] == ("benchmarks", "limits"):
        assert parser("limits").parse_args(step.command[1:]).device == "cpu"
        return
    if step.command[0] == "benchmarks":
        implementation, *_ = profile.subject(parser("profile").parse_args(step.command[1:]))
        assert implementation.name in cuda.OURS
        return
    done = subprocess.run(
        [sys.executable, "-m", *step.command, "--collect-only"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_step_whose_time_is_up_is_ended_and_done_again_and_one_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "REPORT_S", 0.0)
    monkeypatch.setattr(cuda, "LEAST_S", 0.0)
    slow = Step("slow", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 0.05)
    wrong = Step("wrong", ("timeit", "1 // 0"), 0.9)
    finding = Step("finding", ("timeit", "1 // 0"), 0.9, may_fail=True)
    planned = [wrong, slow, finding]
    told: list[str] = []
    assert not cuda.do_steps(planned, tmp_path, "cpu", 1.0, tell=told.append)
    first = [line.partition(" after")[0] for line in told]
    assert first == ["wrong: failed", "slow: stopped", "finding: failed"]
    told.clear()
    mended = replace(wrong, command=("timeit", "-n1", "-r1", "1"))
    planned = [mended, slow, finding]
    assert cuda.do_steps(planned, tmp_path, "cpu", 1.0, tell=told.append)
    second = [line.partition(" after")[0] for line in told]
    assert second == ["wrong: finished", "slow: stopped", "finding: failed before"]


def begun(folder: Path, *rows: cuda.Done) -> None:
    """A folder of a run on the CPU that was left with these rows."""
    made = cuda.environment("cpu")
    device = {name: made[name] for name in ("device", "device_name")}
    with journal.opened(folder / cuda.STEPS, cuda.Done, device) as steps:
        for row in rows:
            steps.append(row)


def test_a_step_that_would_begin_again_waits_for_those_that_were_not_begun(tmp_path: Path) -> None:
    begun(tmp_path, cuda.Done("first", "begun", 0.0), cuda.Done("first", "stopped", 9.0))
    told: list[str] = []
    quick = ("timeit", "-n1", "-r1", "1")
    cuda.do_steps(
        [Step("first", quick, 0.9), Step("second", quick, 0.9)], tmp_path, "cpu", 1.0, tell=told.append
    )
    assert [line.partition(" after")[0] for line in told] == ["second: finished", "first: finished"]


def test_a_sweep_that_was_killed_goes_on_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = cuda.Done("one", "stopped", 9.0, None, "a.csv")
    begun(tmp_path, cuda.Done("one", "begun", 0.0), stopped, cuda.Done("two", "begun", 0.0))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).touch()
    goes_on: dict[str, str] = {}

    def run(step: Step, folder: Path, seconds: float, before: cuda.Done | None) -> cuda.Done:
        goes_on[step.name] = before.csv if before else ""
        return cuda.Done(step.name, "finished", 1.0)

    monkeypatch.setattr(cuda, "_run", run)
    sweep = ("pytest", "benchmarks")
    cuda.do_steps([Step(n, sweep, 0.2) for n in ("one", "two", "three")], tmp_path, "cpu", 1.0)
    assert goes_on == {"one": "a.csv", "two": "b.csv", "three": ""}


def test_what_a_step_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "REPORT_S", 0.0)
    worker = tmp_path / "worker"
    script = (
        f"import os; w = os.fork(); open({str(worker)!r}, 'a').write(f'{{w}} '); import time; time.sleep(60)"
    )
    step = Step("forks", ("timeit", "-n1", "-r1", script), 0.1)
    planned = [step]
    cuda.do_steps(planned, tmp_path, "cpu", 1.0, tell=lambda line: None)
    pids = [int(pid) for pid in worker.read_text().split() if pid != "0"]
    assert pids and all(is_gone(pid) for pid in pids)


def test_a_sweep_goes_on_only_at_the_commit_that_it_was_begun_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SimpleNamespace(git_commit=provenance.columns()["git_commit"])]
    monkeypatch.setattr(cuda.plan, "progress", lambda csv: (1, 2))
    monkeypatch.setattr(cuda.record, "read", lambda csv: rows)
    assert cuda._can_go_on(tmp_path / "a.csv")
    rows[0].git_commit = "another"
    assert not cuda._can_go_on(tmp_path / "a.csv")


def test_a_folder_that_was_begun_on_another_device_is_refused(tmp_path: Path) -> None:
    with journal.opened(tmp_path / cuda.STEPS, cuda.Done, {"device": "cpu", "device_name": "another"}):
        pass
    with pytest.raises(RecordError, match="was begun with device_name another, this run is with"):
        cuda.do_steps([], tmp_path, "cpu", 1.0)


def test_a_damaged_list_of_steps_is_told(tmp_path: Path) -> None:
    (tmp_path / cuda.STEPS).write_text("[1")
    with pytest.raises(RecordError, match=f"{cuda.STEPS} cannot be continued: its plan"):
        cuda.do_steps([], tmp_path, "cpu", 1.0)


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


def test_where_no_row_is_right_yet_the_run_ends_without_a_report(tmp_path: Path) -> None:
    write(tmp_path / "sweep.csv", failed_row())
    told: list[str] = []
    packed = tmp_path.with_suffix(".tar.gz")
    assert not cuda.do_steps([], tmp_path, "cpu", 1.0, pack=packed, tell=told.append)
    assert told == [f"no report: {tmp_path} holds no row with status ok: there is nothing to compare"]
    assert packed.exists()


def test_what_was_written_is_packed_after_every_step(tmp_path: Path) -> None:
    folder, pack = tmp_path / "gpu", tmp_path / "gpu.tar.gz"
    planned = [Step("says", ("timeit", "-n1", "-r1", "print('here')"), 0.5)]
    cuda.do_steps(planned, folder, "cpu", 1.0, pack=pack, tell=lambda line: None)
    with tarfile.open(pack) as archive:
        assert {"gpu/says.log", "gpu/environment.json", f"gpu/{cuda.STEPS}"} <= set(archive.getnames())


def wheel(folder: Path, platform: str, content: str = "VALUE = 3") -> Path:
    path = folder / f"small-1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small.py", content)
    return path


def carried(monkeypatch: pytest.MonkeyPatch, out: Path, *wheels: Path) -> int:
    """Run the command where pip downloads these wheels."""

    def download(command: list[str], **options: object) -> SimpleNamespace:
        for found in wheels:
            shutil.copy(found, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", download)
    return main(["carry", "small", f"--out={out}"])


def test_a_wheel_of_pure_python_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried(monkeypatch, tmp_path / "carried", wheel(tmp_path, "any")) == 0
    assert (tmp_path / "carried" / "small.py").read_text() == "VALUE = 3"


@pytest.mark.parametrize(
    ("platform", "size", "message"),
    [("linux_x86_64", 1, "is built for linux_x86_64"), ("any", 2**25, "takes 32 MiB; at most 16")],
)
def test_with_a_wheel_that_cannot_travel_nothing_is_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    platform: str, size: int, message: str,
) -> None:  # fmt: skip
    (tmp_path / "other").mkdir()
    wrong = tmp_path / f"wrong-2-py3-none-{platform}.whl"
    wheel(tmp_path / "other", platform, "x" * size).rename(wrong)
    assert carried(monkeypatch, tmp_path / "carried", wheel(tmp_path, "any"), wrong) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "carried").exists()


def test_the_limits_of_a_machine_are_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.BUFFER_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofline.SQUARE, "cpu", 64)
    assert main(["limits", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "limits.json").read_text())
    assert found.keys() == {
        "square_product_bfloat16_tflop_per_s", "square_product_float32_tflop_per_s",
        "read_gb_per_s", "copy_gb_per_s",
    }  # fmt: skip
    assert min(found.values()) > 0
