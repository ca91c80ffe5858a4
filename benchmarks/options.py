"""Options that commands and the sweep share, each defined once, and the workloads that they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.sweep.plan import SIZES
from benchmarks.workloads import MODELS, MODES, Workloads, chosen
from correctness.problems.loads import LOAD_NAMES
from correctness.problems.problem import Problem, check_device
from moe_impls.interface import DEVICES, DTYPES, check_choice, dtype_name
from reporting.provenance import RESULTS

HISTORY = RESULTS / "history"
MEANING = {
    "T": "tokens",
    "D": "features of a token; not with --model",
    "H": "hidden features of an expert; not with --model",
    "E": "experts; not with --model",
    "K": "experts of a token; not with --model",
}
Add = Callable[..., Any]  # an argparse parser's `add_argument`, or the `addoption` of a group of pytest's


def add_workload(add: Add, *, repeatable: bool) -> None:
    """Add --model, --T to --K, --load and --mode, all repeatable or none, and --device and --dtype."""
    several = {"action": "append"} if repeatable else {}
    again = " (repeatable)" if repeatable else ""
    add("--model", metavar="NAME", help=f"the layer of this model{again}: {', '.join(MODELS)}", **several)
    for size in SIZES:
        add(f"--{size}", dest=size, type=int, metavar="N", help=f"{MEANING[size]}{again}", **several)
    add("--load", metavar="NAME", help=f"how tokens spread over experts{again}: {LOAD_NAMES}", **several)
    add("--mode", metavar="NAME", help=f"only this mode{again}: {', '.join(MODES)}", **several)
    add_device(add)
    add("--dtype", default="float32", metavar="NAME", help=", ".join(map(dtype_name, DTYPES)))


def add_device(add: Add, default: str = "cpu") -> None:
    add("--device", default=default, metavar="NAME", help=f"{', '.join(DEVICES)} (default: {default})")


def add_threads(add: Add) -> None:
    add("--threads", type=int, metavar="N", help="threads that torch computes with on the CPU")


def set_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None leaves their number as it is.

    Raises:
        ValueError: more than there are processors, or less than one.
    """
    if threads is not None:
        check_choice("--threads", threads, tuple(range(1, (os.cpu_count() or 1) + 1)))
        torch.set_num_threads(threads)


def sizes_of(options: argparse.Namespace) -> dict[str, list[int]]:
    """Collect the sizes that were given, by name."""
    return {size: values for size in SIZES if (values := _several(getattr(options, size)))}


def cells(
    options: argparse.Namespace, blocks: Sequence[Workloads], *, seed: int = 0
) -> list[tuple[Problem, str]]:
    """List each problem and mode: of ``blocks``, or of models instead, as the options of `add_workload` say.

    Raises:
        ValueError: something given is not valid; the message names the option and what is valid.
    """
    check_device(options.device, "--device")
    check_choice("--dtype", options.dtype, tuple(map(dtype_name, DTYPES)))
    modes = _several(options.mode)
    for mode in modes:
        check_choice("--mode", mode, MODES)
    given = {"device": options.device, "dtype": getattr(torch, options.dtype), "seed": seed}
    return [
        (replace(problem, **given), mode)
        for block in chosen(blocks, _several(options.model), sizes_of(options), _several(options.load))
        for problem in block.problems()
        for mode in modes or block.modes
    ]


def _several(value: Any) -> list[Any]:
    """Turn the value of an option, repeatable or not, into a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
