"""Retrieval: does the most similar image show the same objects? (paper, section 4.2, appendix D; Tables 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import mean_interval
from rsm_probe.errors import ImageError
from rsm_probe.figures import displayed
from rsm_probe.neighbours.nearest_images import nearest
from rsm_probe.paper.experiment import ExperimentConfig, Subject
from rsm_probe.paper.published_numbers import retrieval_number
from rsm_probe.paper.retrieval.figures import retrieval_figures
from rsm_probe.paper.retrieval.object_counts import SCORES
from rsm_probe.paper.retrieval.report import retrieval_report
from rsm_probe.paper.similarities import nearest_images, similarity_values
from rsm_probe.paper.similarity_rules import Way
from rsm_probe.runs.entries import ImagesConfig
from rsm_probe.runs.fields import Count, Distinct, Images
from rsm_probe.runs.fields import Seed as Place
from rsm_probe.runs.pieces import once
from rsm_probe.runs.tables import Row, TableResult
from rsm_probe.similarity.kernels import RBF
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel


class RetrievalConfig(ExperimentConfig):
    """Each query retrieves the most similar images of a database, which are compared with it by their objects."""

    study: Literal["retrieval"] = "retrieval"
    query_images: ImagesConfig | None = Field(
        default=None, description="where queries come from; else they are drawn from images:, apart from the database"
    )
    queries: Images = Field(default=200, description="how many are drawn")
    database_sizes: Annotated[tuple[Images, ...], Distinct] = Field(
        default=(500,),
        min_length=1,
        description="how many images are searched; a smaller database is part of a larger, whose mean centres all",
    )
    score: Literal["f1", "iou"] = Field(
        default="f1", description="f1 of the objects class by class, or iou of the classes that are present"
    )
    top: Count = Field(default=5, description="neighbours among which the best is also reported")
    tile: Count | None = Field(
        default=None, description="images on each side of a tile that has its own width of an RBF kernel; else all"
    )
    exact_top: bool = Field(
        default=False,
        description="solve only the matchings that can be among the neighbours; one database size, no tile",
    )
    pictured: Annotated[tuple[Place, ...], Distinct] = Field(
        default=(0,), max_length=20, description="numbers of the queries whose neighbours are drawn"
    )

    @model_validator(mode="after")
    def _one_search(self) -> RetrievalConfig:
        if self.exact_top and (self.tile is not None or len(self.database_sizes) > 1):
            raise ValueError("exact_top: finds neighbours in one database under one width; leave out tile: or sizes")
        if any(number >= self.queries for number in self.pictured):
            raise ValueError(f"pictured: there are {self.queries} queries, numbered from 0")
        return self

    def image_sets(self, source: ImagesConfig, progress: bool) -> dict[str, ImageSet]:
        """Queries and the largest database, drawn at random without overlap.

        Raises:
            ImageError: too few images, or images of which nobody knows the objects.
        """
        largest, images = max(self.database_sizes), source.load(progress)
        _require_counts(images)
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(images))
        if self.query_images is None:
            needed = self.queries + largest
            if len(images) < needed:
                raise ImageError(
                    f"{images.name} holds {len(images)} images; {self.queries} queries and a database of {largest} "
                    f"need {needed}"
                )
            return {
                "queries": images.subset(order[: self.queries]),
                "database": images.subset(order[self.queries : needed]),
            }
        queries = self.query_images.load(progress)
        _require_counts(queries)
        for part, count in ((queries, self.queries), (images, largest)):
            if len(part) < count:
                raise ImageError(f"{part.name} holds {len(part)} images, and {count} are asked for")
        chosen = rng.permutation(len(queries))[: self.queries]
        return {"queries": queries.subset(chosen), "database": images.subset(order[:largest])}

    def compare(self, subject: Subject, progress: bool) -> list[Row]:
        """One row for each layer, database size, kernel and matching."""
        queries, database = (subject.images[name] for name in ("queries", "database"))
        if not (np.array(videos(queries))[:, None] != np.array(videos(database))).any():
            raise ImageError(
                f"no query of {queries.name} has a candidate: all images of the database are of its own video"
            )
        truth = SCORES[self.score](*class_counts([queries, database]))
        shown, as_the_paper = places_of(queries), self._as_the_paper(subject)
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["queries"].values()):
            found = self.neighbours(subject, number, progress)
            for size in self.database_sizes:
                scores = {key: _scores(truth, places[size]) for key, places in found.items()}
                about: Row = {
                    "model": subject.title,
                    "layer": layer.name,
                    "locations": layer.shape[1],
                    "database": size,
                }
                for matching, kernel in scores:
                    paper = float("nan")
                    if as_the_paper:
                        paper = retrieval_number(self.images.source, subject.source, size, kernel, matching)
                    rows.append(about | self._row(scores, (matching, kernel), shown) | {"paper": paper})
        self.seen(subject)
        return rows

    def neighbours(self, subject: Subject, number: int, progress: bool) -> dict[tuple[str, str], dict[int, np.ndarray]]:
        """(matching, kernel) -> size of the database -> places of the nearest images (queries, top), -1 where none.

        Args:
            subject: the model.
            number: of its layer; the database's mean is subtracted from both sides.
            progress: show bars.
        """
        folder = subject.folder
        queries, database = (list(subject.layers[name].values())[number] for name in ("queries", "database"))
        groups = videos(subject.images["queries"]), videos(subject.images["database"])
        found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for (matching, kernel), way in self.ways().items():
            values = cache(lambda way=way: self._similarities(folder, number, queries, database, way, progress))
            for size in self.database_sizes:
                file = folder / f"{number:03d}-{matching}-{kernel}-{size}.npz"

                def search(size: int = size, way: Way = way, values: Any = values) -> dict[str, np.ndarray]:
                    if self.exact_top and way.matching.one_to_one and not way.pooled:
                        return {"places": self._exact(queries, database, way, groups, progress)}
                    return {"places": nearest_images(values()[:, :size], self.top, groups)}

                found.setdefault((matching, kernel), {})[size] = once(file, subject.owner, search)["places"]
        return found

    def seen(self, subject: Subject) -> dict[str, np.ndarray]:
        """What the model sees of the queries that are pictured and of their nearest images, in bytes.

        Preprocessing crops or pads, so that the locations of a layer do not lie on the image itself. Keys are `q` and
        the number of a query, `d` and the place of an image in the database; each is (H, W) or (H, W, 3).
        """
        chosen = {f"q{query}": ("queries", query) for query in self.pictured}
        found = self.neighbours(subject, len(subject.layers["queries"]) - 1, False)
        places = {int(sizes[max(sizes)][query, 0]) for sizes in found.values() for query in self.pictured}
        chosen |= {f"d{place}": ("database", place) for place in sorted(places) if place >= 0}

        def shown() -> dict[str, np.ndarray]:
            if subject.model is None:
                return {}
            return {key: _picture(subject.model, subject.images[name][place]) for key, (name, place) in chosen.items()}

        owner = f"{subject.owner} {list(chosen)}"
        return once(subject.folder / "pictures.npz", owner, shown)

    def _similarities(
        self, folder: Path, number: int, x: CapturedLayer, y: CapturedLayer, way: Way, progress: bool
    ) -> np.ndarray:
        where = folder / f"{number:03d}-{way.products_name}.zarr"
        return similarity_values(
            x, y, way, where, self.centering, self.tile,
            memory=self.memory, workers=self.workers, device=self.device, progress=progress,
        )  # fmt: skip

    def _exact(self, x: CapturedLayer, y: CapturedLayer, way: Way, groups: Any, progress: bool) -> np.ndarray:
        # Only the order counts here: it does not depend on a width, and the median's would need every pair matched.
        kernel = RBF(1.0) if isinstance(way.kernel, RBF) else way.kernel
        found = nearest(
            x, y, min(self.top, len(y)), way.matching, kernel, self.centering, groups=groups,
            memory=self.memory, workers=self.workers, device=self.device, progress=progress,
        )  # fmt: skip
        return found["index"].values

    def _as_the_paper(self, subject: Subject) -> bool:
        """Whether data, queries and score are those of the paper's Table 2 or 3."""
        if subject.images["database"].name != self.images.source:
            return False
        drawn = self.query_images
        if self.images.source == "egoobjects":
            return (self.score, self.queries, drawn, self.images.split) == ("f1", 2000, None, "test")
        whole = drawn is not None and (drawn.source, drawn.split, self.images.split) == ("cityscapes", "test", "train")
        return whole and (self.score, self.queries) == ("iou", 500)

    def _row(
        self,
        scores: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
        key: tuple[str, str],
        groups: Sequence[str],
    ) -> Row:
        """What the table says of one way, with the differences to spatio-semantic and semantic retrieval."""
        matching, kernel = key
        first, best = scores[key]
        row: Row = {"kernel": kernel, "matching": matching}
        row["score"], row["low"], row["high"] = self._mean(first, groups)
        row["best"], row["best_low"], row["best_high"] = self._mean(best, groups)
        for name, against in (("gain", "identity"), ("behind", "optimal")):
            if (against, kernel) in scores:
                row[name], row[f"{name}_low"], row[f"{name}_high"] = self._mean(
                    first - scores[against, kernel][0], groups
                )
        return row | {"queries": int((~np.isnan(first)).sum())}

    def _mean(self, values: np.ndarray, groups: Sequence[str]) -> tuple[float, float, float]:
        return mean_interval(values, self.repeats, self.level, self.seed, groups)

    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """Table 2 of the paper, or Table 3 where classes are only present or absent."""
        return retrieval_report(self, result, accuracies)

    def figures(self, out: Path) -> dict[str, Figure]:
        """Figure 3, the score against the number of locations, and the neighbours of some queries."""
        return retrieval_figures(self, self.open(out), out)


