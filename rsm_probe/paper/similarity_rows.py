"""Similarities of captured images under a rule, some rows at a time: all pairs need not fit into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.errors import ComparisonError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.pairs.compute import rsm
from rsm_probe.pairs.on_disk import match_on_disk
from rsm_probe.paper.similarities import vectors_of
from rsm_probe.paper.similarity_rules import SimilarityRule, in_tiles
from rsm_probe.similarity import Centering
from rsm_probe.similarity.centering import subtract_mean, token_mean
from rsm_probe.similarity.kernels import RBF, NarrowRBF, squared_distances


class SimilarityRows:
    """The similarities of the images of a layer with each other; values are those of `similarity_values`.

    Products of locations are matched when this is made, and stored on disk.

    Args:
        layer: the images.
        rule: how two images are compared.
        store: a folder for matched products, from which an interrupted call resumes; vectors are stored beside it.
        centering: see `rsm_probe.rsm`.
        tile: see `in_tiles`; rows then begin at multiples of it.
        execution: how pairs are matched.

    Attributes:
        needs_median: whether `block` gives squared distances, from which `of_distances` makes similarities once their
            median over all pairs is known.
    """

    def __init__(
        self,
        layer: CapturedLayer,
        rule: SimilarityRule,
        store: Path,
        centering: Centering | None,
        tile: int | None,
        execution: Execution,
    ) -> None:
        self._layer, self._rule, self._tile = layer, rule, tile
        self.needs_median = rule.kernel.needs_width and tile is None
        if rule.vector:
            vectors = vectors_of(layer, rule, store.with_name(f"{store.stem}-x.npz"))
            self._vectors = vectors if centering is None else subtract_mean(vectors, token_mean(vectors, centering))
        else:
            self._pairs = match_on_disk(layer, None, store, rule.matching, centering, None, False, execution)

    def block(self, start: int, stop: int) -> np.ndarray:
        """Similarities, or squared distances, of images `start` to `stop` with all images from `start` on.

        Returns:
            Shape (stop - start, N - start), float64.

        Raises:
            ComparisonError: products are not finite.
            StorageError: a tile is damaged.
        """
        products, rows, columns = self._products(start, stop)
        if not np.isfinite(products).all():
            raise ComparisonError(
                f"layer {self._layer.name}: products of some images are not finite: its values are too large"
            )
        if self.needs_median:
            return squared_distances(products, rows, columns)
        values = in_tiles(self._rule.kernel, products, (rows, columns), True, self._tile)
        return values / self._layer.shape[1] if self._rule.per_location else values

    def of_distances(self, distances: np.ndarray, median: float) -> np.ndarray:
        """Convert squared distances of any shape to similarities; see `needs_median`."""
        return (RBF(median) if median else NarrowRBF()).of_distances(distances)

    def _products(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Products of a block of rows, and the squared norms of its rows and columns."""
        if self._rule.vector:
            pairs = rsm(self._vectors[start:stop], self._vectors[start:], self._rule.matching, "linear").dataset
        else:
            pairs = self._pairs.isel(image_a=slice(start, stop), image_b=slice(start, None))
        try:
            return pairs["product"].values, pairs["norm_a"].values, pairs["norm_b"].values
        except (OSError, ValueError, RuntimeError) as error:
            raise StorageError(
                f"a tile of the pairs of {self._layer.name} is damaged ({error}); run the study again: only that tile "
                f"is recomputed"
            ) from error
