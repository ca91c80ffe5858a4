"""Tables in markdown, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes most of a second to import
    import pandas as pd


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or none of it: to a temporary neighbour first, then renamed."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those around it; raise NotADirectoryError where a file is in their place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError, with the option's name, if a file cannot be written there; its folder is made."""
    try:
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written: {error.strerror or error}") from error


def markdown_table(frame: pd.DataFrame) -> str:
    """A table with the columns of ``frame``; those that hold numbers only are aligned to the right."""

    def cells(values: object) -> str:
        return "| " + " | ".join(str(v).replace("|", "\\|") for v in values) + " |"  # type: ignore[attr-defined]

    numeric = [all(_is_number(v) for v in frame[c]) for c in frame.columns]
    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([cells(frame.columns), rule, *(cells(row) for row in frame.itertuples(index=False))])


def _is_number(value: object) -> bool:
    try:
        float(str(value).rstrip("x% ") or "nan")
    except ValueError:
        return False
    return True


def with_block(text: str, command: str, content: str) -> str:
    """A page whose part between ``<!-- begin: command -->`` and the next ``<!-- end -->`` is ``content``.

    Raises:
        ValueError: the page has no such lines, or has them twice.
    """
    begin, end = f"<!-- begin: {command} -->\n", "<!-- end -->\n"
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise ValueError(f"the page must hold the lines {begin.strip()!r} and then {end.strip()!r} once")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content.strip()}\n\n{end}{after}"


def slug(text: str) -> str:
    """Lower-case letters, digits and single hyphens: "AMD EPYC (2x)" -> "amd-epyc-2x"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
