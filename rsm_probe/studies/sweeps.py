"""Several sweeps drawn together: the paper's Figures 15, 16 and 17 over data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, ValidationInfo, field_validator, model_validator

from rsm_probe.config import read_nested
from rsm_probe.errors import ConfigError
from rsm_probe.report.default import REPORT, plots, titled
from rsm_probe.report.facts import command_of
from rsm_probe.report.page import Page, Section
from rsm_probe.runs.fields import folder_names
from rsm_probe.runs.several import Results, SeveralStudies
from rsm_probe.runs.tables import csv_text
from rsm_probe.studies.sweep import SweepConfig
from rsm_probe.studies.sweep_figures import FIGURES, Architecture, figure_numbers

# Other names in the run folder.
_TAKEN = ("figures", "config.yaml", "numbers.csv", REPORT)


class SweepsConfig(SeveralStudies):
    """Sweeps of the same architectures over several data sets, shown in one figure."""

    study: Literal["sweeps"] = "sweeps"
    figure: Literal["figure15", "figure16", "figure17"]
    sweeps: dict[str, SweepConfig] = Field(
        min_length=1, description="data set -> sweep, each in a folder of that name; or a file with these"
    )

    on_cluster: ClassVar[bool] = SweepConfig.on_cluster

    @field_validator("sweeps", mode="before")
    @classmethod
    def _from_file(cls, sweeps: Any, info: ValidationInfo) -> Any:
        if not isinstance(sweeps, str):
            return folder_names(sweeps, _TAKEN)
        data, home = read_nested(sweeps, info)
        # Parsed here, because the paths in that file are relative to its own folder.
        named = folder_names(data.get("sweeps"), _TAKEN)
        return (
            {name: SweepConfig.parse(sweep, f"{sweeps}: sweeps.{name}", home) for name, sweep in named.items()}
            if isinstance(named, Mapping)
            else named
        )

    @model_validator(mode="after")
    def _comparable(self) -> SweepsConfig:
        rows = {data: sweep.architectures for data, sweep in self.sweeps.items()}
        for data, architectures in rows.items():
            if architectures is None:
                raise ValueError(f"sweeps.{data}: every model needs a name:, which labels its row")
            if architectures != next(iter(rows.values())):
                raise ValueError(f"sweeps.{data}: all sweeps of one figure need the same names, seeds and controls")
        first = next(iter(self.sweeps.values()))
        for key in ("kernels", "matchings", "estimators", "centering", "layers", "batch_size"):
            if any(getattr(sweep, key) != getattr(first, key) for sweep in self.sweeps.values()):
                raise ValueError(f"{key}: must be the same in all sweeps of one figure")
        if self.figure == "figure17" and not any(len(row.trained) > 1 for row in first.architectures or ()):
            raise ValueError("seeds: figure17 compares networks that differ in their seed; give several seeds")
        if "identity" not in first.matchings or len(first.matchings) < 2:
            raise ValueError("matchings: the figure compares identity with a second matching; give both")
        return self

    def parts(self, out: Path) -> dict[str, SweepConfig]:
        """The sweeps."""
        return self.sweeps

    def check_together(self, progress: bool) -> None:
        """Reject sweeps with different numbers of images.

        Raises:
            ConfigError: the numbers differ.
            ImageError: images cannot be loaded.
        """
        counts = {data: len(sweep.images.load(progress)) for data, sweep in self.sweeps.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{data}: {count}" for data, count in counts.items())
            raise ConfigError(f"CKA of different numbers of images is not comparable ({shown}); set count:")

    def summary(self, results: Results) -> tuple[str, str]:
        """`numbers.csv` with the numbers in the figure."""
        return "numbers.csv", csv_text(figure_numbers(results, self._rows, *self._kind))

    def figures(self, out: Path) -> dict[str, Figure]:
        """Draw the figure of a finished run, and Figure 16 also for the untrained controls, if there are any."""
        results, draw = self.open(out), FIGURES[self.figure]
        figures: dict[str, Figure] = {self.figure: draw(results, self._rows, *self._kind)}
        controls = [Architecture(f"{row.name}, untrained", [row.control]) for row in self._rows if row.control]
        if controls and self.figure == "figure16":
            figures["figure16-untrained"] = draw(results, controls, *self._kind)
        return figures

    def page(self, out: Path) -> Page:
        """See `Study.page`: the figure, and then the sections of each sweep."""
        sections = [Section("Over all data sets", "", plots(self.figures(out)))]
        pages: dict[str, Page] = {data: sweep.page(out / data) for data, sweep in self.sweeps.items()}
        for data, page in pages.items():
            sections += [replace(one, title=f"{data}: {one.title}", command=page.command) for one in page.sections]
        settings = " ".join(f"{data}: {page.setting}" for data, page in pages.items())
        answers = " ".join(f"{data}: {page.answer}" for data, page in pages.items())
        notes = [f"{data}: {note}" for data, page in pages.items() for note in page.notes]
        first = next(iter(pages.values()))
        facts = {f"{data}: {name}": fact for data, page in pages.items() for name, fact in page.provenance.items()}
        name = self.figure.replace("figure", "Figure ")
        title = titled(f"After {name} of Wald et al. 2024, over {len(pages)} data sets", out)
        return Page(title, first.question, settings, answers, sections, command_of(out), facts, notes)

    @property
    def _rows(self) -> list[Architecture]:
        rows = next(iter(self.sweeps.values())).architectures
        assert rows is not None
        return rows

    @property
    def _kind(self) -> tuple[tuple[str, ...], str]:
        """The kernels of the figure, and its semantic matching: the first one."""
        first = next(iter(self.sweeps.values()))
        return first.kernels, next(name for name in first.matchings if name != "identity")
