"""The GPU's clock, as a stand-in for nvidia-smi tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.timing import clocks


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, before all others, that prints what ``answer`` beside it holds."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/options\ncat {tmp_path}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(clocks, "_identifier", lambda device: "GPU-of-" + device)
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1980, 0x0000000000000000", (1980, "none")),
        ("345, 0x0000000000000001", (345, "none")),  # idle
        ("1410, 0x0000000000000044", (1410, "power_cap+hardware_thermal_slowdown")),
        ("[N/A], [N/A]", None),
        ("", None),
        ("1980, Active", None),
    ],
)
def test_the_clock_and_what_holds_it_down_are_told(nvidia_smi: Path, answer: str, expected: object) -> None:
    (nvidia_smi / "answer").write_text(answer + "\n")
    assert clocks.gpu_clock("cuda:1") == expected
    assert "--id=GPU-of-cuda:1 " in (nvidia_smi / "options").read_text()


def test_a_cpu_has_none_and_neither_has_a_gpu_without_the_program(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocks.gpu_clock("cpu") is None and not (nvidia_smi / "options").exists()
    monkeypatch.setenv("PATH", str(nvidia_smi / "nothing"))
    assert clocks.gpu_clock("cuda") is None
