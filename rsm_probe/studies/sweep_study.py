"""The layer sweep as a study: a configuration, one run folder, the figures of the paper's appendix G."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from rsm_probe.comparison.cka import get_estimator
from rsm_probe.config import Config, read_yaml
from rsm_probe.errors import ConfigError, RsmProbeError, StorageError
from rsm_probe.matching.registry import get_matching
from rsm_probe.probe.layers import Layers
from rsm_probe.similarity.centering import Centering
from rsm_probe.similarity.kernels import get_kernel
from rsm_probe.similarity.pairs import parse_bytes
from rsm_probe.sources.embedded import EMBEDDED
from rsm_probe.sources.images import ImageSet, folder
from rsm_probe.sources.models import LoadedModel, load_model
from rsm_probe.sources.training import TrainingConfig, train_or_load
from rsm_probe.storage import save_json, save_text
from rsm_probe.studies.passing import require_device
from rsm_probe.studies.provenance import provenance
from rsm_probe.studies.result import SweepResult
from rsm_probe.studies.sweep import sweep
from rsm_probe.studies.sweep_figures import sweep_figures


class ModelConfig(Config):
    """A model by name, or a small network trained by a recipe, once for every seed."""

    name: str = Field(default="", description="what results call it; with several seeds, the seed is appended")
    source: str | None = Field(default=None, description="torchvision:NAME, timm:NAME, hf:NAME or a .safetensors file")
    weights: str | None = Field(
        default="default", description="default, a file with a state dict, or null for random weights"
    )
    part: str = Field(default="", description="submodule to use in place of the whole, such as an image tower")
    layers: str | tuple[str, ...] | None = Field(default=None, description="of this model; else those of the study")
    recipe: TrainingConfig | None = Field(default=None, description="train a small network instead of loading one")
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(0,), min_length=1, description="of the recipe or of random weights; one model for each"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        return read_yaml(data) if isinstance(data, str) else data

    @field_validator("source")
    @classmethod
    def _no_code(cls, source: str | None) -> str | None:
        if source is not None and Path(source.partition(":")[0]).suffix == ".py":
            raise ValueError("a configuration runs no code; give file.py:function in Python or on the command line")
        return source

    def load(self, seed: int = 0) -> LoadedModel:
        """The model of a library or file.

        Raises:
            ModelError: it cannot be had.
        """
        assert self.source is not None
        return load_model(self.source, self.weights, self.name, seed, part=self.part)

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.source is None) == (self.recipe is None):
            raise ValueError("give either source: or recipe:")
        if self.source is not None and self.weights is not None and self.seeds != (0,):
            raise ValueError("seeds: only make a difference to a recipe or to random weights (weights: null)")
        return self

    def titled(self, seed: int, default: str) -> str:
        """What results call the model of a seed."""
        name = self.name or default
        return f"{name}-{seed}" if len(self.seeds) > 1 else name


class ImagesConfig(Config):
    """Which images: an embedded set with its options, or a folder."""

    source: str = Field(description="digits, scenes, photos, or the path of a folder of images")
    split: Literal["all", "train", "test"] = Field(default="all", description="of an embedded set")
    size: PositiveInt | None = Field(default=None, description="edge in pixels, of an embedded set")
    count: PositiveInt | None = Field(default=None, description="how many images; of a folder, a random sample")
    seed: NonNegativeInt = Field(default=0, description="of drawing and sampling")
    strict: bool = Field(default=False, description="a broken file is an error instead of being left out")

    @model_validator(mode="after")
    def _fitting(self) -> ImagesConfig:
        if self.source in EMBEDDED and self.strict:
            raise ValueError("strict: is for folders; an embedded set holds no broken files")
        if self.source not in EMBEDDED and (self.split != "all" or self.size is not None):
            raise ValueError("split: and size: are for embedded sets; a folder's images come as they are")
        return self

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
    seed: NonNegativeInt = 0
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
        require_device(self.device)
        self._claim(out)
        finished = (out / "provenance.json").exists()
        images = self.images.load(progress)
        accuracies: dict[str, float] = {}
        layers: dict[str, Layers] = {}
        models = self._load_models(out / "models", accuracies, layers, progress)
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
        if out.is_file():
            raise StorageError(f"{out} is a file; choose another --out")
        if (out / "checkpoint" / "settings.json").exists() and file.exists():
            stored = self.parse(read_yaml(file), str(file)).model_dump(mode="json", exclude=self._EXECUTION)
            mine = self.model_dump(mode="json", exclude=self._EXECUTION)
            differing = [key for key in mine if mine[key] != stored[key]]
            if differing:
                raise StorageError(
                    f"{out} holds a run with other {', '.join(differing)}; choose another --out or remove it"
                )
        elif not file.exists() and out.is_dir() and any(not f.name.startswith(".") for f in out.iterdir()):
            raise StorageError(f"{out} is not empty and holds no run (there is no config.yaml); choose another --out")
        # Until something was computed, the folder may change its settings: nothing is lost.
        save_text(file, self.to_yaml())

    def _load_models(
        self, folder: Path, accuracies: dict[str, float], layers: dict[str, Layers], progress: bool
    ) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        for entry in self.models:
            for seed in entry.seeds:
                if entry.source is not None:
                    loaded = entry.load(seed)
                    title = entry.titled(seed, loaded.name)
                else:
                    assert entry.recipe is not None
                    title = entry.titled(seed, "resnet")
                    file = folder / f"{title}.safetensors"
                    loaded, accuracies[title] = train_or_load(entry.recipe, seed, file, self.device or "cpu", progress)
                if title in models:
                    raise ConfigError(f"two models are called {title!r}; give each a name: of its own")
                models[title] = loaded
                chosen = self.layers if entry.layers is None else entry.layers
                layers[title] = chosen if isinstance(chosen, str) else list(chosen)
        return models
