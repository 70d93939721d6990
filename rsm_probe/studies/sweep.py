"""The layer sweep as a study: a configuration, one run folder, the figures of the paper's appendix G."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field

from rsm_probe.config import Config
from rsm_probe.errors import ModelError, StorageError
from rsm_probe.execution.devices import find_device
from rsm_probe.matching.registry import get_matching
from rsm_probe.paper.similarity_rules import require_usable
from rsm_probe.runs.entries import ImagesConfig, ModelConfig, ToldApart
from rsm_probe.runs.fields import (
    AtLeastTwo,
    Count,
    Distinct,
    Estimators,
    Folder,
    Hours,
    Kernels,
    Layers,
    Matchings,
    Memory,
    Seed,
)
from rsm_probe.runs.loaded_models import check_models, load_models
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.run_folder import claimed, require_free, run_folder
from rsm_probe.similarity.centering import Centering
from rsm_probe.storage.files import save_json
from rsm_probe.streaming.layer_stream import make_batches
from rsm_probe.streaming.layer_sweep import sweep
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.sweep_figures import Architecture, sweep_figures


class SweepConfig(Config):
    """A layer sweep: which models see which images, how their RSMs are made and compared."""

    study: Literal["sweep"] = "sweep"
    models: Annotated[tuple[ModelConfig, ...], ToldApart] = Field(min_length=1)
    images: ImagesConfig
    layers: Layers = "blocks"
    matchings: Matchings = Field(default=("identity", "optimal"), min_length=1)
    kernels: Kernels = Field(default=("linear",), min_length=1)
    estimators: Estimators = Field(default=("unbiased", "biased"), min_length=1)
    centering: Centering | None = "location-mean"
    batch_size: AtLeastTwo = 250
    seed: Seed = 0
    keep: Annotated[tuple[str, ...], Distinct] = Field(
        default=(), description="layers whose mini-batch RSMs go into the result"
    )
    device: str | None = Field(default="auto", description="auto: a GPU where there is one; or cpu, cuda, cuda:1, mps")
    workers: Count | None = None
    memory: Memory = "1GB"
    max_hours: Hours | None = 12.0
    networks: Folder | None = Field(
        default=None, description="folder of trained networks, which several studies can share; else in the run folder"
    )

    # What may differ when a run is continued, because it decides how, not what.
    _EXECUTION: ClassVar[set[str]] = {"device", "workers", "memory", "max_hours", "networks"}

    def run(self, out: Path, progress: bool = False) -> SweepResult:
        """Runs the study, or continues it, and writes everything into one folder.

        The folder then holds `config.yaml` (this configuration with its defaults), `provenance.json` (versions,
        machine, accuracies of trained networks), `models/`, `result.zarr` and `figures/`.

        Raises:
            RsmProbeError: whatever `sweep` and the loading of models and images raise.
        """
        out = run_folder(out)
        # Whatever can be refused is refused before the folder is claimed and networks are trained.
        require_free(self, out, _has_begun, self._EXECUTION)
        find_device(self.device, ModelError)
        require_usable(get_matching(name)[1] for name in self.matchings)
        images = self.images.load(progress)
        make_batches(images, self.batch_size, self.seed, self.estimators)
        networks = out / "models" if self.networks is None else Path(self.networks)
        known = check_models(self.models, self.layers, networks)
        with claimed(self, out, _has_begun, self._EXECUTION) as require_there:
            models, layers, accuracies = load_models(self.models, self.layers, networks, self.device, progress, known)
            require_there()
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
            require_there()
            if not (out / "provenance.json").exists():
                seeds = {entry.name or "model": list(entry.seeds) for entry in self.models}
                about = {"seeds": {"images": self.seed, "models": seeds}, "images": len(images)}
                about |= {"skipped": dict(images.skipped), "accuracy": accuracies}
                save_json(out / "provenance.json", {**provenance(), **about})
        return result

    def require_free(self, out: Path) -> None:
        """Makes sure that this study may run in a folder; nothing is written.

        Raises:
            StorageError: the folder holds something else, another study, or a run with other settings.
        """
        require_free(self, run_folder(out), _has_begun, self._EXECUTION)

    def figures(self, out: Path) -> dict[str, Figure]:
        """The figures of a finished run by name.

        Raises:
            StorageError: the folder holds no finished sweep, or its result is damaged.
        """
        return sweep_figures(open_result(out), self.architectures)

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


def open_result(out: Path) -> SweepResult:
    """The result of a finished sweep in its run folder.

    Raises:
        StorageError: the folder holds none, or it is damaged.
    """
    if not (out / "result.zarr").is_dir():
        raise StorageError(f"{out} holds no finished run; run it again, it continues")
    return SweepResult.open(out / "result.zarr")


def _has_begun(out: Path) -> bool:
    return (out / "checkpoint" / "settings.json").exists() or (out / "result.zarr").exists()
