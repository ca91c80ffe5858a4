"""The sweep as a user runs it, on tiny layers: what it writes, and what it does with bad input and faults."""

from __future__ import annotations

import io
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.sweep import record
from benchmarks.sweep.record import Row
from benchmarks.sweep.request import Options, requested
from benchmarks.sweep.run import measure_all
from benchmarks.sweep.workload import Settings, WorkloadRun
from correctness.problems.problem import Problem
from moe_impls.registry import IMPLEMENTATIONS, ResolveError, resolve
from reporting.provenance import ROOT

pytestmark = pytest.mark.xdist_group("sweeps")  # each of which is run once
TINY = ("--T=8", "--D=16", "--H=8", "--E=4", "--K=2", "--seconds=0.01")


def command(out: Path, *options: str) -> list[str]:
    # -p no:cacheprovider: the outer run's cache is not this one's.
    return [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", f"--out={out}",
            f"--benchmark-storage={out / 'json'}", *options]  # fmt: skip


def sweep(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), cwd=ROOT, capture_output=True, text=True, timeout=300)


def rows_of(out: Path) -> list[Row]:
    (path,) = out.glob("*.csv")
    return record.read(path)


def implementation(folder: Path, body: str, name: str = "mine") -> str:
    """A file with a ``forward``; ``right`` in it is a right one."""
    path = folder / f"{name}.py"
    path.write_text(
        "import time, torch\nfrom moe_impls.interface import Support\n"
        f"from moe_impls.index_add import forward as right\n{body}\n"
    )
    return f"{path}:forward"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("sweep")
    options = ("--impl=sorted_dispatch", "--impl=index_add", "--benchmark-autosave", "--benchmark-save-data")
    return out, sweep(out, *TINY, "--T=4", *options)


def test_a_sweep_measures_every_cell_and_says_where_at_the_very_end(run) -> None:
    out, done = run
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(out)
    assert [row.status for row in rows] == ["ok"] * 8
    assert {(r.implementation, r.T, r.mode) for r in rows} == {
        (name, T, mode)
        for name in ("sorted_dispatch", "index_add")
        for T in (4, 8)
        for mode in ("forward", "forward_backward")
    }
    (csv,) = out.glob("*.csv")
    assert done.stdout.splitlines()[-3:] == [
        f"CSV:    {csv}",
        f"report: {out / 'report.md'}",
        f"report: {out / 'report.html'}",
    ]
    assert (out / "report.md").is_file()


def test_progress_tells_what_was_measured_and_the_time_left(run) -> None:
    _, done = run
    lines = [line for line in done.stdout.splitlines() if re.search(r"\[\d/4\]", line)]
    assert len(lines) == 4 and all("s left" in line and "index_add" in line for line in lines)


def test_pytest_benchmark_stores_the_samples_of_the_csv(run) -> None:
    out, _ = run
    (stored,) = out.glob("json/*/*.json")
    stats = {
        b["params"]["rows"] + b["params"]["implementation"]: b
        for b in json.loads(stored.read_text())["benchmarks"]
    }
    assert len(stats) == 8
    for row in rows_of(out):
        name = f"sweep-T{row.T}-D16-H8-E4-K2-float32-cpu-{row.mode}{row.implementation}"
        found = stats[name]["stats"]
        assert row.samples_ms is not None and row.rounds == len(row.samples_ms) == found["rounds"] >= 7
        assert [s * 1e3 for s in found["data"]] == pytest.approx(row.samples_ms, rel=1e-12)
        assert found["median"] * 1e3 == pytest.approx(row.median_ms, rel=1e-12)
        assert found["min"] * 1e3 == pytest.approx(row.min_ms, rel=1e-12)
        assert stats[name]["extra_info"]["run_id"] == row.run_id


def test_a_rows_figures_follow_from_its_samples(run) -> None:
    for row in rows_of(run[0]):
        assert row.samples_ms and row.median_ms and row.limit_ms and row.tflop_per_s
        assert row.min_ms and row.p20_ms and row.p80_ms
        assert row.median_ms == statistics.median(row.samples_ms) and row.min_ms == min(row.samples_ms)
        assert row.min_ms <= row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.tokens_per_s == pytest.approx(row.T / row.median_ms * 1e3, rel=1e-5)
        assert row.tflop_per_s == pytest.approx(row.flops / (row.median_ms / 1e3) / 1e12, rel=1e-5)
        assert row.efficiency == pytest.approx(row.limit_ms / row.median_ms, rel=1e-5)
        assert row.worst_error_fraction is not None and 0 < row.worst_error_fraction <= 1
        assert row.peak_memory_bytes and row.routing_checksum


class Fault(NamedTuple):
    """What a ``forward`` does, and the status and a part of the reason of its row."""

    body: str
    status: str
    reason: str


