"""Output similarity: do similar outputs go with similar representations? (paper, section 4.3, appendix E)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
from rsm_probe.paper.outputs.divergence import SAME_OUTPUTS, jensen_shannon, probabilities
from rsm_probe.paper.outputs.figures import PicturedPairs, outputs_figures
from rsm_probe.paper.outputs.page import outputs_page, shown_pairs
from rsm_probe.paper.outputs.report import outputs_report
from rsm_probe.paper.outputs.streamed import StreamedCorrelations, least_memory
from rsm_probe.paper.published_numbers import TABLE1, TABLE4_PEARSON, TABLE4_SPEARMAN, Numbers, correlation_number
from rsm_probe.paper.shown import ShownModel
from rsm_probe.paper.similarities import similarity_values
from rsm_probe.paper.similarity_rows import SimilarityRows
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
    content = staticmethod(outputs_page)

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Load the images to classify.

        Raises:
            ImageError: the images cannot be loaded, or are too few.
            CostError: not even some rows of their similarities fit into memory.
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
        """Make one row per kernel and matching, with both correlations.

        The bootstrap draws images rather than pairs, because pairs share images. All rules see the same draws.
        """
        (layer,) = subject.layers["images"].values()
        keys = list(self.rules_of(layer))
        if not keys:
            return []
        if self._streams(len(layer)):
            with _naming(subject):
                values = self._streamed(subject).values()
        else:
            values = self._in_memory(subject)
        measured = {name: self._with_intervals(name, keys, *values[measure]) for name, measure in MEASURES.items()}
        rows: list[Row] = []
        for matching, kernel in keys:
            row: Row = {
                "model": subject.title, "layer": layer.name, "locations": layer.shape[1], "kernel": kernel,
                "matching": matching, "images": len(layer),
            }  # fmt: skip
            for name, of_rules in measured.items():
                stated = correlation_number(self._paper_table(name, len(layer)), subject.source, kernel, matching)
                row |= of_rules[matching, kernel] | {f"{name}_paper": stated}
            rows.append(row | {"semantic": self.study.semantic or ""})
        return rows

    def pairs(self, subject: Subject) -> tuple[np.ndarray, dict[tuple[str, str], np.ndarray]]:
        """Compute the divergence of all pairs of images, (N, N), and their similarities by (matching, kernel)."""
        (layer,) = subject.layers["images"].values()
        with _naming(subject):  # check that the model is a classifier before hours of matching
            divergence = jensen_shannon(probabilities(self._logits(subject)))
            if np.ptp(divergence) == 0:
                raise ComparisonError(SAME_OUTPUTS)
        study = self.study
        return divergence, {
            key: similarity_values(layer, None, rule, file, study.centering, study.tile, self.execution)
            for key, rule in self.rules_of(layer).items()
            for file in [subject.folder / f"{rule.products_name}.zarr"]
        }

    def _streams(self, images: int) -> bool:
        """Whether the similarity matrices, one per rule and some more, do not fit into memory."""
        return (3 * len(self.rules) + 4) * 8 * images**2 > self.execution.memory_bytes

    def _require_memory(self, images: int) -> None:
        """Refuse image sets whose similarities do not even fit into memory some rows at a time.

        Raises:
            CostError: the rows do not fit.
        """
        needed = least_memory(images, self.study.tile)
        if self._streams(images) and needed > self.execution.memory_bytes:
            rows = "a row" if self.study.tile is None else f"{self.study.tile} rows (tile:)"
            raise CostError(
                f"similarities of all pairs of {images} images take about {format_bytes(needed)} for {rows} of them, "
                f"above memory: {self.study.memory}; raise memory:, or use fewer images (count:)"
            )

    def _streamed(self, subject: Subject) -> StreamedCorrelations:
        """The correlations of a model, computed from rows of the similarities."""
        (layer,) = subject.layers["images"].values()
        study = self.study
        with _naming(subject):
            outputs = probabilities(self._logits(subject))
        return StreamedCorrelations(
            folder=subject.folder,
            owner=subject.owner,
            images=len(layer),
            divergence=lambda start, stop: jensen_shannon(outputs[start:stop], outputs[start:]),
            rows={
                key: partial(
                    SimilarityRows, layer, rule, subject.folder / f"{rule.products_name}.zarr", study.centering,
                    study.tile, self.execution,
                )
                for key, rule in self.rules_of(layer).items()
            },
            tile=study.tile,
            repeats=study.repeats,
            seed=study.seed,
            execution=self.execution,
        )  # fmt: skip

    def _in_memory(self, subject: Subject) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Both correlations for every rule, (rules,), and in every bootstrap sample, (repeats, rules)."""
        divergence, similarities = self.pairs(subject)
        stack, study = np.stack(list(similarities.values())), self.study
        return {
            measure: (
                get_measure(measure).grid(stack, divergence[None])[:, 0],
                bootstrap_samples(stack, divergence[None], measure, study.repeats, study.seed)[:, :, 0],
            )
            for measure in MEASURES.values()
        }

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

    def _with_intervals(
        self, name: str, keys: list[tuple[str, str]], values: np.ndarray, samples: np.ndarray
    ) -> dict[tuple[str, str], Row]:
        """Compute value, interval, gain over the identity and difference of the semantic RSM for every rule.

        Args:
            name: name of the measure in the table.
            keys: matching and kernel of each rule.
            values: value of each rule, (rules,).
            samples: its values in bootstrap samples, (repeats, rules).
        """
        study, semantic = self.study, self.study.semantic
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

    def show(self, subject: Subject) -> ShownModel:
        """Count pairs by similarity and divergence."""
        return shown_pairs(self.picture(subject)) if self.shown else ShownModel({}, {})

    def picture(self, subject: Subject) -> PicturedPairs:
        """Collect divergence and similarity of all pairs; of a random sample of them, if they exceed memory."""
        (layer,) = subject.layers["images"].values()
        if self._streams(len(layer)):
            sample, values_of = self._streamed(subject).pictured()
            drawn = zip(self.rules_of(layer), values_of, strict=True)
            return PicturedPairs(subject.title, sample, {key: part for key, part in drawn if key[0] in self.shown})
        divergence, similarities = self.pairs(subject)
        triangle = np.triu_indices(len(divergence), 1)
        shown = {key: values[triangle] for key, values in similarities.items() if key[0] in self.shown}
        return PicturedPairs(subject.title, divergence[triangle], shown)


@contextmanager
def _naming(subject: Subject) -> Iterator[None]:
    """Say of which model the outputs cannot be compared.

    Raises:
        ModelError: they cannot.
    """
    try:
        yield
    except ComparisonError as error:
        raise ModelError(f"{subject.title}: {error}") from error
