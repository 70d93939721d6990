"""Retrieval: do the most similar images show the same objects? (paper, section 4.2, appendix D; Tables 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import mean_interval
from rsm_probe.config import read_yaml
from rsm_probe.errors import ImageError, ModelError
from rsm_probe.execution.execution import Execution
from rsm_probe.figures import displayed
from rsm_probe.matching.matches import match
from rsm_probe.neighbours.nearest_images import find_nearest
from rsm_probe.pairs.token_sets import centred_tokens
from rsm_probe.paper.experiment import Experiment, ExperimentConfig, Subject
from rsm_probe.paper.published_numbers import retrieval_number
from rsm_probe.paper.retrieval.figures import MatchedImages, PicturedNeighbours, retrieval_figures
from rsm_probe.paper.retrieval.object_counts import SCORES
from rsm_probe.paper.retrieval.page import chosen_queries, retrieval_page, shown_neighbours
from rsm_probe.paper.retrieval.report import retrieval_report
from rsm_probe.paper.retrieval.seen_sets import DATABASE, QUERIES, SeenSets, seen_sets
from rsm_probe.paper.shown import ShownModel, seen_by
from rsm_probe.paper.similarities import nearest_images, similarity_values
from rsm_probe.paper.similarity_rules import SimilarityRule
from rsm_probe.runs.fields import Count, Distinct, Images, Seed, Share
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.pieces import once
from rsm_probe.runs.run_folder import run_folder
from rsm_probe.runs.tables import Row
from rsm_probe.similarity.kernels import RBF
from rsm_probe.sources import ImageSet, LoadedModel
from rsm_probe.sources.images.objects.counted import require_objects, with_counts
from rsm_probe.sources.images.registry import named_images
from rsm_probe.sources.models.view.region import Region
from rsm_probe.sources.models.view.views import ModelView
from rsm_probe.storage.files import Arrays

# The least share of an object's box that a model must see, where nothing else is said.
_SEEN = 0.5


class RetrievalConfig(ExperimentConfig):
    """Retrieve the most similar images of a database for each query, and score them by their objects."""

    study: Literal["retrieval"] = "retrieval"
    query_images: ImagesConfig | None = Field(
        default=None, description="where queries come from; else from images:, outside the database"
    )
    queries: Images = Field(default=200, description="number of queries")
    database_sizes: Annotated[tuple[Images, ...], Distinct] = Field(
        default=(500,),
        min_length=1,
        description="numbers of images to search; smaller databases are part of the largest, whose mean centres all",
    )
    score: Literal["f1", "iou"] = Field(
        default="f1", description="f1 of object counts by class, or iou of the classes present"
    )
    top: Count = Field(default=5, description="neighbours per query; the best of them is also reported")
    tile: Count | None = Field(
        default=None, description="images per side of a tile with its own RBF width; else one width for all pairs"
    )
    seen: Share | None = Field(
        default=None,
        description="least share of an object's box that a model must see, after its own resize and crop, for the "
        "object to count; 0 counts all; by default 0.5, and 0 for scenes and egoobjects",
    )
    exact_top: bool = Field(
        default=False,
        description="match only pairs that can be neighbours; needs one database size and no tile",
    )
    pictured: Annotated[tuple[Seed, ...], Distinct] = Field(
        default=(0,), max_length=20, description="indices of the queries whose neighbours are drawn"
    )

    execution_keys: ClassVar[frozenset[str]] = ExperimentConfig.execution_keys | {"seen"}
    on_cluster: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_search(self) -> RetrievalConfig:
        if self.exact_top and (self.tile is not None or len(self.database_sizes) > 1):
            raise ValueError("exact_top: needs a single database size and no tile:; leave out tile: or other sizes")
        if any(number >= self.queries for number in self.pictured):
            raise ValueError(f"pictured: must be below the number of queries, {self.queries}; indices start at 0")
        return self

    def as_begun(self, out: Path) -> Self:
        """See `ExperimentConfig.as_begun`. Earlier versions counted all objects."""
        study, file = super().as_begun(out), run_folder(out) / "config.yaml"
        if "seen" in self.model_fields_set or not file.is_file():
            return study
        return study.model_copy(update={"seen": read_yaml(file).get("seen", 0.0)})

    def least_seen(self, images: ImagesConfig) -> float:
        """The least share of an object's box that a model must see for the object to count."""
        if self.seen is not None:
            return self.seen
        return 0.0 if named_images(images.source).counts_all else _SEEN

    def runner(self, out: Path, execution: Execution | None = None) -> RetrievalRunner:
        """See `ModelStudy.runner`."""
        return RetrievalRunner(self, out, execution)


