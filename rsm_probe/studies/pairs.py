"""All pairs as a study: whole RSMs of a set of images, or of queries and a database, layer by layer, on disk."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field, model_validator

from rsm_probe.captures.captured_layers import KIND as CAPTURE
from rsm_probe.captures.captured_layers import Capture, CapturedLayer
from rsm_probe.captures.recording import capture_layers
from rsm_probe.comparison.alignment import cka
from rsm_probe.errors import ComparisonError, RsmProbeError
from rsm_probe.execution.execution import Execution
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.on_disk import largest_gap, match_on_disk, open_pairs, pairs_left, require_pairs_time
from rsm_probe.pairs.tile_plan import tiling_seconds
from rsm_probe.paper.page_parts import models_text
from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Page
from rsm_probe.runs.fields import Count, FolderOrUrl, Hours
from rsm_probe.runs.images_config import ImagesConfig, number_of
from rsm_probe.runs.plan import ModelLeft, ModelPlan, StudyPlan
from rsm_probe.runs.study import Runner, TimedStudy
from rsm_probe.runs.tables import Row, load_table, save_table
from rsm_probe.similarity.kernels import check_kernel, get_kernel
from rsm_probe.similarity.rsm import RSM
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.paths import absolute, file_name, is_url
from rsm_probe.streaming.batch_consumer import naming
from rsm_probe.streaming.cost import LayerCost
from rsm_probe.studies.pairs_page import certificate_of, pairs_page
from rsm_probe.studies.pairs_shown import chosen_pairs, thumbnails_of
from rsm_probe.studies.rsm_panels import pair_panels
from rsm_probe.studies.sweep_report.shared_pictures import SharedPictures
from rsm_probe.studies.sweep_report.shown import Shown

# Ends the name of a model's capture of the database.
_DATABASE = "-database"
# The files of the table in the run folder.
_TABLE = ("pairs.csv", "pairs.json")


@dataclass(frozen=True)
class PairsResult:
    """The paths and properties of the pairs of every layer.

    Attributes:
        table: one row per model, layer and matching, with `images_a`, `images_b`, `locations`, `channels`,
            `largest_gap` (the largest possible distance of a product from the optimum, relative to the norms; NaN
            without a proof) and `path` (relative to `folder`). For one set of images also `cka_<kernel>`, the CKA with
            the spatio-semantic RSM of the same layer, if there is one and `memory` suffices for both; NaN where it is
            undefined.
        folder: path or URL of the folder with the pairs.
    """

    table: list[Row]
    folder: str

    def rsm(self, model: str, layer: str, matching: str, kernel: str = "cosine") -> RSM:
        """Read one RSM into memory.

        Raises:
            ComparisonError: there is no such model, layer or matching.
        """
        for row in self.table:
            if (row["model"], row["layer"], row["matching"]) == (model, layer, matching):
                return RSM.from_pairs(open_pairs(f"{self.folder}/{row['path']}"), kernel)
        raise ComparisonError(f"there are no pairs of layer {layer!r} of model {model!r} with matching {matching!r}")

    def __str__(self) -> str:
        keys = [key for key in self.table[0] if key != "path"]
        cells = [keys, *([_shown(row[key]) for key in keys] for row in self.table)]
        widths = [max(len(line[k]) for line in cells) for k in range(len(keys))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def require_applicable(matchings: Sequence[str], kernels: Sequence[str]) -> None:
    """Refuse kernels that do not apply to the scores of a matching.

    Raises:
        ValueError: a kernel does not apply.
    """
    try:
        for matching, kernel in itertools.product(matchings, kernels):
            check_kernel(get_kernel(kernel), matching, get_matching(matching)[1].one_to_one)
    except ComparisonError as error:
        raise ValueError(str(error)) from None


class PairsConfig(TimedStudy):
    """All pairs: models, images, how their pairs are matched, and where results are stored."""

    study: Literal["pairs"] = "pairs"
    database: ImagesConfig | None = Field(
        default=None,
        description="images in the columns; by default those in the rows, with each pair matched once",
    )
    # Layers are estimated one by one, in the middle of a run: a default could stop it after hours of work.
    max_hours: Hours | None = Field(default=None, description="limit for the pairs of one layer and matching")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="type of tokens on disk")
    tile: Count | None = Field(default=None, description="images per side of a tile")
    permutations: bool = Field(default=False, description="also keep the matched locations")
    store: FolderOrUrl | None = Field(
        default=None,
        description="folder or URL for captures and pairs that all workers can access; by default the run folder",
    )

    on_cluster: ClassVar[bool] = True

    @model_validator(mode="after")
    def _applicable(self) -> PairsConfig:
        require_applicable(self.matchings, self.kernels)
        titles = {title for model in self.models for title in model.titles()}
        if self.database is not None and (twice := sorted(titles & {f"{title}{_DATABASE}" for title in titles})):
            raise ValueError(
                f"models: the name {twice[0]!r} is reserved for a capture of the database; choose a different name:"
            )
        return self

    def why_no_figures(self, out: Path) -> str:
        """See `Study.why_no_figures`."""
        if self.database is not None:
            return (
                "RSMs are drawn for one set of images, and this run matched images: with database:; pairs.csv lists "
                "the pairs of every layer, which rsm_probe.RSM.from_pairs reads"
            )
        return f"the RSMs of all images need more than memory: {self.memory}; raise it in {out / 'config.yaml'}"

    def runner(self, out: Path, execution: Execution | None = None) -> PairsRunner:
        """See `ModelStudy.runner`."""
        return PairsRunner(self, out, execution)

    def has_begun(self, out: Path) -> bool:
        """See `Study.has_begun`. With a URL, captures and pairs check their own settings."""
        if self.store is not None and is_url(self.store):
            return (out / _TABLE[1]).exists()
        return any(Path(absolute(self.store or out)).glob("captures/*/layers"))


class PairsRunner(Runner[PairsConfig]):
    """Capture every model once, then match all pairs, layer by layer.

    Afterwards the folder holds `captures/` and `pairs/` (unless `store` is given), `pairs.csv`, `pairs.json`,
    `config.yaml` and `provenance.json`.
    """

    def load_images(self) -> None:
        """Load the images of both sides."""
        self.store = absolute(self.study.store or self.folder)
        self.images = self.study.images.load_source(self.execution.progress)
        database = self.study.database
        self.database = None if database is None else database.load_source(self.execution.progress)

    def take(self, images: ImageSet) -> None:
        """Take images that are loaded, in place of `load_images`."""
        self.store = absolute(self.study.store or self.folder)
        self.images, self.database = images, None

    def images_of(self, entry: Any) -> dict[str, ImageSet | ImageLoader]:
        """See `Runner.images_of`."""
        return {"images": self.images} | ({} if self.database is None else {"database": self.database})

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """All pairs of one set, or of both sets."""
        return counts["images"] * counts["database"] if "database" in counts else super().pairs_of(counts)

    def with_left(self, models: Mapping[str, LoadedModel], plans: list[ModelPlan]) -> list[ModelPlan]:
        """See `Runner.with_left`; a model has begun once its images are captured."""
        return [replace(plan, left=self._left(plan.title)) for plan in plans]

    def plan(self) -> StudyPlan:
        """See `Runner.plan`."""
        plan = super().plan()
        done = all(model.left is not None and not model.left.pairs_of_all for model in plan.models)
        return replace(plan, finished=done and (self.folder / _TABLE[1]).exists())

    def _left(self, title: str) -> ModelLeft | None:
        """What is left of a model; None before its images are captured."""
        captures = []
        for side in [""] if self.database is None else ["", _DATABASE]:
            existing = ChunkStore.existing(self._capture_path(title, side), CAPTURE)
            if existing is None or not existing.finished:
                return None
            captures.append(Capture(existing))
        study, rows, columns, left = self.study, captures[0], captures[-1], dict[str, dict[str, int]]()
        for number, layer in enumerate(rows):
            x, y = rows[layer], None if self.database is None else columns[layer]
            left[f"{title}/{layer}"] = {
                matching: pairs_left(
                    x, y, f"{self.store}/{_pairs_path(title, number, matching)}", matching, study.centering, study.tile,
                    study.permutations, self.execution,
                )
                for matching in study.matchings
            }  # fmt: skip
        return ModelLeft(left, 0, "captured already, {pairs} pairs of all layers and matchings are left")

    def disk_seconds(self, layer: LayerCost) -> float:
        """See `Runner.disk_seconds`."""
        columns = None if self.database is None else number_of(self.database)
        return tiling_seconds(number_of(self.images), columns, layer.token_bytes, self.study.tile)

    def sizes(self, models: Sequence[ModelPlan]) -> tuple[float, float]:
        """See `Runner.sizes`; products and bounds of all pairs are stored, and permutations where asked for."""
        memory, disk = super().sizes(models)
        entries = number_of(self.images) * number_of(self.images if self.database is None else self.database)
        numbers = [16 + (2 * layer.locations if self.study.permutations else 0) for m in models for layer in m.layers]
        return memory, disk + entries * len(self.study.matchings) * sum(numbers)

    def require_cost(self, models: Sequence[ModelPlan], workers: int) -> None:
        """See `Runner.require_cost`; the limit is that of one layer and matching."""
        for model in models:
            for layer in model.layers:
                for matching in layer.pair_seconds:
                    seconds = model.matching_seconds(layer, matching, workers)
                    with naming(model.title, layer.name.partition("/")[2]):
                        require_pairs_time(self.execution, seconds, model.pairs_left(layer, matching), layer.locations)

    def compute(
        self, models: dict[str, LoadedModel], accuracies: dict[str, float], require_there: Callable[[], None]
    ) -> PairsResult:
        """Match all pairs of images for every layer of every model, and store what the report page shows."""
        result = self.match(models, require_there)
        self._store_shown(result, models)
        return result

    def match(self, models: Mapping[str, LoadedModel], require_there: Callable[[], None]) -> PairsResult:
        """Match all pairs of images for every layer of every model; see `Runner.compute`."""
        table: list[Row] = []
        for title, model in models.items():
            require_there()
            rows = self._captured(title, model, self.images, "")
            columns = None if self.database is None else self._captured(title, model, self.database, _DATABASE)
            for number, layer in enumerate(rows):
                require_there()
                table += self._layer(title, number, rows[layer], None if columns is None else columns[layer])
        require_there()
        # A run folder that holds its own pairs may be moved.
        save_table(self.folder, table, _TABLE, {"folder": self.study.store and self.store})
        return PairsResult(table, self.store)

    def _store_shown(self, result: PairsResult, models: Mapping[str, LoadedModel]) -> None:
        """Store what the page shows, unless it is there; without it if whole RSMs do not fit into memory."""
        study, first = self.study, result.table[0]
        if not self._fits(max(first["images_a"], first["images_b"])):
            return
        settings = hashlib.sha256(study.model_dump_json(exclude=set(study.execution_keys)).encode()).hexdigest()
        known = Shown.open(self.folder)
        if known is not None and known.settings == settings:
            return
        sides = [self.images] if self.database is None else [self.images, self.database]
        try:
            shown = chosen_pairs(
                result.table,
                study.kernels,
                lambda row, kernel: result.rsm(row["model"], row["layer"], row["matching"], kernel),
                lambda row: Capture.open(self._capture_path(row["model"], ""))[row["layer"]],
                self.database is None,
                study.centering,
                settings,
            )
            thumbnails, notes = thumbnails_of(shown, sides, next(iter(models.values())))
            pictures = SharedPictures.of(self.images) if self.database is None else SharedPictures()
            replace(
                shown, thumbnails=thumbnails, notes=[*shown.notes, *notes], pictures=pictures.of_images(shown.ids),
                picture=pictures.kind, composition=pictures.composition,
            ).save(self.folder)  # fmt: skip
        except RsmProbeError as error:  # the results of hours are not lost for a picture
            warnings.warn(f"the report page will have no pictures: {error}", stacklevel=2)

    def page(self) -> Page:
        """See `Study.page`."""
        table = self.open().table
        page = pairs_page(table, self.study.model_dump(), Shown.open(self.folder))
        made = {"Models": models_text(self.study.models), **certificate_of(table), **facts_of(self.folder)}
        return replace(page, command=command_of(self.folder), provenance=made)

    def _capture_path(self, title: str, side: str) -> str:
        return f"{self.store}/captures/{file_name(title)}{side}.zarr"

    def _captured(self, title: str, model: LoadedModel, images: ImageSet | ImageLoader, side: str) -> Capture:
        return capture_layers(
            model, images, self.layers(title), self._capture_path(title, side),
            self.study.dtype, self.study.batch_size, self.study.reading(), self.execution,
        )  # fmt: skip

    def _layer(self, title: str, number: int, x: CapturedLayer, y: CapturedLayer | None) -> Iterator[Row]:
        """Match the pairs of one layer by all matchings; identity comes first, because others are compared with it."""
        study, aligned = self.study, dict[str, RSM]()
        for matching in sorted(study.matchings, key=lambda name: name != "identity"):
            path = _pairs_path(title, number, matching)
            pairs = match_on_disk(
                x, y, f"{self.store}/{path}", matching, study.centering, study.tile, study.permutations, self.execution
            )
            row: Row = {
                "model": title, "layer": x.name, "matching": matching, "images_a": len(x),
                "images_b": len(x if y is None else y), "locations": x.shape[1], "channels": x.shape[2],
                "largest_gap": largest_gap(pairs),
            }  # fmt: skip
            for kernel in study.kernels if y is None and "identity" in study.matchings and self._fits(len(x)) else ():
                rsm = RSM.from_pairs(pairs, kernel)
                where = f"layer {x.name!r} of model {title!r}, matching {matching!r}, kernel {kernel!r}"
                row[f"cka_{kernel}"] = _cka(rsm, aligned.setdefault(kernel, rsm), where)
            yield {**row, "path": path}

    def _fits(self, images: int) -> bool:
        """Whether the memory budget suffices for a few whole RSMs."""
        return (4 + 2 * len(self.study.kernels)) * 8 * images**2 <= self.execution.memory_bytes

    def provenance(self) -> dict[str, Any]:
        """The number of images, and the images that were left out."""
        skipped = dict(self.images.skipped) if isinstance(self.images, ImageSet) else {}
        return {"images": self.open().table[0]["images_a"], "skipped": skipped}

    def open(self) -> PairsResult:
        """See `Study.open`."""
        table, facts = load_table(self.folder / _TABLE[1])
        return PairsResult(table, facts.get("folder") or str(self.folder))

    def figures(self) -> dict[str, Figure]:
        """Draw the RSMs of one set of images, a figure per model; see `Study.figures`."""
        result = self.open()
        if self.study.database is not None or not self._fits(result.table[0]["images_a"]):
            return {}
        layers = dict[str, dict[str, None]]()
        for row in result.table:
            layers.setdefault(row["model"], {})[row["layer"]] = None
        kernel, matchings = self.study.kernels[0], self.study.matchings
        return {
            f"rsms-{title}": pair_panels(
                partial(result.rsm, title, kernel=kernel), list(names), matchings, f"{title}: {kernel} similarity"
            )
            for title, names in layers.items()
        }


def _pairs_path(title: str, number: int, matching: str) -> str:
    """Where the pairs of a layer are, by its number, relative to the folder of all pairs."""
    return f"pairs/{file_name(title)}/{number:03d}-{file_name(matching)}.zarr"


def _cka(rsm: RSM, aligned: RSM, where: str) -> float:
    """CKA with the spatio-semantic RSM; NaN and a warning without one, as hours of pairs precede it.

    Class tokens that enter the first block, for example, are the same for all images.
    """
    try:
        return cka(rsm, aligned)
    except ComparisonError as error:
        warnings.warn(f"{where}: CKA with the spatio-semantic RSM is NaN: {error}", stacklevel=2)
        return float("nan")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
