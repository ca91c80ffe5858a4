"""How many faults that nobody chose the suite finds: ``python -m evidence mutation``, results/mutation.csv.

The mutants of a seed come in an order that the seed alone decides, so that more of them, or the same after an
edit elsewhere, go on from where a run ended. What survives is looked at: `equivalent.txt` names those that
compute nothing else, each with the reason; the others are holes.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from scipy.stats import binomtest

from evidence import tables
from evidence.mutation.trial import Judges, Verdict, Worker
from reporting import provenance
from reporting.pages import markdown_table, write_atomically

if TYPE_CHECKING:
    from evidence.mutation.operators import Mutant

CSV = tables.RESULTS / "mutation.csv"
PAGE = CSV.with_suffix(".md")
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
SEED, NUMBER = 19, 700
KILLED, SURVIVED, SAME = "killed", "survived", "equivalent"

EACH = "test_each_implementation.py"
_ROUTER, _LAYERS, _LOSSES = ("router", "moe_impls.router:route"), ("layers", ""), ("losses", "moe_impls")


def _of(*implementations: str, tests: str = "", named: str = "", interpreted: bool = False) -> Judges:
    subjects = tuple(("implementation", name) for name in implementations)
    own = (EACH, tests) if tests else (EACH,)
    return Judges(subjects, own, named or " or ".join(implementations), interpreted)


# Which files are mutated, and what each is held to: those subjects that use it.
JUDGES: dict[str, Judges] = {
    "functional": _of(
        "index_add",
        "sorted_dispatch",
        "recompute",
        tests="test_functional.py",
        named="index_add or sorted_dispatch or recompute or functional",
    ),
    "dispatcher": _of("sorted_dispatch", tests="test_dispatcher.py", named="dispatcher or sorted_dispatch"),
    "router": Judges((_ROUTER, _LOSSES, _LAYERS), ("test_sentinels.py", "test_layer.py")),
    "losses": Judges((_LOSSES, _LAYERS), ("test_losses.py",)),
    "layer": Judges((_LAYERS,), ("test_layer.py", "test_layer_on_a_mesh.py")),
    "compiled": Judges((("implementation", "compiled"),)),
    "compiling": Judges((("implementation", "compiled"),)),
    "dense_mask": _of("dense_mask"),
    "gathered": _of("gathered"),
    "grouped_mm": _of("grouped_mm"),
    "index_add": _of("index_add"),
    "native": _of("native", "native+prepared", tests="test_fast_paths.py", named="native"),
    "packed": _of("packed+prepared", tests="test_fast_paths.py", named="packed"),
    "padded": _of("padded"),
    "recompute": _of("recompute", tests="test_fast_paths.py"),
    "sorted_dispatch": _of("sorted_dispatch"),
    "triton_fused": _of("triton_fused", tests="test_triton.py", named="triton", interpreted=True),
    "triton_kernels": _of("triton_fused", tests="test_triton.py", named="triton", interpreted=True),
}
# Functions that only a GPU, an installation or a compiler can judge, not a result on a CPU.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "triton_fused": (
        "_is_installed", "is_available", "_kernels", "_check", "_precision", "_on_gpus", "configurations",
        "choices", "tuning_seconds", "_blocks_for", "_milliseconds", "_Blocks",
    ),
    "triton_kernels": ("_inlined",),
}  # fmt: skip


def draw(seed: int, only: Sequence[str] = ()) -> list[Mutant]:
    """List all mutants, or those of some files, in the order in which a seed draws them."""
    from evidence.mutation.operators import mutants

    named = [(file, name) for file, name in _files() if name in only or not only]
    found = [m for file, name in named for m in mutants(file, _text(file), LEFT_OUT.get(name, ()))]
    return sorted(found, key=lambda mutant: tables.digest(seed, mutant.key))


def run(seed: int = SEED, number: int = NUMBER, workers: int = 1, only: Sequence[str] = ()) -> int:
    """Judge the first mutants that a seed draws, and files as they are; 1 if one survives that computes else.

    A row of an earlier run is kept while its file is what it was and, for one that survived, while what
    judges it is. What is known to be equivalent is not run again.
    """
    from evidence.mutation.operators import unchanged

    every = draw(seed, only)
    drawn = every[:number]
    unknown = equivalents().keys() - {mutant.key for mutant in every}
    if unknown and not only:
        print(f"{EQUIVALENT.name} names what is no mutant any more: {', '.join(sorted(unknown))}")
    of = made_of()
    files = str(len({mutant.file for mutant in every}))
    made = {"seed": str(seed), "of": str(len(every)), "files": files}
    made |= {"of_judges": tables.digest(sorted(of.items()))}
    rows = _kept(drawn, made)
    print(f"{len(rows)} of {len(drawn)} are kept from {CSV}", flush=True)
    made = provenance.columns() | made
    rows |= {m.key: made | _row(m, Verdict("", "", 0.0)) for m in drawn if m.key in equivalents()}
    with _Pool(workers) as pool:
        for row in pool.judge([mutant for mutant in drawn if mutant.key not in rows]):
            rows[row["key"]] = made | row
            _write([rows[mutant.key] for mutant in drawn if mutant.key in rows], of)
            print(f"{len(rows)} of {len(drawn)}: {_told(row)}", flush=True)
        # Where no mutant of a file survives, the file itself must, or all that was found means nothing.
        passed = {row["file"] for row in rows.values() if row["verdict"] == SURVIVED}
        files = dict.fromkeys(row["file"] for row in rows.values() if row["file"] not in passed)
        broken = [row for row in pool.judge([unchanged(file, _text(file)) for file in files]) if row["check"]]
    for row in [*broken, *(row for row in rows.values() if standing(row, equivalents()) == SURVIVED)]:
        print(_told(row))
    _write([rows[mutant.key] for mutant in drawn], of)
    print(f"{headline(tables.read(CSV))}\n{CSV}\n{PAGE}")
    return int(bool(broken) or counts(tables.read(CSV))[SURVIVED] > 0)


class _Pool:
    """Workers that judge mutants, each one at a time."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __enter__(self) -> _Pool:
        self.stack, self.free = ExitStack(), queue.SimpleQueue[Worker]()
        for _ in range(self.workers):
            self.free.put(self.stack.enter_context(Worker(provenance.ROOT)))
        self.pool = ThreadPoolExecutor(self.workers)
        self.stack.callback(
            self.pool.shutdown, cancel_futures=True
        )  # waits for those that are judged just then
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def judge(self, mutants: list[Mutant]) -> Iterator[dict[str, str]]:
        for future in as_completed([self.pool.submit(self._judge, mutant) for mutant in mutants]):
            yield future.result()

    def _judge(self, mutant: Mutant) -> dict[str, str]:
        worker = self.free.get()
        try:
            verdict = worker.judge(mutant.file, mutant.text(), JUDGES[Path(mutant.file).stem])
        finally:
            self.free.put(worker)
        return _row(mutant, verdict)


