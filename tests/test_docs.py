"""Pages tell what is there: links lead to files and headings, code runs, commands and their options exist.

A block that is not to be run or looked at stands below a comment that says why: ``<!-- not run: reason -->``.
A python block that begins with ``# kernel.py`` or the like is a file of the reader's.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from benchmarks.workloads import GRIDS, MODELS, MODES
from correctness.problems.loads import load_named
from docs import hooks
from moe_impls.interface import DEVICES, DTYPES, dtype_name
from moe_impls.registry import DISTRIBUTED, IMPLEMENTATIONS, PEERS, PEERS_ON_RANKS
from reporting.provenance import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
LANGUAGES = {"python", "sh", "text", "yaml"}
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A block of code on a page."""

    line: int  # of the page, above the code
    code: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text_of(page))


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language, in order, without those that a comment above takes out."""
    found, above = [], ""
    for token in tokens_of(page):
        if token.type == "fence":
            assert token.info in LANGUAGES, f"{page.name}: a block of {token.info or 'no language'}"
            if token.info == language and not NOT_RUN.match(above):
                assert token.map
                found.append(Block(token.map[0] + 1, token.content))
        above = token.content if token.type == "html_block" else ""
    return found


# Links


def links(page: Path) -> Iterator[str]:
    """The targets of links and images inside the repository."""
    for token in tokens_of(page):
        for part in token.children or ():
            target = part.attrs.get("href") or part.attrs.get("src")
            if isinstance(target, str) and not re.match(r"https?://", target):
                yield target


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked to by, on GitHub and in the site."""
    tokens = tokens_of(page)
    titles = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.tag[:1] == "h"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@of_each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_are_short_and_in_the_navigation() -> None:
    navigation = text_of(ROOT / "mkdocs.yml")
    for page in DOCS:
        assert f": {page.name}\n" in navigation
    for page in PAGES:
        by_hand = re.sub(r"<!-- begin: .*?<!-- end -->", "", text_of(page), flags=re.DOTALL)
        assert len(by_hand.splitlines()) <= 130, page.name


def test_every_check_is_described_in_a_sentence() -> None:
    for checks in hooks.described_checks().values():
        assert len({check.name for check in checks}) == len(checks) > 1
        for check in checks:
            assert check.meaning.endswith("."), check.name


# Python


@of_each_page
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, with the names of those before."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        code = "\n" * block.line + block.code  # so that a traceback has the line of the page
        exec(compile(code, str(page), "exec"), names)


def verified(page: str, subject: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`pytest correctness` of a subject of a page, as in --impl=kernel.py:forward, from the reader's file."""
    option, file, name = re.split("[=:]", subject)
    (code,) = (b.code for b in blocks(ROOT / page, "python") if b.code.startswith(f"# {file}"))
    (folder / file).write_text(code, encoding="utf-8")
    command = ["pytest", "correctness", f"{option}={folder / file}:{name}", "-p", "no:xdist", *options]
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("page", "subject", "some"),
    [
        ("README.md", "--impl=kernel.py:forward", "values-small or exact-integers-"),
        (
            "docs/writing-an-implementation.md",
            "--impl=kernel.py:prepare+prepared",
            "values-small or prepared- or without_gradients",
        ),
        (
            "docs/verify-your-dispatcher.md",
            "--impl=dispatcher.py:forward",
            "values_of_ranks-spread or values_of_ranks-uneven or exact_of_ranks-integers_cancelling",
        ),
        ("docs/layers-and-routers.md", "--layer=layer.py:Layer", ""),
        ("docs/verify-your-layer.md", "--layer=layer.py:Layer", ""),
        ("docs/routers.md", "--router=router.py:route", "not values and not gradients or T_12_"),
    ],
)
def test_the_subjects_of_pages_are_right(page: str, subject: str, some: str, tmp_path: Path) -> None:
    done = verified(page, subject, tmp_path, "-k", some)
    assert done.returncode == 0, done.stdout


def test_the_finding_of_a_page_is_what_the_command_finds(tmp_path: Path) -> None:
    page = "docs/reading-a-finding.md"
    shown = blocks(ROOT / page, "text")[0].code
    (command,) = commands(blocks(ROOT / page, "sh")[0].code)
    done = verified(page, "--impl=kernel.py:forward", tmp_path, *command[command.index("-x") :])
    assert done.returncode == 1

    def on_any_processor(text: str) -> str:
        """Leave out the last digits of a budget: what a plain computation loses depends on how it sums."""
        return re.sub(r"(budget \d)[\d.]*e", r"\1e", text)

    assert on_any_processor(shown) in on_any_processor(done.stdout.replace(f"{tmp_path}/", ""))


# Shell


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without variables that are set for it."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
            words = shlex.split(command)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words


