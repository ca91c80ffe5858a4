"""``python -m benchmarks cuda``: verify, measure and profile on a GPU, the most important first, in time.

Every step is one of this project's own commands in a process of its own, with its output in a log. The same
command with the same folder does what is left: a sweep goes on with the row after the last on disk, and what
failed, or would begin again after its time was up, is tried again after all else.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.options import RESULTS, add_device
from benchmarks.report.folder import write_report
from benchmarks.sweep import journal, plan, record
from correctness.problems.problem import check_device
from correctness.session.child import Child
from moe_impls.registry import usable
from reporting import provenance
from reporting.pages import write_atomically
from reporting.provenance import ROOT

STEPS = "steps.journal"
OURS = ("triton_fused", "grouped_mm", "sorted_dispatch", "padded")
PEERS = (
    "transformers.grouped_mm",
    "transformers.batched_mm",
    "liger.fused_moe",
    "scattermoe.parallel_experts",
    "torchtitan.grouped_mm",
)
REPORT_S = 30.0  # kept for the report
LEAST_S = 5.0  # a step that would have less is not begun


@dataclass(frozen=True)
class Step:
    """A command of this project, without ``python -m``, and the share of all the time that it may take."""

    name: str
    command: tuple[str, ...]
    share: float
    may_fail: bool = False  # what fails in it is a finding about others

    @property
    def is_sweep(self) -> bool:
        return self.command[:2] == ("pytest", "benchmarks")


@dataclass(frozen=True)
class Done:
    """How a step ended: finished, failed (its command said so) or stopped (its time was up).

    Of one that this command was killed in the last word is begun.
    """

    step: str
    status: str
    seconds: float
    exit_status: int | None = None
    csv: str = ""  # of a sweep, in the folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="for all of it (default: 10)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=(
        "results/<machine> unless given; one that was begun is continued"
    ))  # fmt: skip
    add_device(parser.add_argument, default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a small part of it, to try the command itself")
    parser.add_argument("--all-configs", action="store_true", help=(
        "verify every tile that triton_fused may choose, and not only the one that is fastest here"
    ))  # fmt: skip
    parser.add_argument("--pack", type=Path, metavar="FILE", help=(
        "after each step, put all that was written into this one .tar.gz"
    ))  # fmt: skip


def run(options: argparse.Namespace) -> int:
    check_device(options.device, "--device")
    if not options.minutes > 0:
        raise ValueError(f"--minutes is {options.minutes}; it must be above 0")
    if options.device == "cpu" and not options.smoke:
        raise ValueError("--device is cpu; valid with --smoke only: `pytest benchmarks` measures on a CPU")
    folder = options.out or RESULTS / record.environment(options.device, "cuda").machine
    peers = [] if options.smoke else usable(PEERS, print)
    planned = steps(options.device, options.smoke, peers, all_configs=options.all_configs)
    return 0 if do_steps(planned, folder, options.device, options.minutes, pack=options.pack) else 1


def steps(device: str, smoke: bool, peers: Sequence[str] = (), *, all_configs: bool = False) -> list[Step]:
    """List what is done, in this order: what is worth most first."""
    subjects = [f"--impl={name}" for name in (*OURS, *peers)]
    verify = ["pytest", "correctness", f"--device={device}", "-q"]

    def sweep(*options: str) -> tuple[str, ...]:
        return ("pytest", "benchmarks", "--benchmark-autosave", "-q", f"--device={device}", *options)

    if smoke:
        chosen = ("--impl=sorted_dispatch", "--impl=grouped_mm")
        return [
            Step("verify", (*verify, "--impl=sorted_dispatch", "-k", "exact"), 0.4),
            Step("sweep", sweep("--grid=smoke", *chosen), 0.4),
            Step("profile", ("benchmarks", "profile", f"--device={device}", "--impl=sorted_dispatch",
                             "--T=64", "--D=32", "--H=32", "--E=4", "--K=2"), 0.2),
        ]  # fmt: skip

    def models(*tokens: int) -> tuple[str, ...]:
        names = ("qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b")
        return (*(f"--model={name}" for name in names), *(f"--T={T}" for T in tokens))

    low = "--dtype=bfloat16"
    tiles = ("pytest", "tests/moe_impls/test_triton.py", "-q", "-k", "every_configuration")
    return [
        Step("limits", ("benchmarks", "limits", f"--device={device}"), 0.04),
        # The 35 listed problems of triton_fused: every dtype and activation, all kinds of sizes and loads.
        Step("verify-first", (*verify, "-x", subjects[0], "-k", "(values or exact) and not generated"), 0.12),
        *([Step("every-tile", tiles, 0.15)] if all_configs else []),
        Step("models-many-tokens", sweep(low, *models(32768, 4096), *subjects), 0.32),
        Step("models-few-tokens", sweep(low, *models(1, 16, 64), *subjects), 0.13),
        *(
            Step(f"profile-{name}", ("benchmarks", "profile", f"--device={device}", low, f"--impl={name}",
                                     "--model=qwen3-30b-a3b", "--T=4096"), 0.04)
            for name in OURS[:2]
        ),
        Step("verify", (*verify, "-x", *(f"--impl={name}" for name in OURS)), 0.3),
        Step("sweep-bfloat16", sweep(low, "--grid=throughput", *subjects), 0.3),
        Step("sweep-float32", sweep("--grid=default", *subjects), 0.3),
        Step("sweep-float16", sweep("--dtype=float16", "--grid=default", *subjects), 0.3),
        *(
            Step(f"verify-{name}", (*verify, f"--impl={name}"), 0.1, may_fail=True)
            for name in peers
        ),
    ]  # fmt: skip


def environment(device: str) -> dict[str, object]:
    """Describe what the figures depend on and no row holds."""
    found: dict[str, object] = {
        **provenance.columns(),
        "device": device,
        "device_name": provenance.device_name(device),
        "cuda": torch.version.cuda,
        "float32_products": torch.backends.cuda.matmul.fp32_precision,  # tf32, or as they are
        "triton": importlib.util.find_spec("triton") is not None,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def do_steps(
    planned: Sequence[Step], folder: Path, device: str, minutes: float, *, pack: Path | None = None,
    tell: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Do all steps that fit, then write the report; whether no step failed that may not, nor the report.

    pack: a .tar.gz that holds the folder as it is after each step, so that a killed run leaves one, too.

    Raises:
        RecordError: the folder's list of steps cannot be read, or is of another device.
    """
    end, found = time.monotonic() + 60 * minutes, environment(device)
    with journal.opened(folder / STEPS, Done, {n: found[n] for n in ("device", "device_name")}) as begun:
        write_atomically(folder / "environment.json", (json.dumps(found, indent=1) + "\n").encode())
        done = {row.step: row for row in begun.rows}  # of a step that was done again the last
        if begun.rows and begun.rows[-1].status == "begun":
            done[begun.rows[-1].step] = _killed(begun.rows, folder)

        def failed(step: Step) -> bool:
            return step.name in done and done[step.name].status == "failed"

        def comes_last(step: Step) -> bool:
            stopped = step.name in done and done[step.name].status == "stopped"
            return failed(step) or (stopped and not step.is_sweep)

        for step in sorted(planned, key=comes_last):
            before = done.get(step.name)
            if before and (before.status == "finished" or (failed(step) and step.may_fail)):
                tell(f"{step.name}: {before.status} before")
                continue
            seconds = min(end - time.monotonic() - REPORT_S, step.share * 60 * minutes)
            if seconds < LEAST_S:
                tell(f"{step.name}: no time is left for it")
                continue
            begun.append(Done(step.name, "begun", 0.0))
            done[step.name] = now = _run(step, folder, seconds, before)
            begun.append(now)
            tell(f"{step.name}: {now.status} after {now.seconds:.0f} s")
            _pack(folder, pack)
    went_well = not any(failed(step) and not step.may_fail for step in planned)
    if any(folder.glob("*.csv")):
        try:
            for path in write_report(folder):
                tell(str(path))
        except record.RecordError as error:  # such as: no row is ok yet
            tell(f"no report: {error}")
            went_well = False
        _pack(folder, pack)
    return went_well