class RetrievalRunner(Experiment[RetrievalConfig]):
    """Finds the nearest images of every query, and scores them by shared objects."""

    report = staticmethod(retrieval_report)
    draw = staticmethod(retrieval_figures)
    content = staticmethod(retrieval_page)

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Draw queries and the largest database at random, without overlap.

        Raises:
            ImageError: there are too few images, or they have no object annotations.
        """
        study = self.study
        largest, images = max(study.database_sizes), source.load(self.execution.progress)
        rng = np.random.default_rng(study.seed)
        order = rng.permutation(len(images))
        if study.query_images is None:
            needed = study.queries + largest
            if len(images) < needed:
                raise ImageError(
                    f"{images.name} has {len(images)} images, but {study.queries} queries and a database of {largest} "
                    f"need {needed}"
                )
            drawn = with_counts(images.subset(order[:needed]))
            require_objects(drawn)
            return {
                "queries": drawn.subset(range(study.queries)),
                "database": drawn.subset(range(study.queries, needed)),
            }
        queries = study.query_images.load(self.execution.progress)
        for part, count in ((queries, study.queries), (images, largest)):
            if len(part) < count:
                raise ImageError(f"{part.name} has {len(part)} images, but {count} are requested")
        numbers = rng.permutation(len(queries))[: study.queries]
        return {
            "queries": with_counts(queries.subset(numbers)),
            "database": with_counts(images.subset(order[:largest])),
        }

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """All queries with the whole database."""
        return counts["queries"] * counts["database"]

    def compare(self, subject: Subject) -> list[Row]:
        """Make one row per layer, database size, kernel and matching."""
        sets = self.seen_sets(subject)
        queries, database = sets.queries, sets.database
        if not (np.array(videos(queries))[:, None] != np.array(videos(database))).any():
            raise ImageError(f"no query of {queries.name} has a candidate: all database images come from its own video")
        truth = SCORES[self.study.score](*class_counts([queries, database]))
        groups, as_the_paper = scenes_of(queries), self._as_the_paper(subject)
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["queries"].values()):
            neighbours = self.neighbours(subject, number)
            for size in self.study.database_sizes:
                scores = {key: _scores(truth, by_size[size]) for key, by_size in neighbours.items()}
                for matching, kernel in scores:
                    paper = float("nan")
                    if as_the_paper:
                        paper = retrieval_number(self.study.images.source, subject.source, size, kernel, matching)
                    rows.append(
                        {
                            "model": subject.title, "layer": layer.name, "locations": layer.shape[1], "database": size,
                            **self._row(scores, matching, kernel, groups), "paper": paper, "objects": sets.summary,
                        }
                    )  # fmt: skip
        self.seen(subject)
        return rows

    def seen_sets(self, subject: Subject) -> SeenSets:
        """Queries and database with the objects that the model sees, which alone count."""
        database = self.entry(subject.title).images or self.study.images
        queries = self.study.query_images or database
        return seen_sets(subject, {QUERIES: self.study.least_seen(queries), DATABASE: self.study.least_seen(database)})

    def neighbours(self, subject: Subject, number: int) -> dict[tuple[str, str], dict[int, np.ndarray]]:
        """Find the nearest images of every query.

        Args:
            subject: the model.
            number: number of its layer; the database's mean is subtracted from both sides.

        Returns:
            (matching, kernel) -> database size -> indices of the nearest images, (queries, top); -1 if there are fewer.
        """
        groups = videos(subject.images["queries"]), videos(subject.images["database"])
        neighbours: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for (matching, kernel), rule in self.rules_of(self._layers(subject, number)[0]).items():
            # All database sizes share the similarities, which are computed on first use.
            values = cache(lambda rule=rule: self._similarities(subject, number, rule))
            for size in self.study.database_sizes:
                file = subject.folder / f"{number:03d}-{matching}-{kernel}-{size}.npz"

                def search(size: int = size, rule: SimilarityRule = rule, values: Any = values) -> Arrays:
                    if self.study.exact_top and rule.matching.one_to_one and not rule.vector:
                        return {"places": self._exact(subject, number, rule, groups)}
                    return {"places": nearest_images(values()[:, :size], self.study.top, groups)}

                neighbours.setdefault((matching, kernel), {})[size] = once(file, subject.owner, search)["places"]
        return neighbours

    def seen(self, subject: Subject) -> dict[str, np.ndarray]:
        """Collect the pictured queries and their nearest images as the model sees them, uint8.

        Preprocessing crops or pads, so the locations of a layer do not correspond to the original image.

        Returns:
            `q<index>` (query) or `d<index>` (database image) -> picture (H, W) or (H, W, 3).
        """
        pictured = self.study.pictured
        if not pictured:
            return {}
        shown = {f"q{query}": ("queries", query) for query in pictured}
        neighbours = self.neighbours(subject, len(subject.layers["queries"]) - 1)
        numbers = {int(sizes[max(sizes)][query, 0]) for sizes in neighbours.values() for query in pictured}
        shown |= {f"d{number}": ("database", number) for number in sorted(numbers) if number >= 0}

        def pictures() -> Arrays:
            if subject.model is None:
                return {}
            return {key: _picture(subject.model, subject.images[name][number]) for key, (name, number) in shown.items()}

        return once(subject.folder / "pictures.npz", f"{subject.owner} {list(shown)}", pictures)

    def _layers(self, subject: Subject, number: int) -> list[CapturedLayer]:
        """The layer of that number for queries and database."""
        return [list(subject.layers[name].values())[number] for name in ("queries", "database")]

    def _similarities(self, subject: Subject, number: int, rule: SimilarityRule) -> np.ndarray:
        store, study = subject.folder / f"{number:03d}-{rule.products_name}.zarr", self.study
        x, y = self._layers(subject, number)
        return similarity_values(x, y, rule, store, study.centering, study.tile, self.execution)

    def _exact(self, subject: Subject, number: int, rule: SimilarityRule, groups: Any) -> np.ndarray:
        x, y = self._layers(subject, number)
        # The order does not depend on the width, and the median width would need all pairs to be matched.
        kernel = RBF(1.0) if isinstance(rule.kernel, RBF) else rule.kernel
        top = min(self.study.top, len(y))
        nearest_of = find_nearest(
            x, y, top, rule.matching, kernel, self.study.centering, groups, None, None, None, self.execution
        )
        return nearest_of["index"].values

    def _as_the_paper(self, subject: Subject) -> bool:
        """Whether data, queries and score are those of Table 2 or 3 in the paper."""
        study = self.study
        if subject.images["database"].name != study.images.source:
            return False
        drawn = study.query_images
        if study.images.source == "egoobjects":
            return (study.score, study.queries, drawn, study.images.split) == ("f1", 2000, None, "test")
        whole = drawn is not None and (drawn.source, drawn.split, study.images.split) == ("cityscapes", "test", "train")
        return whole and (study.score, study.queries) == ("iou", 500)

    def _row(
        self,
        scores: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
        matching: str,
        kernel: str,
        groups: Sequence[str],
    ) -> Row:
        """Make the row of one rule: its gain over the identity, and how far the semantic RSM is above it."""
        first, best = scores[matching, kernel]
        measured = {"score": first, "best": best}
        for name, against in (("gain", "identity"), ("behind", "optimal")):
            if (against, kernel) in scores:
                measured[name] = first - scores[against, kernel][0]
        semantic = self.study.semantic
        if semantic is not None:
            measured["difference"] = scores[semantic, kernel][0] - first
            measured["best_difference"] = scores[semantic, kernel][1] - best
        row: Row = {"kernel": kernel, "matching": matching}
        for name, values in measured.items():
            ends = ("low", "high") if name == "score" else (f"{name}_low", f"{name}_high")
            means = mean_interval(values, self.study.repeats, self.study.level, self.study.seed, groups)
            row |= dict(zip((name, *ends), means, strict=True))
        return row | {"queries": int((~np.isnan(first)).sum()), "semantic": semantic or ""}

    def picture(self, subject: Subject) -> PicturedNeighbours:
        """Collect the nearest images of some queries under one kernel, and the matched locations of the first."""
        return self._pictured(subject, self.study.pictured, self.seen(subject))

    def show(self, subject: Subject) -> ShownModel:
        """Collect queries with their nearest images: those of `pictured:`, and those whose score matching changes."""
        neighbours = self.neighbours(subject, len(subject.layers["queries"]) - 1)
        kernel, size = self._shown_kernel, max(self.study.database_sizes)
        of_rule = {name: neighbours[name, kernel][size] for name in self.shown if (name, kernel) in neighbours}
        sets = self.seen_sets(subject)
        truth = SCORES[self.study.score](*class_counts([sets.queries, sets.database]))
        scores = {name: _scores(truth, nearest_of)[0] for name, nearest_of in of_rule.items()}
        queries = chosen_queries(self.study.pictured, scores)

        numbers = {int(index) for nearest_of in of_rule.values() for q in queries for index in nearest_of[q]}
        wanted = {f"q{query}": (QUERIES, query) for query in queries}
        wanted |= {f"d{number}": (DATABASE, number) for number in sorted(numbers) if number >= 0}
        seen = {key: _picture(subject.model, subject.images[of][number]) for key, (of, number) in wanted.items()}
        view = None if subject.model is None else ModelView(subject.model)
        regions = {
            key: region
            for key, (of, number) in wanted.items()
            if (region := _shown_region(view, subject.images[of], number, seen[key])) is not None
        }
        return shown_neighbours(self._pictured(subject, list(queries), seen), queries, seen, regions)

    @property
    def _shown_kernel(self) -> str:
        return "cosine" if "cosine" in self.study.kernels else self.study.kernels[0]

    def _pictured(self, subject: Subject, queries: Sequence[int], seen: Mapping[str, np.ndarray]) -> PicturedNeighbours:
        """Collect the nearest images of some queries.

        Args:
            subject: the model.
            queries: indices of the queries.
            seen: see `seen`; images without one have no matched locations.
        """
        study, number = self.study, len(subject.layers["queries"]) - 1
        kernel, size = self._shown_kernel, max(study.database_sizes)
        neighbours = self.neighbours(subject, number)
        nearest_of = {(q, name): neighbours[name, kernel][size][q] for q in queries for name in self.shown}
        best = {key: self._matched(subject, *key, int(numbers[0]), seen) for key, numbers in nearest_of.items()}
        layer = list(subject.layers["queries"])[number]
        sets = self.seen_sets(subject)
        asked, database = class_counts([sets.queries, sets.database])
        truth = {q: SCORES[study.score](asked[[q]], database)[0] for q in queries}
        objects = {QUERIES: sets.queries.annotations, DATABASE: sets.database.annotations}
        return PicturedNeighbours(
            subject.title, layer, kernel, subject.images, objects, study.top, nearest_of, best, study.score,
            {key: _of_neighbours(truth[key[0]], numbers) for key, numbers in nearest_of.items()},
            self._pictured_similarities(subject, number, kernel, nearest_of),
        )  # fmt: skip

    def _pictured_similarities(
        self, subject: Subject, number: int, kernel: str, nearest_of: Mapping[tuple[int, str], np.ndarray]
    ) -> dict[tuple[int, str], np.ndarray]:
        """The similarities of pictured queries and their nearest images; none if only some pairs were matched."""
        if self.study.exact_top:
            return {}
        values = {name: self._similarities(subject, number, self.rules[name, kernel]) for name in self.shown}
        return {key: _of_neighbours(values[key[1]][key[0]], numbers) for key, numbers in nearest_of.items()}

    def _matched(
        self, subject: Subject, query: int, matching: str, index: int, seen: Mapping[str, np.ndarray]
    ) -> MatchedImages | None:
        """Match the locations of a query and its nearest image; None if they cannot be drawn."""
        x, y = self._layers(subject, -1)
        if index < 0 or x.grid is None or y.grid is None or f"d{index}" not in seen:
            return None
        tokens = [
            centred_tokens(layer, slice(number, number + 1), y, self.study.centering)[0]
            for layer, number in ((x, query), (y, index))
        ]
        matched = match(tokens[0], tokens[1], matching)
        if matched.permutation is None or matched.affinities is None:
            return None
        pictures = seen[f"q{query}"], seen[f"d{index}"]
        return MatchedImages(pictures, (x.grid, y.grid), matched.permutation, matched.affinities)


def class_counts(sets: Sequence[ImageSet]) -> list[np.ndarray]:
    """Count the objects of each class in each image, (N, K) per set, over all classes that occur in any set."""
    names = sorted({name for images in sets for note in images.annotations for name in note["counts"]})
    return [
        np.array([[note["counts"].get(name, 0) for name in names] for note in images.annotations], dtype=np.float64)
        .reshape(len(images), len(names))
        for images in sets
    ]  # fmt: skip


def videos(images: ImageSet) -> list[str]:
    """The video of each image; an image without one counts as its own video."""
    return [
        str(note.get("video") or f"image {name}") for note, name in zip(images.annotations, images.ids, strict=True)
    ]


def scenes_of(images: ImageSet) -> list[str]:
    """The scene of each image, or else its video; frames of one scene are not independent."""
    return [str(note.get("scene") or video) for note, video in zip(images.annotations, videos(images), strict=True)]


def _scores(truth: np.ndarray, nearest_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The score of the nearest image of each query, and the best score among the nearest; NaN without candidates."""
    values = np.where(nearest_of >= 0, np.take_along_axis(truth, np.maximum(nearest_of, 0), axis=1), np.nan)
    known = ~np.isnan(values).all(axis=1)
    best = np.full(len(values), np.nan)
    best[known] = np.nanmax(values[known], axis=1)
    return values[:, 0], best


def _of_neighbours(values: np.ndarray, nearest_of: np.ndarray) -> np.ndarray:
    """The values of the nearest images of a query, from those of all images (M,); NaN where candidates run out."""
    return np.where(nearest_of >= 0, values[np.maximum(nearest_of, 0)], np.nan)


def _picture(model: LoadedModel | None, image: Any) -> np.ndarray:
    """Convert an image as the model sees it to uint8."""
    return np.round(255 * displayed(seen_by(model, image))).astype(np.uint8)


def _shown_region(view: ModelView | None, images: ImageSet, index: int, picture: np.ndarray) -> Region | None:
    """The part of an image that its picture shows, in pixels of the image; None if that is not known."""
    height, width = picture.shape[:2]
    if view is None:
        return Region.of(width, height)
    try:
        region, whole = view.of_image(images, index)
    except ModelError:
        return None
    return whole if (whole.width, whole.height) == (width, height) else region