PROJECT = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
TOX = configparser.ConfigParser()
TOX.read(ROOT / "tox.ini", encoding="utf-8")
# Files that a reader has, not this repository.
READERS = {"kernel.py", "dispatcher.py", "router.py", "layer.py", "gate.md", "FILE", "DIR", "/tmp/try"}


@functools.cache
def help_of(module: str, command: str) -> str:
    """What `python -m module command --help` says; it ends with status 0 only if there is such a command."""
    if module in ("benchmarks", "evidence"):  # whose parsers are at hand: seconds less for each command
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit) as ended:
            importlib.import_module(f"{module}.__main__").main([command, "--help"])
        assert ended.value.code == 0, command
        return told.getvalue()
    words = [sys.executable, "-m", module, command, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_options(words: list[str], told: str) -> None:
    """Each option is one that the help tells, with a value that exists."""
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", told))
    for word, after in itertools.pairwise([*words, ""]):
        option, _, value = word.partition("=")
        if option.startswith("-"):
            assert option in known, option
            check_value(option, value or after)
        else:
            check_file(option)


def check_value(option: str, value: str) -> None:
    valid = {
        "--impl": (*IMPLEMENTATIONS, *DISTRIBUTED, *PEERS, *PEERS_ON_RANKS),
        "--model": MODELS,
        "--grid": GRIDS,
        "--mode": MODES,
        "--device": DEVICES,
        "--dtype": tuple(map(dtype_name, DTYPES)),
    }
    if option in valid and ":" not in value:
        assert value in valid[option], f"{option} {value}"
    if option == "--load":
        load_named(value)


def check_file(word: str) -> None:
    """A word that looks like a path leads to something, unless the reader is to fill it in."""
    path = word.partition(":")[0]
    looks_like_one = re.search(r"/|\.(py|csv|md|txt)$", path)
    if looks_like_one and not re.search(r"[<>*]", path) and path not in READERS and "origin/" not in path:
        assert (ROOT / path).exists(), word


def check(words: list[str]) -> None:
    """Fail unless the command that these words are exists, with its options and files."""
    program, *rest = words
    if program == "pytest":
        folder = next((w.partition("/")[0] for w in rest if not w.startswith("-")), "correctness")
        check_options(rest, help_of("pytest", folder))
    elif words[:2] == ["python", "-m"]:
        module, *rest = rest[1:]
        if module == "mkdocs":
            return
        if module == "tests":  # which passes them on
            check_options(rest, help_of("pytest", "correctness"))
            return
        check_options(rest[1:], help_of(module, rest[0]))
    elif program in PROJECT.get("scripts", {}):
        check_options(rest[1:], help_of(program.replace("-", "_"), rest[0]))
    elif program == "tox":
        assert f"testenv:{rest[1]}" in TOX, words
        if len(rest) > 2:
            (takes,) = (c for c in TOX[f"testenv:{rest[1]}"]["commands"].splitlines() if "{posargs}" in c)
            check([*shlex.split(takes.replace("{posargs}", "")), *rest[3:]])
    elif program == "torchrun":
        check(["python", *words[words.index("-m") :]])
    elif program == "compute-sanitizer":
        check(words[words.index("pytest") :])
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
    elif program == ".ci/run":
        assert (ROOT / program).is_file()
    else:
        assert program in ("git", "cd", "ruff", "pyright"), words


@of_each_page
def test_commands_exist_with_their_options_and_files(page: Path) -> None:
    for block in blocks(page, "sh"):
        for words in commands(block.code):
            check(words)


@pytest.mark.parametrize(
    "command",
    [
        "pytest correctness --implementation auto",
        "pytest correctness --impl atuo",
        "pytest correctness/test_gone.py",
        "pytest benchmarks --model olmoe",
        "python -m benchmarks report --fast",
        "tox -e test",
        "tox -e benchmarks -- --girl smoke",
        "pip install '.[suit]'",
        "make",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    (words,) = commands(command)
    with pytest.raises(AssertionError):
        check(words)


def test_a_command_of_python_that_does_not_exist_is_found() -> None:
    with pytest.raises(AssertionError):
        check(["python", "-m", "benchmarks", "figure"])


# The table of a newcomer's change


def test_files_of_a_newcomers_change_hold_what_is_added_to() -> None:
    """Where CONTRIBUTING.md says `file` (`NAME`), the file defines NAME; where a folder, it is there."""
    rows = re.findall(r"^\| an? [^|]* \| (\d) \| (.*) \|$", text_of(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    assert len(rows) == 6
    for count, places in rows:
        named = re.findall(r"`([^`]+/[^`]*)`(?: \(`(\w+)`\))?", places)
        assert len(named) == int(count)
        for path, name in named:
            assert (ROOT / path.partition("<")[0]).exists(), path
            assert not name or re.search(rf"^(def |class )?{name}\b", text_of(ROOT / path), re.MULTILINE), (
                name
            )
