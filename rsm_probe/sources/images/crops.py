"""Pairs of overlapping crops of one image: the same content at different locations (paper, section 4.1)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.objects.item_objects import ItemObjects
from rsm_probe.sources.images.published import resized


def crop_pairs(images: ImageSet, edge: int, crop: int) -> ImageSet:
    """Cut the upper-left and the lower-left crop of each image; all upper crops come first, then all lower ones.

    The two crops share `crop` x `2 crop - edge` pixels: 64 x 44 for the paper's crops of 64 from images of 84
    (section 4.1). The paper's shifts of 20 and 100 pixels are not multiples of the strides of the networks, so the
    shared content does not yield identical tokens (appendix B).

    Args:
        images: N images. Their short side is resized to `edge`, and the rest is cropped about the centre.
        edge: edge of the resized images, in pixels.
        crop: edge of the crops, in pixels: less than `edge` and more than half of it.

    Returns:
        2 N images named `<image>/upper` and `<image>/lower`, with the labels and annotations of their images.

    Raises:
        ImageError: the crops do not overlap or cover the whole image, or an edge is out of range.
    """
    require_edge(edge, "edge")
    require_edge(crop, "crop")
    if not edge / 2 < crop < edge:
        raise ImageError(
            f"two crops of {crop} pixels overlap partly only if edge is more than {crop} and less than {2 * crop} "
            f"pixels, found {edge}"
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
        # Those of items say nothing about crops, and reading them would decode the images.
        annotations=() if isinstance(images.annotations, ItemObjects) else [*images.annotations, *images.annotations],
        content=lambda: f"{images.content()} edge={edge} crop={crop}",
    ).made_by(crop_pairs, images=images, edge=edge, crop=crop)
