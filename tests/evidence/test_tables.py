"""A table is made task by task, goes on after an interruption, and knows what it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from evidence import tables
from reporting import provenance


@pytest.fixture
def csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = {"git_commit": "c" * 40, "torch_version": "2", "device_name": "d"}
    monkeypatch.setattr(provenance, "columns", lambda: dict(made))
    return tmp_path / "table.csv"


class Work:
    """Makes a row of each task, unless it is to be interrupted there."""

    def __init__(self, interrupted: str = "") -> None:
        self.done: list[str] = []
        self.interrupted = interrupted

    def __call__(self, task: str) -> tables.Rows:
        if task == self.interrupted:
            raise KeyboardInterrupt
        self.done.append(task)
        return [{"task": task, "only_b": "x"} if task == "b" else {"task": task}]


TASKS = ["a", "b", "c"]
MADE_OF = {"check one": "1", "check two": "2"}


def interrupted(csv: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tables.make(csv, MADE_OF, TASKS, Work("c"), workers=1)


def test_an_interrupted_run_goes_on_where_it_ended(csv: Path) -> None:
    interrupted(csv)
    work = Work()
    rows = tables.make(csv, MADE_OF, TASKS, work, workers=1)
    assert work.done == ["c"]
    assert [row["task"] for row in rows] == TASKS
    assert {row["git_commit"] for row in rows} == {"c" * 40}


def test_half_a_line_is_made_again(csv: Path) -> None:
    interrupted(csv)
    part = csv.with_suffix(".part.jsonl")
    part.write_text(part.read_text("utf-8")[:-10], "utf-8")
    work = Work()
    tables.make(csv, MADE_OF, TASKS, work, workers=1)
    assert work.done == ["b", "c"]
    assert len(part.read_text("utf-8").splitlines()) == 1 + len(TASKS)


def test_what_was_made_of_something_else_is_made_again(csv: Path) -> None:
    interrupted(csv)
    work = Work()
    tables.make(csv, MADE_OF | {"check two": "changed"}, TASKS, work, workers=1)
    assert work.done == TASKS


def test_a_written_table_has_no_part_and_cells_that_do_not_apply_are_empty(csv: Path) -> None:
    tables.write(csv, tables.make(csv, MADE_OF, TASKS, Work(), workers=1), MADE_OF)
    assert [row["only_b"] for row in tables.records(tables.read(csv))] == ["", "x", ""]
    assert sorted(path.name for path in csv.parent.iterdir()) == ["table.csv", "table.made_of.json"]


def test_a_table_is_fresh_until_what_it_was_made_of_changes(csv: Path) -> None:
    assert tables.changes(csv, MADE_OF) == {"besides": ["there is no such table"]}
    tables.write(csv, tables.make(csv, MADE_OF, TASKS, Work(), workers=1), MADE_OF)
    assert tables.changes(csv, MADE_OF) == {}
    assert tables.changes(csv, {"check one": "other", "check three": "3"}) == {
        "added": ["check three"],
        "changed": ["check one"],
        "removed": ["check two"],
    }


@pytest.mark.parametrize("commit", ["c" * 40 + "-dirty", "unknown"])
def test_a_table_made_of_files_that_no_commit_has_is_stale(csv: Path, commit: str) -> None:
    tables.write(csv, [{"git_commit": commit}], MADE_OF)
    assert tables.changes(csv, MADE_OF) == {"besides": ["some rows were made of files that are in no commit"]}


def test_a_table_whose_making_was_not_recorded_is_stale(csv: Path) -> None:
    tables.write(csv, [{"git_commit": "c" * 40}], MADE_OF)
    csv.with_suffix(".made_of.json").unlink()
    assert tables.changes(csv, MADE_OF) == {"besides": ["what it was made of is not recorded"]}


def test_a_page_names_every_commit_of_its_table(csv: Path) -> None:
    rows = [
        provenance.columns() | {"git_commit": commit} for commit in ("a" * 40, "a" * 40, "b" * 40 + "-dirty")
    ]
    made = tables.made_at(tables.write(csv, rows, {}))
    assert made == "made at commits aaaaaaaaaaaa, bbbbbbbbbbbb-dirty with torch 2 on d"


def test_only_what_code_does_counts() -> None:
    one = tables.code_of('"""Words."""\n\ndef f(x):\n    """More words."""\n    return x  # and more\n')
    assert one == tables.code_of("def f(x):\n    return (x)\n")
    assert one != tables.code_of("def f(x):\n    return -x\n")


def test_the_judges_are_among_what_evidence_is_made_of() -> None:
    assert {"file correctness/judging/compare.py", "file correctness/oracle/experts.py"} <= set(
        tables.judges()
    )
