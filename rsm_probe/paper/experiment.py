"""What the paper's experiments have in common: models see images, layers are captured, a table and a report follow."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, model_validator

from rsm_probe.captures.captured_layers import Capture, CapturedLayer
from rsm_probe.captures.recording import capture
from rsm_probe.config import Config
from rsm_probe.errors import ConfigError, ModelError
from rsm_probe.execution.devices import find_device
from rsm_probe.matching.matching import Matching
from rsm_probe.paper.similarity_rules import Way, require_usable, way
from rsm_probe.probe.layers import Layers as Names
from rsm_probe.runs.entries import ImagesConfig, SubjectConfig, ToldApart, base_title
from rsm_probe.runs.fields import Count, Draws, Folder, Kernels, Layers, Level, Memory, Seed, Ways
from rsm_probe.runs.loaded_models import check_models, load_models
from rsm_probe.runs.provenance import provenance
from rsm_probe.runs.run_folder import claimed, require_free, run_folder
from rsm_probe.runs.tables import Row, TableResult
from rsm_probe.similarity.centering import Centering
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.storage.files import save_json
from rsm_probe.storage.places import file_name

# Letters of a title in the name of a folder; no file system took more.
_LONGEST_BEFORE = 200


@dataclass(frozen=True)
class Subject:
    """A model under study.

    Attributes:
        title: what results call it.
        model: the model itself; None where what was computed of it is only read.
        source: where its published weights are from; None for other weights.
        images: those that passed, by name.
        layers: of the model, in forward order, by the name of the images.
        folder: where what is computed of it is kept.
        owner: a hash of all that decides what is computed: settings, images, and what the layers answer.
    """

    title: str
    model: LoadedModel | None
    source: str | None
    images: Mapping[str, ImageSet]
    layers: Mapping[str, Mapping[str, CapturedLayer]]
    folder: Path
    owner: str


class ExperimentConfig(Config):
    """The settings that all experiments share; each adds its own."""

    study: str
    models: Annotated[tuple[SubjectConfig, ...], ToldApart] = Field(min_length=1)
    layers: Layers = Field(default="blocks", description="of models that name none of their own")
    images: ImagesConfig
    matchings: Ways = Field(
        default=("identity", "optimal", "pooled"),
        min_length=1,
        description="identity (spatio-semantic), optimal (semantic), pooled (means over locations), other matchings",
    )
    kernels: Kernels = Field(default=("cosine", "linear", "rbf"), min_length=1)
    centering: Centering | None = "location-mean"
    seed: Seed = Field(default=0, description="of what is drawn: images, pairs, bootstrap samples")
    repeats: Draws = Field(default=1000, description="bootstrap samples of each interval")
    level: Level = Field(default=0.95, description="of the intervals")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of tokens on disk")
    batch_size: Count = Field(default=64, description="images per forward pass")
    device: str | None = Field(default="auto", description="auto: a GPU where there is one; or cpu, cuda, cuda:1, mps")
    workers: Count | None = None
    memory: Memory = "2GB"
    networks: Folder | None = Field(default=None, description="folder of trained networks; else in the run folder")

    _EXECUTION: ClassVar[set[str]] = {
        "device", "workers", "memory", "networks", "repeats", "level", "pictured", "paper",
    }  # fmt: skip

    @model_validator(mode="after")
    def _something_to_compare(self) -> ExperimentConfig:
        if not self.ways():
            raise ValueError(f"matchings: none of {self.matchings} goes with the kernels {self.kernels}")
        return self

    def ways(self) -> dict[tuple[str, str], Way]:
        """(matching, kernel) -> how images are compared, of those that go together; the identity comes first."""
        names = sorted(self.matchings, key=lambda name: name != "identity")
        pairs = {(name, kernel): way(name, kernel) for name in names for kernel in self.kernels}
        return {key: found for key, found in pairs.items() if found is not None}

    def run(self, out: Path, progress: bool = False) -> TableResult:
        """Runs the study, or continues it where it was interrupted.

        The folder then holds `table.csv`, `report.md`, `captures/`, `parts/` (what was computed of them), `config.yaml`
        and `provenance.json`.

        Args:
            out: the run folder.
            progress: show what is needed, and bars.

        Raises:
            RsmProbeError: whatever the loading of models and images, capturing and comparing raise.
        """
        out = run_folder(out)
        # Whatever can be refused is refused before the folder is claimed and networks are trained.
        require_free(self, out, _has_begun, self._EXECUTION)
        find_device(self.device, ModelError)
        require_usable(self.matching_methods())
        sources = dict.fromkeys(entry.images or self.images for entry in self.models)
        drawn = {source: self.image_sets(source, progress) for source in sources}
        networks = out / "models" if self.networks is None else Path(self.networks)
        known = check_models(self.models, self.layers, networks)
        for title, model in known.items():
            self.check_model(title, model, drawn[self._entry(title).images or self.images])
        with claimed(self, out, _has_begun, self._EXECUTION) as require_there:
            models, layers, accuracies = load_models(self.models, self.layers, networks, self.device, progress, known)
            rows: list[Row] = []
            for number, (title, model) in enumerate(models.items()):
                require_there()
                sets = drawn[self._entry(title).images or self.images]
                subject = self._subject(out, number, title, model, layers[title], sets, progress)
                require_there()
                rows += self.compare(subject, progress)
            require_there()
            # Every row has the same keys, in the order of the first row that has them.
            keys = list(dict.fromkeys(key for row in rows for key in row))
            result = TableResult([{key: row.get(key, float("nan")) for key in keys} for row in rows], out)
            result.save(self.report(result, accuracies))
            if not (out / "provenance.json").exists():
                counted = [
                    {"set": name, "of": images.name, "images": len(images), "skipped": len(images.skipped)}
                    for sets in drawn.values()
                    for name, images in sets.items()
                ]
                save_json(out / "provenance.json", {**provenance(), "images": counted, "accuracy": accuracies})
        return result

    def require_free(self, out: Path) -> None:
        """Makes sure that this study may run in a folder; nothing is written.

        Raises:
            StorageError: the folder holds something else, another study, or a run with other settings.
        """
        require_free(self, run_folder(out), _has_begun, self._EXECUTION)

    def matching_methods(self) -> list[Matching]:
        """All matchings that the study will use."""
        return [found.matching for found in self.ways().values()]

    def check_model(self, title: str, model: LoadedModel, sets: Mapping[str, ImageSet]) -> None:
        """Refuses a model that the study cannot use, before anything is computed of it."""

    @staticmethod
    def open(out: Path) -> TableResult:
        """The result of a finished run.

        Raises:
            StorageError: the run is not finished.
        """
        return TableResult.open(out)

    @abstractmethod
    def image_sets(self, source: ImagesConfig, progress: bool) -> dict[str, ImageSet]:
        """The images that pass through a model, by name."""

    @abstractmethod
    def compare(self, subject: Subject, progress: bool) -> list[Row]:
        """What the table says of a model."""

    @abstractmethod
    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """The table in the paper's layout, with the paper's numbers where models and data are the same."""

    @abstractmethod
    def figures(self, out: Path) -> dict[str, Figure]:
        """The figures of a finished run by name.

        Raises:
            StorageError: the run is not finished.
        """

    def subjects(self, out: Path) -> list[Subject]:
        """The models of a finished run that figures show one by one, with what was captured of them.

        Of networks that differ in their seed, the first stands for all, and of those with dilated stages the one
        without; tables and common figures hold every one of them.

        Raises:
            StorageError: the run is not finished, or a capture is damaged.
        """
        found, entries, drawn = [], set(), dict[ImagesConfig, dict[str, ImageSet]]()
        for number, title in enumerate(dict.fromkeys(row["model"] for row in self.open(out).table)):
            entry = self._entry(title)
            kind = self.models.index(entry), entry.control and base_title(title) == entry.control_title
            if kind in entries:
                continue
            entries.add(kind)
            source = entry.images or self.images
            if source not in drawn:
                drawn[source] = self.image_sets(source, False)
            sets = drawn[source]
            captures = {name: Capture.open(capture_folder(out, number, title, name)) for name in sets}
            layers = {name: self.choose_layers(capture) for name, capture in captures.items()}
            owner = self._owner(layers)
            found.append(Subject(title, None, None, sets, layers, subject_folder(out, number, title), owner))
        return found

    def choose_layers(self, layers: Mapping[str, CapturedLayer]) -> dict[str, CapturedLayer]:
        """Those of the captured layers that the study is about."""
        return dict(layers)

    def _subject(
        self,
        out: Path,
        number: int,
        title: str,
        model: LoadedModel,
        layers: Names,
        sets: Mapping[str, ImageSet],
        progress: bool,
    ) -> Subject:
        captures: dict[str, Capture] = {
            name: capture(
                model, images, layers, capture_folder(out, number, title, name), dtype=self.dtype,
                batch_size=self.batch_size, device=self.device, progress=progress,
            )
            for name, images in sets.items()
        }  # fmt: skip
        chosen = {name: self.choose_layers(found) for name, found in captures.items()}
        entry = self._entry(title)
        published = entry.source if entry.weights == "default" and title != entry.control_title else None
        folder, owner = subject_folder(out, number, title), self._owner(chosen)
        return Subject(title, model, published, sets, chosen, folder, owner)

    def _owner(self, layers: Mapping[str, Mapping[str, CapturedLayer]]) -> str:
        settings = self.model_dump(mode="json", exclude={"models", *self._EXECUTION})
        about = {name: [layer.about for layer in part.values()] for name, part in layers.items()}
        return hashlib.sha256(json.dumps([settings, about], sort_keys=True).encode()).hexdigest()

    def _entry(self, title: str) -> SubjectConfig:
        """What the configuration says of a model.

        Raises:
            ConfigError: nothing.
        """
        for entry in self.models:
            if title in entry.titles():
                return entry
        raise ConfigError(f"no model of the configuration is called {title!r}, of which there are results")


def capture_folder(out: Path, number: int, title: str, images: str) -> Path:
    """Where a run keeps what the layers of its model of that number answer to images of that name."""
    return _numbered(out / "captures", number, title, f"-{images}.zarr")


def subject_folder(out: Path, number: int, title: str) -> Path:
    """Where a run keeps what is computed of its model of that number."""
    return _numbered(out / "parts", number, title, "")


def _numbered(folder: Path, number: int, title: str, ending: str) -> Path:
    # What earlier versions called it is found again.
    before = folder / f"{number:02d}-{re.sub('[^A-Za-z0-9._-]+', '-', title)[:_LONGEST_BEFORE]}{ending}"
    return before if before.is_dir() else folder / f"{number:02d}-{file_name(title)}{ending}"


def _has_begun(out: Path) -> bool:
    """Whether a run computed something: a capture that was refused has no layers."""
    return any(out.glob("captures/*/layers")) or any(out.glob("parts/*/*"))
