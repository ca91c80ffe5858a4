"""Operators make the edits that they name and no other; a mutant is judged in a copy; rows outlive a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from evidence import tables
from evidence.mutation import table
from evidence.mutation.operators import mutants, unchanged
from evidence.mutation.trial import Judges, Verdict, Worker
from reporting.provenance import ROOT


def edits(text: str) -> list[tuple[str, str]]:
    """List (operator, the line as it becomes) of the mutants of a text of one line in a function."""
    made = []
    for mutant in mutants("file.py", f"def f(a, b, c):\n    {text}  # why\n    return a\n"):
        before, line, after, *_ = mutant.text().split("\n")
        assert (before, after) == ("def f(a, b, c):", "    return a")
        assert line.endswith("  # why")
        made.append((mutant.operator, line.removesuffix("  # why").strip()))
    return made


@pytest.mark.parametrize(
    ("line", "operator", "becomes"),
    [
        ("a = b + c", "arithmetic", ["a = b - c"]),
        ("a = b // c", "arithmetic", ["a = b % c"]),
        ("a = -b", "arithmetic", ["a = b"]),
        ("a = (b < c) | c", "comparison", ["a = (b <= c) | c"]),
        ("a = b is None", "comparison", ["a = b is not None"]),
        ("a = b[1]", "constant", ["a = b[2]", "a = b[0]"]),
        ("a = b * 0.5", "constant", ["a = b * 1.5", "a = b * -0.5"]),
        ("a = g(keepdim=True)", "constant", ["a = g(keepdim=False)"]),
        ("a = b if c else 0", "negated condition", ["a = b if not (c) else 0"]),
        ("a = not b", "negated condition", ["a = b"]),
        ("a = b and c", "negated condition", ["a = b or c"]),
        ("a = g(b, dim=c, out=a)", "dropped keyword", ["a = g(b, out=a)", "a = g(b, dim=c, )"]),
        ("a = g(b, c)", "swapped arguments", ["a = g(c, b)"]),
        ("a = (b * c).to(a).view(c)", "removed .to", ["a = (b * c).view(c)"]),
        ("a = b.float()", "removed .float", ["a = b"]),
        ("a = b.detach()", "removed .detach", ["a = b"]),
        ("a = b.contiguous()", "removed .contiguous", ["a = b"]),
        ("a = b.clamp(max=c)", "removed .clamp", ["a = b"]),
        ("g(b)", "deleted statement", ["pass"]),
        ("raise KeyError(a, -b)", "deleted statement", ["pass"]),
        ("a[b] = c", "deleted statement", ["pass"]),
        ("a += b", "+= to =", ["a = b"]),
        ("a += b", "arithmetic", ["a -= b"]),
    ],
)
def test_an_operator_makes_its_edit(line: str, operator: str, becomes: list[str]) -> None:
    assert [edited for name, edited in edits(line) if name == operator] == becomes


@pytest.mark.parametrize(
    "line",
    [
        '"""Docstring, 1 + 1."""',
        "d: Tensor | None = a",  # the only value that d gets
        "import d",
        'd = f"{a + 1} is wrong"',
        "d = g(*a, b)",
        "d = g(a, a)",
    ],
)
def test_what_computes_nothing_is_left_alone(line: str) -> None:
    assert edits(line) == []


def test_declarations_messages_and_functions_that_are_named_are_left_alone() -> None:
    text = "SUPPORT = Support(a=1)\ndef f(a):\n    raise E(a + 1)\nclass C:\n    def g(self):\n        g(1)\n"
    assert [mutant.operator for mutant in mutants("file.py", text, ["C.g"])] == []
    assert {mutant.function for mutant in mutants("file.py", text)} == {"C.g"}


def test_every_mutant_of_a_file_compiles_and_differs_and_has_a_key_that_moving_it_keeps() -> None:
    text = (ROOT / "moe_impls" / "functional.py").read_text("utf-8")
    found = mutants("functional.py", text)
    texts = [mutant.text() for mutant in found]
    for edited in texts:
        compile(edited, "functional.py", "exec")
    assert len({*texts, text}) > 0.9 * len(found)  # two operators may make one edit
    keys = [mutant.key for mutant in found]
    assert len(set(keys)) == len(keys)
    assert [mutant.key for mutant in mutants("functional.py", f"# moved\n{text}")] == keys
    assert unchanged("functional.py", text).text() == text


def test_every_file_that_is_mutated_is_there_and_its_functions_left_out_are() -> None:
    for file, name in table._files():
        text = (ROOT / file).read_text("utf-8")
        for function in table.LEFT_OUT.get(name, ()):
            assert f"{function}(" in text
    for judges in table.JUDGES.values():
        assert all((ROOT / "tests" / "moe_impls" / test).is_file() for test in judges.tests)


LOSSES = Judges((("losses", "moe_impls"),), ("test_losses.py",))


def test_a_mutant_is_judged_in_a_copy_and_the_checkout_stays_as_it_is() -> None:
    file = "moe_impls/losses.py"
    text = (ROOT / file).read_text("utf-8")
    with Worker(ROOT) as worker:
        wrong = worker.judge(file, text.replace("return E * (f * P).sum()", "return (f * P).sum()"), LOSSES)
        assert "-moe_impls" in wrong.check
        assert "the loss for K = 1 is" in wrong.finding
        check = worker.judge(file, text.replace("if v.ndim != 1:", "if False:"), LOSSES)
        assert check.check.startswith("tests/moe_impls/test_losses.py::")
        dead = worker.judge(file, text.replace("    return loss_coef", "    import os; os.abort()"), LOSSES)
        assert dead == Verdict("process", "it ended its process by SIGABRT", dead.seconds)
        assert worker.judge(file, text, LOSSES)[:2] == ("", "")
        assert worker.judge(file, "import nothing_of_this_name", LOSSES).check == "import"
    assert (ROOT / file).read_text("utf-8") == text


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a table of one file lie in a folder, and a verdict cost nothing; returns what is judged."""
    judged: list[str] = []

    def judge(worker: Worker, file: str, text: str, judges: Judges) -> Verdict:
        edited = text != (ROOT / file).read_text("utf-8")
        judged.append("edited" if edited else "unchanged")
        return Verdict("values-problem-name", "y is wrong", 1.0) if edited else Verdict("", "", 1.0)

    monkeypatch.setattr(Worker, "judge", judge)
    monkeypatch.setattr(table, "JUDGES", {"losses": LOSSES})
    for name in ("CSV", "PAGE", "EQUIVALENT"):
        monkeypatch.setattr(table, name, tmp_path / getattr(table, name).name)
    table.EQUIVALENT.write_text("# none\n", "utf-8")
    return judged


