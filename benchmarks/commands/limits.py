"""``python -m benchmarks limits``: what the machine can do at best, whatever is computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.options import add_device
from benchmarks.timing import roofline
from correctness.problems.problem import check_device
from moe_impls.interface import dtype_name
from reporting.pages import write_atomically

DTYPES = (torch.bfloat16, torch.float32)
BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # beyond every cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser.add_argument)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write limits.json there, too")


def run(options: argparse.Namespace) -> int:
    check_device(options.device, "--device")
    found = measured(options.device)
    for name, rate in found.items():
        print(f"{name}: {rate:.4g}")
    if options.out:
        write_atomically(options.out / "limits.json", (json.dumps(found, indent=1) + "\n").encode())
    return 0


def measured(device: str) -> dict[str, float]:
    """Rates of a large square matrix product in each dtype, and of reading and copying a large buffer."""
    products = {
        f"square_product_{dtype_name(dtype)}_tflop_per_s": roofline.square_rate(dtype, device) / roofline.TERA
        for dtype in DTYPES
    }
    moved = roofline.bandwidths(device, BUFFER_BYTES[device.partition(":")[0]])
    return products | {f"{name}_gb_per_s": rate / roofline.GIGA for name, rate in moved.items()}
