"""One measured cell as a row of a CSV file: the columns, and the environment that rows have in common.

The docstring of each field says what the column means; ``python -m benchmarks.sweep.record`` writes them
into ``results/README.md``. To add a column, add a field with a default of None here, and fill it in
``workload.py``.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import inspect
import math
import os
import re
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from benchmarks.sweep import journal
from benchmarks.sweep.journal import RecordError as RecordError
from benchmarks.sweep.journal import is_cut as is_cut
from moe_impls.interface import Routing
from reporting.pages import slug, with_block, write_atomically
from reporting.provenance import ROOT, device_name, git_commit

# Of what the columns mean. It rises when a column changes its meaning or is removed, and files of another
# version are refused then; a column that is added is empty in older files, which stay readable.
SCHEMA_VERSION = 4
Status = Literal["ok", "incorrect", "unsupported", "out_of_memory", "error", "timeout"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a run has in common: the first columns of each of its rows. Units stand in brackets."""

    schema_version: int = SCHEMA_VERSION
    """version of what these columns mean; adding one does not change it"""
    run_id: str
    """UTC time at which the run began, and its grid or models"""
    git_commit: str
    """commit of the checkout; `-dirty` if files differed from it, `unknown` outside of one"""
    machine: str
    """the processor's name and, for a CPU, the number of CPUs"""
    device: str
    """`cpu` or `cuda`"""
    device_name: str
    """name of the CPU or GPU"""
    torch_version: str
    """version of torch"""
    threads: int
    """threads that torch computes with on the CPU"""
    threads_wait: str
    """what OpenMP's threads do between operations, by `OMP_WAIT_POLICY`: `default`, `active` or `passive`"""
    cache: str
    """`warm`: before each call the caches hold what the last call left there; `cold`: they were
    overwritten"""


@dataclass(frozen=True, kw_only=True)
class Row(Environment):
    """One cell: an implementation on a workload in one mode. The fields are the columns, in this order.

    Fields that are None are empty in the file; a row that is not ``ok`` has no timings.
    """

    time_utc: str
    """[ISO 8601] when the row was made"""
    implementation: str
    """its name, or the `package.module:function` or `path/file.py:function` that was asked for"""
    workload: str
    """`sweep` for synthetic layers, otherwise the model"""
    T: int
    """[tokens] in one call"""
    D: int
    """[features] input of an expert (d_model)"""
    H: int
    """[features] hidden layer of an expert"""
    O: int
    """[features] output of an expert"""
    E: int
    """[experts] in the layer"""
    K: int
    """[experts] chosen for each token"""
    activation: str
    """of the experts' hidden layer; swiglu and its kin are gated"""
    output_activation: str
    """of the experts' output"""
    combine: str
    """`sum` or `logsumexp` over a token's experts"""
    bias: bool
    """whether experts have biases"""
    dtype: str
    """of inputs, weights and results"""
    load: str
    """how tokens spread over experts: a name that `correctness.problems.loads.load_named` takes"""
    seed: int
    """of inputs and routing"""
    routing_checksum: str | None = None
    """differs when an expert id or a gate does; empty if no inputs were made"""
    mode: str
    """`forward` (no gradients recorded), or `forward_backward`: y, then the gradients of x, the gates and
    every weight from a random dy"""
    status: Status
    """`ok`; `incorrect`, `error`, `out_of_memory`, `timeout`; `unsupported`: not declared by the
    implementation"""
    reason: str
    """why the status is not `ok`; of `auto`, the implementation that it took"""
    rounds: int | None = None
    """[samples] how many times the implementations of the workload were timed in turn, at least 7"""
    calls_per_sample: int | None = None
    """[calls] that one sample spans, so that it is long enough for the clock"""
    median_ms: float | None = None
    """[ms a call] median of the samples"""
    min_ms: float | None = None
    """[ms a call] the shortest sample"""
    p20_ms: float | None = None
    """[ms a call] 20 % of the samples are shorter"""
    p80_ms: float | None = None
    """[ms a call] 80 % of the samples are shorter"""
    tokens_per_s: float | None = None
    """[1/s] T / median"""
    flops: int
    """[operations] of the expert products: 2·T·K·(F·D + O·H), F = 2H if gated; three times that with the
    backward. With O = D: 6·T·K·D·H and 18, not gated 4 and 12. Router, activation and combine are not
    counted"""
    tflop_per_s: float | None = None
    """[10¹²/s] flops / median"""
    gemm_square_tflop_per_s: float | None = None
    """[10¹²/s] of a large square matrix product in this dtype, measured at most a minute before"""
    gemm_experts_tflop_per_s: float | None = None
    """[10¹²/s] of two dense matrix products (six with the backward) with the same FLOPs, T·K rows and
    dtype on the weights of one expert; the fastest of their samples, taken after those of the
    implementations"""
    read_gb_per_s: float | None = None
    """[10⁹ bytes/s] bandwidth of reading a buffer, likewise"""
    copy_gb_per_s: float | None = None
    """[10⁹ bytes/s] bandwidth of reading one half of a buffer and writing it to the other, of the bytes of
    both"""
    gpu_clock_mhz: int | None = None
    """[MHz] of a GPU's multiprocessors right after the timing, by nvidia-smi; empty of a CPU"""
    gpu_clock_limits: str | None = None
    """what held that clock down: `none`, or `power_cap`, `thermal_slowdown` and others of NVML's clock
    event reasons, joined by `+`"""
    touched_experts: int | None = None
    """[experts] that received a token"""
    read_bytes: int | None = None
    """[bytes] that a call has to read at the least: tokens, ids, gates and the weights of touched experts
    once; with the backward dy, too"""
    written_bytes: int | None = None
    """[bytes] that it has to write: y; with the backward the gradients of x, the gates and all experts,
    too"""
    compute_limit_ms: float | None = None
    """[ms] flops / gemm_experts_tflop_per_s"""
    traffic_limit_ms: float | None = None
    """[ms] read_bytes / read_gb_per_s + written_bytes / copy_gb_per_s"""
    limit_ms: float | None = None
    """[ms] the larger of the two"""
    efficiency: float | None = None
    """limit / median: 1 is as fast as the machine allows; above 1.05 the limit's model is at fault, and
    the report says so"""
    compile_ms: float | None = None
    """[ms] how much longer the first call was than the median: compilation and other first-time work. What
    an earlier workload compiled is not compiled again, nor what the compiler finds in its cache on disk"""
    tuning_ms: float | None = None
    """[ms] of compile_ms what an implementation spent on trying several forms of its kernels; empty of one
    that tries none"""
    peak_memory_bytes: int | None = None
    """[bytes] most that one call held at once above its inputs, results and gradients included, by the
    record of torch's allocator"""
    saved_for_backward_bytes: int | None = None
    """[bytes] still held after the forward of a call with gradients, its result apart: what waits for the
    backward. 0 in mode `forward`"""
    worst_error_fraction: float | None = None
    """largest error of y and of each gradient in both checks, as a fraction of what `correctness.judging`
    allows"""
    samples_ms: tuple[float, ...] | None = None
    """[ms a call] every sample in the order taken, separated by `;`"""

    def __post_init__(self) -> None:
        """Raise ValueError unless the values fit each other."""
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else [value]:
                if isinstance(number, float) and not 0 <= number < math.inf:
                    raise ValueError(f"{field.name} is {number}; it must be finite and not negative")
        for name in TIMINGS if self.status == "ok" else MEASURED:
            value = getattr(self, name)
            if self.status == "ok" and value is None:
                raise ValueError(f"{name} is empty in a row with status ok")
            if self.status != "ok" and value is not None:
                raise ValueError(f"{name} is {value} in a row with status {self.status}; it must be empty")


