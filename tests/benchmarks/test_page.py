"""The HTML report in a real browser: it works alone, shows the CSV's numbers, and can be used by everyone."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.report import page, styles, tables
from benchmarks.report.folder import write_report
from benchmarks.sweep import record
from benchmarks.sweep.record import Row
from tests.benchmarks.test_record import failed_row, make_row, write

pytestmark = pytest.mark.xdist_group("page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IS_INSTALLED = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
in_a_browser = pytest.mark.skipif(
    not IS_INSTALLED and not os.environ.get("CI"),
    reason="needs Chromium and playwright (pip install '.[browser]')",
)
MAX_BYTES = 5_000_000
PLOTS = ("lines", "heat", "roof", "memory", "stages")


def rows() -> list[Row]:
    """Two implementations on T x E x K in two modes, dtypes and loads; their times are all different."""
    found = []
    axes = (
        (16, 32, 64),
        (4, 8),
        (1, 2),
        ("forward", "forward_backward"),
        ("float32", "bfloat16"),
        ("a", "b"),
    )
    for i, (T, E, K, mode, dtype, name) in enumerate(itertools.product(*axes)):
        median = (1 + i / 1000) * T * E / 100
        found.append(
            make_row(
                implementation=name, T=T, E=E, K=K, mode=mode, dtype=dtype, median_ms=median,
                p20_ms=0.9 * median, p80_ms=1.1 * median, efficiency=0.3 + i / 1000,
                saved_for_backward_bytes=4096 * T if mode == "forward_backward" else 0,
            )
        )  # fmt: skip
    found.append(make_row(load="zipf", implementation="a", median_ms=0.123456))
    found.append(failed_row("out_of_memory", "needs <b>90 GiB</b> & more", implementation="b", T=64, K=4))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CSV, a profile and the report made from them."""
    place = tmp_path_factory.mktemp("report")
    write(place / "run.csv", *rows())
    profiled = place / "profiles" / "a-sweep-t16-forward-backward"
    profiled.mkdir(parents=True)
    (profiled / "stages.csv").write_text(
        "stage,forward_ms,backward_ms,percent,operators\ndispatch,1.5,0,30,sort\nexpert_gemms,2,1.5,70,mm\n"
    )
    write_report(place)
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report in a page of its own; whatever it logs or asks the network for fails the test."""
    options = getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    context = browser.new_context(**options)
    context.set_offline(True)
    tab, found = context.new_page(), []
    tab.on("console", lambda message: found.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on("request", lambda request: found.append(request.url) if request.url != url else None)
    url = (folder / page.NAME).as_uri()
    tab.goto(url)
    tab.evaluate("window.page.ready")
    yield tab
    tab.wait_for_timeout(100)
    context.close()
    assert found == []


def choose(tab: Any, name: str, value: str) -> None:
    tab.select_option(f"#{name}", value)
    tab.evaluate("running")


def plotted(tab: Any, plot: str) -> list[dict]:
    return tab.evaluate(f"window.page.plots.{plot}.view.data('rows')")


def test_the_page_is_one_small_file(folder: Path) -> None:
    text = (folder / page.NAME).read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    assert '<script src="' not in text and "<link rel=stylesheet" not in text
    assert "<b>90 GiB" not in text  # what a CSV holds is text, never markup


def test_every_row_is_in_the_page_with_the_numbers_of_the_csv(folder: Path) -> None:
    newest = tables.newest(tables.table_of(record.read(folder / "run.csv")))
    for kept, want in zip(page.rows(newest), rows(), strict=True):
        for name, value in dataclasses.asdict(want).items():
            assert name in page._LEFT_OUT or kept[name] == value


def test_without_its_library_the_page_is_missed_in_one_line(folder, tmp_path, monkeypatch, capsys) -> None:
    write(tmp_path / "run.csv", *rows())
    (tmp_path / page.NAME).write_text("of an earlier report")
    monkeypatch.setattr(page, "is_available", lambda: False)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"{page.MISSING}\n"
    assert not (tmp_path / page.NAME).exists()
    assert page.NAME not in (tmp_path / "report.md").read_text()


@in_a_browser
def test_the_table_shows_the_numbers_of_the_csv(opened: Any) -> None:
    choose(opened, "rows-which", "all")
    shown = opened.eval_on_selector_all(
        "#rows tbody tr",
        "lines => lines.map(line => Object.fromEntries("
        "[...line.cells].map(({dataset}) => [dataset.column, dataset.value])))",
    )
    want = rows()
    assert len(shown) == len(want)
    for line, row in zip(shown, want, strict=True):
        for column in line.keys() & record.COLUMNS.keys():
            value = getattr(row, column)
            if isinstance(value, float | int):
                assert float(line[column]) == pytest.approx(value, rel=1e-12)
            else:
                assert line[column] == ("" if value is None else value)


@in_a_browser
def test_every_plot_shows_the_rows_that_are_chosen(opened: Any) -> None:
    for mode, dtype in itertools.product(("forward", "forward_backward"), ("float32", "bfloat16")):
        choose(opened, "dtype", dtype)
        choose(opened, "mode", mode)
        want = [r for r in rows() if (r.mode, r.dtype, r.load, r.status) == (mode, dtype, "uniform", "ok")]
        lines = plotted(opened, "lines")
        fixed = int(opened.input_value("#fixed"))
        assert {r["median_ms"] for r in lines} == {r.median_ms for r in want if fixed == r.K}
        assert {r["median_ms"] for r in plotted(opened, "roof")} == {r.median_ms for r in want}
        assert {r["saved_mib"] for r in plotted(opened, "memory")} == {
            r.saved_for_backward_bytes / 2**20 for r in want if r.saved_for_backward_bytes is not None
        }
        fastest = {(r["T"], r["E"]): r["implementation"] for r in plotted(opened, "heat")}
        K = int(opened.input_value("#heat-K"))
        for (T, E), name in fastest.items():
            cell = [r for r in want if (r.T, r.E, r.K) == (T, E, K)]
            assert name == min(cell, key=lambda r: r.median_ms or 0).implementation


@in_a_browser
def test_lines_are_drawn_over_each_of_t_e_and_k(opened: Any) -> None:
    for axis, count in (("T", 3), ("E", 2), ("K", 2)):
        choose(opened, "axis", axis)
        assert len({r[axis] for r in plotted(opened, "lines")}) == count
        assert opened.locator("#lines svg text", has_text=styles.AXES[axis]).count() > 0
    for quantity in ("relative", "efficiency_percent", "tokens_per_s"):
        choose(opened, "quantity", quantity)
        title = opened.locator(f"#quantity option[value={quantity}]").inner_text()
        assert opened.locator("#lines svg text", has_text=title).count() > 0


@in_a_browser
def test_a_load_that_was_measured_at_one_size_is_shown_too(opened: Any) -> None:
    choose(opened, "load", "zipf")
    assert [r["median_ms"] for r in plotted(opened, "lines")] == [0.123456]
    assert opened.locator("#rows tbody tr").count() == 1


@in_a_browser
def test_axes_have_labels_with_units(opened: Any) -> None:
    for plot, titles in {
        "lines": ("median time, ms", "tokens T"),
        "heat": ("tokens T", "experts E"),
        "roof": ("GFLOP/s", "FLOPs per byte"),
        "memory": ("peak above the inputs, MiB", "tokens T"),
        "stages": ("time, ms",),
    }.items():
        for title in titles:
            assert opened.locator(f"#{plot} svg text", has_text=title).count() > 0, (plot, title)


@in_a_browser
def test_rows_that_failed_say_why(opened: Any) -> None:
    choose(opened, "rows-which", "failed")
    (line,) = opened.locator("#rows tbody tr").all()
    assert line.locator("[data-column=status]").inner_text() == "out_of_memory"
    assert line.locator("[data-column=reason]").inner_text() == "needs <b>90 GiB</b> & more"
    assert "at commit c0ffee" in line.get_attribute("title")


@in_a_browser
def test_the_page_is_used_by_keyboard(opened: Any) -> None:
    opened.focus("#mode")
    opened.keyboard.press("ArrowDown")
    opened.evaluate("running")
    assert {r["mode"] for r in plotted(opened, "lines")} == {"forward_backward"}
    opened.focus("button[data-column=median_ms]")
    for direction in ("ascending", "descending"):
        opened.keyboard.press("Enter")
        times = [float(t) for t in opened.eval_on_selector_all(
            "#rows td[data-column=median_ms]", "cells => cells.map(c => c.dataset.value)")]  # fmt: skip
        assert times == sorted(times, reverse=direction == "descending")
        assert opened.locator(f"th[aria-sort={direction}]").count() == 1
    reached = set()
    opened.focus("#setting")
    for _ in range(40):
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.className"))
        opened.keyboard.press("Tab")
    assert {*page.FILTERS, "theme", "quantity", "axis", "fixed", "heat-K", "rows-which", "scroll"} <= reached


@in_a_browser
@pytest.mark.parametrize(
    "opened",
    [
        {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        for width in (400, 1280)
        for scheme in ("light", "dark")
    ],
    ids=lambda o: f"{o['viewport']['width']}-{o['color_scheme']}",
    indirect=True,
)
def test_the_page_fits_narrow_and_wide_windows_in_light_and_dark(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for plot in PLOTS:
        assert opened.locator(f"#{plot} svg").count() == 1
        box = opened.evaluate(f"(e => [e.scrollWidth, e.clientWidth])(document.getElementById('{plot}'))")
        assert box[0] <= box[1] + 1, plot
    before = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert _contrast(opened) > 7
    opened.click("#theme")
    opened.evaluate("running")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert _contrast(opened) > 7


def _contrast(tab: Any) -> float:
    """The contrast of text on the page, by WCAG 2: 7 is its level AAA."""

    def luminance(which: str) -> float:
        colour = tab.evaluate(f"getComputedStyle(document.body).{which}")
        parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance("color"), luminance("backgroundColor")))
    return (high + 0.05) / (low + 0.05)
