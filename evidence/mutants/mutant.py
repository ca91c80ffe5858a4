"""What a mutant is, and the text files that hold them: a right module changed in a line or two.

``<kind>.txt`` holds the mutants of a kind, in families. A mutant is a line that names it, the check that must
reject it and what that check must say, and the edit that makes its base wrong:

    [family | base]
    name | check | finding | on: part of a problem's id | source: owner/repository#number
      a line of the base that stays
    - a line of the base that goes
    + a line that takes its place or comes after it

The base may be left out where it is the first of its kind, as may ``on`` and ``source``. Lines of the base
are written without its indentation and its comments, and occur in it exactly once. ``KEPT`` is an empty dict,
for what a mutant remembers between calls.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import types
from dataclasses import dataclass, field
from pathlib import Path

# What mutants are wrong forms of, and the modules of this folder that they may be edits of.
LAYERS = ("layer_deepseek", "layer_llama4", "layer_gemma", "layer_switch", "layer_gpt_oss")
KINDS = {
    "experts": ("grouped", "dense"),
    "router": ("router",),
    "layer": LAYERS,
    "loss": ("losses",),
    "ranks": ("ranks",),
}
SIGNS = ("  ", "- ", "+ ")


@dataclass(frozen=True)
class Mutant:
    """A right module, edited until it is wrong.

    kind, family: what it is a wrong form of, and the heading that it stands under.
    base: the module that is edited.
    killed_by: the check that must reject it; ``finding``: a regular expression that its message matches.
    on: part of the ids of the problems where that shows; empty: any problem of the check may show it.
    source: a public report of the same mistake, as owner/repository#number or @commit.
    edit: the lines of the change, each with its sign.
    """

    name: str
    kind: str
    family: str
    base: str
    killed_by: str
    finding: str
    on: str = ""
    source: str = ""
    edit: list[str] = field(default_factory=list, hash=False)

    def load(self) -> types.ModuleType:
        """Run the edited module anew, so that no two share any state.

        Raises:
            ValueError: lines of the base that the edit names do not occur in it exactly once.
        """
        lines = inspect.getsource(importlib.import_module(self.base)).splitlines()
        for old, new in _changes(self.edit):
            found = [i for i in range(len(lines)) if [_code(line) for line in lines[i : i + len(old)]] == old]
            if len(found) != 1:
                raise ValueError(f"{self.name}: {old} occurs {len(found)} times in {self.base}, not once")
            indent = " " * (len(lines[found[0]]) - len(lines[found[0]].lstrip()))
            lines[found[0] : found[0] + len(old)] = [indent + line for line in new]
        text = "\n".join(lines) + "\n"
        module = types.ModuleType(f"mutant_{self.name}")
        filename = f"<{self.name}, a mutant of {self.base}>"
        return run(text, module, filename)


def run(text: str, module: types.ModuleType, filename: str) -> types.ModuleType:
    """Run the text of a module in it, which keeps the text as ``TEXT`` for other processes."""
    module.__dict__.update(KEPT={}, TEXT=text)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), module.__dict__)
    return module


def _code(line: str) -> str:
    """Strip a line of indentation and comment."""
    return line.strip().partition("  #")[0]


def _changes(edit: list[str]) -> list[tuple[list[str], list[str]]]:
    """Pair the lines of the base with those that replace them, for each change of an edit."""
    changes: list[tuple[list[str], list[str]]] = []
    before = "+ "
    for sign, line in ((line[:2], line[2:]) for line in edit):
        if before == "+ " and sign != "+ ":
            changes.append(([], []))
        old, new = changes[-1]
        if sign != "+ ":
            old.append(line)
        if sign != "- ":
            new.append(line)
        before = sign
    return changes


def read(kind: str) -> list[Mutant]:
    """Read the mutants of a kind from its file."""
    path = Path(__file__).with_name(f"{kind}.txt")
    return parse(path.read_text(encoding="utf-8"), kind, path.name)


def parse(text: str, kind: str, file: str = "text") -> list[Mutant]:
    """Read the mutants that a text holds.

    Raises:
        ValueError: a line is none of those described above, or two mutants have one name.
    """
    mutants: dict[str, Mutant] = {}
    family = base = ""
    current: Mutant | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            if not line or line.startswith("#"):
                continue
            if line.startswith("[") and line.endswith("]"):
                family, base = _heading(line[1:-1], kind)
                current = None
            elif line[:2] in SIGNS:
                if current is None or not (current.edit or line[0] != "+"):
                    raise ValueError("an edit begins below the name of a mutant, with a line of the base")
                current.edit.append(line)
            else:
                if not family:
                    raise ValueError("the line '[family]' comes before its mutants")
                current = _header(line, kind, family, base)
                if current.name in mutants:
                    raise ValueError(f"there are two mutants {current.name!r}")
                mutants[current.name] = current
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}; it is {line!r}") from None
    unchanged = [m.name for m in mutants.values() if not any(line[0] != " " for line in m.edit)]
    if unchanged:
        raise ValueError(f"{file}: {', '.join(unchanged)} must change a line")
    return list(mutants.values())


def _heading(text: str, kind: str) -> tuple[str, str]:
    """Read the family and the base of a heading."""
    family, _, base = (part.strip() for part in text.partition("|"))
    base = base or KINDS[kind][0]
    if base not in KINDS[kind]:
        raise ValueError(f"a base of kind {kind!r} is one of {', '.join(KINDS[kind])}")
    return family, f"{__package__}.{base}"


def _header(line: str, kind: str, family: str, base: str) -> Mutant:
    """Read a mutant, but for its edit, from the line that names it."""
    if line.count(" | ") < 2:
        raise ValueError("a mutant is 'name | check | finding', with '| on: ...' and '| source: ...' if any")
    name, check, finding, *rest = line.split(" | ")
    more: dict[str, str] = {}
    for part in rest:
        key, _, more[key] = part.partition(": ")
        if key not in ("on", "source"):
            raise ValueError(f"unknown field {key!r}; there are 'on' and 'source'")
    return Mutant(name, kind, family, base, check, finding, more.get("on", ""), more.get("source", ""))
