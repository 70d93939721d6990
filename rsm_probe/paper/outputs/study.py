"""Output similarity: are images alike inside that a classifier answers alike? (paper, section 4.3, appendix E)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field
from tqdm import tqdm

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import interval
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.statistics import bootstrap_samples
from rsm_probe.errors import ComparisonError, CostError, ImageError, ModelError, StorageError
from rsm_probe.execution.amounts import format_bytes, parse_bytes
from rsm_probe.paper.experiment import ExperimentConfig, Subject
from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities
from rsm_probe.paper.outputs.report import outputs_figures, outputs_report
from rsm_probe.paper.published_numbers import TABLE1, TABLE4_PEARSON, TABLE4_SPEARMAN, Numbers, correlation_number
from rsm_probe.paper.similarities import similarity_values
from rsm_probe.paper.similarity_rules import Way
from rsm_probe.runs.entries import ImagesConfig
from rsm_probe.runs.fields import Count, Draws, Layers
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row, TableResult
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.logits import logits
from rsm_probe.storage.files import Arrays

MEASURES = {"pearson": "rsa-pearson", "spearman": "rsa-spearman"}


class OutputsConfig(ExperimentConfig):
    """The divergence of class probabilities of image pairs against the similarity of their representations."""

    study: Literal["outputs"] = "outputs"
    layers: Layers = Field(default="blocks", description="the last of these in forward order is the last hidden layer")
    repeats: Draws = Field(default=200, description="bootstrap samples of each interval; each sees all pairs")
    tile: Count | None = Field(
        default=None, description="images on each side of a tile that has its own width of an RBF kernel; else all"
    )
    paper: Literal["table1", "table4"] | None = Field(
        default=None, description="the table of the paper whose images these are, for its numbers beside these"
    )

    def image_sets(self, source: ImagesConfig, progress: bool) -> dict[str, ImageSet]:
        """The images that are classified.

        Raises:
            ImageError: they cannot be had, or are too few.
            CostError: their similarities do not fit into memory.
        """
        images = source.load(progress)
        if len(images) < 4:
            raise ImageError(f"a correlation over pairs needs at least 4 images, and {images.name} has {len(images)}")
        self._require_memory(len(images))
        return {"images": images}

    def check_model(self, title: str, model: LoadedModel, sets: Mapping[str, ImageSet]) -> None:
        """Refuses what is not a classifier, by its answers to two images.

        Raises:
            ModelError: it is none.
        """
        try:
            probabilities(logits(model, sets["images"], np.arange(2)))
        except ComparisonError as error:
            raise ModelError(f"{title}: {error}") from error

    def choose_layers(self, layers: Mapping[str, CapturedLayer]) -> dict[str, CapturedLayer]:
        """The last one."""
        name = list(layers)[-1]
        return {name: layers[name]}

    def compare(self, subject: Subject, progress: bool) -> list[Row]:
        """One row for each kernel and matching, with both correlations."""
        divergence, found = self.pairs(subject, progress)
        measured = {name: self._correlations(measure, divergence, found) for name, measure in MEASURES.items()}
        (layer,) = subject.layers["images"].values()
        rows: list[Row] = []
        for matching, kernel in found:
            row: Row = {"model": subject.title, "layer": layer.name, "locations": layer.shape[1], "kernel": kernel}
            row |= {"matching": matching, "images": len(layer)}
            for name, values in measured.items():
                row |= values[matching, kernel]
                table = self._paper_table(name, len(layer))
                row[f"{name}_paper"] = correlation_number(table, subject.source, kernel, matching)
            rows.append(row)
        return rows

    def pairs(self, subject: Subject, progress: bool) -> tuple[np.ndarray, dict[tuple[str, str], np.ndarray]]:
        """The divergence of all pairs of images, (N, N), and their similarities by (matching, kernel)."""
        (layer,) = subject.layers["images"].values()
        try:  # before hours of matching: whether the model is a classifier at all
            divergence = jensen_shannon(probabilities(self._logits(subject, progress)))
            if np.ptp(divergence) == 0:
                raise ComparisonError("the classifier answers all images alike; nothing correlates with such answers")
        except ComparisonError as error:
            raise ModelError(f"{subject.title}: {error}") from error
        return divergence, {
            key: self._similarities(subject.folder, layer, way, progress) for key, way in self.ways().items()
        }

    def _require_memory(self, images: int) -> None:
        """Refuses sets whose whole matrices, one for each way and some more, do not fit.

        Raises:
            CostError: they do not.
        """
        needed = (3 * len(self.ways()) + 4) * 8 * images**2
        if needed > parse_bytes(self.memory):
            raise CostError(
                f"{len(self.ways())} similarities of all pairs of {images} images take about {format_bytes(needed)}, "
                f"above memory: {self.memory}; take fewer images (count:), fewer matchings or kernels, or raise memory:"
            )

    def _similarities(self, folder: Path, layer: CapturedLayer, way: Way, progress: bool) -> np.ndarray:
        return similarity_values(
            layer, None, way, folder / f"{way.products_name}.zarr", self.centering, self.tile,
            memory=self.memory, workers=self.workers, device=self.device, progress=progress,
        )  # fmt: skip

    def _logits(self, subject: Subject, progress: bool) -> np.ndarray:
        """What the classifier answers to every image, (N, K) or (N, Q, K)."""
        images, model = subject.images["images"], subject.model
        size = min(self.batch_size, len(images))
        starts = range(0, len(images), size)

        def one_batch(number: int) -> Arrays:
            # Batches are stacked, so that all of them are of one size: the last one is filled up with its last image.
            places = np.minimum(np.arange(starts[number], starts[number] + size), len(images) - 1)
            if model is None:
                raise StorageError(f"{subject.folder} has lost its logits; run the study again, it continues")
            return {"logits": logits(model, images, places)}

        with tqdm(desc="classifying", total=len(starts), unit="batch", disable=not progress, leave=False) as bar:
            values = stacked(subject.folder / "logits.npz", subject.owner, len(starts), one_batch, bar.update)["logits"]
        return values.reshape(-1, *values.shape[2:])[: len(images)]

    def _correlations(
        self, measure: str, divergence: np.ndarray, found: Mapping[tuple[str, str], np.ndarray]
    ) -> dict[tuple[str, str], Row]:
        """Value, interval and difference to the identity under every way.

        Pairs share images, so that images are drawn with replacement, and not pairs; all ways see the same draws.
        """
        name = measure.removeprefix("rsa-")
        stack = np.stack(list(found.values()))
        values = get_measure(measure).grid(stack, divergence[None])[:, 0]
        samples = bootstrap_samples([(stack, divergence[None])], measure, self.repeats, self.seed)[:, :, 0]
        keys, rows = list(found), {}
        for number, (matching, kernel) in enumerate(keys):
            low, high = interval(samples[:, number], self.level)
            row: Row = {name: float(values[number]), f"{name}_low": low, f"{name}_high": high}
            if ("identity", kernel) in found:
                other = keys.index(("identity", kernel))
                row[f"{name}_gain"] = float(values[number] - values[other])
                ends = interval(samples[:, number] - samples[:, other], self.level)
                row[f"{name}_gain_low"], row[f"{name}_gain_high"] = ends
            rows[matching, kernel] = row
        return rows

    def _paper_table(self, name: str, images: int) -> Numbers:
        tables = {
            ("table1", "pearson", 2_000): TABLE1,
            ("table4", "pearson", 20_000): TABLE4_PEARSON,
            ("table4", "spearman", 20_000): TABLE4_SPEARMAN,
        }
        return tables.get((self.paper or "", name, images), {})

    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """Tables 1 and 4 of the paper, as measured."""
        return outputs_report(self, result, accuracies)

    def figures(self, out: Path) -> dict[str, Figure]:
        """Divergence against similarity, a figure for each model, and all correlations."""
        return outputs_figures(self, self.open(out), out)