def _meanings(kind: type) -> dict[str, str]:
    """What each field of a class means: the text below it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


COLUMNS: dict[str, str] = {**_meanings(Environment), **_meanings(Row)}  # what each means
# Every row of a right result has these. A column that is added is not among them, since older files lack it.
TIMINGS = (
    "rounds", "calls_per_sample", "median_ms", "min_ms", "p20_ms", "p80_ms", "tokens_per_s", "tflop_per_s",
    "gemm_square_tflop_per_s", "gemm_experts_tflop_per_s", "read_gb_per_s", "copy_gb_per_s",
    "touched_experts", "read_bytes", "written_bytes", "compute_limit_ms", "traffic_limit_ms", "limit_ms",
    "efficiency", "compile_ms", "peak_memory_bytes", "saved_for_backward_bytes", "worst_error_fraction",
    "samples_ms",
)  # fmt: skip
# Only rows of right results have these; what a check found is there of wrong ones, too.
MEASURED = tuple(
    name
    for name, default in ((field.name, field.default) for field in fields(Row))
    if default is not MISSING and name not in ("schema_version", "routing_checksum", "worst_error_fraction")
)


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file of this schema; see ``journal.read``."""
    with contextlib.suppress(OSError, UnicodeDecodeError), path.open(newline="", encoding="utf-8") as file:
        version = next(csv.DictReader(file), {}).get("schema_version")
        if version not in (None, str(SCHEMA_VERSION)):
            raise RecordError(
                f"{path}, line 2: schema_version is {version!r}; this version reads {SCHEMA_VERSION}"
            )
    return journal.read(path, Row, needed=TIMINGS)


def environment(device: str, grid: str, cache: str = "warm") -> Environment:
    """Capture where and with what a run is made. The machine is named by its processor, never by its host."""
    name = device_name(device)
    cores = "" if device.startswith("cuda") else f"-{os.cpu_count()}-cpus"
    return Environment(
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{grid}",
        git_commit=git_commit(),
        machine=slug(name) + cores,
        device=device,
        device_name=name,
        torch_version=str(torch.__version__),
        threads=torch.get_num_threads(),
        threads_wait=threads_wait(),
        cache=cache,
    )


def threads() -> dict[str, object]:
    """Columns of other tables: how many threads torch computes with, and what they do while they wait."""
    return {"threads": torch.get_num_threads(), "threads_wait": threads_wait()}


def threads_wait() -> str:
    """Tell what OpenMP's threads do between operations: look for work (active) or sleep (passive).

    By default they do the first for a while, then the second. Asleep, they make small operations several
    times slower.
    """
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() or "default"


def routing_checksum(routing: Routing) -> str:
    """Twelve hexadecimal digits that differ when an expert id or a gate (as float32) does."""
    digest = hashlib.sha256(routing.expert_ids.cpu().contiguous().numpy().tobytes())
    digest.update(routing.gates.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def now_utc() -> str:
    """The time as rows have it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


PAGE, COMMAND = ROOT / "results" / "README.md", "python -m benchmarks.sweep.record"


def dictionary() -> str:
    """The table of columns, their units and meanings, in markdown."""
    lines = ["| column | unit | meaning |", "|---|---|---|"]
    for name, meaning in COLUMNS.items():
        unit, text = re.fullmatch(r"(?:\[(.+?)\] )?(.+)", meaning).groups(default="")  # type: ignore[union-attr]
        lines.append(f"| `{name}` | {unit} | {text} |".replace("|  |", "| |"))
    return "\n".join(lines)


def page() -> str:
    """``results/README.md`` with the columns as they are now."""
    return with_block(PAGE.read_text(encoding="utf-8"), COMMAND, dictionary())


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
