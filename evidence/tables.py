"""Tables of evidence: made task by task, so that an interrupted run goes on, and what they were made of.

Beside ``results/<table>.csv`` lies ``<table>.made_of.json``: every mutant, check, lookalike, problem and
suite that it was made of and every file of code that decides what is right, each with a digest. `changes`
compares it with the checkout, so that no test has to.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch

from correctness.judging.process_state import restored, settings
from reporting import provenance
from reporting.pages import write_atomically

RESULTS = provenance.ROOT / "results"
JUDGES = ("oracle", "problems", "judging", "checks")  # the rooms of correctness/ that decide what is right
Rows = list[dict[str, str]]


def digest(*things: object) -> str:
    """Return twelve hexadecimal digits that differ where the representations of ``things`` do."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:12]


def code_of(text: str) -> str:
    """Reduce source text to what it does: its syntax tree, without docstrings, comments and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def files(*paths: Path) -> dict[str, str]:
    """List files of code, by their path in the checkout, each with the digest of what it does."""
    return {
        f"file {path.relative_to(provenance.ROOT).as_posix()}": digest(code_of(path.read_text("utf-8")))
        for path in sorted(paths)
    }


def judges() -> dict[str, str]:
    """List the files that decide what is right, which all evidence is made of."""
    rooms = (provenance.ROOT / "correctness" / room for room in JUDGES)
    return files(*(path for room in rooms for path in room.glob("*.py")))


def read(table: Path) -> pd.DataFrame:
    """Read a table of results, all cells as text.

    Raises:
        FileNotFoundError: there is none, with the table's name.
    """
    return pd.read_csv(table, dtype=str, keep_default_na=False)


def records(frame: pd.DataFrame) -> Rows:
    """List the rows of a table, each as column: cell."""
    return frame.to_dict(orient="records")  # pyright: ignore[reportReturnType]


def write(table: Path, rows: Rows, made_of: dict[str, str]) -> pd.DataFrame:
    """Write a table and, beside it, what it was made of; the rows of an interrupted run are then needless."""
    frame = pd.DataFrame(rows).fillna("").astype(str)
    write_atomically(table, frame.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(_made_of(table), (json.dumps(made_of, indent=0, sort_keys=True) + "\n").encode())
    _part(table).unlink(missing_ok=True)
    return frame


def made_at(frame: pd.DataFrame) -> str:
    """Say at which commit, with which torch and on which processor a table's rows were made."""
    commits = ", ".join(commit[:12] + commit[40:] for commit in frame["git_commit"].drop_duplicates())
    versions, devices = (", ".join(frame[c].drop_duplicates()) for c in ("torch_version", "device_name"))
    plural = "s" if "," in commits else ""
    return f"made at commit{plural} {commits} with torch {versions} on {devices}"


def make(
    table: Path,
    made_of: dict[str, str],
    tasks: list[str],
    work: Callable[[str], Rows],
    workers: int | None = None,
) -> Rows:
    """Do all tasks, ``workers`` at a time (one for each CPU); their rows are in the order of the tasks.

    Each row says where it was made, and is written to ``<table>.part.jsonl`` as it is made. A run made of the
    same and with the same torch and processor goes on from there.
    """
    part, made = _part(table), provenance.columns()
    head = made | {"git_commit": "any", "made_of": digest(sorted(made_of.items()))}
    done = _interrupted(part, head)
    if kept := [task for task in tasks if task in done]:
        print(f"{len(kept)} of {len(tasks)} are kept from {part}", flush=True)
    write_atomically(part, "".join(json.dumps(line) + "\n" for line in [head, *done.items()]).encode())
    missing = [task for task in tasks if task not in done]
    with part.open("a", encoding="utf-8") as file:
        for count, (task, rows) in enumerate(_results(work, missing, workers), start=len(kept) + 1):
            done[task] = [made | row for row in rows]
            file.write(json.dumps([task, done[task]]) + "\n")
            file.flush()
            print(f"{count} of {len(tasks)}: {task}", flush=True)
    return [row for task in tasks for row in done[task]]


def _results(
    work: Callable[[str], Rows], tasks: list[str], workers: int | None
) -> Iterator[tuple[str, Rows]]:
    """Yield each task and its rows, as they are done; by one worker in this process."""
    if workers == 1:
        yield from ((task, _alone(work, task)) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(_alone, work, task): task for task in tasks}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run waits for the tasks in flight only


def _alone(work: Callable[[str], Rows], task: str) -> Rows:
    """Do a task and put back what it changes in the process."""
    with restored(settings(torch.float32)):
        return work(task)


def _interrupted(part: Path, head: dict[str, str]) -> dict[str, Rows]:
    """Read what an interrupted run of the same has done; of the last line perhaps half was written."""
    done: dict[str, Rows] = {}
    lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
    if not lines or json.loads(lines[0]) != head:
        return done
    for line in lines[1:]:
        try:
            task, rows = json.loads(line)
        except json.JSONDecodeError:
            break
        done[task] = rows
    return done


def changes(table: Path, made_of: dict[str, str]) -> dict[str, list[str]]:
    """Compare what a table was made of with the checkout.

    Returns:
        for each of "added", "changed", "removed" and "besides" what it says; empty if the table is fresh.
    """
    if not table.exists():
        return {"besides": ["there is no such table"]}
    found: dict[str, list[str]] = {}
    if any(len(commit) != 40 for commit in read(table)["git_commit"].unique()):
        found["besides"] = ["some rows were made of files that are in no commit"]
    if not _made_of(table).exists():
        return found | {"besides": [*found.get("besides", []), "what it was made of is not recorded"]}
    before = json.loads(_made_of(table).read_text(encoding="utf-8"))
    found["added"] = [name for name in made_of if name not in before]
    found["changed"] = [name for name, value in made_of.items() if before.get(name, value) != value]
    found["removed"] = [name for name in before if name not in made_of]
    return {kind: names for kind, names in found.items() if names}


def _made_of(table: Path) -> Path:
    return table.with_suffix(".made_of.json")


def _part(table: Path) -> Path:
    return table.with_suffix(".part.jsonl")
