"""How fast a GPU is clocked, and what holds its clock down: a time without that cannot be compared."""

from __future__ import annotations

import shutil
import subprocess

import torch

# Bits of NVML's nvmlClocksEventReasons; an idle GPU is clocked down, which is no reason to doubt a time.
REASONS = {
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "thermal_slowdown",
    0x40: "hardware_thermal_slowdown",
    0x80: "power_brake",
    0x100: "display_clock",
}


def gpu_clock(device: str) -> tuple[int, str] | None:
    """Ask for the clock of the multiprocessors in MHz and what holds it down, joined by ``+`` or ``none``.

    None for a CPU, and where ``nvidia-smi`` is missing or does not tell.
    """
    command = shutil.which("nvidia-smi")
    if not device.startswith("cuda") or command is None:
        return None
    done = subprocess.run(
        [command, f"--id={_identifier(device)}", "--query-gpu=clocks.sm,clocks_event_reasons.active",
         "--format=csv,noheader,nounits"],
        capture_output=True, text=True,
    )  # fmt: skip
    clock, _, reasons = done.stdout.strip().partition(", ")
    if done.returncode or not clock.isdecimal() or not reasons.startswith("0x"):
        return None
    active = int(reasons, 16)
    return int(clock), "+".join(name for bit, name in REASONS.items() if active & bit) or "none"


def _identifier(device: str) -> str:
    """UUID of the device, independent of CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
