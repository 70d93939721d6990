"""Output similarity: do similar outputs go with similar representations? (paper, section 4.3, appendix E)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rsm_probe.comparison.intervals import interval
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.statistics import bootstrap_samples
from rsm_probe.errors import ComparisonError, CostError, ImageError, ModelError, StorageError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.logits import logits
from rsm_probe.paper.experiment import Experiment, ExperimentConfig, Subject
from rsm_probe.paper.outputs.divergence import jensen_shannon, probabilities
from rsm_probe.paper.outputs.figures import PicturedPairs, outputs_figures
from rsm_probe.paper.outputs.report import outputs_report
from rsm_probe.paper.published_numbers import TABLE1, TABLE4_PEARSON, TABLE4_SPEARMAN, Numbers, correlation_number
from rsm_probe.paper.similarities import similarity_values
from rsm_probe.runs.fields import Count, Draws, Layers
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row
from rsm_probe.sources import ImageSet, LoadedModel
from rsm_probe.storage.files import Arrays

MEASURES = {"pearson": "rsa-pearson", "spearman": "rsa-spearman"}


class OutputsConfig(ExperimentConfig):
    """Correlate the divergence of class probabilities with the similarity of representations, over pairs of images."""

    study: Literal["outputs"] = "outputs"
    layers: Layers = Field(default="blocks", description="the last of these in forward order is used")
    repeats: Draws = Field(default=200, description="bootstrap samples per interval; each uses all pairs")
    tile: Count | None = Field(
        default=None, description="images per side of a tile with its own RBF width; else one width for all pairs"
    )
    paper: Literal["table1", "table4"] | None = Field(
        default=None, description="the paper's table that uses these images, to show its numbers"
    )

    def runner(self, out: Path, execution: Execution | None = None) -> OutputsRunner:
        """See `ModelStudy.runner`."""
        return OutputsRunner(self, out, execution)


class OutputsRunner(Experiment[OutputsConfig]):
    """Correlates the divergence of a classifier's outputs with the similarity of its last hidden layer."""

    report = staticmethod(outputs_report)
    draw = staticmethod(outputs_figures)

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Load the images to classify.

        Raises:
            ImageError: the images cannot be loaded, or are too few.
            CostError: their similarities do not fit into memory.
        """
        images = source.load(self.execution.progress)
        if len(images) < 4:
            raise ImageError(f"a correlation over pairs needs at least 4 images, but {images.name} has {len(images)}")
        self._require_memory(len(images))
        return {"images": images}

    def check(self, loaded: dict[str, LoadedModel]) -> None:
        """Refuse models that are not classifiers, judged by their outputs for two images.

        Raises:
            ModelError: a model is not a classifier.
        """
        for title, model in loaded.items():
            try:
                probabilities(logits(model, self.images(self.entry(title))["images"], np.arange(2)))
            except ComparisonError as error:
                raise ModelError(f"{title}: {error}") from error

    def choose_layers(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """Choose the last layer."""
        name = list(layers)[-1]
        return {name: layers[name]}

    def compare(self, subject: Subject) -> list[Row]:
        """Make one row per kernel and matching, with both correlations."""
        divergence, similarities = self.pairs(subject)
        if not similarities:
            return []
        measured = {name: self._correlations(measure, divergence, similarities) for name, measure in MEASURES.items()}
        (layer,) = subject.layers["images"].values()
        rows: list[Row] = []
        for matching, kernel in similarities:
            row: Row = {
                "model": subject.title, "layer": layer.name, "locations": layer.shape[1], "kernel": kernel,
                "matching": matching, "images": len(layer),
            }  # fmt: skip
            for name, values in measured.items():
                stated = correlation_number(self._paper_table(name, len(layer)), subject.source, kernel, matching)
                row |= values[matching, kernel] | {f"{name}_paper": stated}
            rows.append(row | {"semantic": self.study.semantic or ""})
        return rows

    def pairs(self, subject: Subject) -> tuple[np.ndarray, dict[tuple[str, str], np.ndarray]]:
        """Compute the divergence of all pairs of images, (N, N), and their similarities by (matching, kernel)."""
        (layer,) = subject.layers["images"].values()
        try:  # check that the model is a classifier before hours of matching
            divergence = jensen_shannon(probabilities(self._logits(subject)))
            if np.ptp(divergence) == 0:
                raise ComparisonError("the classifier gives the same output for all images, so there is no correlation")
        except ComparisonError as error:
            raise ModelError(f"{subject.title}: {error}") from error
        study = self.study
        return divergence, {
            key: similarity_values(layer, None, rule, file, study.centering, study.tile, self.execution)
            for key, rule in self.rules_of(layer).items()
            for file in [subject.folder / f"{rule.products_name}.zarr"]
        }

    def _require_memory(self, images: int) -> None:
        """Refuse image sets whose similarity matrices do not fit into memory.

        Raises:
            CostError: the matrices, one per rule and some more, do not fit.
        """
        needed = (3 * len(self.rules) + 4) * 8 * images**2
        if needed > self.execution.memory_bytes:
            raise CostError(
                f"{len(self.rules)} similarities of all pairs of {images} images take about {format_bytes(needed)}, "
                f"above memory: {self.study.memory}; use fewer images (count:), matchings or kernels, or raise memory:"
            )

    def _logits(self, subject: Subject) -> np.ndarray:
        """Compute the classifier's outputs for all images, (N, K) or (N, Q, K)."""
        images, model = subject.images["images"], subject.model
        size = min(self.study.batch_size, len(images))
        starts = range(0, len(images), size)

        def one_batch(number: int) -> Arrays:
            if model is None:
                raise StorageError(f"{subject.folder} has lost its logits; rerun the study to compute them again")
            # Batches are stacked and must have one size, so the last image fills up the last batch.
            numbers = np.minimum(np.arange(starts[number], starts[number] + size), len(images) - 1)
            return {"logits": logits(model, images, numbers)}

        with self.execution.bar("classifying", len(starts), "batch", leave=False) as bar:
            values = stacked(subject.folder / "logits.npz", subject.owner, len(starts), one_batch, bar.update)["logits"]
        return values.reshape(-1, *values.shape[2:])[: len(images)]

    def _correlations(
        self, measure: str, divergence: np.ndarray, similarities: Mapping[tuple[str, str], np.ndarray]
    ) -> dict[tuple[str, str], Row]:
        """Compute value, interval, gain over the identity and difference of the semantic RSM for every rule.

        The bootstrap draws images rather than pairs, because pairs share images. All rules see the same draws.
        """
        name, study, keys = measure.removeprefix("rsa-"), self.study, list(similarities)
        semantic = study.semantic
        stack = np.stack(list(similarities.values()))
        values = get_measure(measure).grid(stack, divergence[None])[:, 0]
        samples = bootstrap_samples(stack, divergence[None], measure, study.repeats, study.seed)[:, :, 0]
        rows = {}
        for number, (matching, kernel) in enumerate(keys):
            measured = {name: (values[number], samples[:, number])}
            if ("identity", kernel) in keys:
                base = keys.index(("identity", kernel))
                measured[f"{name}_gain"] = values[number] - values[base], samples[:, number] - samples[:, base]
            if semantic is not None:
                best = keys.index((semantic, kernel))
                measured[f"{name}_difference"] = values[best] - values[number], samples[:, best] - samples[:, number]
            row: Row = {}
            for key, (value, drawn) in measured.items():
                low, high = interval(drawn, study.level)
                row |= {key: float(value), f"{key}_low": low, f"{key}_high": high}
            rows[matching, kernel] = row
        return rows

    def _paper_table(self, name: str, images: int) -> Numbers:
        tables = {
            ("table1", "pearson", 2_000): TABLE1,
            ("table4", "pearson", 20_000): TABLE4_PEARSON,
            ("table4", "spearman", 20_000): TABLE4_SPEARMAN,
        }
        return tables.get((self.study.paper or "", name, images), {})

    def picture(self, subject: Subject) -> PicturedPairs:
        """Collect divergence and similarity of all pairs."""
        divergence, similarities = self.pairs(subject)
        triangle = np.triu_indices(len(divergence), 1)
        shown = {key: values[triangle] for key, values in similarities.items() if key[0] in self.shown}
        return PicturedPairs(subject.title, divergence[triangle], shown)
