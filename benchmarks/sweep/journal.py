"""What a long run is to do and what of it is done, on disk, so that it goes on where it was interrupted.

A journal is two files beside each other: ``name.csv`` holds a row for each thing that is done, on disk before
the next is begun, and ``name.plan.json`` holds what was planned and under which conditions. A run reads::

    with journal.opened(folder / "peers.part.csv", Cell, plan) as begun:  # new, or continued
        done = {(cell.layer, cell.T) for cell in begun.rows}
        for layer, T in everything:
            if (layer, T) not in done:
                begun.append(measure(layer, T))  # a Cell
    journal.discard(folder / "peers.part.csv")  # where the results are elsewhere by now

``Cell`` is a dataclass, its fields are the columns: texts, numbers, booleans, literals and tuples of floats.
An empty cell of the file is the field's default; what else a value must be the dataclass checks. ``plan``
holds JSON: a run whose plan differs from the one that was begun is refused, with what differs. Of things that
are done again (a step that failed), append another row and let the last one count. While a journal is open no
other process writes to it; a last line that a killed process did not write to its end is cut off. Any suffix
will do: ``steps.journal`` in a folder of results is no CSV of measurements.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from reporting.pages import make_folder, write_atomically

Row = TypeVar("Row")


class RecordError(ValueError):
    """A file of rows or its plan that cannot be used; the message says which, where and why in one line."""


class Journal(Generic[Row]):
    """A journal that is open: the rows that are done, those of earlier processes first.

    was_torn: the last line had not been written to its end, and was cut off.
    """

    def __init__(self, path: Path, rows: list[Row], was_torn: bool) -> None:
        self.path, self.rows, self.was_torn = path, rows, was_torn

    def append(self, row: Row) -> None:
        """Add a row; when this returns it is on disk."""
        append(self.path, row)
        self.rows.append(row)


@contextlib.contextmanager
def opened(path: Path, kind: type[Row], plan: Mapping[str, object]) -> Iterator[Journal[Row]]:
    """Begin a journal of rows of a kind, or continue the one that is there.

    Raises:
        RecordError: another process has it open, it was begun with another plan or other columns, or a row
            cannot be read.
        OSError: it cannot be written.
    """
    make_folder(path.parent)
    with locked(path):
        was_torn = False
        if path.exists():
            _check_same(path, read_plan(path), json.loads(json.dumps(plan)))
            was_torn = repair(path)
            _check_header(path, kind)
        else:
            write_atomically(plan_path(path), (json.dumps(plan, indent=1) + "\n").encode())
            create(path, kind)
        yield Journal(path, read(path, kind), was_torn)


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in before | now:
        if before.get(name) != now.get(name):
            raise RecordError(
                f"{path} was begun with {name} {before.get(name)}, this run is with {now.get(name)}: "
                "delete it to begin anew"
            )


def discard(path: Path) -> None:
    """Remove a journal and its plan."""
    for file in (path, plan_path(path)):
        file.unlink(missing_ok=True)


def plan_path(path: Path) -> Path:
    """Path of the plan of a journal."""
    return path.with_suffix(".plan.json")


def read_plan(path: Path) -> dict[str, Any]:
    """Read what a journal was begun with.

    Raises:
        RecordError: there is no plan, or it is not readable.
    """
    plan = plan_path(path)
    try:
        found = json.loads(plan.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be continued: its plan {plan.name} {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{plan} is no plan: {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"{plan} is no plan: it holds a {type(found).__name__}")
    return found


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing to a file.

    Raises:
        RecordError: another process is writing to it.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecordError(f"{path} is being written to by another run (it holds {lock.lock_file})") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def columns(kind: type) -> list[str]:
    """Names of the columns of a kind of row, in their order."""
    return [field.name for field in dataclasses.fields(kind)]


def create(path: Path, kind: type) -> None:
    """Make a file with the header alone. Raises FileExistsError if there is one."""
    if path.exists():
        raise FileExistsError(f"{path} exists")
    write_atomically(path, _line(columns(kind)).encode())


def append(path: Path, row: Any) -> None:
    """Add a row to a file; when this returns it is on disk."""
    texts = [_to_text(getattr(row, name)) for name in columns(type(row))]
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_line(texts))
        file.flush()
        os.fsync(file.fileno())


def _line(texts: list[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(texts)
    return stream.getvalue()


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


def repair(path: Path) -> bool:
    """Cut off a last line that was not written to its end; whether there was one."""
    if not is_cut(path):
        return False
    content = path.read_bytes()
    write_atomically(path, content[: content.rfind(b"\n") + 1])
    return True


def read(path: Path, kind: type[Row], needed: Sequence[str] = ()) -> list[Row]:
    """Read the rows of a file; a last line that was not written to its end is none.

    A column that the kind has a default for may be missing, unless it is among those that are needed; one
    that the kind does not know is left out, with a warning that names it.

    Raises:
        RecordError: no such file, missing columns, or a row that the kind does not take; with the line where
            it is.
    """
    try:
        text = path.read_bytes().decode()
        reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        header = next(reader, [])
        lines = [(reader.line_num, values) for values in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    if not header:
        raise RecordError(f"{path} is empty, or was not written to the end of its first line")
    if len(set(header)) < len(header):
        raise RecordError(f"{path} has repeated columns: {', '.join(header)}")
    missing = [name for name in (*_required(kind), *needed) if name not in header]
    rows = []
    for number, texts in lines:
        try:
            rows.append(_parse(kind, header, texts))
        except _Misfit as misfit:
            if missing and misfit.is_incomplete:
                break
            raise RecordError(f"{path}, line {number}: {misfit}") from None
    if missing:
        raise RecordError(f"{path} has no column {', '.join(missing)}")
    if unknown := [name for name in header if name not in columns(kind)]:
        warnings.warn(f"{path}: unknown columns are left out: {', '.join(unknown)}", stacklevel=2)
    return rows


def _required(kind: type) -> list[str]:
    """Names of the columns without a default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


