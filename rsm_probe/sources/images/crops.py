"""Pairs of overlapping crops of one image: the same content at different locations (paper, section 4.1)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.published import resized


def crop_pairs(images: ImageSet, edge: int, crop: int) -> ImageSet:
    """Cut the upper-left and the lower-left crop of every image: first all upper ones, then all lower ones.

    The two share `crop` x `2 crop - edge` pixels: 44 x 64 for the paper's crops of 64 from images of 84 (section 4.1).
    Shifts that strides of the network do not divide, 20 or 100 pixels, keep the tokens of the two from being equal
    (appendix B).

    Args:
        images: N images; their short side is resized to `edge`, the rest cropped about the centre.
        edge: of the image, in pixels.
        crop: edge of the crops, in pixels, less than `edge` and more than half of it.

    Returns:
        2 N images named `<image>/upper` and `<image>/lower`, with the labels and annotations of their images.

    Raises:
        ImageError: crops that do not overlap, or cover the image; edges out of range.
    """
    require_edge(edge, "edge")
    require_edge(crop, "crop")
    if not edge / 2 < crop < edge:
        raise ImageError(
            f"two crops of {crop} pixels overlap in part only where the image has more than {crop} and fewer than "
            f"{2 * crop} pixels, found {edge}"
        )
    squares, count = resized(images, edge), len(images)

    def load(index: int) -> Image.Image:
        image: Any = squares[index % count]
        top = 0 if index < count else edge - crop
        return image.crop((0, top, crop, top + crop))

    return ImageSet(
        f"{images.name} (crops)",
        [f"{name}/{part}" for part in ("upper", "lower") for name in images.ids],
        load,
        labels=[*images.labels, *images.labels],
        annotations=[*images.annotations, *images.annotations],
        content=lambda: f"{images.content()} edge={edge} crop={crop}",
    )