def class_counts(sets: Sequence[ImageSet]) -> list[np.ndarray]:
    """How many objects of each class are in each image of some sets, (N, K) each, of all classes that occur."""
    names = sorted({name for images in sets for note in images.annotations for name in note["counts"]})
    return [
        np.array([[note["counts"].get(name, 0) for name in names] for note in images.annotations], dtype=np.float64)
        .reshape(len(images), len(names))
        for images in sets
    ]  # fmt: skip


def videos(images: ImageSet) -> list[str]:
    """The video of each image; images without one are a video of their own."""
    return [
        str(note.get("video") or f"image {name}") for note, name in zip(images.annotations, images.ids, strict=True)
    ]


def places_of(images: ImageSet) -> list[str]:
    """What each image shows: frames of one scene, or of one video, are not independent."""
    return [str(note.get("scene") or video) for note, video in zip(images.annotations, videos(images), strict=True)]


def _scores(truth: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The score of the nearest image of each query, and the best among the nearest; NaN without any candidate."""
    values = np.where(places >= 0, np.take_along_axis(truth, np.maximum(places, 0), axis=1), np.nan)
    known = ~np.isnan(values).all(axis=1)
    best = np.full(len(values), np.nan)
    best[known] = np.nanmax(values[known], axis=1)
    return values[:, 0], best


def _picture(model: LoadedModel, image: Any) -> np.ndarray:
    """An image as the model takes it, in bytes."""
    pixels = image if isinstance(image, Tensor) else model.preprocess(image)
    return np.round(255 * displayed(pixels)).astype(np.uint8)


def _require_counts(images: ImageSet) -> None:
    if len(images.annotations) != len(images) or not all("counts" in note for note in images.annotations):
        raise ImageError(
            f"nobody knows the objects in {images.name}: retrieval needs images whose annotations hold counts, such as "
            "scenes, egoobjects or cityscapes"
        )
    if not any(note["counts"] for note in images.annotations):
        raise ImageError(f"{images.name} has no object in any image, so that all images would be equal")
