"""Images in a configuration, and the image set that they become."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rsm_probe.config import Config
from rsm_probe.runs.fields import Count, Edge, Images, Seed
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.registry import IMAGE_SETS, named_images


class ImagesConfig(Config):
    """Which images: a set of the registry with the options that it takes, or a folder."""

    source: str = Field(min_length=1, description=f"{', '.join(IMAGE_SETS)}, or the path of a folder")
    split: Literal["all", "train", "test"] = Field(
        default="all",
        description="of a set that has splits, or of a folder that holds train/ and test/ or val/",
    )
    root: str = Field(default="data", description="the folder that holds a published data set")
    annotations: str = Field(
        default="EgoObjectsV1_unified_eval.json", description="of egoobjects: the file of annotations within root:"
    )
    frames: Count = Field(default=1, description="of scenes: this many in a row show the same digits")
    size: Edge | None = Field(default=None, description="edge in pixels; a folder's images keep theirs without")
    count: Images | None = Field(default=None, description="how many images; of a folder or CIFAR-100, a random sample")
    seed: Seed = Field(default=0, description="of drawing and sampling")
    strict: bool = Field(default=False, description="a broken file is an error instead of being left out")

    @model_validator(mode="after")
    def _fitting(self) -> ImagesConfig:
        images = named_images(self.source)
        if self.strict and not images.on_disk:
            raise ValueError("strict: is for folders; an embedded set holds no broken files")
        if self.split == "all" and images.requires("split"):
            raise ValueError(f"split: of {self.source} is train or test")
        if self.split != "all" and not images.takes("split"):
            raise ValueError(f"split: {self.source} has no splits; leave it out")
        if self.frames > 1 and not images.takes("frames"):
            names = ", ".join(name for name, named in IMAGE_SETS.items() if named.takes("frames"))
            raise ValueError(f"frames: is for {names}")
        return self

    def load(self, progress: bool = False) -> ImageSet:
        """The images.

        Raises:
            ImageError: missing or empty folder, broken files with `strict`, options that do not fit.
        """
        options = self.model_dump(exclude={"source"})
        return named_images(self.source).load(path=self.source, progress=progress, **options)
