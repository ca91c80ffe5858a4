"""One measured cell as a row of a CSV file: the columns, the environment, appending and reading.

``results/README.md`` says what each column means.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from moe_impls.interface import Routing
from reporting.pages import slug, write_atomically
from reporting.provenance import device_name, git_commit

SCHEMA_VERSION = 4
STATUSES = ("ok", "incorrect", "unsupported", "out_of_memory", "error", "timeout")


class RecordError(ValueError):
    """A CSV file that cannot be used; the message says which, where and why in one line."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a run has in common: the first columns of each of its rows."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    git_commit: str
    machine: str
    device: str
    device_name: str
    torch_version: str
    threads: int
    threads_wait: str  # default | active | passive
    cache: str  # warm | cold


@dataclass(frozen=True, kw_only=True)
class Row(Environment):
    """One cell: an implementation on a workload in one mode. The fields are the columns, in this order.

    Fields that are None are empty in the file; a row that is not ``ok`` has no timings.
    """

    time_utc: str
    implementation: str
    workload: str
    T: int
    D: int
    H: int
    O: int
    E: int
    K: int
    activation: str
    output_activation: str
    combine: str
    bias: bool
    dtype: str
    load: str
    seed: int
    routing_checksum: str | None
    mode: str
    status: str
    reason: str
    rounds: int | None = None
    calls_per_sample: int | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_s: float | None = None
    flops: int
    tflop_per_s: float | None = None
    gemm_square_tflop_per_s: float | None = None
    gemm_experts_tflop_per_s: float | None = None
    read_gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    gpu_clock_mhz: int | None = None
    gpu_clock_limits: str | None = None
    touched_experts: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    compute_limit_ms: float | None = None
    traffic_limit_ms: float | None = None
    limit_ms: float | None = None
    efficiency: float | None = None
    compile_ms: float | None = None
    peak_memory_bytes: int | None = None
    saved_for_backward_bytes: int | None = None
    worst_error_fraction: float | None = None
    samples_ms: tuple[float, ...] | None = None


COLUMNS = {field.name: str(field.type) for field in dataclasses.fields(Row)}
MAY_BE_EMPTY = ("routing_checksum", "gpu_clock_mhz", "gpu_clock_limits")
# What only rows of right results have, and all of them.
TIMINGS = tuple(
    name for name, kind in COLUMNS.items() if kind.endswith("| None") and name not in MAY_BE_EMPTY
)


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
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        threads_wait=threads_wait(),
        cache=cache,
    )


def threads() -> dict[str, object]:
    """How many threads torch computes with, and what they do while they wait: columns of other tables."""
    return {"threads": torch.get_num_threads(), "threads_wait": threads_wait()}


def threads_wait() -> str:
    """What OpenMP's threads do between operations: look for work in a loop (active) or sleep (passive).

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
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def create(path: Path) -> None:
    """A new file with the header only. Raises OSError if it cannot be written or exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(COLUMNS)


def append(path: Path, row: Row) -> None:
    """Add one row; when this returns it is on disk."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(_to_text(getattr(row, name)) for name in COLUMNS)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other sweeps out of a file.

    Raises:
        RecordError: another process is writing to it.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecordError(
            f"{path} is being written to by another sweep (it holds {lock.lock_file})"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def repair(path: Path) -> bool:
    """Cut off a last line that was not written to its end; whether there was one."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_atomically(path, whole)
    return len(whole) < len(content)


def _to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ";".join(map(repr, value))
    if isinstance(value, str):
        return " ".join(value.split())  # a row is a line
    return repr(value)


def is_cut(path: Path) -> bool:
    """Whether the last line was not written to its end."""
    return not path.read_bytes().endswith(b"\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was not written to its end, by a sweep that was killed, is none.

    Raises:
        RecordError: no such file, missing or unknown columns, another schema version, a value that is not of
            its column's type, or timings that do not fit the status; with the line where it is.
    """
    try:
        text = path.read_bytes().decode()
        reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        header = next(reader, [])
        lines = [(f"{path}, line {reader.line_num}", values) for values in reader]
        _check_header(path, header, lines[0][1] if lines else [])
        return [_parse(place, header, values) for place, values in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error


def _check_header(path: Path, header: list[str], first: list[str]) -> None:
    version = dict(zip(header, first, strict=False)).get("schema_version", str(SCHEMA_VERSION))
    if version != str(SCHEMA_VERSION):
        raise RecordError(f"{path}, line 2: schema_version is {version}; this version reads {SCHEMA_VERSION}")
    missing = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    if not header:
        raise RecordError(f"{path} is empty, or was not written to the end of its first line")
    if missing:
        raise RecordError(f"{path} has no column {', '.join(missing)}")
    if unknown or len(set(header)) < len(header):
        raise RecordError(f"{path} has unknown or repeated columns: {', '.join(unknown or header)}")


def _parse(place: str, header: list[str], texts: list[str]) -> Row:
    if len(texts) != len(header):
        raise RecordError(f"{place}: {len(texts)} values in {len(header)} columns")
    values = {name: _from_text(place, name, text) for name, text in zip(header, texts, strict=True)}
    row = Row(**values)  # type: ignore[arg-type]  # _from_text gives each column its type
    if row.schema_version != SCHEMA_VERSION:
        raise RecordError(
            f"{place}: schema_version is {row.schema_version}; this version reads {SCHEMA_VERSION}"
        )
    if row.status not in STATUSES:
        raise RecordError(f"{place}: status is {row.status!r}; valid are {', '.join(STATUSES)}")
    for name in TIMINGS:
        value = getattr(row, name)
        if row.status == "ok" and value is None:
            raise RecordError(f"{place}: {name} is empty in a row with status ok")
        if row.status != "ok" and value is not None and name != "worst_error_fraction":
            raise RecordError(
                f"{place}: {name} is {value} in a row with status {row.status}; it must be empty"
            )
    return row


def _from_text(place: str, name: str, text: str) -> object:
    kind, _, optional = COLUMNS[name].partition(" | ")
    if text == "" and optional:
        return None
    try:
        if kind == "str":
            return text
        if kind == "int":
            return int(text)
        if kind == "bool":
            return {"True": True, "False": False}[text]
        numbers = _finite(text.split(";")) if kind.startswith("tuple") else _finite([text])
        return numbers if kind.startswith("tuple") else numbers[0]
    except (ValueError, KeyError) as error:
        raise RecordError(
            f"{place}: {name} is {text!r}; it must be {_KINDS.get(kind, 'a finite number >= 0')}"
        ) from error


_KINDS = {"int": "a whole number", "bool": "True or False"}


def _finite(texts: Iterable[str]) -> tuple[float, ...]:
    numbers = tuple(map(float, texts))
    if not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError
    return numbers