FAULTS = {
    "raises": Fault(
        "def forward(*a, **k): raise RuntimeError('no kernel\\nfor this')",
        "error",
        "RuntimeError: no kernel for this",
    ),
    "wrong": Fault(
        "def forward(*a, **k): return right(*a, **k) * 1.01",
        "incorrect",
        "check before timing: y is wrong",
    ),
    "shape": Fault("def forward(*a, **k): return right(*a, **k)[1:]", "incorrect", "shape"),
    "memory": Fault(
        "def forward(*a, **k): return torch.empty(2**60)", "out_of_memory", "DefaultCPUAllocator"
    ),
    "sleeps": Fault(
        "def forward(*a, **k): time.sleep(60)",
        "timeout",
        "longer than 5 s (--cell-timeout): it computed 0",
    ),
    "loops": Fault(
        "def forward(*a, **k):\n    while True: pass", "timeout", "longer than 5 s (--cell-timeout)"
    ),
    # Right as long as it computes; from the fourth call on it returns what it remembers.
    "remembers": Fault(
        "seen = []\n"
        "def forward(*a, **k):\n"
        "    seen.append(right(*a, **k) if len(seen) < 4 else seen[-1])\n"
        "    return seen[-1]",
        "incorrect",
        "check on new inputs after timing: y is wrong",
    ),
}
ENDING = {
    "segmentation_fault": Fault(
        "import ctypes\ndef forward(*a, **k): ctypes.string_at(0)", "error", "ended its process by SIGSEGV"
    ),
    "exit": Fault(
        "import os\ndef forward(*a, **k): os._exit(3)", "error", "ended its process with exit status 3"
    ),
    "killed": Fault(
        "import os\ndef forward(*a, **k): os.kill(os.getpid(), 9)",
        "out_of_memory",
        "SIGKILL, as when memory",
    ),
    "hangs": Fault(
        "import signal\n"
        "def forward(*a, **k):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    time.sleep(60)",
        "timeout",
        "ran on after its time limit; its process was killed",
    ),
    "memory": Fault(
        "def forward(*a, **k): torch.ones(2**29)",
        "out_of_memory",
        "DefaultCPUAllocator",
    ),
}


def beside_right_ones(
    faults: dict[str, Fault], folder: Path, *options: str
) -> tuple[list[Row], subprocess.CompletedProcess[str], Path]:
    """Measure wrong implementations between two right ones, in one sweep."""
    names = [implementation(folder, fault.body, name) for name, fault in faults.items()]
    impls = [f"--impl={name}" for name in ("dense_mask", *names, "index_add")]
    done = sweep(folder / "out", *TINY, "--mode=forward", "--cell-timeout=5", *impls, *options)
    return rows_of(folder / "out"), done, folder / "out"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory):
    return beside_right_ones(FAULTS, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory):
    return beside_right_ones(ENDING, tmp_path_factory.mktemp("ending"), "--isolate", "--cell-memory=1")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_becomes_a_row(faulty, name: str) -> None:
    rows, done, _ = faulty
    (row,) = (row for row in rows if f"{name}.py" in row.implementation)
    assert row.status == FAULTS[name].status
    assert FAULTS[name].reason in row.reason and FAULTS[name].reason in done.stdout
    assert row.median_ms is None


def test_the_others_go_on_beside_faults(faulty) -> None:
    rows, done, out = faulty
    assert done.returncode == 1, done.stdout + done.stderr
    right = [row for row in rows if row.status == "ok"]
    assert [row.implementation for row in right] == ["dense_mask", "index_add"]
    assert all(row.median_ms is not None for row in right)
    assert f"{len(FAULTS)} failed, 2 passed" in done.stdout and (out / "report.md").is_file()


@pytest.mark.parametrize("name", ENDING)
def test_isolated_what_ends_the_process_becomes_a_row(ending, name: str) -> None:
    rows, _, _ = ending
    (row,) = (row for row in rows if f"{name}.py" in row.implementation)
    assert row.status == ENDING[name].status
    assert ENDING[name].reason in row.reason


def test_isolated_the_others_go_on_and_are_timed_side_by_side(ending) -> None:
    rows, done, _ = ending
    assert done.returncode == 1, done.stdout + done.stderr
    first, last = rows[0], rows[-1]
    assert (first.status, last.status) == ("ok", "ok")
    assert first.rounds == last.rounds


def test_isolated_an_import_that_ends_the_process_is_a_usage_error(tmp_path: Path) -> None:
    name = implementation(tmp_path, "import os\nos._exit(3)\ndef forward(*a, **k): return right(*a, **k)")
    done = sweep(tmp_path / "out", *TINY, f"--impl={name}", "--isolate")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: importing {name} ended its process with exit status 3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_isolated_sweep_writes_the_same_rows(tmp_path: Path, run) -> None:
    done = sweep(tmp_path, *TINY, "--T=4", "--impl=sorted_dispatch", "--impl=index_add", "--isolate")
    assert done.returncode == 0, done.stdout + done.stderr

    def facts(row: Row) -> tuple:
        return row.implementation, row.T, row.mode, row.status, row.routing_checksum, row.peak_memory_bytes

    assert list(map(facts, rows_of(tmp_path))) == list(map(facts, rows_of(run[0])))


