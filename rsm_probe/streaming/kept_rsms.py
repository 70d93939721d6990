"""RSMs of single mini-batches that a sweep keeps beside its sums."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import LayerError, did_you_mean
from rsm_probe.forward.layer_stream import layer_names
from rsm_probe.probe.facets.facet_names import matches

if TYPE_CHECKING:
    import xarray as xr


class KeptLayers:
    """The layers whose mini-batch RSMs are kept.

    Args:
        keep: names or globs.

    Attributes:
        patterns: names and globs as a list.

    Raises:
        LayerError: `keep` is neither text nor a sequence of text.
    """

    def __init__(self, keep: Any) -> None:
        names = layer_names(keep, "keep")
        self.patterns = [names] if isinstance(names, str) else names

    def __contains__(self, layer: str) -> bool:
        return any(matches(layer, pattern) for pattern in self.patterns)

    def require_among(self, layers: Collection[str]) -> None:
        """Reject names and globs that match no layer.

        Raises:
            LayerError: a pattern matches no layer; the message suggests similar names.
        """
        for pattern in self.patterns:
            if not any(layer in KeptLayers(pattern) for layer in layers):
                raise LayerError(f"keep={pattern!r} matches no layer of this sweep{did_you_mean(pattern, layers)}")


@dataclass
class BatchRsms:
    """RSMs of one mini-batch.

    Attributes:
        keys: keys of the R RSMs.
        values: similarities, shape (R, B, B), float64.
        ids: names of the B images.
        labels: labels of the B images.
    """

    keys: list[RsmKey]
    values: np.ndarray
    ids: list[str]
    labels: list[str]


def stack_rsms(batches: Sequence[BatchRsms]) -> xr.Dataset:
    """Stack the RSMs of batches, whose sizes may differ, into one array padded with NaN.

    Returns:
        `rsm` (batch, rsm, image_a, image_b) with the fields of its `RsmKey`, `image_id` and `image_label` as
        coordinates.
    """
    import xarray as xr

    size = max(batch.values.shape[1] for batch in batches)
    keys = batches[0].keys
    values = np.full((len(batches), len(keys), size, size), np.nan)
    ids, labels = np.full((len(batches), size), "", dtype=object), np.full((len(batches), size), "", dtype=object)
    for number, batch in enumerate(batches):
        count = batch.values.shape[1]
        values[number, :, :count, :count] = batch.values
        ids[number, :count], labels[number, :count] = batch.ids, batch.labels
    coordinates: dict[str, Any] = {name: ("rsm", [getattr(key, name) for key in keys]) for name in RsmKey._fields}
    return xr.Dataset(
        {"rsm": (("batch", "rsm", "image_a", "image_b"), values)},
        coords={
            **coordinates,
            "image_id": (("batch", "image_a"), ids.astype(np.str_)),
            "image_label": (("batch", "image_a"), labels.astype(np.str_)),
        },
    )


class PaddedRsms:
    """RSMs of mini-batches as one array, padded with NaN; see `stack_rsms`.

    Args:
        rsms: dimensions (batch, rsm, image_a, image_b).

    Attributes:
        keys: keys of the RSMs.
        sizes: number of images in each mini-batch.
    """

    def __init__(self, rsms: xr.DataArray) -> None:
        self._values = rsms.values
        fields = zip(*(rsms[name].values for name in RsmKey._fields), strict=True)
        self.keys = [RsmKey.from_texts(texts) for texts in fields]
        self.sizes = [int(count) for count in np.isfinite(self._values[:, 0, 0]).sum(axis=1)]

    def rsms(self, batch: int) -> np.ndarray:
        """Return the RSMs of one mini-batch of N images, (R, N, N)."""
        count = self.sizes[batch]
        return self._values[batch, :, :count, :count]