def _row(mutant: Mutant, verdict: Verdict) -> dict[str, str]:
    facts = {name: str(value) for name, value in vars(mutant).items() if not name.startswith("_")}
    return facts | {
        "verdict": KILLED if verdict.check else SURVIVED,
        "check": verdict.check,
        "finding": verdict.finding[:200],
        "seconds": f"{verdict.seconds:.1f}",
        "of_file": _digest(mutant.file),
    }


def _files() -> list[tuple[str, str]]:
    return [(f"moe_impls/{name}.py", name) for name in JUDGES]


@functools.cache
def _text(file: str) -> str:
    """Read a file once: what is judged is what was there when the run began."""
    return (provenance.ROOT / file).read_text(encoding="utf-8")


def _digest(file: str) -> str:
    return tables.digest(tables.code_of(_text(file)))


def _kept(drawn: list[Mutant], made: dict[str, str]) -> dict[str, dict[str, str]]:
    """Read the rows that an earlier run with this seed has made and that are still worth something."""
    before = {row["key"]: row for row in tables.records(tables.read(CSV))} if CSV.exists() else {}
    kept = {}
    for mutant in drawn:
        row = before.get(mutant.key)
        if row is None or row["seed"] != made["seed"] or row["of_file"] != _digest(mutant.file):
            continue
        if row["verdict"] == KILLED or row["of_judges"] == made["of_judges"]:
            kept[mutant.key] = row | {"of": made["of"], "files": made["files"]}
    return kept


def _write(rows: tables.Rows, of: dict[str, str]) -> None:
    tables.write(CSV, rows, of)
    write_atomically(PAGE, page().encode())


