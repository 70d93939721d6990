"""The RSMs of one moment of training, in the form in which CKA between moments is a sum of products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsm_probe.checks import listed
from rsm_probe.comparison.alignment import Estimator
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError, ImageError, LayerError
from rsm_probe.streaming.kept_rsms import BatchRsms

# What two moments have in common: layer, matching, kernel.
LayerRsm = tuple[str, str, str]


class StepRsms:
    """The RSMs of one model over all mini-batches, as rows whose inner products are HSIC.

    They take 4 bytes per pair of images of a mini-batch (ordered pairs; 8 per unordered pair), for every RSM.

    Args:
        step: of the training.
        estimator: of CKA.

    Attributes:
        step: of the training.
        keys: layer, matching and kernel of the R RSMs, in computation order; empty before the first batch.
    """

    def __init__(self, step: int, estimator: Estimator) -> None:
        self.step = step
        self.keys: list[LayerRsm] = []
        self._estimator = estimator
        self._ids: list[list[str]] = []
        self._rows: list[np.ndarray] = []
        self._exponents = np.empty(0, dtype=np.int64)

    def add(self, batch: BatchRsms) -> None:
        """Add the RSMs of one mini-batch."""
        if not self._rows:
            self.keys = [_of_key(key) for key in batch.keys]
            largest = np.abs(batch.values).max(axis=(1, 2))
            # A power of two, the same for all batches, so that squares do not overflow; CKA keeps all digits.
            self._exponents = np.where(largest > 0, np.frexp(largest)[1], 0)
        rows = self._estimator.rows(np.ldexp(batch.values, -self._exponents[:, None, None]))
        self._ids.append(list(batch.ids))
        # Each batch counts by its pairs.
        self._rows.append(rows * np.sqrt(self._estimator.divisor(batch.values.shape[1])))

    def require_same(self, other: StepRsms, what: str) -> None:
        """Refuse RSMs of other layers or images.

        Args:
            other: RSMs to compare with.
            what: their name in messages.

        Raises:
            LayerError: a layer is missing on one side.
            ComparisonError: a matching or kernel is missing in `other`.
            ImageError: images or mini-batches differ.
        """
        own, others = ({layer: None for layer, _, _ in rsms.keys} for rsms in (self, other))
        if missing := [layer for layer in others if layer not in own]:
            raise LayerError(
                f"the model has lost {_layers(missing)}, which {what} has (layers left: {listed(list(own))}); a watch "
                f"compares the same layers at all steps: name layers that last in layers="
            )
        if new := [layer for layer in own if layer not in others]:
            raise LayerError(
                f"the model has {_layers(new)}, which {what} lacks (it has {listed(list(others))}); a watch compares "
                f"the same layers at all steps: name the layers that both have in layers="
            )
        for layer, matching, kernel in self.keys:
            if (layer, matching, kernel) not in other.keys:
                raise ComparisonError(
                    f"{what} has no RSM of layer {layer!r} by {matching}/{kernel}; record what it has, or begin in "
                    f"another folder"
                )
        if self._ids != other._ids:
            raise ImageError(
                f"the images or their mini-batches differ from those of {what}; RSMs of different images cannot be "
                f"compared: give images that repeat"
            )

    def cka(self, other: StepRsms) -> np.ndarray:
        """CKA of each RSM with the same layer, matching and kernel of another moment, which has them all.

        Returns:
            Shape (R,); NaN if HSIC of an RSM with itself is not positive.
        """
        order = [other.keys.index(key) for key in self.keys]
        cross = _inner(self._rows, [rows[order] for rows in other._rows])
        own, others = _inner(self._rows, self._rows), _inner(other._rows, other._rows)[order]
        defined = (own > 0) & (others > 0)
        if self is other:
            return np.where(defined, 1.0, np.nan)
        scale = np.sqrt(np.where(defined, own, np.nan)) * np.sqrt(np.where(defined, others, np.nan))
        values: np.ndarray = cross / scale
        return values


def _layers(names: Sequence[str]) -> str:
    return f"the layer{'s' if len(names) > 1 else ''} {listed([repr(name) for name in names])}"


def _of_key(key: RsmKey) -> LayerRsm:
    return key.layer, key.matching, key.kernel


def _inner(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Inner products of the rows of two moments, summed over batches, shape (R,)."""
    sums: np.ndarray = np.sum([np.einsum("rp,rp->r", x, y) for x, y in zip(a, b, strict=True)], axis=0)
    return sums
