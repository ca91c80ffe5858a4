"""Two implementations or versions side by side: what differs is found, what does not is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from benchmarks.__main__ import main
from benchmarks.commands import compare
from benchmarks.timing import memory, versions
from benchmarks.workloads import Workloads
from correctness.problems.inputs import make_inputs
from correctness.problems.problem import Problem
from reporting.provenance import ROOT

QUICK = "--seconds=0.1"
SLEEPS = "import time\n\ndef forward(x, routing, experts, *, combine='sum'):\n    time.sleep(0.03)\n    "
WRONG = "def forward(x, routing, experts, *, combine='sum'):\n    return 2 * "
RIGHT = "sorted_dispatch.forward(x, routing, experts, combine=combine)\n"
IMPORT = "from moe_impls import sorted_dispatch\n"


@pytest.fixture(autouse=True)
def small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PROBLEMS", (Workloads(T=(16,), D=(32,), H=(16,), E=(4,), K=(2,)),))


def implementation(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(IMPORT + text + RIGHT)
    return f"{path}:forward"


def version(folder: Path, sleep_s: float = 0.0) -> Path:
    """A copy of the package, in which sorted_dispatch takes that much longer."""
    shutil.copytree(ROOT / "moe_impls", folder / "moe_impls")
    path = folder / "moe_impls" / "sorted_dispatch.py"
    slowed = path.read_text().replace("    T, K =", f"    __import__('time').sleep({sleep_s})\n    T, K =")
    path.write_text(slowed)
    return folder


def test_a_slower_implementation_is_found_and_the_table_says_so(tmp_path: Path, capsys) -> None:
    slow = implementation(tmp_path, "slow", SLEEPS + "return ")
    files = f"--csv={tmp_path / 'c.csv'}", f"--markdown={tmp_path / 'c.md'}"
    assert main(["compare", "sorted_dispatch", slow, QUICK, *files]) == 0
    table = pd.read_csv(tmp_path / "c.csv").to_dict(orient="records")
    assert {row["verdict"] for row in table} == {"slower"}
    for row in table:
        assert 1 < row["low"] <= row["ratio"] <= row["high"] and row["ratio"] > 1.5 and row["rounds"] >= 8
    assert (tmp_path / "c.md").read_text().count("| slower |") == len(table) == 2
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "fwd" in line) <= 80


def test_an_implementation_can_be_compared_with_itself(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    assert main(["compare", "sorted_dispatch", "sorted_dispatch", QUICK, f"--csv={path}"]) == 0
    table = pd.read_csv(path).to_dict(orient="records")
    assert [row["second"] for row in table] == ["sorted_dispatch (again)"] * 2
    assert all(0.5 < row["ratio"] < 2 for row in table)


def test_what_is_being_done_is_told_from_the_first_check_on(capsys) -> None:
    assert main(["compare", QUICK, "--mode=forward"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "index_add and sorted_dispatch: 1 calls, samples of 0.2 s in all"
    assert told[1] == "check 1 of 1: sweep T=16 D=32 H=16 E=4 K=2 uniform forward"
    assert told[2].startswith("timing, visit 1 of 10: ") and told[-1].startswith("check after timing, 1 of 1")


def test_when_time_is_up_there_are_as_many_rounds_as_an_interval_needs(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.csv"
    monkeypatch.setattr(compare, "LONGEST", 0)
    assert main(["compare", "--seconds=0.0001", f"--csv={path}"]) == 0
    assert list(pd.read_csv(path)["rounds"]) == [8, 8]


def test_a_wrong_implementation_has_no_ratio_but_a_reason(tmp_path: Path) -> None:
    wrong, path = implementation(tmp_path, "wrong", WRONG), tmp_path / "c.csv"
    assert main(["compare", "sorted_dispatch", wrong, QUICK, f"--csv={path}"]) == 1
    table = pd.read_csv(path, keep_default_na=False).to_dict(orient="records")
    assert all(row["ratio"] == "" and "incorrect" in row["reason"] for row in table)


REMEMBERS = (
    "seen = {}\n\ndef forward(x, routing, experts, *, combine='sum'):\n"
    "    y = sorted_dispatch.forward(x, routing, experts, combine=combine)\n"
    "    return seen.setdefault(x.data_ptr(), y)\n"
)
COUNTS = (
    "calls = []\n\ndef forward(x, routing, experts, *, combine='sum'):\n    calls.append(1)\n"
    "    y = sorted_dispatch.forward(x, routing, experts, combine=combine)\n"
    "    return y if len(calls) < 5 else 0 * y\n"
)


@pytest.mark.parametrize("text", [REMEMBERS, COUNTS], ids=["remembers", "counts"])
def test_what_is_right_only_before_it_is_timed_has_no_ratio(tmp_path: Path, capsys, text: str) -> None:
    mine, path = tmp_path / "mine.py", tmp_path / "c.csv"
    mine.write_text(IMPORT + text)
    given = ["compare", "sorted_dispatch", f"{mine}:forward", QUICK, "--mode=forward", f"--csv={path}"]
    assert main(given) == 1
    (reason,) = pd.read_csv(path)["reason"]
    assert "mine.py:forward: incorrect" in reason
    assert reason in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("text", [REMEMBERS, COUNTS], ids=["remembers", "counts"])
def test_a_version_that_is_right_only_before_it_is_timed_is_refused(tmp_path: Path, text: str) -> None:
    base = version(tmp_path / "base")
    changed = base / "moe_impls" / "index_add.py"
    changed.write_text(
        "from moe_impls import sorted_dispatch\nfrom moe_impls.interface import Support\n"
        "SUPPORT = Support()\n" + text
    )
    assert main(["compare", f"--base={base}", "index_add", QUICK, "--mode=forward"]) == 2


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "implementations", interrupted)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err == "interrupted: what was written before is kept\n"


def test_the_problems_of_a_comparison_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    sizes = ["--T=4", "--T=9", "--D=16", "--H=8", "--E=4", "--K=2"]
    options = [*sizes, "--load=zipf", "--dtype=bfloat16", "--mode=forward", QUICK, f"--csv={path}"]
    assert main(["compare", "sorted_dispatch", "index_add", *options]) == 0
    table = pd.read_csv(path)
    assert list(table["T"]) == [4, 9]
    assert set(table["dtype"]) == {"bfloat16"}
    assert {tuple(row) for row in table[["D", "H", "E", "K", "load", "mode"]].values} == {
        (16, 8, 4, 2, "zipf", "forward")
    }


def test_what_needs_more_memory_than_there_is_is_not_attempted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: 1000)
    path = tmp_path / "c.csv"
    assert main(["compare", "sorted_dispatch", "index_add", QUICK, f"--csv={path}"]) == 1
    assert all("out_of_memory" in reason for reason in pd.read_csv(path)["reason"])


def test_another_version_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    base, path = version(tmp_path / "base", sleep_s=0.003), tmp_path / "c.csv"
    assert main(["compare", f"--base={base}", "sorted_dispatch", QUICK, f"--csv={path}"]) == 0
    assert set(pd.read_csv(path)["verdict"]) == {"faster"}


def worker_of(parent: psutil.Process) -> psutil.Process | None:
    found = parent.children(recursive=True) if parent.is_running() else []
    return next((p for p in found if "worker.py" in " ".join(p.cmdline())), None)


def stands_still(process: psutil.Process, within_s: float) -> bool:
    """Whether a process is soon stopped: a signal takes a moment to arrive on a busy machine."""
    end = time.monotonic() + within_s
    while time.monotonic() < end and process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)
    return process.status() == psutil.STATUS_STOPPED


@pytest.mark.skipif(sys.platform != "linux", reason="processes stand still on Linux alone")
def test_a_version_stands_still_between_its_calls_and_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path; from benchmarks.timing.versions import Version\n"
        "version = Version(Path(sys.argv[1]), 'sorted_dispatch', Path(sys.argv[2]))\n"
        "version.ask('anew'); print('asked', flush=True); time.sleep(60)"
    )
    inputs = tmp_path / "inputs.pt"
    problem = Problem("tiny", T=4, D=4, H=4, O=4, E=2, K=1)
    versions.write_inputs(inputs, problem, make_inputs(problem), gradients=False)
    with subprocess.Popen(
        [sys.executable, "-c", code, ROOT, inputs], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "asked\n"
        worker = worker_of(psutil.Process(parent.pid))
        assert worker is not None and stands_still(worker, within_s=20)
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_gate_fails_on_a_slowdown_and_passes_without_one(tmp_path: Path, monkeypatch, capsys) -> None:
    base = version(tmp_path / "base")
    monkeypatch.setattr(compare, "ROOT", version(tmp_path / "here", sleep_s=0.003))
    gate = ["gate", f"--base={base}", "--impl=sorted_dispatch", QUICK]
    assert main(gate) == 1
    assert "slower than at" in capsys.readouterr().out
    monkeypatch.setattr(compare, "ROOT", base)
    assert main([*gate, "--threshold=2"]) == 0
    assert "no implementation is slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--base=no-such-ref"], "'no-such-ref' is neither a commit of"),
        (["compare", "--base={tmp_path}"], "holds no package moe_impls"),
        (["compare", "dense_mask"], "1 implementations are given; it must be 2"),
        (["compare", "--seconds=0"], "--seconds is 0.0; it must be above 0"),
        (["compare", "--E=4", "--K=5"], "--K is 5; it must not exceed E, here 4"),
        (["compare", "--model=olmoe-1b-7b", "--D=5"], "--D cannot be given with --model"),
        (["compare", "--mode=backward"], "forward, forward_backward"),
        (["compare", "--threads=0"], "--threads is 0; valid are 1"),
        (["gate", "--base=HEAD", "--threshold=0"], "--threshold is 0.0; it must be in (0, 10)"),
        (["gate"], "the following arguments are required: --base"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message: str, tmp_path: Path, capsys) -> None:
    try:
        status = main([argument.format(tmp_path=tmp_path) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_uncommitted_changes_are_refused_with_a_commit_as_base(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / "file").write_text("2")
    with (
        pytest.raises(versions.VersionError, match="needs a clean checkout; not committed: file"),
        versions.checked_out("HEAD"),
    ):
        pass
    (tmp_path / "file").write_text("1")
    with versions.checked_out("HEAD") as tree:
        assert (tree / "file").read_text() == "1"
    assert not tree.exists()