def _told(row: dict[str, str]) -> str:
    by = f" by {row['check']}: {row['finding'][:80]}" if row["check"] else ""
    edit = f"{row['before'][:60]} -> {row['after'][:60]}" if row["before"] else row["operator"]
    return f"{row['key']} {row['file']}:{row['line']} {edit}: {row['verdict']}{by}, {row['seconds']} s"


def made_of() -> dict[str, str]:
    """List the files that are mutated, those that decide what is right, and the tests that judge, too."""
    tests = {test for judges in JUDGES.values() for test in judges.tests}
    return (
        tables.files(*(provenance.ROOT / file for file, _ in _files()))
        | tables.files(*(provenance.ROOT / "tests" / "moe_impls" / test for test in tests))
        | tables.judges()
    )


def equivalents() -> dict[str, str]:
    """Read the mutants that were found to compute nothing else: the reason by key.

    Raises:
        ValueError: a line is not ``key | file: before -> after | reason``.
    """
    found = {}
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            key, *what, reason = line.split(" | ")
            if len(what) != 1 or not reason:
                raise ValueError(f"{EQUIVALENT.name}: {line!r} is not 'key | file: before -> after | reason'")
            found[key] = reason
    return found


def standing(row: Mapping[str, str], same: Mapping[str, str]) -> str:
    """Say what a row counts as."""
    return SAME if row["verdict"] == SURVIVED and row["key"] in same else row["verdict"]


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Count the killed, the equivalent and the survivors."""
    same = equivalents()
    stands = [standing(row, same) for row in tables.records(frame)]
    return {name: stands.count(name) for name in (KILLED, SAME, SURVIVED)}


def headline(frame: pd.DataFrame) -> str:
    """Say the figures in one sentence."""
    number = counts(frame)
    of = number[KILLED] + number[SURVIVED]
    interval = binomtest(number[KILLED], of).proportion_ci(0.95, "exact")
    seed, every, files = (frame[name].iloc[0] for name in ("seed", "of", "files"))
    return (
        f"of {len(frame)} single edits, drawn by seed {seed} from the {every} that operators make in "
        f"{files} files, {number[KILLED]} are found, {number[SAME]} compute the same and {number[SURVIVED]} "
        f"survive: {number[KILLED] / of:.1%} of those that compute something else (95 % interval "
        f"{interval.low:.1%} to {interval.high:.1%})"
    )


def page() -> str:
    """Write out the page of the committed table."""
    frame, same = tables.read(CSV), equivalents()
    frame["stands"] = [standing(row, same) for row in tables.records(frame)]
    frame["by"] = [check.partition("-")[0].partition("::")[0] for check in frame["check"]]
    frame["edit"] = "`" + frame["before"] + "` to `" + frame["after"] + "`"
    frame["place"] = frame["file"] + ":" + frame["line"]
    frame["reason"] = [same.get(key, "") for key in frame["key"]]
    killed, equal, alive = (pd.DataFrame(frame[frame["stands"] == name]) for name in (KILLED, SAME, SURVIVED))
    by = killed["by"].value_counts().rename_axis("check").reset_index(name="found first")
    text = headline(frame)
    return f"""# Faults that nobody chose

{text[0].upper()}{text[1:]}.

The table was {tables.made_at(frame)}, by
`python -m evidence mutation`. All of it, with what was found first in each mutant: [{CSV.name}]({CSV.name}).

The interval is that of Clopper and Pearson, over the mutants that are not known to be equivalent. The edits,
the files and what each is held to stand in `evidence/mutation/`. `native.cpp` is not edited.

## Files

{_by(frame, "file")}

## Operators

{_by(frame, "operator")}

## Survivors

{_listed(alive, "key", "place", "function", "edit")}

## Equivalent

{_listed(equal, "place", "edit", "reason")}

## Checks

{markdown_table(by)}
"""


def _listed(frame: pd.DataFrame, *columns: str) -> str:
    return markdown_table(frame.filter(columns)) if len(frame) else "None."


def _by(frame: pd.DataFrame, column: str) -> str:
    """Count what became of the mutants for each value of a column."""
    table = pd.crosstab(frame[column], frame["stands"]).reindex(
        columns=[KILLED, SAME, SURVIVED], fill_value=0
    )
    return markdown_table(table.assign(drawn=table.sum(axis=1)).reset_index())
