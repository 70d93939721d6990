"""What a run stores for its page besides the table: facts, thumbnails, and counts of pairs on a grid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.report.page import Thumbnail
from rsm_probe.sources.images.image_set import Loaded
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.storage.files import Arrays, load_arrays

# The file of a model in its folder of intermediate results.
SHOWN = "shown.npz"
# Cells of a grid of densities along each axis.
_CELLS = 32
_FACTS, _IMAGE = "facts", "image-"


@dataclass(frozen=True)
class ShownModel:
    """What is shown of a model.

    Attributes:
        facts: all but images, as JSON holds it.
        images: key -> thumbnail.
    """

    facts: Mapping[str, Any]
    images: Mapping[str, Thumbnail]

    def pack(self) -> Arrays:
        """Convert to arrays."""
        arrays = {f"{_IMAGE}{key}": np.frombuffer(image.content, np.uint8) for key, image in self.images.items()}
        about = {key: [*image.size, image.name, image.label] for key, image in self.images.items()}
        text = json.dumps({"facts": self.facts, "images": about})
        return {_FACTS: np.frombuffer(text.encode(), np.uint8), **arrays}

    @classmethod
    def read(cls, file: Path) -> ShownModel | None:
        """Read what a run stored; None if it stored nothing.

        Raises:
            StorageError: the file is damaged.
        """
        if not file.exists():
            return None
        arrays = load_arrays(file)
        if _FACTS not in arrays:
            return None
        stored = json.loads(arrays[_FACTS][0].tobytes())
        return cls(
            stored["facts"],
            {
                key: Thumbnail(arrays[f"{_IMAGE}{key}"][0].tobytes(), (width, height), name, label)
                for key, (width, height, name, label) in stored["images"].items()
            },
        )


def seen_by(model: LoadedModel | None, image: Loaded) -> Any:
    """An image as a model sees it: after the model's own resize and crop, or as it is where there are none."""
    if model is None or not isinstance(image, Image.Image):
        return image
    pixels = model.preprocess(image)
    # Normalised pixels have to be stretched to be shown, each image by itself.
    return image if tuple(pixels.shape[-2:]) == image.size[::-1] else pixels


def pair_counts(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Count pairs of values on a grid.

    Args:
        x: first value of each pair, (P,).
        y: second value, (P,).

    Returns:
        `x` and `y`, the edges of the cells, and `counts` by column of the grid.
    """
    counts, across, up = np.histogram2d(x, y, bins=_CELLS)
    return {"x": across.tolist(), "y": up.tolist(), "counts": counts.astype(int).tolist()}


def pair_cells(counted: Mapping[str, Any], **where: Any) -> list[dict[str, Any]]:
    """The cells of a grid that hold pairs, as rows of a density chart.

    Args:
        counted: what `pair_counts` returns.
        where: further keys of every row.
    """
    across, up, counts = (np.asarray(counted[key]) for key in ("x", "y", "counts"))
    return [
        {
            "x": float(across[i]), "x2": float(across[i + 1]), "y": float(up[j]), "y2": float(up[j + 1]),
            "pairs": int(counts[i, j]), **where,
        }
        for i, j in np.argwhere(counts)
    ]  # fmt: skip
