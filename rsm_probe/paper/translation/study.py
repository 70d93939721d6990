"""Translation sensitivity: are overlapping crops of an image similar? (paper, section 4.1, Figure 2; appendix B)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import interval
from rsm_probe.errors import ImageError, ModelError
from rsm_probe.execution.execution import Execution
from rsm_probe.figures import displayed, thinned
from rsm_probe.matching.matches import match
from rsm_probe.pairs.compute import rsm
from rsm_probe.pairs.on_disk import largest_gap
from rsm_probe.paper.experiment import Experiment, ExperimentConfig, Subject
from rsm_probe.paper.page_parts import SIDE
from rsm_probe.paper.shown import ShownModel, seen_by
from rsm_probe.paper.similarity_rules import SimilarityRule
from rsm_probe.paper.translation.crop_statistics import APART, OVERLAPPING, UNRELATED, Crops
from rsm_probe.paper.translation.figures import PicturedCrops, translation_figures
from rsm_probe.paper.translation.page import distribution, matched_crops, translation_page
from rsm_probe.paper.translation.report import translation_report
from rsm_probe.report.thumbnails import thumbnail
from rsm_probe.runs.fields import AtLeastTwo, Edge, Images
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row
from rsm_probe.similarity.centering import subtract_mean, token_mean
from rsm_probe.sources import ImageSet, crop_pairs
from rsm_probe.sources.images.registry import named_images
from rsm_probe.sources.models.view.crops_seen import shared_pixels
from rsm_probe.storage.files import Arrays

# Images and layers whose crops are shown with their matched locations.
_SHOWN_IMAGES, _SHOWN_LAYERS = 3, 3


class TranslationConfig(ExperimentConfig):
    """Compare the similarities of overlapping crops of an image with those of crops of different images."""

    study: Literal["translation"] = "translation"
    edge: Edge = Field(default=84, description="edge of the images, in pixels")
    crop: Edge = Field(default=64, description="edge of the crops; the two share crop x (2 crop - edge) pixels")
    batch: AtLeastTwo = Field(default=10, description="images per mini-batch, whose RSM has twice as many crops")
    batches: Images = 20

    @model_validator(mode="after")
    def _enough_images(self) -> TranslationConfig:
        if not self.edge / 2 < self.crop < self.edge:
            raise ValueError(f"crop: must be above half of edge: {self.edge} and below it, found {self.crop}")
        if self.images.count is not None and self.images.count < self.batch * self.batches:
            raise ValueError(f"images.count: {self.batches} batches of {self.batch} need {self.batch * self.batches}")
        if named_images(self.images.source).cut_to_size and self.images.size not in (None, self.edge):
            raise ValueError(f"images.size: images are cut to edge: {self.edge} pixels; leave size: out")
        return self

    def runner(self, out: Path, execution: Execution | None = None) -> TranslationRunner:
        """See `ModelStudy.runner`."""
        return TranslationRunner(self, out, execution)


class TranslationRunner(Experiment[TranslationConfig]):
    """Compares the crops of each mini-batch, layer by layer."""

    report = staticmethod(translation_report)
    draw = staticmethod(translation_figures)
    content = staticmethod(translation_page)

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Load the crops: all upper ones, then all lower ones.

        Raises:
            ImageError: there are too few images.
        """
        study = self.study
        needed = study.batch * study.batches
        if named_images(source.source).cut_to_size:
            source = source.model_copy(update={"size": study.edge, "count": source.count or needed})
        images = source.load(self.execution.progress)
        if len(images) < needed:
            raise ImageError(f"{images.name} has {len(images)} images, but {study.batches} batches need {needed}")
        # Shuffle, because successive images may be parts of the same photograph more or less often than chance.
        order = np.random.default_rng(study.seed).permutation(len(images))[:needed]
        return {"crops": crop_pairs(images.subset(order), study.edge, study.crop)}

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """The pairs of crops within mini-batches."""
        crops = 2 * self.study.batch
        return self.study.batches * crops * (crops - 1) // 2

    def compare(self, subject: Subject) -> list[Row]:
        """Make one row per layer, kernel and matching."""
        crops, seen = self.crops(subject.images["crops"]), self.seen_of_crops(subject)
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["crops"].values()):
            measured: dict[tuple[str, str], Row] = {}
            samples: dict[tuple[str, str], Mapping[str, np.ndarray]] = {}
            for (matching, kernel), rule in self.rules_of(layer).items():
                values = self.similarities(subject, number, layer, rule)
                key = matching, kernel
                samples[key] = {kind: crops.samples(values, kind) for kind in (UNRELATED, APART)}
                measured[key] = {
                    "model": subject.title, "layer": layer.name, "locations": layer.shape[1], "kernel": kernel,
                    "matching": matching, **crops.statistics(values, samples[key]),
                }  # fmt: skip
            for (matching, kernel), row in measured.items():
                # All rules are drawn from the same photographs.
                for name, first, second, (value, kind) in (
                    ("gain", matching, "identity", ("auroc", UNRELATED)),
                    ("difference", self.study.semantic, matching, ("auroc", UNRELATED)),
                    ("apart_difference", self.study.semantic, matching, ("apart", APART)),
                ):
                    if first is not None and second in self.study.matchings:
                        one, other = (first, kernel), (second, kernel)
                        low, high = interval(samples[one][kind] - samples[other][kind], self.study.level)
                        row |= {
                            name: measured[one][value] - measured[other][value], f"{name}_low": low,
                            f"{name}_high": high,
                        }  # fmt: skip
                rows.append(row | {"semantic": self.study.semantic or ""} | seen)
        return rows

    def seen_of_crops(self, subject: Subject) -> Row:
        """What a model sees of two crops after its own resize and crop, in pixels of the crops; NaN if unknown."""
        values = (math.nan,) * 3
        try:
            if subject.model is not None:
                values = astuple(shared_pixels(subject.model.preprocess, self.study.edge, self.study.crop))
        except ModelError as error:
            warnings.warn(f"it is not known which pixels of both crops {subject.title} sees: {error}", stacklevel=2)
        return dict(zip(("seen_width", "seen_height", "seen_shared"), values, strict=True))

    def crops(self, images: ImageSet) -> Crops:
        """The pairs of crops that overlap, and those that do not."""
        study = self.study
        return Crops(images, study.batch, study.batches, study.repeats, study.seed, study.level)

    def similarities(self, subject: Subject, number: int, layer: CapturedLayer, rule: SimilarityRule) -> np.ndarray:
        """Compute the similarities of all crops within each mini-batch.

        Args:
            subject: the model.
            number: number of the layer.
            layer: the representations of all crops.
            rule: how two crops are compared.

        Returns:
            (batches, 2 n, 2 n): n upper crops, then n lower ones.
        """
        known = self._stored(subject, number, layer, rule)
        values = [
            rule.kernel(products, norms, norms, same=True)
            for products, norms in zip(known["products"], known["norms"], strict=True)
        ]
        return np.stack(values) / (layer.shape[1] if rule.per_location else 1)

    def _stored(self, subject: Subject, number: int, layer: CapturedLayer, rule: SimilarityRule) -> Arrays:
        """Matched products of the crops in every mini-batch, computed once."""
        file, count = subject.folder / f"{number:03d}-{rule.products_name}.npz", self.study.batches
        with self.execution.bar(f"{layer.name}, {rule.name}", count, "batch", leave=False) as bar:
            return stacked(file, subject.owner, count, lambda b: self._products(layer, rule, b), bar.update)

    def _products(self, layer: CapturedLayer, rule: SimilarityRule, number: int) -> Arrays:
        """Compute matched products of the crops in one mini-batch, centred by its own mean as in the paper."""
        study = self.study
        upper, lower = self._mini_batch(layer, number)
        if rule.vector in ("", "mean"):
            tokens = torch.cat([layer.tokens(upper), layer.tokens(lower)])
            tokens = tokens.mean(dim=1, keepdim=True) if rule.vector else tokens
        else:
            tokens = torch.cat([layer.vectors(rule.vector, part) for part in (upper, lower)])[:, None].float()
        pairs = rsm(
            tokens, None, rule.matching, "linear", study.centering,
            grid=None if rule.vector else layer.grid, workers=study.workers, memory=study.memory,
        ).dataset  # fmt: skip
        gap = np.array(largest_gap(pairs))
        return {"products": pairs["product"].values, "norms": pairs["norm_a"].values, "gap": gap}

    def gaps(self, subject: Subject) -> dict[str, float]:
        """See `Experiment.gaps`; products of earlier versions come without."""
        gaps: dict[str, float] = {}
        for number, layer in enumerate(subject.layers["crops"].values()):
            for rule in {rule.products_name: rule for rule in self.rules_of(layer).values()}.values():
                stored = self._stored(subject, number, layer, rule).get("gap", np.array(np.nan))
                gaps[rule.name] = float(np.maximum(gaps.get(rule.name, 0.0), stored.max()))
        return {name: gap for name, gap in gaps.items() if not math.isnan(gap)}

    def _mini_batch(self, layer: CapturedLayer, number: int) -> tuple[slice, slice]:
        """The upper and the lower crops of a mini-batch."""
        batch, total = self.study.batch, len(layer) // 2
        upper = slice(number * batch, (number + 1) * batch)
        return upper, slice(total + upper.start, total + upper.stop)

    def show(self, subject: Subject) -> ShownModel:
        """Collect distributions of similarities, and the first crops with their matched locations."""
        images, crops, distributions = subject.images["crops"], self.crops(subject.images["crops"]), []
        for number, layer in enumerate(subject.layers["crops"].values()):
            for (matching, kernel), rule in self.rules_of(layer).items():
                if matching in self.shown:
                    values = self.similarities(subject, number, layer, rule)
                    distributions += [
                        distribution(of_kind, layer=layer.name, matching=matching, kernel=kernel, kind=f"{kind} crops")
                        for kind in (OVERLAPPING, UNRELATED, APART)
                        if (of_kind := crops.values(values, kind)).size
                    ]
        count = min(_SHOWN_IMAGES, self.study.batch)
        numbers = {f"upper{k}": k for k in range(count)} | {f"lower{k}": len(images) // 2 + k for k in range(count)}
        pictures = {
            key: thumbnail(seen_by(subject.model, images[number]), images.ids[number], str(images.labels[number]), SIDE)
            for key, number in numbers.items()
        }
        return ShownModel({"distributions": distributions, "crops": self._matched_crops(subject, count)}, pictures)

    def _matched_crops(self, subject: Subject, count: int) -> list[dict[str, Any]]:
        """The matched locations of the first crops, in some layers that have a grid."""
        study, seen, pairs = self.study, self.seen_of_crops(subject), []
        layers = [
            layer for layer in subject.layers["crops"].values() if layer.grid is not None and len(layer.grid) == 2
        ]
        whole = (seen["seen_width"], seen["seen_height"]) == (study.crop, study.crop)
        for layer in thinned(layers, _SHOWN_LAYERS):
            assert layer.grid is not None
            parts = self._mini_batch(layer, 0)
            tokens = torch.cat([layer.tokens(part) for part in parts]).float()
            if study.centering is not None:
                tokens = subtract_mean(tokens, token_mean(tokens, study.centering))
            shift = (study.edge - study.crop) * layer.grid[0] / study.crop if whole else None
            semantic = [name for name in self.shown if name != "identity"]
            for number, name in itertools.product(range(count), semantic):
                matched = match(tokens[number], tokens[study.batch + number], name, grid=layer.grid)
                if matched.permutation is None or matched.affinities is None:
                    continue
                crops = matched_crops(layer.name, name, layer.grid, matched.permutation, matched.affinities, shift)
                pairs.append({**crops, "pair": number})
        return pairs

    def picture(self, subject: Subject) -> PicturedCrops:
        """Collect two crops, the RSM of the first mini-batch and the similarities of all, under one kernel."""
        images, study = subject.images["crops"], self.study
        kernels, crops = study.kernels, self.crops(images)
        kernel = "rbf" if "rbf" in kernels else kernels[0]
        rsms, kinds = dict[tuple[str, str], np.ndarray](), dict[tuple[str, str], dict[str, np.ndarray]]()
        for number, layer in enumerate(subject.layers["crops"].values()):
            for name in self.shown:
                values = self.similarities(subject, number, layer, self.rules[name, kernel])
                rsms[layer.name, name] = values[0]
                kinds[layer.name, name] = {f"{k} crops": crops.values(values, k) for k in (OVERLAPPING, UNRELATED)}
        upper, lower = (displayed(images[number]) for number in (0, len(images) // 2))
        # The lower end of the upper crop is the upper end of the lower one.
        rows = 2 * study.crop - study.edge
        shared = (0, study.crop - rows, study.crop, study.crop), (0, 0, study.crop, rows)
        return PicturedCrops(subject.title, kernel, rsms, kinds, (upper, lower), shared)
