"""The page of a run: that of its study or, for a study that has none, its tables and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from rsm_probe.figures import print_style
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page, Part, Plot, Section, Table
from rsm_probe.report.write import write_page
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.study import Study
from rsm_probe.storage.paths import inside

# Name of the page in a run folder.
REPORT = "report.html"
_DPI = 110


def write_report(study: Study, out: Path, file: Path | None = None) -> Path:
    """Write the page of a finished run.

    Args:
        study: the study.
        out: its run folder.
        file: where the page is written; by default `report.html` in the run folder.

    Returns:
        The file.

    Raises:
        StorageError: the run is not finished, its result is damaged, a package is missing (the message says how to
            install it), or the page cannot be written.
    """
    folder = run_folder(out)
    return write_page(page_of(study, folder), inside(folder, folder / REPORT) if file is None else file)


def page_of(study: Study, folder: Path) -> Page:
    """The page of a finished run; see `write_report`."""
    page = study.page(folder)
    return default_page(study, folder) if page is None else page


def default_page(study: Study, folder: Path) -> Page:
    """The page of a study that has none of its own: figures, and the tables in the run folder."""
    study.open(folder)  # refuses a run that is not finished
    figures = study.figures(folder)
    tables = [_table(file) for file in sorted(folder.glob("*.csv"))]
    parts: dict[str, list[Part]] = {"Figures": list(plots(figures)), "Tables": [*tables]}
    counts = f"{len(figures)} figures and {len(tables)} tables"
    return Page(
        title=titled(f"Study {study.study}", folder),
        question=f"What are the results of study {study.study}?",
        setting="The settings are in the file config.yaml of the run folder.",
        answer=f"The run is finished. Its results are {counts}.",
        sections=[Section(title, "", of_title) for title, of_title in parts.items() if of_title],
        command=command_of(folder),
        provenance=facts_of(folder),
    )


def titled(study: str, folder: Path) -> str:
    """The title of a page: what was studied, and the name of its folder."""
    return f"{study} (run folder {folder.resolve().name})"


def plots(figures: Mapping[str, Figure]) -> list[Plot]:
    """Figures as parts of a page, by name."""
    drawn = []
    for name, figure in figures.items():
        stream = io.BytesIO()
        with print_style():
            # Without the version of Matplotlib, which would be part of the file.
            figure.savefig(stream, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
        drawn.append(Plot(name, stream.getvalue(), f"{name}, as in the folder figures/ of the run."))
    return drawn


def _table(file: Path) -> Table:
    """The table of a CSV file of the run."""
    with file.open(encoding="utf-8", newline="") as stream:
        heading, *rows = csv.reader(stream)
    return Table(file.stem, heading, [[_number(cell) for cell in row] for row in rows], f"{file.name} of the run.")


def _number(cell: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
