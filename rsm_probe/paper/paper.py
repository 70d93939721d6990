"""Several studies by one command, such as all experiments of the paper: they share their networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from pydantic import Field, field_validator

from rsm_probe.config import Config, read_yaml
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.fields import folder_names
from rsm_probe.runs.run_folder import claimed, require_free, run_folder
from rsm_probe.runs.tables import TableResult
from rsm_probe.storage.files import save_text

Experiment = TranslationConfig | RetrievalConfig | OutputsConfig | ApproximationConfig
EXPERIMENTS: dict[str, type[Experiment]] = {
    "translation": TranslationConfig,
    "retrieval": RetrievalConfig,
    "outputs": OutputsConfig,
    "approximation": ApproximationConfig,
}
# What else a run folder holds.
_TAKEN = ("figures", "models", "config.yaml", "report.md")


class PaperConfig(Config):
    """Experiments one after another, each in a folder of its own within the run folder."""

    study: Literal["paper"] = "paper"
    studies: dict[str, Experiment] = Field(
        min_length=1, description="name -> an experiment, or the file that holds it; a name becomes a folder"
    )

    @field_validator("studies", mode="before")
    @classmethod
    def _read(cls, studies: Any) -> Any:
        if not isinstance(studies, dict):
            return studies
        found = {}
        for name, entry in folder_names(studies, _TAKEN).items():
            data = read_yaml(entry) if isinstance(entry, str) else entry
            kind = data.get("study") if isinstance(data, dict) else None
            if kind not in EXPERIMENTS:
                raise ValueError(f"{name}: study: must be one of {', '.join(EXPERIMENTS)}, found {kind!r}")
            found[name] = EXPERIMENTS[kind].parse(data, f"studies.{name}")
        return found

    def run(self, out: Path, progress: bool = False) -> dict[str, TableResult]:
        """Runs the studies, or continues them, and writes `report.md`: all of their reports.

        Networks that recipes train lie in `models/` of the run folder, so that studies which name the same network
        train it once.

        Raises:
            RsmProbeError: whatever the studies raise.
        """
        out = run_folder(out)
        require_free(self, out)
        for name, study in self.studies.items():
            study.require_free(out / name)
        results = {}
        with claimed(self, out) as require_there:
            for name, study in self.studies.items():
                networks = study.networks or str(out / "models")
                results[name] = study.model_copy(update={"networks": networks}).run(out / name, progress)
                require_there()
            reports = [(result.folder / "report.md").read_text(encoding="utf-8") for result in results.values()]
            save_text(out / "report.md", "\n".join(reports))
        return results

    def figures(self, out: Path) -> dict[str, Figure]:
        """The figures of all studies, each name with that of its study before it.

        Raises:
            StorageError: a study is not finished.
        """
        return {
            f"{name}-{title}": figure
            for name, study in self.studies.items()
            for title, figure in study.figures(out / name).items()
        }
