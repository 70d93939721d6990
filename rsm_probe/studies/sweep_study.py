"""The layer sweep as a study: a configuration, one run folder, the figures of the paper's appendix G."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rsm_probe.comparison.cka import get_estimator
from rsm_probe.config import Config, read_yaml
from rsm_probe.errors import ConfigError, RsmProbeError, StorageError
from rsm_probe.matching.registry import get_matching
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import get_kernel
from rsm_probe.similarity.pairs import parse_bytes
from rsm_probe.sources.embedded import EMBEDDED
from rsm_probe.sources.images import ImageSet, folder
from rsm_probe.sources.models import LoadedModel, load_model
from rsm_probe.sources.training import TrainingConfig, train_or_load
from rsm_probe.storage import save_json, save_text
from rsm_probe.studies.provenance import provenance
from rsm_probe.studies.result import SweepResult
from rsm_probe.studies.sweep import sweep
from rsm_probe.studies.sweep_figures import sweep_figures


class ModelConfig(Config):
    """A model by name, or a small network trained by a recipe, once for every seed."""

    name: str = Field(default="", description="what results call it; with several seeds, the seed is appended")
    source: str | None = Field(default=None, description="torchvision:NAME, timm:NAME, hf:NAME or a .safetensors file")
    weights: str | None = Field(
        default="default", description="default, a .safetensors file, or null for random weights"
    )
    recipe: TrainingConfig | None = Field(default=None, description="train a small network instead of loading one")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="of the recipe")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.source is None) == (self.recipe is None):
            raise ValueError("give either source: or recipe:")
        return self


class ImagesConfig(Config):
    """Which images: an embedded set with its options, or a folder."""

    source: str = Field(description="digits, scenes, photos, or the path of a folder of images")
    split: Literal["all", "train", "test"] = Field(default="all", description="of an embedded set")
    size: PositiveInt | None = Field(default=None, description="edge in pixels, of an embedded set")
    count: PositiveInt | None = Field(default=None, description="how many images; of a folder, a random sample")
    seed: int = Field(default=0, description="of drawing and sampling")
    strict: bool = Field(default=False, description="a broken file is an error instead of being left out")

    def load(self, progress: bool = False) -> ImageSet:
        """The images.

        Raises:
            ImageError: missing or empty folder, broken files with `strict`, options that do not fit.
        """
        if self.source not in EMBEDDED:
            images = folder(self.source, strict=self.strict, progress=progress)
            return images if self.count is None else images.sample(self.count, self.seed)
        options = {"size": self.size, "count": self.count}
        return EMBEDDED[self.source](
            split=self.split,
            seed=self.seed,
            **{key: value for key, value in options.items() if value is not None},
        )


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
    seed: int = 0
    keep: tuple[str, ...] = Field(default=(), description="layers whose mini-batch RSMs go into the result")
    device: str | None = None
    workers: PositiveInt | None = None
    memory: str | int = "1GB"
    max_hours: PositiveFloat | None = 12.0

    # What may differ when a run is continued, because it decides how, not what.
    _EXECUTION: ClassVar[set[str]] = {"device", "workers", "memory", "max_hours"}

    @field_validator("matchings", "kernels", "estimators", "memory")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        check = {
            "matchings": get_matching,
            "kernels": get_kernel,
            "estimators": get_estimator,
            "memory": parse_bytes,
        }
        try:
            for item in value if isinstance(value, tuple) else (value,):
                check[info.field_name](item)
        except RsmProbeError as error:
            raise ValueError(str(error)) from None
        return value

    def run(self, out: Path, progress: bool = False) -> SweepResult:
        """Runs the study, or continues it, and writes everything into one folder.

        The folder then holds `config.yaml` (this configuration with its defaults), `provenance.json` (versions,
        machine, accuracies of trained networks), `models/`, `result.zarr` and `figures/`.

        Raises:
            RsmProbeError: whatever `sweep` and the loading of models and images raise.
        """
        self._claim(out)
        images = self.images.load(progress)
        accuracies: dict[str, float] = {}
        models = self._load_models(out / "models", accuracies, progress)
        result = sweep(
            models,
            images,
            self.layers if isinstance(self.layers, str) else list(self.layers),
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
        save_json(
            out / "provenance.json",
            {**provenance(), "images": len(images), "skipped": dict(images.skipped), "accuracy": accuracies},
        )
        return result

    @staticmethod
    def figures(out: Path) -> dict[str, Figure]:
        """The figures of a finished run by file name.

        Raises:
            StorageError: the folder holds no finished sweep.
        """
        return sweep_figures(SweepResult.open(out / "result.zarr"))

    def _claim(self, out: Path) -> None:
        """Makes the folder this run's, or makes sure that it is."""
        file = out / "config.yaml"
        if file.exists():
            stored = self.parse(read_yaml(file), str(file)).model_dump(mode="json", exclude=self._EXECUTION)
            mine = self.model_dump(mode="json", exclude=self._EXECUTION)
            differing = [key for key in mine if mine[key] != stored[key]]
            if differing:
                raise StorageError(
                    f"{out} holds a run with other {', '.join(differing)}; choose another --out or remove it"
                )
        elif out.is_dir() and any(out.iterdir()):
            raise StorageError(f"{out} is not empty and holds no run (there is no config.yaml); choose another --out")
        elif out.is_file():
            raise StorageError(f"{out} is a file; choose another --out")
        save_text(file, self.to_yaml())

    def _load_models(self, folder: Path, accuracies: dict[str, float], progress: bool) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        for entry in self.models:
            if entry.source is not None:
                loaded = {entry.name: load_model(entry.source, entry.weights, entry.name)}
            else:
                loaded = {}
                for seed in entry.seeds:
                    assert entry.recipe is not None
                    name = (
                        f"{entry.name or 'resnet'}-{seed}" if len(entry.seeds) > 1 else entry.name or f"resnet-{seed}"
                    )
                    file = folder / f"{name}.safetensors"
                    loaded[name], accuracies[name] = train_or_load(
                        entry.recipe, seed, file, self.device or "cpu", progress
                    )
            for name, model in loaded.items():
                title = name or model.name
                if title in models:
                    raise ConfigError(f"two models are called {title!r}; give each a name: of its own")
                models[title] = model
        return models
