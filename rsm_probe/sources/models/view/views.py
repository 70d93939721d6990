"""What one model sees of images of different sizes: each size is probed once."""

from __future__ import annotations

from typing import Any

from PIL import Image

from rsm_probe.errors import ModelError
from rsm_probe.sources.images.clips import Clip
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.view.probing import seen_region
from rsm_probe.sources.models.view.region import Region


class ModelView:
    """What a model sees of images, by their size.

    Args:
        model: the model.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._preprocess = model.preprocess
        self._regions: dict[tuple[int, int], Region | ModelError] = {}

    def of_size(self, size: tuple[int, int]) -> Region:
        """What the model sees of a picture.

        Args:
            size: width and height of the picture.

        Raises:
            ModelError: see `seen_region`.
        """
        if size not in self._regions:
            try:
                self._regions[size] = seen_region(self._preprocess, size)
            except ModelError as error:
                self._regions[size] = error
        region = self._regions[size]
        if isinstance(region, ModelError):
            raise region
        return region

    def of_image(self, images: ImageSet, index: int) -> tuple[Region, Region]:
        """What the model sees of an image of a set, and the whole image.

        It sees all of a tensor, which is ready for the model. The image is loaded if its size is not known.

        Raises:
            ModelError: see `seen_region`.
            ImageError: the image cannot be loaded.
        """
        if len(images.sizes):
            width, height = map(int, images.sizes[index])
        else:
            image: Any = images[index]
            image = image.frames[0] if isinstance(image, Clip) else image
            if not isinstance(image, Image.Image):
                whole = Region.of(int(image.shape[-1]), int(image.shape[-2]))
                return whole, whole
            width, height = image.size
        return self.of_size((width, height)), Region.of(width, height)
