"""What the paper's experiments share: capture layers of models, compare images, write a table and a report."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field, model_validator

from rsm_probe.captures.captured_layers import Capture, CapturedLayer
from rsm_probe.captures.recording import capture_layers
from rsm_probe.config import read_yaml
from rsm_probe.errors import MatchingError, RsmProbeError
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.on_disk import largest_gap, open_pairs
from rsm_probe.paper.page_parts import NOTHING_SHOWN, certificates_text, images_text, models_text
from rsm_probe.paper.shown import SHOWN, ShownModel
from rsm_probe.paper.similarity_rules import (
    SimilarityRule,
    known_rule,
    semantic_matching,
    shown_matchings,
    similarity_rule,
)
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page
from rsm_probe.runs.fields import Distinct, Draws, Kernels, Level, Seed, each_named
from rsm_probe.runs.given import GivenModel
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig, ToldApart, base_title
from rsm_probe.runs.pieces import once, owner_of
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.study import ModelStudy, Runner
from rsm_probe.runs.tables import Row, TableResult, markdown
from rsm_probe.sources import ImageSet, LoadedModel
from rsm_probe.storage.files import Arrays
from rsm_probe.storage.paths import file_name

# The matchings of an experiment that names none, and those of earlier versions.
_DEFAULT = ("identity", "optimal", "pooled", "max", "gem")
_DEFAULT_BEFORE = ("identity", "optimal", "pooled")
# Earlier versions cut titles to this length in folder names.
_LONGEST_BEFORE = 200

Rules = Annotated[tuple[str, ...], AfterValidator(each_named(known_rule)), Distinct]


class SubjectConfig(ModelConfig):
    """A model of an experiment, which may have its own images."""

    images: ImagesConfig | None = Field(default=None, description="images for this model; else those of the study")


class GivenSubject(GivenModel, SubjectConfig):
    """The entry of a model of an experiment that Python gave."""


class ExperimentConfig(ModelStudy):
    """The settings that all experiments share; each adds its own."""

    models: Annotated[tuple[SubjectConfig, ...], ToldApart] = Field(min_length=1)
    matchings: Rules = Field(
        default=_DEFAULT,
        min_length=1,
        description="identity (spatio-semantic), optimal (semantic) and other matchings; baselines that compare one "
        "vector per image: pooled (mean over locations), max, gem, class-token",
    )
    kernels: Kernels = Field(default=("cosine", "linear", "rbf"), min_length=1)
    seed: Seed = Field(default=0, description="seed of all random draws: images, pairs, bootstrap samples")
    repeats: Draws = Field(default=1000, description="bootstrap samples per interval")
    level: Level = Field(default=0.95, description="level of the intervals")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="type of tokens on disk")

    given_model: ClassVar[type[GivenModel]] = GivenSubject
    execution_keys: ClassVar[frozenset[str]] = ModelStudy.execution_keys | {"repeats", "level", "pictured", "paper"}

    @model_validator(mode="after")
    def _something_to_compare(self) -> ExperimentConfig:
        if not self.rules():
            raise ValueError(f"matchings: none of {self.matchings} can be combined with the kernels {self.kernels}")
        return self

    def rules(self) -> dict[tuple[str, str], SimilarityRule]:
        """The rule for each (matching, kernel) that can be combined; the identity comes first."""
        names = sorted(self.matchings, key=lambda name: name != "identity")
        rules = {(name, kernel): similarity_rule(name, kernel) for name in names for kernel in self.kernels}
        return {key: rule for key, rule in rules.items() if rule is not None}

    def matching_methods(self) -> list[Matching]:
        """All matchings that the study uses."""
        return [rule.matching for rule in self.rules().values()]

    @property
    def semantic(self) -> str | None:
        """The matching whose semantic RSM is compared with all others; None if there is none."""
        return semantic_matching(self.matchings)

    def as_begun(self, out: Path) -> Self:
        """This study as it continues the run in a folder, which keeps the default matchings of its version."""
        file = run_folder(out) / "config.yaml"
        if "matchings" in self.model_fields_set or self.matchings != _DEFAULT or not file.is_file():
            return self
        before = read_yaml(file).get("matchings") == list(_DEFAULT_BEFORE)
        return self.model_copy(update={"matchings": _DEFAULT_BEFORE}) if before else self

    def require_free(self, out: Path) -> None:
        """See `Study.require_free`."""
        ModelStudy.require_free(self.as_begun(out), out)

    def has_begun(self, out: Path) -> bool:
        """See `Study.has_begun`. A capture without layers was refused and does not count."""
        return any(out.glob("captures/*/layers")) or any(out.glob("parts/*/*"))

    @abstractmethod
    def runner(self, out: Path, execution: Execution | None = None) -> Experiment[Any]:
        """See `ModelStudy.runner`."""


@dataclass(frozen=True)
class Subject:
    """A model under study.

    Attributes:
        title: name of the model in results.
        model: the model itself; None if its results are only read.
        source: source of its published weights; None for other weights.
        images: name -> the images that the model saw.
        layers: name of the images -> captured layers, in forward order.
        folder: folder for its results.
        owner: hash of everything that determines the results: settings, images, and the tokens of the layers.
    """

    title: str
    model: LoadedModel | None
    source: str | None
    images: Mapping[str, ImageSet]
    layers: Mapping[str, Mapping[str, CapturedLayer]]
    folder: Path
    owner: str


C = TypeVar("C", bound=ExperimentConfig)


class Experiment(Runner[C]):
    """Captures the layers of every model, and compares them.

    The run folder then holds `table.csv`, `report.md`, `result.json`, `captures/`, `parts/` (intermediate results),
    `config.yaml` and `provenance.json`. An experiment defines `compare` and, where the defaults do not suit,
    `image_sets`, `check`, `choose_layers`, `report`, `picture`, `draw`, `show` and `content`.
    """

    def __init__(self, study: C, out: Path, execution: Execution | None = None) -> None:
        super().__init__(study.as_begun(out), out, execution)
        self._sets: dict[ImagesConfig, dict[str, ImageSet]] = {}
        self.captured_in = self.folder  # runs over the same representations may share one folder
        self.rules = self.study.rules()
        self.shown = shown_matchings(self.study.matchings)

    # Experiments define some of these

    @abstractmethod
    def compare(self, subject: Subject) -> list[Row]:
        """Compute the rows of the table for a model."""

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Load the images that a model sees, by name.

        Raises:
            ImageError: the images cannot be loaded, or the experiment cannot use them.
        """
        return {"images": source.load(self.execution.progress)}

    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """Format the table as Markdown, in the layout of the paper if it has one."""
        return markdown(list(result.table[0]), [list(row.values()) for row in result.table])

    def picture(self, subject: Subject) -> Any:
        """Collect what figures show of a model, besides the table."""

    def draw(self, result: TableResult) -> dict[str, Figure]:
        """Draw the figures, by name."""
        return {}

    def show(self, subject: Subject) -> ShownModel:
        """Collect what the page shows of a model, besides the table; the run stores it."""
        return ShownModel({}, {})

    def gaps(self, subject: Subject) -> dict[str, float]:
        """The largest certified gap of each matching of a model, relative to the norms, where products are stored."""
        names, gaps = {rule.products_name: rule.name for rule in self.rules.values()}, dict[str, float]()
        for file in sorted(subject.folder.glob("*.zarr")):
            name = names.get(re.sub(r"^\d{3}-", "", file.stem))
            if name not in (None, "identity"):
                gaps[name] = float(np.maximum(gaps.get(name, 0.0), largest_gap(open_pairs(file))))
        return {name: gap for name, gap in gaps.items() if not math.isnan(gap)}

    def content(self, result: TableResult, shown: Mapping[str, ShownModel]) -> Page | None:
        """Lay out the page of a finished run, without command and provenance; None for one of tables and figures.

        Args:
            result: the result.
            shown: model -> what the run stored of it; some models only, see `subjects`.
        """
        return None

    # Shared by all experiments

    def load_images(self) -> None:
        """Load the images of all models."""
        for entry in self.study.models:
            self.images(entry)

    def compute(
        self, models: dict[str, LoadedModel], accuracies: dict[str, float], require_there: Callable[[], None]
    ) -> TableResult:
        """Compare one model after another, and save table and report.

        Raises:
            MatchingError: no layer has the tokens that the matchings need.
        """
        rows: list[Row] = []
        with_pictures = set(self._first_of_each_kind(list(models)))
        for number, (title, model) in enumerate(models.items()):
            require_there()
            subject = self.subject(number, title, model)
            require_there()
            entry = self.entry(title)
            facts = {"network": entry.network, "untrained": entry.is_untrained(title)}
            of_model = self.compare(subject)
            rows += [row | facts for row in of_model]
            require_there()
            if of_model and title in with_pictures:
                self._store_shown(subject)
        if not rows:
            raise MatchingError(
                f"matchings: {', '.join(self.study.matchings)} needs tokens that no layer of any model has; add "
                f"pooled, max or optimal, or probe layers of a transformer with a class token"
            )
        require_there()
        # Give every row the same keys, in order of first appearance.
        keys = list(dict.fromkeys(key for row in rows for key in row))
        table = [{key: row.get(key, float("nan")) for key in keys} for row in rows]
        result = TableResult(table, self.folder, self.study.model_dump())
        result.save(self.report(result, accuracies))
        return result

    def provenance(self) -> dict[str, Any]:
        """The images that were used, and how many were skipped."""
        return {
            "images": [
                {"set": name, "of": images.name, "images": len(images), "skipped": len(images.skipped)}
                for sets in self._sets.values()
                for name, images in sets.items()
            ]
        }

    def open(self) -> TableResult:
        """See `Study.open`."""
        return TableResult.open(self.folder, self.study.model_dump())

    def figures(self) -> dict[str, Figure]:
        """See `Study.figures`."""
        # One model at a time, because the pairs of all models may not fit into memory.
        pictured = (self.picture(subject) for subject in (self.subjects() if self.shown else ()))
        return self.draw(replace(self.open(), pictured=pictured))

    def subjects(self) -> Iterator[Subject]:
        """Yield the models of a finished run that have figures of their own, with their captures.

        The first of several seeds stands for all of them, and the undilated network for its dilated versions. Tables
        and shared figures include every model.

        Raises:
            StorageError: the run is not finished, or a capture is damaged.
        """
        titles = list(dict.fromkeys(row["model"] for row in self.open().table))
        for title in self._first_of_each_kind(titles):
            yield self.subject(titles.index(title), title)

    def _first_of_each_kind(self, titles: Sequence[str]) -> Iterator[str]:
        """The models that have figures of their own; see `subjects`."""
        kinds = set()
        for title in titles:
            entry = self.entry(title)
            kind = self.study.models.index(entry), base_title(title) in entry.controls
            if kind not in kinds:
                kinds.add(kind)
                yield title

    def _store_shown(self, subject: Subject) -> None:
        # Keys that may differ between runs in one folder decide what is shown, too.
        keys = self.study.model_dump(mode="json", include={"pictured"})

        def collect() -> Arrays:
            shown = self.show(subject)
            return replace(shown, facts={"gaps": self.gaps(subject), **shown.facts}).pack()

        try:
            once(subject.folder / SHOWN, f"{subject.owner} {keys}", collect)
        except RsmProbeError as error:  # the results of hours are not lost for a picture
            warnings.warn(f"the report page will have no pictures of {subject.title}: {error}", stacklevel=2)

    def page(self) -> Page | None:
        """See `Study.page`."""
        result = self.open()
        titles = list(dict.fromkeys(row["model"] for row in result.table))
        stored = {
            title: ShownModel.read(subject_folder(self.folder, k, title) / SHOWN) for k, title in enumerate(titles)
        }
        shown = {title: of_model for title, of_model in stored.items() if of_model is not None}
        page = self.content(result, shown)
        if page is None:
            return None
        made = {"Models": models_text(self.study.models), **images_text(self.folder), **certificates_text(shown)}
        made |= {**page.provenance, **facts_of(self.folder)}
        without = [] if shown else [NOTHING_SHOWN]
        return replace(page, command=command_of(self.folder), provenance=made, notes=[*page.notes, *without])

    def subject(self, number: int, title: str, model: LoadedModel | None = None) -> Subject:
        """Open the captures of a model, or make them.

        Args:
            number: number of the model in the run.
            title: title of the model.
            model: the model, to make or complete its captures; None to only read them.
        """
        entry, captures, study = self.entry(title), dict[str, Mapping[str, CapturedLayer]](), self.study
        for name, images in self.images(entry).items():
            file = capture_folder(self.captured_in, number, title, name)
            captures[name] = Capture.open(file) if model is None else capture_layers(
                model, images, self.layers(title), file, study.dtype, study.batch_size, study.reading(), self.execution
            )  # fmt: skip
        layers = {name: self.choose_layers(captured) for name, captured in captures.items()}
        published = entry.source if entry.weights == "default" and title not in entry.controls else None
        folder = subject_folder(self.folder, number, title)
        owner = self._owner(layers, folder, finished=model is None)
        return Subject(title, model, published, self.images(entry), layers, folder, owner)

    def timed_methods(self) -> list[Matching]:
        """All but those of baselines with one vector per image, which take no time to speak of."""
        return [rule.matching for rule in self.rules.values() if not rule.vector]

    def rules_of(self, layer: CapturedLayer) -> dict[tuple[str, str], SimilarityRule]:
        """The rules that apply to a layer, by (matching, kernel)."""
        return {key: rule for key, rule in self.rules.items() if rule.applies_to(layer)}

    def images_of(self, entry: Any) -> dict[str, ImageSet]:
        """See `Runner.images_of`."""
        return self.images(entry)

    def images(self, entry: SubjectConfig) -> dict[str, ImageSet]:
        """The images for the models of an entry, by name; loaded once."""
        source = entry.images or self.study.images
        if source not in self._sets:
            self._sets[source] = self.image_sets(source)
        return self._sets[source]

    def _owner(self, layers: Mapping[str, Mapping[str, CapturedLayer]], folder: Path, finished: bool) -> str:
        """The owner of intermediate results.

        Args:
            layers: name of the images -> captured layers.
            folder: folder of the intermediate results.
            finished: whether the results are only read.
        """
        settings = self.study.model_dump(
            mode="json", exclude={"models", *self.study.reading_keys, *self.study.execution_keys}
        )
        contents = {name: [layer.provenance for layer in captured.values()] for name, captured in layers.items()}
        earlier, renewed = _hash([settings, contents]), sorted({repr(m) for m in self.timed_methods() if m.renewed})
        # The results of a finished run are those of its version.
        if not renewed or (finished and any(owner_of(file) == earlier for file in folder.rglob("*.npz"))):
            return earlier
        return _hash([settings, contents, renewed])


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def capture_folder(out: Path, number: int, title: str, images: str) -> Path:
    """The folder of the layers of a model, for images of that name."""
    return _numbered(out / "captures", number, title, f"-{images}.zarr")


def subject_folder(out: Path, number: int, title: str) -> Path:
    """The folder of the intermediate results of a model."""
    return _numbered(out / "parts", number, title, "")


def _numbered(folder: Path, number: int, title: str, ending: str) -> Path:
    # Earlier versions named folders differently; keep using a folder under its old name.
    before = folder / f"{number:02d}-{re.sub('[^A-Za-z0-9._-]+', '-', title)[:_LONGEST_BEFORE]}{ending}"
    return before if before.is_dir() else folder / f"{number:02d}-{file_name(title)}{ending}"