def test_more_mutants_of_a_seed_go_on_from_those_that_were_judged(small: list[str]) -> None:
    assert table.run(seed=1, number=3) == 0
    assert table.run(seed=1, number=5) == 0
    assert small == [*["edited"] * 3, "unchanged", *["edited"] * 2, "unchanged"]
    rows = tables.records(tables.read(table.CSV))
    assert [row["key"] for row in rows] == [mutant.key for mutant in table.draw(1)[:5]]
    assert {row["verdict"] for row in rows} == {"killed"}
    table.run(seed=2, number=5)
    assert small.count("edited") == 10


def test_a_survivor_is_a_hole_until_it_is_known_to_be_equivalent(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Worker, "judge", lambda *_: Verdict("", "", 1.0))
    assert table.run(seed=1, number=2) == 1
    assert "0 are found, 0 compute the same and 2 survive: 0.0%" in capsys.readouterr().out
    keys = [mutant.key for mutant in table.draw(1)[:2]]
    table.EQUIVALENT.write_text(f"{keys[0]} | losses.py: a -> b | one is as good\n", "utf-8")
    assert table.run(seed=1, number=2) == 1
    assert "0 are found, 1 compute the same and 1 survive" in table.page()[200:] + capsys.readouterr().out
    assert "one is as good" in table.page()


def test_a_run_in_which_the_file_itself_fails_means_nothing(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Worker, "judge", lambda *_: Verdict("values", "y is wrong", 1.0))
    assert table.run(seed=1, number=2) == 1
    assert "losses.py:0 unchanged: killed by values" in capsys.readouterr().out


def test_a_line_of_equivalents_without_a_reason_is_refused(small: list[str]) -> None:
    table.EQUIVALENT.write_text("0123456789ab | losses.py: a -> b\n", "utf-8")
    with pytest.raises(ValueError, match="is not 'key | file: before -> after | reason'"):
        table.equivalents()
