"""The experiments of the paper by name, one line each, and the study that runs several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.experiment import ExperimentConfig
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.page_words import joint_answer
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.report.default import page_of
from rsm_probe.report.joint import joint_page
from rsm_probe.report.page import Page
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.several import Results, SeveralStudies, read_parts

EXPERIMENTS: dict[str, type[ExperimentConfig]] = {
    "translation": TranslationConfig,
    "retrieval": RetrievalConfig,
    "outputs": OutputsConfig,
    "approximation": ApproximationConfig,
}
# Other entries of a run folder, whose names are taken.
_TAKEN = ("figures", "models", "config.yaml", "report.md", "report.html")


class PaperConfig(SeveralStudies):
    """Runs experiments one after another, each in its own folder within the run folder."""

    study: Literal["paper"] = "paper"
    studies: dict[str, SerializeAsAny[ExperimentConfig]] = Field(
        min_length=1, description="name -> an experiment, or a file that holds one; the name becomes a folder"
    )

    # Those of the experiments that cannot leave this process stay, with a warning.
    on_cluster: ClassVar[bool] = True

    @field_validator("studies", mode="before")
    @classmethod
    def _read(cls, studies: Any, info: ValidationInfo) -> Any:
        return read_parts(studies, EXPERIMENTS, _TAKEN, info)

    def parts(self, out: Path) -> dict[str, ExperimentConfig]:
        """The experiments; they share trained networks in `models/` of the run folder."""
        shared = str(out / "models")
        return {
            name: study.model_copy(update={"networks": study.networks or shared})
            for name, study in self.studies.items()
        }

    def summary(self, results: Results) -> tuple[str, str]:
        """Join all reports into `report.md`."""
        reports = [(result.folder / "report.md").read_text(encoding="utf-8") for result in results.values()]
        return "report.md", "\n".join(reports)

    def page(self, out: Path) -> Page:
        """See `Study.page`: the pages of all experiments in one."""
        out = run_folder(out)
        results, parts = self.open(out), self.parts(out)
        tables = {name: (part.study, results[name].table) for name, part in parts.items()}
        return joint_page(
            "Experiments of the paper",
            "Do semantic RSMs say more than spatio-semantic ones?",
            joint_answer(tables),
            {name: page_of(part, out / name) for name, part in parts.items()},
            out,
        )