def test_what_an_implementation_does_not_declare_is_no_failure(tmp_path: Path) -> None:
    body = "SUPPORT = Support(gradients=False)\ndef forward(*a, **k): return right(*a, **k)"
    done = sweep(tmp_path / "out", *TINY, f"--impl={implementation(tmp_path, body)}")
    assert done.returncode == 0, done.stdout
    forward, backward = sorted(rows_of(tmp_path / "out"), key=lambda row: row.mode)
    assert (forward.status, backward.status) == ("ok", "unsupported")
    assert backward.reason == "gradients not declared"


def test_a_layer_beyond_the_memory_is_not_attempted(tmp_path: Path) -> None:
    done = sweep(tmp_path / "out", "--T=4", "--D=100000", "--H=100000", "--E=64", "--K=1", "--mode=forward",
                 "--impl=index_add")  # fmt: skip
    assert done.returncode == 1
    (row,) = rows_of(tmp_path / "out")
    assert row.status == "out_of_memory" and "GiB are available; not attempted" in row.reason
    assert "report: not written" in done.stdout.splitlines()[-1]


def test_ctrl_c_leaves_the_rows_so_far_and_their_report(tmp_path: Path) -> None:
    many = [f"--T={T}" for T in range(1, 200)]
    with subprocess.Popen(
        command(tmp_path, *TINY, *many, "--impl=index_add"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Python ignores Ctrl-C where its parent did, as under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not any(
            p.read_text().count("\n") > 3 for p in tmp_path.glob("*.csv")
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    rows = rows_of(tmp_path)
    assert 3 <= len(rows) < 398 and {row.status for row in rows} == {"ok"}
    assert (tmp_path / "report.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(grid="huge"), "smoke, default, latency, throughput, full"),
        (Options(impl=["fastest"]), "dense_mask, sorted_dispatch, index_add, compiled"),
        (Options(impl=["nowhere.py:forward"]), "does not exist"),
        (Options(model=["gpt-9"]), "mixtral-8x7b, mixtral-8x22b"),
        (Options(model=["notebook"], grid="smoke"), "--grid smoke cannot be given with --model"),
        (Options(device="tpu"), "cpu, cuda"),
        (Options(dtype="int8"), "float64, float32, bfloat16, float16"),
        (Options(load=["heavy"]), "uniform, zipf"),
        (Options(mode=["sideways"]), "forward, forward_backward"),
        (Options(K=[64]), "must not exceed E"),
        (Options(T=[0]), "at least 1"),
        (Options(seconds=-1.0), "--seconds is -1.0; it must be above 0"),
        (Options(cell_memory=0.0), "--cell-memory is 0.0; it must be above 0"),
        (Options(threads=0), "--threads is 0; valid are 1"),
        pytest.param(
            Options(device="cuda"),
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here"),
        ),
    ],
)
def test_options_that_are_not_valid_are_refused_with_what_is(options: Options, message: str) -> None:
    with pytest.raises((ValueError, ResolveError), match=re.escape(message)):
        requested(options)


def test_a_bad_option_is_a_usage_error_in_one_line(tmp_path: Path) -> None:
    done = sweep(tmp_path / "out", "--K=64")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in done.stderr.splitlines() if line.strip())
    assert line.startswith("ERROR: --K is 64; it must not exceed E")
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_no_pytest_and_continues_what_it_has_begun(tmp_path: Path) -> None:
    options = Options(impl=["index_add"], T=[4, 8], D=[16], H=[8], E=[4], K=[2], seconds=0.001)
    request, stream = requested(options, out=tmp_path), io.StringIO()
    rows = measure_all(request, stream)
    assert rows == record.read(request.csv) and {row.status for row in rows} == {"ok"}
    assert [row.T for row in rows] == [4, 4, 8, 8] and "[4/4]" in stream.getvalue()
    again = requested(Options(), resume=request.csv)
    assert again.options == options and measure_all(again, stream) == rows


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_cell(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = sweep(tmp_path / "file" / "out", *TINY)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --out: " in done.stderr and "cannot be written" in done.stderr
    assert "passed" not in done.stdout


def test_a_sweep_is_one_test_for_each_cell(tmp_path: Path) -> None:
    done = sweep(tmp_path, *TINY, "--collect-only", "-q")
    assert done.returncode == 0
    assert done.stdout.count("test_cell[") == 2 * len(IMPLEMENTATIONS)
    assert list(tmp_path.rglob("*.csv")) == []


def test_what_an_implementation_spends_on_tuning_is_a_column() -> None:
    spent = itertools.accumulate(itertools.repeat(0.25))
    tunes = replace(resolve("sorted_dispatch"), name="tunes", tuning_seconds=lambda: next(spent))
    problem = Problem("tiny", T=4, D=4, H=4, O=4, E=2, K=1)
    run = WorkloadRun(problem, "forward", [tunes, resolve("index_add")], Settings(seconds=0.01))
    rows = run.rows(record.environment("cpu", "tiny"))
    assert (rows["tunes"].tuning_ms, rows["index_add"].tuning_ms) == (250.0, None)
