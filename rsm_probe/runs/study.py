"""The protocol of studies: read from a configuration, run in a folder, opened and drawn from that folder.

A study has three parts. Its configuration decides what to compute; it is immutable and computes nothing itself. Its
`Runner` loads, computes and writes. Its result holds everything that the report and the figures show.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from matplotlib.figure import Figure
from pydantic import Field

from rsm_probe.config import Config
from rsm_probe.errors import ConfigError, CostError, ModelError
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching, matching_label
from rsm_probe.runs.fields import (
    Count,
    Folder,
    Forward,
    Hours,
    Inputs,
    Kernels,
    Layers,
    Layouts,
    Matchings,
    Memory,
    Method,
    Tokens,
)  # fmt: skip
from rsm_probe.runs.given import GivenModel, with_given
from rsm_probe.runs.images_config import ImagesConfig, number_of
from rsm_probe.runs.model_config import ModelConfig, ToldApart, check_models, load_models, named_function
from rsm_probe.runs.plan import ModelPlan, StudyPlan, measured_layers, models_to_plan, require_usable
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.run_folder import claimed, require_free, run_folder
from rsm_probe.similarity.centering import Centering
from rsm_probe.sources import ImageLoader, ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Reading
from rsm_probe.storage.differences import as_stored
from rsm_probe.storage.files import load_json, save_json
from rsm_probe.streaming.cost import LayerCost


class Study(Config):
    """The interface of a study to the command line.

    Attributes:
        study: its name in configurations and in `rsm_probe.studies.registry.STUDIES`.
        execution_keys: keys that may differ when a run is continued, because they decide how the work runs.
        on_cluster: whether `run` accepts an executor, so that other machines can compute.
    """

    study: str
    execution_keys: ClassVar[frozenset[str]] = frozenset()
    on_cluster: ClassVar[bool] = False

    @abstractmethod
    def run(self, out: Path, *, executor: Executor | None = None, progress: bool = False) -> Any:
        """Run the study in a folder, or continue it after an interruption.

        Args:
            out: the run folder.
            executor: where the work is done; None for threads of this process. Only for studies with `on_cluster`.
            progress: show the estimated cost and progress bars.

        Returns:
            The result; its `str` describes the results and where they are stored.

        Raises:
            RsmProbeError: models or images cannot be loaded, or the computation fails.
        """

    @abstractmethod
    def open(self, out: Path) -> Any:
        """Open the result of a finished run.

        Raises:
            StorageError: the run is not finished, or its result is damaged.
        """

    @abstractmethod
    def figures(self, out: Path) -> dict[str, Figure]:
        """Draw the figures of a finished run, by name.

        Raises:
            StorageError: the run is not finished, or its result is damaged.
        """

    def why_no_figures(self, out: Path) -> str:
        """Say why `figures` draws nothing for a finished run."""
        return f"study: {self.study} draws no figures with these settings"

    def page(self, out: Path) -> Any:
        """The report `Page` of a finished run, which `open` opens; None for a page of its tables and figures."""
        return None

    @abstractmethod
    def plan(self, out: Path) -> Any:
        """Check the study and estimate its cost; nothing is run, trained or written.

        Args:
            out: the run folder.

        Returns:
            What the study would do; its `str` describes models, layers, images, pairs, time, memory and disk.

        Raises:
            RsmProbeError: the study would be refused; see `run`.
        """

    def gpus_of_workers(self, out: Path) -> torch.device | None:
        """All GPUs, where the study distributes its workers over them (`device: cuda`); None elsewhere.

        Args:
            out: the run folder.
        """
        return None

    def has_begun(self, out: Path) -> bool:
        """Whether a folder holds computed results; until then its settings may change."""
        return False

    def require_free(self, out: Path) -> None:
        """Check that this study may run in a folder; nothing is written.

        Raises:
            StorageError: the folder holds other files, a different study, or a run with different settings.
        """
        require_free(self, run_folder(out), self.has_begun, self.free_keys(out))

    def claimed(self, out: Path) -> AbstractContextManager[Callable[[], None]]:
        """See `rsm_probe.runs.run_folder.claimed`."""
        return claimed(self, out, self.has_begun, self.free_keys(out))

    def free_keys(self, out: Path) -> frozenset[str]:
        """Keys that may differ when the run in a folder is continued."""
        return self.execution_keys


class ModelStudy(Study):
    """Settings shared by all studies of models; each study adds its own."""

    models: Annotated[tuple[ModelConfig, ...], ToldApart] = Field(min_length=1)
    images: ImagesConfig
    layers: Layers = Field(default="blocks", description="layers of models without layers: of their own")
    tokens: Tokens = None
    layouts: Layouts = None
    method: Method = None
    forward: Forward = None
    inputs: Inputs = None
    matchings: Matchings = Field(default=("identity", "optimal"), min_length=1)
    kernels: Kernels = Field(default=("cosine",), min_length=1)
    centering: Centering | None = "location-mean"
    batch_size: Count = Field(default=64, description="images per forward pass")
    device: str | None = Field(default="auto", description="auto: a GPU if there is one; or cpu, cuda, cuda:1, mps")
    workers: Count | None = None
    memory: Memory = "2GB"
    networks: Folder | None = Field(
        default=None, description="folder of trained networks, which studies can share; by default in the run folder"
    )

    execution_keys: ClassVar[frozenset[str]] = frozenset({"device", "workers", "memory", "networks"})

    # The entry of a model that Python gives.
    given_model: ClassVar[type[GivenModel]] = GivenModel
    # Captures and sweeps keep them in their own settings.
    reading_keys: ClassVar[frozenset[str]] = frozenset({"tokens", "layouts", "method", "forward", "inputs"})

    def reading(self) -> Reading:
        """How models are called and read, where their entries do not say it."""
        return Reading(None, self.layouts, self.method, named_function(self.forward), self.inputs, self.tokens)

    def execution(self, executor: Executor | None = None, progress: bool = False) -> Execution:
        """How the study runs; see `Study.run`."""
        tiles_on = executor if self.on_cluster else None  # other studies run here, and keep their time limit
        return Execution(self.device, self.workers, self.memory, None, tiles_on, progress)

    @abstractmethod
    def runner(self, out: Path, execution: Execution | None = None) -> Runner[Any]:
        """Make the runner that loads, computes and writes for this study in a folder."""

    def run(
        self,
        out: str | Path,
        *,
        executor: Executor | None = None,
        progress: bool = False,
        models: Any = None,
        images: Any = None,
    ) -> Any:
        """Run the study in a folder, or continue it after an interruption; see `Study.run`.

        Args:
            out: the run folder.
            executor: where tiles of pairs are computed.
            progress: show the estimated cost and progress bars.
            models: in place of the configuration's: modules, loaded models or names, as `sweep` takes them. The run
                folder knows them by their fingerprints: the same models must be given to continue.
            images: in place of the configuration's: an image set or whatever `sweep` takes.
        """
        study = with_given(self, models, images, self.given_model)
        return study.runner(run_folder(out), study.execution(executor, progress)).run()

    def plan(self, out: Path) -> StudyPlan:
        """See `Study.plan`."""
        return self.runner(out).plan()

    def gpus_of_workers(self, out: Path) -> torch.device | None:
        """See `Study.gpus_of_workers`."""
        return torch.device("cuda") if self.device == "cuda" else None

    def open(self, out: Path) -> Any:
        """See `Study.open`."""
        return self.runner(out).open()

    def figures(self, out: Path, *, images: Any = None) -> dict[str, Figure]:
        """See `Study.figures`; images that Python gave to `run` are given again."""
        return with_given(self, None, images).runner(out).figures()

    def page(self, out: Path) -> Any:
        """See `Study.page`."""
        return self.runner(out).page()

    def matching_methods(self) -> list[Matching]:
        """All matchings that the study uses."""
        return [get_matching(name)[1] for name in self.matchings]


class TimedStudy(ModelStudy):
    """A study that estimates its time before it starts."""

    max_hours: Hours | None = Field(default=12.0, description="refuse to start a study with a longer estimated time")

    execution_keys: ClassVar[frozenset[str]] = ModelStudy.execution_keys | {"max_hours"}

    def execution(self, executor: Executor | None = None, progress: bool = False) -> Execution:
        """See `ModelStudy.execution`."""
        return replace(super().execution(executor, progress), max_hours=self.max_hours)


S = TypeVar("S", bound=ModelStudy)


class Runner(ABC, Generic[S]):
    """One run of a study of models in its folder.

    Args:
        study: the study.
        out: the run folder.
        execution: how the work runs; by default from the configuration.
    """

    def __init__(self, study: S, out: Path, execution: Execution | None = None) -> None:
        self.study = study
        self.folder = run_folder(out)
        self.execution = execution or study.execution()

    def run(self) -> Any:
        """Check everything, claim the folder, load the models, compute, and write the provenance."""
        study, networks, loaded = self.study, self.networks, self._checked()
        # All checks come first, so that a rejected study leaves no folder and trains no network.
        with study.claimed(self.folder) as require_there:
            start, continued = time.monotonic(), study.has_begun(self.folder)
            models, accuracies = load_models(study.models, networks, self.execution, loaded)
            result = self.compute(models, accuracies, require_there)
            require_there()
            cost = {"seconds": round(time.monotonic() - start, 1), "continued": continued}
            self._save_provenance({**self.provenance(), "accuracy": accuracies}, cost)
        return result

    def _save_provenance(self, facts: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """Write `provenance.json`, again for a run that has grown."""
        file, facts = self.folder / "provenance.json", as_stored(facts)
        stored = load_json(file) if file.exists() else {}
        if any(stored.get(key) != value for key, value in facts.items()):
            save_json(file, {**provenance(), **facts, **cost})

    @property
    def networks(self) -> Path:
        """The folder of trained networks."""
        return self.folder / "models" if self.study.networks is None else Path(self.study.networks)

    def _checked(self) -> dict[str, LoadedModel]:
        """Check all that can be checked before the folder is claimed, and load what needs no training."""
        study = self.study
        study.require_free(self.folder)
        self.execution.device_or("cpu", ModelError)
        require_usable(study.matching_methods())
        self.load_images()
        loaded = check_models(study.models, study.layers, self.networks)
        self.check(loaded)
        return loaded

    def plan(self) -> StudyPlan:
        """Check everything, and estimate the cost; see `Study.plan`."""
        study, models = self.study, list[ModelPlan]()
        methods = {matching_label(method): method for method in self.timed_methods()}
        entries = models_to_plan(study.models, self._checked(), self.networks)
        for title, (entry, model) in entries.items():
            sets = self.images_of(entry)
            first = next(iter(sets.values()))
            counts = {name: number_of(images) for name, images in sets.items()}
            reading, pairs = replace(study.reading(), layers=self.layers(title)), self.pairs_of(counts)
            together = min(next(iter(counts.values())), self.images_together)
            layers, seconds = measured_layers(title, model, first, reading, methods, self.execution, pairs, together)
            matched = list(self.choose_layers({layer.name: layer for layer in layers}))
            models.append(
                ModelPlan(
                    title,
                    "trained by a recipe" if entry.recipe else entry.source or "a checkpoint",
                    layers,
                    matched,
                    {first.name if name == "images" else name: count for name, count in counts.items()},
                    seconds,
                    pairs,
                    self.passes,
                    disk_seconds={layer.name: self.disk_seconds(layer) for layer in layers},
                )
            )
        models = self.with_left({title: model for title, (_, model) in entries.items()}, models)
        missing = [title for entry in study.models for title in entry.missing_networks(self.networks)]
        workers = min(self.execution.worker_count, available_cores())
        refusal = None
        try:
            self.require_cost(models, workers)
        except CostError as error:
            refusal = str(error)
        limit = self.execution.max_hours
        sizes, begun = self.sizes(models), study.has_begun(self.folder)
        return StudyPlan(study.study, models, study.matchings, workers, *sizes, missing, limit, refusal, begun)

    def require_cost(self, models: Sequence[ModelPlan], workers: int) -> None:
        """Refuse an estimate that `run` would refuse.

        Args:
            models: the plans of all models.
            workers: CPU threads that match.

        Raises:
            CostError: it exceeds a limit.
        """

    def images_of(self, entry: Any) -> Mapping[str, ImageSet | ImageLoader]:
        """The images that the models of an entry see, by name, once they are loaded."""
        raise NotImplementedError

    def timed_methods(self) -> Iterable[Matching]:
        """The matchings whose time counts in an estimate."""
        return self.study.matching_methods()

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """The number of pairs that are matched in a layer by each matching, from the images of each set."""
        count = next(iter(counts.values()))
        return count * (count - 1) // 2

    def with_left(self, models: Mapping[str, LoadedModel], plans: list[ModelPlan]) -> list[ModelPlan]:
        """Add what an earlier run left to do.

        Args:
            models: models by title; those to be trained have random weights.
            plans: their plans, as if there was no earlier run.
        """
        return plans

    def disk_seconds(self, layer: LayerCost) -> float:
        """Estimated seconds of writing the pairs of a layer by one matching."""
        return 0.0

    def choose_layers(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """Choose the layers to match among those that are captured."""
        return dict(layers)

    @property
    def passes(self) -> int:
        """Forward passes per image."""
        return 1

    @property
    def images_together(self) -> int:
        """Most images that are matched with each other at a time, which decides how they are timed."""
        return 1024

    def sizes(self, models: Sequence[ModelPlan]) -> tuple[float, float]:
        """Estimated bytes of memory besides the models, and of disk."""
        batch = max(2 * self.study.batch_size * layer.token_bytes for model in models for layer in model.layers)
        return batch + self.execution.memory_bytes, sum(model.token_bytes for model in models)

    @abstractmethod
    def load_images(self) -> None:
        """Load the images, and reject those that the study cannot use."""

    def check(self, loaded: dict[str, LoadedModel]) -> None:
        """Reject models that the study cannot use; networks to be trained are not included."""

    @abstractmethod
    def compute(
        self, models: dict[str, LoadedModel], accuracies: dict[str, float], require_there: Callable[[], None]
    ) -> Any:
        """Compute and save the result.

        Args:
            models: models by title.
            accuracies: accuracies of networks trained by recipes, by title.
            require_there: raises StorageError if the run folder was removed; call it between pieces of work.
        """

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Describe images and seeds for `provenance.json`."""

    @abstractmethod
    def open(self) -> Any:
        """See `Study.open`."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """See `Study.figures`."""

    def page(self) -> Any:
        """See `Study.page`."""
        return None

    def layers(self, title: str) -> str | list[str]:
        """The layers of a model."""
        return self.entry(title).layers_or(self.study.layers)

    def entry(self, title: str) -> Any:
        """The configuration entry of a model.

        Raises:
            ConfigError: the configuration has no such model.
        """
        for entry in self.study.models:
            if title in entry.titles():
                return entry
        raise ConfigError(f"there are results of model {title!r}, but the configuration has no such model")
