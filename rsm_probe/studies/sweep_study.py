"""The layer sweep as a study: a configuration, one run folder, the figures of the paper's appendix G."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from rsm_probe.config import Config
from rsm_probe.devices import find_device
from rsm_probe.errors import ModelError
from rsm_probe.similarity.centering import Centering
from rsm_probe.storage.files import save_json
from rsm_probe.studies.entries import ImagesConfig, ModelConfig, known
from rsm_probe.studies.provenance import provenance
from rsm_probe.studies.result import SweepResult
from rsm_probe.studies.run_folder import claim, load_models
from rsm_probe.studies.sweep import sweep
from rsm_probe.studies.sweep_figures import Architecture, sweep_figures


class SweepConfig(Config):
    """A layer sweep: which models see which images, how their RSMs are made and compared."""

    study: Literal["sweep"] = "sweep"
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    images: ImagesConfig
    layers: str | tuple[str, ...] = "blocks"
    matchings: tuple[str, ...] = Field(default=("identity", "optimal"), min_length=1)
    kernels: tuple[str, ...] = Field(default=("linear",), min_length=1)
    estimators: tuple[str, ...] = Field(default=("unbiased", "biased"), min_length=1)
    centering: Centering | None = "location-mean"
    batch_size: int = Field(default=250, ge=2)
    seed: NonNegativeInt = 0
    keep: tuple[str, ...] = Field(default=(), description="layers whose mini-batch RSMs go into the result")
    device: str | None = Field(default="auto", description="auto: a GPU where there is one; or cpu, cuda, cuda:1, mps")
    workers: PositiveInt | None = None
    memory: str | int = "1GB"
    max_hours: PositiveFloat | None = 12.0
    networks: str | None = Field(
        default=None, description="folder of trained networks, which several studies can share; else in the run folder"
    )

    # What may differ when a run is continued, because it decides how, not what.
    _EXECUTION: ClassVar[set[str]] = {"device", "workers", "memory", "max_hours", "networks"}

    @field_validator("matchings", "kernels", "estimators", "memory")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        return known(value, info.field_name)

    def run(self, out: Path, progress: bool = False) -> SweepResult:
        """Runs the study, or continues it, and writes everything into one folder.

        The folder then holds `config.yaml` (this configuration with its defaults), `provenance.json` (versions,
        machine, accuracies of trained networks), `models/`, `result.zarr` and `figures/`.

        Raises:
            RsmProbeError: whatever `sweep` and the loading of models and images raise.
        """
        find_device(self.device, ModelError)  # before anything is loaded
        claim(self, out, out / "checkpoint" / "settings.json", self._EXECUTION)
        finished = (out / "provenance.json").exists()
        images = self.images.load(progress)
        networks = out / "models" if self.networks is None else Path(self.networks)
        models, layers, accuracies = load_models(self.models, self.layers, networks, self.device, progress)
        result = sweep(
            models,
            images,
            layers,
            self.matchings,
            self.kernels,
            self.batch_size,
            self.device,
            self.workers,
            self.seed,
            centering=self.centering,
            estimators=self.estimators,
            keep=self.keep,
            memory=self.memory,
            max_hours=self.max_hours,
            out=out,
            progress=progress,
        )
        if not finished:
            seeds = {"images": self.seed, "models": {entry.name or "model": list(entry.seeds) for entry in self.models}}
            counted = {"images": len(images), "skipped": dict(images.skipped)}
            save_json(out / "provenance.json", {**provenance(), "seeds": seeds, **counted, "accuracy": accuracies})
        return result

    def figures(self, out: Path) -> dict[str, Figure]:
        """The figures of a finished run by file name.

        Raises:
            StorageError: the folder holds no finished sweep.
        """
        return sweep_figures(SweepResult.open(out / "result.zarr"), self.architectures)

    @property
    def architectures(self) -> list[Architecture] | None:
        """Which models differ in their seed alone; None where a name is only known once the model is loaded."""
        if not all((entry.name or entry.recipe) and entry.dilated == (0,) for entry in self.models):
            return None
        return [
            Architecture(
                entry.name or "resnet",
                [entry.titled(seed) for seed in entry.seeds],
                entry.control_title if entry.control else None,
            )
            for entry in self.models
        ]
