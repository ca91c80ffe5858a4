"""Hooks of `python -m mkdocs`: the tables of checks, and pages of the files that other pages link to."""

from __future__ import annotations

import csv
import functools
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from correctness.checks import balance, layers, routers, table
from correctness.checks.case import Check
from correctness.ranks import checks as ranks
from evidence.mutants import MUTANTS, Mutant

if TYPE_CHECKING:
    from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- checks -->"  # in docs/checks.md, where the tables go
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the target of a link inside the repository
LANGUAGES = {".py": "python", ".cpp": "cpp", ".toml": "toml", ".yml": "yaml"}  # of files shown as pages


class Described(NamedTuple):
    """A check as its page shows it."""

    name: str
    meaning: str  # the first sentence of its docstring, or all of its first paragraph
    needs: str  # a declaration without which it does not apply, or empty
    finds: str  # a mistake that it is shown to find, with a public report of it


# The kinds of subjects, with their heading and what their mutants are called.
KINDS = (
    (table.IMPLEMENTATION, "Implementations", "experts"),
    (routers.ROUTER, "Routers", "router"),
    (layers.LAYER, "Whole layers", "layer"),
    (balance.LOSSES, "Loads and balance losses", "loss"),
    (ranks.RANKS, "Distributed implementations", "ranks"),
)


def described_checks() -> dict[str, list[Described]]:
    """The checks of each kind of subject, in the order in which they run."""
    return {heading: _described(kind.checks, mutants) for kind, heading, mutants in KINDS}


def _described(checks: Iterable[Check], mutants: str) -> list[Described]:
    found = {}
    for check in checks:
        paragraph = " ".join((check.function.__doc__ or "").strip().partition("\n\n")[0].split())
        described = Described(check.name, paragraph, check.needs, _example(mutants, check.name))
        found.setdefault(check.name, described)
    return list(found.values())


def _example(kind: str, check: str) -> str:
    """A mutant that the check must kill, or else the one that it kills with the fewest others."""
    mutants = {mutant.name: mutant for mutant in MUTANTS if mutant.kind == kind}
    meant = [mutant for mutant in mutants.values() if mutant.killed_by == check]
    kills = {
        name: checks
        for (of, name), checks in killing_checks().items()
        if of == kind and name in mutants and check in checks
    }
    if not meant and not kills:
        return ""
    rarest = min(kills, key=lambda name: len(kills[name]), default="")
    mutant = next((m for m in meant if m.source), meant[0]) if meant else mutants[rarest]
    return mutant.name.replace("_", " ") + _report(mutant)


@functools.cache
def killing_checks() -> dict[tuple[str, str], set[str]]:
    """The checks that kill each mutant (kind, name), by the committed table."""
    with (ROOT / "results" / "mutants.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [column for column in rows[0] if ":" in column]  # kind:check
    return {
        (row["kind"], row["mutant"]): {c.partition(":")[2] for c in columns if row[c] == "killed"}
        for row in rows
    }


def _report(mutant: Mutant) -> str:
    """A link to the public report of a mutant's mistake: ``owner/name#number`` or ``owner/name@commit``."""
    place, sign, number = re.match(r"([^#@]*)([#@]?)(.*)", mutant.source).groups()  # type: ignore[union-attr]
    kind = {"#": "issues", "@": "commit"}.get(sign)
    return f" ([{mutant.source}](https://github.com/{place}/{kind}/{number}))" if kind else ""


def tables() -> str:
    """Markdown: for each kind of subject a heading and the table of its checks."""
    parts = []
    for kind, checks in described_checks().items():
        rows = [f"| `{c.name}` | {c.meaning} | {c.needs and f'`{c.needs}`'} | {c.finds} |" for c in checks]
        head = "| check | meaning | needs | finds, for instance |\n|---|---|---|---|"
        parts.append("\n".join([f"## {kind}: {len(checks)} checks\n", head, *rows]))
    return "\n\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's files that pages link to, and in turn those that these link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + ["CONTRIBUTING.md"]
    done = set(waiting[:-1])
    while waiting:
        path = waiting.pop()
        waiting += [target for target in _targets(path) if target not in done]
        if path not in done:
            done.add(path)
            files.append(_file(path, config))
    return files


def _file(path: str, config: Any) -> File:
    """A file of the repository in the site: as it is, or, if it is source, as a page that shows it."""
    from mkdocs.structure.files import File

    source = ROOT / path
    if language := LANGUAGES.get(source.suffix):
        code = source.read_text(encoding="utf-8")
        return File.generated(config, _uri(path), content=f"# {path}\n\n````{language}\n{code}````\n")
    return File.generated(config, _uri(path), abs_src_path=str(source))


def _targets(path: str) -> Iterator[str]:
    """The files of the repository, other than those in docs/, that a page links to."""
    if path.endswith(".md"):
        for link in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            if (ROOT / target).is_file() and not target.startswith("docs/"):
                yield target


def _uri(path: str) -> str:
    """Where the site has a file of the repository."""
    return path.removeprefix("docs/") + ".md" * (Path(path).suffix in LANGUAGES)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the tables of checks, and point links between files of the repository at their pages."""
    uri = page.file.src_uri
    path = f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri
    if not (ROOT / path).is_file():  # a page that shows source
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        return posixpath.relpath(_uri(target), posixpath.dirname(_uri(path)))

    return LINK.sub(moved, markdown.replace(MARK, tables()))
