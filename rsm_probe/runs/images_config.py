"""The images of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from rsm_probe.config import NO_CODE, Config, ConfigFolder, ConfigPath, config_path
from rsm_probe.errors import ImageError
from rsm_probe.runs.fields import IN_PYTHON, Count, Edge, Images, Seed, Share, WholeNumber
from rsm_probe.sources.images.any_images import as_images, named, require_image_set, warn_of_folder
from rsm_probe.sources.images.clips import require_clips
from rsm_probe.sources.images.folders import read_labels
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.images.pixels import in_order
from rsm_probe.sources.images.published import resized
from rsm_probe.sources.images.registry import IMAGE_SETS, named_images
from rsm_probe.sources.images_of_functions import images_in

_Key = str | int | tuple[str | int, ...] | None
# Keys of `rsm_probe.sources.composed` and `coco`, which have their defaults. Where they are left out, they are not
# stored, so that runs from before there were such keys continue.
_OPTIONS = (
    "cutouts", "backgrounds", "objects", "classes", "include", "exclude", "scale", "overlap", "jitter", "margin",
    "background", "clutter", "crowds",
)  # fmt: skip


class ImagesConfig(Config):
    """Images: an image set of the registry with its options, or a folder."""

    source: str = Field(
        min_length=1,
        description=f"{', '.join(IMAGE_SETS)}, the path of a folder, or of a .npy file with all images; "
        "file.py:function returns what rsm_probe.sources.as_images takes, and needs `--allow-code`",
    )
    split: Literal["all", "train", "test"] = Field(
        default="all",
        description="split of a set with splits, or of a folder with train/ and test/ or val/",
    )
    root: ConfigPath = Field(default="data", description="folder of a published data set")
    annotations: str = Field(
        default="EgoObjectsV1_unified_eval.json",
        description="egoobjects: the annotation file within root:; coco: the JSON file, within root: or elsewhere",
    )
    crowds: bool | None = Field(
        default=None, description="coco: count a crowd (iscrowd: 1) as one object; by default crowds are left out"
    )
    frames: Count = Field(
        default=1, description="scenes and composed: this many consecutive images show the same objects"
    )
    size: Edge | None = Field(
        default=None, description="edge in pixels; without it, images of a folder keep their size"
    )
    count: Images | None = Field(
        default=None, description="number of images; from a folder or CIFAR-100, a random sample"
    )
    seed: Seed = Field(default=0, description="seed of generated images and of the random sample")
    strict: bool = Field(default=False, description="raise an error for a broken file instead of leaving it out")
    clips: Count | None = Field(
        default=None,
        description="a folder holds folders of frames, each of which is a clip: take this many evenly spaced frames",
    )
    axes: str | None = Field(
        default=None,
        description="with clips, NCTHW or NTCHW, as the models take them; else the axes of an array, such as NHWC",
    )
    image_key: _Key = Field(
        default=None, description="file.py:function: name or index of the image within items, or a list of these"
    )
    label_key: _Key = Field(
        default=None, description="file.py:function: name or index of the label within items, or a list of these"
    )
    labels: ConfigPath | None = Field(
        default=None, description="file of lines `id,label`, without a header, in place of labels that are known"
    )

    cutouts: ConfigPath | None = Field(
        default=None, description="composed: folder of class folders with one object per file, on transparency"
    )
    backgrounds: ConfigPath | None = Field(default=None, description="composed: folder of pictures")
    objects: Count | tuple[Count, Count] | None = Field(
        default=None, description="composed: objects per image, or the smallest and largest number; by default [3, 6]"
    )
    classes: Count | None = Field(
        default=None, description="composed: use only this many classes, those with the most cut-outs"
    )
    include: str | tuple[str, ...] | None = Field(
        default=None, description="composed: globs of the classes to use, such as animals/*, where * stands for / too"
    )
    exclude: str | tuple[str, ...] | None = Field(
        default=None, description="composed: globs of the classes to leave out, such as '*cartoon*'"
    )
    scale: Share | tuple[Share, Share] | None = Field(
        default=None, description="composed: longer side of objects as a share of size, or a range; by default [.2, .4]"
    )
    overlap: Share | None = Field(
        default=None, description="composed: largest share of an object that others hide; by default .1"
    )
    jitter: Share | None = Field(
        default=None, description="composed: 0 for objects on a regular grid, to 1 for anywhere, the default"
    )
    margin: Share | None = Field(
        default=None, description="composed: share of size at each edge that objects leave free; by default .0625"
    )
    background: Literal["random", "shared", "grey"] | None = Field(
        default=None, description="composed: random (the default), one that is shared by all images, or plain grey"
    )
    clutter: WholeNumber | None = Field(
        default=None, description="composed: fragments of cut-outs beneath the objects; by default 0"
    )

    @field_validator("source")
    @classmethod
    def _beside_the_configuration(cls, source: str, info: ValidationInfo) -> str:
        file, colon, function = source.rpartition(":")
        if colon and file.endswith(".py"):
            if not (isinstance(info.context, ConfigFolder) and info.context.allow_code):
                raise ValueError(NO_CODE)
            return f"{config_path(file, info)}:{function}"
        if source not in IMAGE_SETS:
            return config_path(source, info)
        folder = getattr(info.context, "folder", None)
        beside = Path(source) if folder is None else Path(folder) / source
        warn_of_folder(source, beside if beside.is_dir() else source)
        return source

    @field_validator("annotations")
    @classmethod
    def _of_coco(cls, annotations: str, info: ValidationInfo) -> str:
        return config_path(annotations, info) if info.data.get("source") == "coco" else annotations

    @model_validator(mode="after")
    def _fitting(self) -> ImagesConfig:
        images = named_images(self.source)
        if self.source == "coco" and "annotations" not in self.model_fields_set:
            raise ValueError("annotations: coco needs the JSON file with the annotations")
        if self.strict and not images.on_disk:
            raise ValueError("strict: applies to images on disk only; an embedded set has no broken files")
        if self.split == "all" and images.requires("split"):
            raise ValueError(f"split: {self.source} needs train or test")
        if self.split != "all" and not images.takes("split"):
            raise ValueError(f"split: {self.source} has no splits; leave it out")
        if self.frames > 1 and not images.takes("frames"):
            raise ValueError(f"frames: applies to {_takers('frames')} only; for clips of a folder, write clips:")
        for key in _OPTIONS:
            if getattr(self, key) is not None and not images.takes(key):
                raise ValueError(f"{key}: applies to {_takers(key)} only")
            if getattr(self, key) is None and images.requires(key):
                raise ValueError(f"{key}: {self.source} needs it")
        code, array = self._runs_code, self.source.endswith(".npy")
        for key, fits, where in (
            ("clips", code or not (array or self.source in IMAGE_SETS), "folders of frames"),
            ("axes", code or array or self.clips is not None, "clips, .npy files and file.py:function"),
            ("image_key", code, "file.py:function"),
            ("label_key", code, "file.py:function"),
        ):
            if getattr(self, key) is not None and not fits:
                raise ValueError(f"{key}: applies to {where} only")
        if self.clips is not None:
            require_clips(self.clips, self.axes)
        elif self.axes is not None:
            in_order(self.axes, (1,) * len(self.axes))
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the keys of `_OPTIONS` that are not said."""
        return {key: value for key, value in handler(self).items() if key not in _OPTIONS or value is not None}

    @property
    def _runs_code(self) -> bool:
        return self.source.rpartition(":")[0].endswith(".py")

    def load(self, progress: bool = False) -> ImageSet:
        """Load the images, for a study that divides them into batches itself.

        Raises:
            ImageError: as `load_source`, or they come from a loader.
        """
        return require_image_set(self.load_source(progress))

    def load_source(self, progress: bool = False) -> ImageSet | ImageLoader:
        """Load the images, or make the loader that yields them in batches of its own.

        Raises:
            ImageError: a missing or empty folder, broken files with `strict`, unsuitable options, or an iterator in
                place of a loader.
        """
        images = self._load(progress)
        if isinstance(images, ImageLoader) and isinstance(images.loader, Iterator):
            raise ImageError(
                f"{images.name} is an iterator, which may not begin again, but a study looks at the first batch before "
                f"its work; give a DataLoader, or rsm_probe.sources.ImageLoader(list(batches))"
            )
        return images

    def _load(self, progress: bool) -> ImageSet | ImageLoader:
        if self.source.startswith(f"{IN_PYTHON}:"):
            raise ImageError(
                "these images were given in Python, and the configuration knows only their fingerprint; give them "
                "again: read_study(CONFIG).run(out, images=images), or figures(out, images=images)"
            )
        options = self.model_dump(exclude={"source", "labels", "image_key", "label_key"})
        with self.naming_paths(self.source, self.root, self.labels, self.cutouts, self.backgrounds):
            labels = None if self.labels is None else read_labels(self.labels)
            if not (self._runs_code or self.source.endswith(".npy")):
                images = named_images(self.source).load(path=self.source, progress=progress, **options)
                return named(images, None, labels)
            if self._runs_code:
                made = images_in(
                    self.source, labels=labels, image_key=self.image_key, label_key=self.label_key, axes=self.axes,
                    clips=self.clips,
                )  # fmt: skip
            else:
                made = as_images(self.source, labels=labels, axes=self.axes, clips=self.clips)
            if isinstance(made, ImageLoader):
                if self.count is not None or self.size is not None:
                    raise ImageError(f"count: and size: do not apply to {made.name}, which comes from a loader")
                return made
            images = made if self.count is None else made.sample(self.count, self.seed)
            return images if self.size is None else resized(images, self.size)


def _takers(key: str) -> str:
    """The image sets to which a key applies."""
    return " and ".join(name for name, images in IMAGE_SETS.items() if images.takes(key))


def number_of(images: ImageSet | ImageLoader) -> int:
    """The number of images; of a loader that does not know it, as if it had one batch or all were like the first."""
    return len(images) if isinstance(images, ImageSet) else sum(images.fresh().sizes)
