"""The report of a folder: CSV files in, ``report.md``, its plots and ``report.html`` out."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import markdown, page, plots, tables
from benchmarks.report.styles import png, styles_of
from benchmarks.sweep import record
from benchmarks.sweep.record import RecordError
from benchmarks.timing import profile
from reporting.pages import write_atomically


def write_report(folder: Path) -> list[Path]:
    """Write ``report.md``, its PNG files and ``report.html`` from the CSV files in ``folder``.

    ``report.html`` is left out where ``page.is_available()`` is false.

    Returns:
        The paths of the reports.

    Raises:
        RecordError: the folder is missing or holds no CSV, a file is not valid, or no row is ok.
    """
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if not files:
        raise RecordError(f"{folder} holds no CSV file" if folder.is_dir() else f"{folder} is no folder")
    table = tables.newest(tables.table_of(row for file in files for row in record.read(file)))
    if "ok" not in set(table["status"]):
        raise RecordError(f"{folder} holds no row with status ok: there is nothing to compare")
    styles = styles_of(table["implementation"].unique())
    figures = {**plots.axis_figures(table, styles), **plots.efficiency_figures(table, styles)}
    made = {name: png(figure) for name, figure in figures.items()}
    if page.is_available():
        made[page.NAME] = page.html(
            table,
            styles,
            title=markdown.TITLE,
            summary=" ".join(filter(None, (markdown.measured(table), tables.unsteady(table)))),
            files=[file.name for file in files],
            profiles=folder / "profiles",
            stage_names=profile.STAGES,
        ).encode()
    made[markdown.NAME] = markdown.text(table, files, list(figures)).encode()
    stale = {file.name for file in (*folder.glob("*.png"), *folder.glob(page.NAME))} - made.keys()
    for name, content in made.items():
        write_atomically(folder / name, content)
    for name in stale:
        (folder / name).unlink()  # of an earlier report
    return [folder / name for name in (markdown.NAME, page.NAME) if name in made]
