"""The experiments of the paper by name, one line each, and the study that runs several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.experiment import ExperimentConfig
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.several import Results, SeveralStudies, read_parts

EXPERIMENTS: dict[str, type[ExperimentConfig]] = {
    "translation": TranslationConfig,
    "retrieval": RetrievalConfig,
    "outputs": OutputsConfig,
    "approximation": ApproximationConfig,
}
# Other entries of a run folder, whose names are taken.
_TAKEN = ("figures", "models", "config.yaml", "report.md")


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
