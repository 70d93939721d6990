"""The images of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rsm_probe.config import Config, ConfigPath, config_path
from rsm_probe.errors import ImageError
from rsm_probe.runs.fields import IN_PYTHON, Count, Edge, Images, Seed
from rsm_probe.sources.images.any_images import warn_of_folder
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.registry import IMAGE_SETS, named_images


class ImagesConfig(Config):
    """Images: an image set of the registry with its options, or a folder."""

    source: str = Field(min_length=1, description=f"{', '.join(IMAGE_SETS)}, or the path of a folder")
    split: Literal["all", "train", "test"] = Field(
        default="all",
        description="split of a set with splits, or of a folder with train/ and test/ or val/",
    )
    root: ConfigPath = Field(default="data", description="folder of a published data set")
    annotations: str = Field(
        default="EgoObjectsV1_unified_eval.json", description="egoobjects: the annotation file within root:"
    )
    frames: Count = Field(default=1, description="scenes: this many consecutive scenes show the same digits")
    size: Edge | None = Field(
        default=None, description="edge in pixels; without it, images of a folder keep their size"
    )
    count: Images | None = Field(
        default=None, description="number of images; from a folder or CIFAR-100, a random sample"
    )
    seed: Seed = Field(default=0, description="seed of generated images and of the random sample")
    strict: bool = Field(default=False, description="raise an error for a broken file instead of leaving it out")

    @field_validator("source")
    @classmethod
    def _beside_the_configuration(cls, source: str, info: ValidationInfo) -> str:
        if source not in IMAGE_SETS:
            return config_path(source, info)
        folder = getattr(info.context, "folder", None)
        warn_of_folder(source, source if folder is None else Path(folder) / source)
        return source

    @model_validator(mode="after")
    def _fitting(self) -> ImagesConfig:
        images = named_images(self.source)
        if self.strict and not images.on_disk:
            raise ValueError("strict: applies to images on disk only; an embedded set has no broken files")
        if self.split == "all" and images.requires("split"):
            raise ValueError(f"split: {self.source} needs train or test")
        if self.split != "all" and not images.takes("split"):
            raise ValueError(f"split: {self.source} has no splits; leave it out")
        if self.frames > 1 and not images.takes("frames"):
            names = ", ".join(name for name, named in IMAGE_SETS.items() if named.takes("frames"))
            raise ValueError(f"frames: applies to {names} only")
        return self

    def load(self, progress: bool = False) -> ImageSet:
        """Load the images.

        Raises:
            ImageError: a missing or empty folder, broken files with `strict`, or unsuitable options.
        """
        if self.source.startswith(f"{IN_PYTHON}:"):
            raise ImageError(
                "these images were given in Python, and the configuration knows only their fingerprint; give them "
                "again: read_study(CONFIG).run(out, images=images)"
            )
        options = self.model_dump(exclude={"source"})
        with self.naming_paths(self.source, self.root):
            return named_images(self.source).load(path=self.source, progress=progress, **options)