def _check_header(path: Path, kind: type) -> None:
    """Refuse to append to a file with other columns: its rows would not fit."""
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != columns(kind):
        differ = sorted(set(header) ^ set(columns(kind))) or ["their order"]
        raise RecordError(f"{path} has other columns than this version writes ({', '.join(differ)})")


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    """Type of each column, without the None of an empty cell."""
    hints = typing.get_type_hints(kind)
    return {name: next((of for of in typing.get_args(hint) if of is not types.NoneType), hint)
            if isinstance(hint, types.UnionType) else hint for name, hint in hints.items()}  # fmt: skip


def _value(of: Any, text: str) -> Any:
    """Value of a cell whose column is of that type; a ValueError says what it must be."""
    if typing.get_origin(of) is typing.Literal:
        if text not in typing.get_args(of):
            raise ValueError(" or ".join(map(repr, typing.get_args(of))))
        return text
    if typing.get_origin(of) is tuple:
        return tuple(_value(float, part) for part in text.split(";"))
    if of is bool:
        if text not in ("True", "False"):
            raise ValueError("True or False")
        return text == "True"
    try:
        return of(text)
    except ValueError:
        raise ValueError({int: "an integer", float: "a number"}[of]) from None


class _Misfit(ValueError):
    """A row that its kind does not take. is_incomplete: perhaps for what is not there."""

    def __init__(self, why: str, is_incomplete: bool = False) -> None:
        super().__init__(why)
        self.is_incomplete = is_incomplete


def _parse(kind: type[Row], header: list[str], texts: list[str]) -> Row:
    if len(texts) != len(header):
        raise _Misfit(f"{len(texts)} values in {len(header)} columns")
    given, known, required = dict(zip(header, texts, strict=True)), columns(kind), _required(kind)
    values = {name: text for name, text in given.items() if name in known and (text or name in required)}
    read = {}
    for name, text in values.items():
        try:
            read[name] = _value(_types(kind)[name], text)
        except ValueError as valid:
            raise _Misfit(f"{name} is {text!r}; it must be {valid}") from None
    absent = [name for name in required if name not in values]
    if absent:
        raise _Misfit(f"{absent[0]} is missing", is_incomplete=True)
    try:
        return kind(**read)
    except ValueError as error:
        raise _Misfit(str(error), is_incomplete=any(name not in given for name in known)) from None
