"""``python -m benchmarks cuda``: verify, measure and profile on a GPU, the most important first, in time.

Every step is one of this project's own commands in a process of its own, with its output in a log. What a
step has done is on disk when its time is up, and the same command with the same folder goes on from there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import plan, record, report
from correctness import provenance
from correctness.pages import write_atomically
from correctness.provenance import ROOT

STEPS = "steps.json"
OURS = ("triton_fused", "grouped_mm", "sorted_dispatch", "padded")
# By the module that each needs.
PEERS = {
    "transformers.grouped_mm": "transformers",
    "transformers.batched_mm": "transformers",
    "liger.fused_moe": "liger_kernel",
    "scattermoe.parallel_experts": "scattermoe",
    "torchtitan.grouped_mm": "torchtitan",
}
REPORT_S = 30.0  # kept for the report
LEAST_S = 5.0  # a step that would have less is not begun


@dataclass(frozen=True)
class Step:
    """A command of this project, without ``python -m``, and the share of all the time that it may take."""

    name: str
    command: tuple[str, ...]
    share: float

    @property
    def is_sweep(self) -> bool:
        return self.command[:2] == ("pytest", "benchmarks")


@dataclass
class Done:
    """How a step ended: finished, failed (its command said so) or stopped (its time was up)."""

    status: str
    seconds: float
    exit_status: int | None = None
    csv: str = ""  # of a sweep, in the folder


def steps(device: str, smoke: bool) -> list[Step]:
    """What is done, in this order."""
    peers = [name for name, module in PEERS.items() if importlib.util.find_spec(module) and not smoke]
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
    return [
        Step("verify-first", (*verify, *subjects[:2], "-k", "values or exact"), 0.2),
        Step("models-many-tokens", sweep(low, *models(32768, 4096), *subjects), 0.25),
        Step("models-few-tokens", sweep(low, *models(1, 16, 64), *subjects), 0.15),
        *(
            Step(f"profile-{name}", ("benchmarks", "profile", f"--device={device}", low, f"--impl={name}",
                                     "--model=qwen3-30b-a3b", "--T=4096"), 0.04)
            for name in OURS[:2]
        ),
        Step("verify", (*verify, *(f"--impl={name}" for name in OURS)), 0.3),
        Step("sweep-bfloat16", sweep(low, "--grid=throughput", *subjects), 0.3),
        Step("sweep-float32", sweep("--grid=default", *subjects), 0.3),
        Step("sweep-float16", sweep("--dtype=float16", "--grid=default", *subjects), 0.3),
        Step("verify-peers", (*verify, *(f"--impl={name}" for name in peers or OURS[:1])), 0.2),
    ]  # fmt: skip


def environment(device: str) -> dict[str, object]:
    """What the figures depend on and no row holds."""
    found: dict[str, object] = {
        **provenance.columns(),
        "device": device,
        "device_name": provenance.device_name(device),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
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


def run(
    folder: Path, device: str, minutes: float, *, smoke: bool, tell: Callable[[str], None] = print
) -> bool:
    """All steps that fit, then the report. Whether no step failed.

    Raises:
        RecordError: the folder's list of steps cannot be read.
    """
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "environment.json", _json(environment(device)))
    done = _read(folder / STEPS)
    for step in steps(device, smoke):
        if step.name in done and done[step.name].status != "stopped":
            tell(f"{step.name}: {done[step.name].status} before")
            continue
        seconds = min(end - time.monotonic() - REPORT_S, step.share * 60 * minutes)
        if seconds < LEAST_S:
            tell(f"{step.name}: no time is left for it")
            continue
        done[step.name] = _run(step, folder, seconds, done.get(step.name))
        write_atomically(folder / STEPS, _json({name: asdict(d) for name, d in done.items()}))
        tell(f"{step.name}: {done[step.name].status} after {done[step.name].seconds:.0f} s")
    if any(folder.glob("*.csv")):
        for path in report.write(folder):
            tell(str(path))
    return all(d.status != "failed" for d in done.values())


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, Done]:
    try:
        return {name: Done(**d) for name, d in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise record.RecordError(f"{path} is no list of steps: {error}; remove it to begin anew") from error


def _run(step: Step, folder: Path, seconds: float, before: Done | None) -> Done:
    command = [sys.executable, "-m", *step.command]
    if step.is_sweep and before is not None and before.csv and plan.progress(folder / before.csv):
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", f"--resume={folder / before.csv}"]
    elif step.is_sweep:
        command.append(f"--out={folder}")
    elif step.command[0] == "benchmarks":
        command.append(f"--out={folder / 'profiles'}")
    known = set(folder.glob("*.csv"))
    begin, status, exit_status = time.monotonic(), "finished", None
    with (folder / f"{step.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"NO_COLOR": "1"}
        )
        try:
            exit_status = process.wait(timeout=seconds)
            status = "finished" if exit_status == 0 else "failed"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "stopped"
    made = [path.name for path in folder.glob("*.csv") if path not in known]
    csv = made[0] if made else before.csv if before else ""
    return Done(status, round(time.monotonic() - begin, 1), exit_status, csv)