def _killed(rows: Sequence[Done], folder: Path) -> Done:
    """Return the last row, of a step that was killed, with the file of its sweep: one that no row names."""
    named = [row.csv for row in rows if row.csv]
    left = sorted(path.name for path in folder.glob("*.csv") if path.name not in named)
    before = [row.csv for row in rows if row.step == rows[-1].step and row.csv]
    return replace(rows[-1], csv=(left or before or [""])[-1])


def _pack(folder: Path, pack: Path | None) -> None:
    """Write the folder into one archive, whole or not at all."""
    if pack is not None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            archive.add(
                folder, arcname=folder.name, filter=lambda file: None if ".lock" in file.name else file
            )
        write_atomically(pack, stream.getvalue())


def _can_go_on(csv: Path) -> bool:
    """Whether a sweep was begun at this commit and has rows; else it is begun anew."""
    if not plan.progress(csv):
        return False
    return all(row.git_commit == provenance.columns()["git_commit"] for row in record.read(csv)[:1])


def _run(step: Step, folder: Path, seconds: float, before: Done | None) -> Done:
    command = [sys.executable, "-m", *step.command]
    if step.is_sweep and before is not None and before.csv and _can_go_on(folder / before.csv):
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", f"--resume={folder / before.csv}"]
    elif step.is_sweep:
        command.append(f"--out={folder}")
    elif step.command[0] == "benchmarks":
        command.append(f"--out={folder / 'profiles' if step.command[1] == 'profile' else folder}")
    known, begin = set(folder.glob("*.csv")), time.monotonic()
    with (folder / f"{step.name}.log").open("ab") as log:
        environment = os.environ | {"NO_COLOR": "1"}
        child = Child(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            exit_status = child.wait(seconds)
        finally:  # of its workers, too, none may compute beside the next step
            child.end()
    status = {None: "stopped", 0: "finished"}.get(exit_status, "failed")
    made = [path.name for path in folder.glob("*.csv") if path not in known]
    csv = made[0] if made else before.csv if before else ""
    return Done(step.name, status, round(time.monotonic() - begin, 1), exit_status, csv)
