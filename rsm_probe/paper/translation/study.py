"""Translation sensitivity: are overlapping crops of one image similar? (paper, section 4.1, Figure 2; appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from tqdm import tqdm

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import interval
from rsm_probe.errors import ImageError
from rsm_probe.pairs.compute import rsm
from rsm_probe.paper.experiment import ExperimentConfig, Subject
from rsm_probe.paper.similarity_rules import SEMANTIC, Way, title
from rsm_probe.paper.translation.crop_statistics import OVERLAPPING, UNRELATED, Crops
from rsm_probe.paper.translation.figures import figure2, separation_figure
from rsm_probe.runs.entries import ImagesConfig
from rsm_probe.runs.fields import AtLeastTwo, Edge, Images
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row, TableResult, accuracy_line, kernel_title, markdown, shown, with_interval
from rsm_probe.sources.images.crops import crop_pairs
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.storage.files import Arrays

_INTRODUCTION = """# Translation sensitivity (paper, section 4.1, Figure 2; appendix B, Figure 7)

Two crops of {crop} x {crop} pixels of each image of {edge} x {edge}, which share {shared} x {crop} pixels; {batches}
mini-batches of {batch} images. *AUROC*: how often two overlapping crops are more similar than two crops of different
photographs, with the interval ({level:.0%}) from photographs drawn with replacement. Those are easy to tell; crops of
other parts of the same photograph share texture and light, and no pixel. The paper shows distributions and states no
number. *none*: equal locations; *PI*: permutation-invariant.
"""


class TranslationConfig(ExperimentConfig):
    """Two overlapping crops of each image; the similarities of crops of one image and of different images."""

    study: Literal["translation"] = "translation"
    edge: Edge = Field(default=84, description="of the images, in pixels")
    crop: Edge = Field(default=64, description="edge of the crops; the two share crop x (2 crop - edge) pixels")
    batch: AtLeastTwo = Field(default=10, description="images in a mini-batch, whose RSM holds twice as many crops")
    batches: Images = 20

    @model_validator(mode="after")
    def _enough_images(self) -> TranslationConfig:
        if not self.edge / 2 < self.crop < self.edge:
            raise ValueError(f"crop: two crops overlap in part from edge: / 2 to edge: {self.edge}, found {self.crop}")
        if self.images.count is not None and self.images.count < self.batch * self.batches:
            raise ValueError(f"images.count: {self.batches} batches of {self.batch} need {self.batch * self.batches}")
        if self.images.source == "photos" and self.images.size not in (None, self.edge):
            raise ValueError(f"images.size: patches are taken of edge: {self.edge} pixels; leave size: out")
        return self

    def image_sets(self, source: ImagesConfig, progress: bool) -> dict[str, ImageSet]:
        """The crops: all upper ones, then all lower ones.

        Raises:
            ImageError: too few images.
        """
        needed = self.batch * self.batches
        if source.source == "photos":
            source = source.model_copy(update={"size": self.edge, "count": source.count or needed})
        images = source.load(progress)
        if len(images) < needed:
            raise ImageError(f"{images.name} holds {len(images)} images; {self.batches} batches need {needed}")
        # In random order: neighbours in a set may be parts of one photograph, or never be.
        chosen = np.random.default_rng(self.seed).permutation(len(images))[:needed]
        return {"crops": crop_pairs(images.subset(chosen), self.edge, self.crop)}

    def compare(self, subject: Subject, progress: bool) -> list[Row]:
        """One row for each layer, kernel and matching."""
        crops = self.crops(subject.images["crops"])
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["crops"].values()):
            aligned: dict[str, tuple[float, np.ndarray]] = {}
            for (matching, kernel), way in self.ways().items():
                values = self.similarities(subject, number, layer, way, progress)
                samples = crops.samples(values, UNRELATED)
                row: Row = {"model": subject.title, "layer": layer.name, "locations": layer.shape[1], "kernel": kernel}
                row |= {"matching": matching, **crops.statistics(values, samples)}
                value, others = aligned.setdefault(kernel, (row["auroc"], samples))
                if "identity" in self.matchings:
                    row["gain"] = row["auroc"] - value
                    row["gain_low"], row["gain_high"] = interval(samples - others, self.level)
                rows.append(row)
        return rows

    def crops(self, images: ImageSet) -> Crops:
        """Which pairs of the crops overlap, and which do not."""
        return Crops(images, self.batch, self.batches, self.repeats, self.seed, self.level)

    def similarities(self, subject: Subject, number: int, layer: CapturedLayer, way: Way, progress: bool) -> np.ndarray:
        """Similarities of all crops of each mini-batch under a way, (batches, 2 n, 2 n): upper crops, then lower ones.

        Args:
            subject: the model.
            number: of the layer.
            layer: what the model answers to all crops.
            way: how two crops are compared.
            progress: show a bar.
        """
        file = subject.folder / f"{number:03d}-{way.products_name}.npz"
        with tqdm(
            desc=f"{layer.name}, {way.name}", total=self.batches, unit="batch", disable=not progress, leave=False
        ) as bar:
            known = stacked(file, subject.owner, self.batches, lambda b: self._products(layer, way, b), bar.update)
        values = [
            way.kernel(products, norms, norms, same=True)
            for products, norms in zip(known["products"], known["norms"], strict=True)
        ]
        return np.stack(values) / (layer.shape[1] if way.per_location else 1)

    def _products(self, layer: CapturedLayer, way: Way, number: int) -> Arrays:
        """Matched inner products of the crops of one mini-batch, centred by their own mean as in the paper."""
        total, part = len(layer) // 2, slice(number * self.batch, (number + 1) * self.batch)
        lower = slice(total + part.start, total + part.stop)
        tokens = torch.cat([layer.tokens(part), layer.tokens(lower)])
        tokens = tokens.mean(dim=1, keepdim=True) if way.pooled else tokens
        found = rsm(
            tokens, None, way.matching, "linear", self.centering,
            grid=None if way.pooled else layer.grid, workers=self.workers, memory=self.memory,
        )  # fmt: skip
        return {"products": found.dataset["product"].values, "norms": found.dataset["norm_a"].values}

    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """A table for each kernel: layers in rows, matchings in columns."""
        about = {key: getattr(self, key) for key in ("batches", "batch", "crop", "edge", "level")}
        about |= {"shared": 2 * self.crop - self.edge}
        parts = [_INTRODUCTION.format(**about), accuracy_line(accuracies)]
        for kernel in dict.fromkeys(of for _, of in self.ways()):
            parts.append(f"## {kernel_title(kernel)}\n")
            parts.append(self._table(result, kernel))
        return "\n".join(part for part in parts if part)

    def _table(self, result: TableResult, kernel: str) -> str:
        """Against other photographs, against the same photograph, and how often the partner is found."""
        names = [name for name, of in self.ways() if of == kernel]
        semantic = [name for name in names if name in SEMANTIC]
        lines: dict[str, list[list[Any]]] = {"others": [], "same": [], "first": []}
        for row in result.select(kernel=kernel, matching=names[0]):
            where = [row["model"], row["layer"], row["locations"]]
            found = {n: result.only(model=row["model"], layer=row["layer"], kernel=kernel, matching=n) for n in names}
            gains = [with_interval(found[name], "gain", "gain_low", "gain_high") for name in semantic]
            lines["others"].append([*where, *(with_interval(each, "auroc") for each in found.values()), *gains])
            lines["same"].append(
                [*where, *(with_interval(e, "apart", "apart_low", "apart_high") for e in found.values())]
            )
            lines["first"].append([*where, *(shown(each["partner_first"], 2) for each in found.values())])
        headings = ["model", "layer", "S", *(title(name) for name in names)]
        return "\n".join(
            [
                "AUROC against crops of other photographs:\n",
                markdown([*headings, *(f"{title(name)} - none" for name in semantic)], lines["others"]),
                "AUROC against crops of other parts of the same photograph:\n",
                markdown(headings, lines["same"]),
                "How often the partner is the most similar crop:\n",
                markdown(headings, lines["first"]),
            ]
        )

    def figures(self, out: Path) -> dict[str, Figure]:
        """Figure 2 of every model under the first kernel, and the separation by layer under each."""
        result, drawn = self.open(out), {}
        shown = [name for name in self.matchings if name == "identity" or name in SEMANTIC][:2]
        kernel = "rbf" if "rbf" in self.kernels else self.kernels[0]
        for subject in self.subjects(out) if shown else ():
            crops = self.crops(subject.images["crops"])
            panels: dict[str, dict[str, Any]] = {}
            for place, layer in enumerate(subject.layers["crops"].values()):
                for name in shown:
                    values = self.similarities(subject, place, layer, self.ways()[name, kernel], False)
                    kinds = {f"{kind} crops": crops.values(values, kind) for kind in (OVERLAPPING, UNRELATED)}
                    panels.setdefault(layer.name, {})[name] = {"rsm": values[0], "kinds": kinds}
            drawn[f"figure2-{subject.title}"] = figure2(panels, kernel)
        models = list(dict.fromkeys(row["model"] for row in result.table))
        used = dict.fromkeys(of for _, of in self.ways())
        return drawn | {f"separation-{kernel}": separation_figure(result, kernel, models) for kernel in used}
