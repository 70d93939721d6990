"""How well similarities separate overlapping crops from others, with intervals over the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rsm_probe.comparison.intervals import auroc, auroc_samples, d_prime, draw_weights, interval
from rsm_probe.sources.images.image_set import ImageSet

OVERLAPPING, UNRELATED, APART = "overlapping", "unrelated", "apart"


class Crops:
    """The pairs of crops within mini-batches, grouped by what the two have in common.

    Overlapping crops come from the same image, unrelated crops from different photographs. If images are known to be
    parts of photographs (`box` in their annotations, the photograph as their label), crops of two disjoint parts of
    one photograph are a third kind, "apart"; crops of overlapping parts are not used.

    Args:
        images: 2 N crops from `crop_pairs`.
        batch: images per mini-batch.
        batches: number of mini-batches; `batch` x `batches` is N.
        repeats: number of bootstrap samples. They draw photographs, because crops of one photograph are not
            independent.
        seed: seed of the samples.
        level: level of the intervals, such as 0.95.
    """

    def __init__(self, images: ImageSet, batch: int, batches: int, repeats: int, seed: int, level: float) -> None:
        count = len(images) // 2
        boxes = [note.get("box") for note in images.annotations[:count]] if images.annotations else []
        parts = bool(boxes) and all(box is not None for box in boxes)
        names = images.labels[:count] if parts else [name.rpartition("/")[0] for name in images.ids[:count]]
        photographs = np.unique(names, return_inverse=True)[1]
        rows, columns = np.triu_indices(2 * batch, 1)
        self._pairs = rows, columns
        of = np.arange(batches)[:, None] * batch
        first, second = of + rows % batch, of + columns % batch
        same = photographs[first] == photographs[second]
        self._kinds = {OVERLAPPING: first == second, UNRELATED: ~same, APART: same & (first != second)}
        if parts:
            self._kinds[APART] &= ~_overlap(np.array(boxes), first, second)
        drawn = draw_weights(int(photographs.max()) + 1, repeats, seed)
        self._weights = {
            OVERLAPPING: drawn[:, photographs[first[self._kinds[OVERLAPPING]]]],
            UNRELATED: drawn[:, photographs[first[self._kinds[UNRELATED]]]]
            * drawn[:, photographs[second[self._kinds[UNRELATED]]]],
            APART: drawn[:, photographs[first[self._kinds[APART]]]],
        }
        self._level = level
        self._batch = batch

    def values(self, similarities: np.ndarray, kind: str) -> np.ndarray:
        """Select the similarities of all pairs of a kind from RSMs (batches, 2 n, 2 n)."""
        return similarities[:, *self._pairs][self._kinds[kind]]

    def samples(self, similarities: np.ndarray, others: str) -> np.ndarray:
        """Compute the AUROC of overlapping crops against another kind for each bootstrap sample."""
        pairs = self.values(similarities, OVERLAPPING), self.values(similarities, others)
        return auroc_samples(*pairs, self._weights[OVERLAPPING], self._weights[others])

    def statistics(self, similarities: np.ndarray, samples: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Compute the columns of the table for the RSMs of a layer.

        Args:
            similarities: (batches, 2 n, 2 n): n upper crops, then n lower ones.
            samples: kind of crops, unrelated and apart -> bootstrap samples of their AUROC against it.
        """
        positive, negative, apart = (self.values(similarities, kind) for kind in (OVERLAPPING, UNRELATED, APART))
        low, high = interval(samples[UNRELATED], self._level)
        apart_low, apart_high = interval(samples[APART], self._level)
        return {
            "auroc": auroc(positive, negative), "low": low, "high": high, "d_prime": d_prime(positive, negative),
            "apart": auroc(positive, apart), "apart_low": apart_low, "apart_high": apart_high,
            **self._partners(similarities),
            "overlapping_pairs": len(positive), "unrelated_pairs": len(negative), "apart_pairs": len(apart),
        }  # fmt: skip

    def _partners(self, similarities: np.ndarray) -> dict[str, float]:
        """How often the partner of a crop is the most similar crop in its mini-batch, and the partner's mean rank."""
        crops = np.arange(2 * self._batch)
        partner = (crops + self._batch) % (2 * self._batch)
        own = similarities[:, crops, partner][:, :, None]
        others = similarities.copy()
        others[:, crops, crops] = -np.inf
        others[:, crops, partner] = -np.inf
        ranks = 1 + (others > own).sum(axis=2) + (others == own).sum(axis=2) / 2
        return {"partner_first": float((ranks == 1).mean()), "partner_rank": float(ranks.mean())}


def _overlap(boxes: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether boxes (left, top, right, bottom) share pixels."""
    a, b = boxes[first], boxes[second]
    return (np.maximum(a[..., :2], b[..., :2]) < np.minimum(a[..., 2:], b[..., 2:])).all(axis=-1)
