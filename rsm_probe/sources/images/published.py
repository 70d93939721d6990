"""Published data sets, read from disk: CIFAR-100, and class folders such as those of ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.clips import Clip
from rsm_probe.sources.images.folders import folder, folder_of_clips
from rsm_probe.sources.images.image_set import ImageSet, Loaded, Targets
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.objects.item_objects import ItemObjects
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.images.pixels import to_rgb

# Possible names of the folder of each split; the first one that exists is used.
_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
# Tiny-ImageNet lists the classes of its validation images in this file, instead of using class folders.
_ANNOTATIONS = "val_annotations.txt"


def cifar100(root: str | Path, split: str, count: int | None = None, seed: int = 0) -> ImageSet:
    """Read CIFAR-100: 32 x 32 images of 100 classes. Labels are class names, targets class numbers.

    Args:
        root: the folder that holds `cifar-100-python` with the files train, test and meta.
        split: "train" (50 000 images) or "test" (10 000).
        count: size of a random sample; None for the whole split.
        seed: seed of the sample.

    Raises:
        ImageError: the split is unknown, or files are missing or damaged; the message says where to get them.
    """
    from torchvision.datasets import CIFAR100

    look_up(split, _SPLITS, "split", ImageError)
    root = Path(root).expanduser().absolute()
    # The files are pickles, which could run any code. torchvision reads them only after checking their MD5 sums against
    # those of the published files.
    try:
        data = CIFAR100(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise ImageError(
            f"no intact CIFAR-100 in {root}: download {CIFAR100.url} and unpack it there, so that the files train, "
            f"test and meta are in {root / CIFAR100.base_folder}"
        ) from error
    numbers = np.asarray(data.targets)
    images = ImageSet(
        "cifar100",
        [f"{split}-{k:05d}" for k in range(len(numbers))],
        lambda index: Image.fromarray(data.data[index]),
        labels=[data.classes[number] for number in numbers],
        targets=Targets(numbers[:, None], len(data.classes)),
    ).made_by(cifar100, root=str(root), split=split)
    return images if count is None else images.sample(count, seed)


def class_folders(
    path: str | Path,
    split: str,
    count: int | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: bool = False,
    strict: bool = False,
) -> ImageSet:
    """Read images in one folder per class, laid out like ImageNet or Tiny-ImageNet.

    Labels are the names of the class folders, targets their alphabetical ranks. Images keep their own sizes; see
    `resized`.

    Args:
        path: the folder that holds `train/<class>/` and, with the same classes, `test`, `val` or `validation`.
            Tiny-ImageNet is read as published: `val/images/` with `val/val_annotations.txt`; its unlabelled `test` is
            ignored.
        split: "train", or "test" for the first of `test`, `val` and `validation` that exists.
        count: size of a random sample; None for all images.
        seed: seed of the sample.
        verify: read every file once now and leave out broken ones; see `folder`.
        progress: show a progress bar while reading.
        strict: raise an error if files are broken, instead of leaving them out.

    Raises:
        ImageError: the split is unknown, a folder is missing, images have no class, or (strict) files are broken.
    """
    root = Path(path).expanduser()
    candidates = [root / name for name in look_up(split, _SPLITS, "split", ImageError)]
    split_folder = next((candidate for candidate in candidates if _has_classes(candidate)), None)
    if split_folder is None:
        looked = ", ".join(str(candidate / "<class>") for candidate in candidates)
        raise ImageError(f"no {split} images in {root}: looked for the class folders {looked}")
    images = _by_class(folder(split_folder, strict=strict, verify=verify, progress=progress), split_folder)
    return images if count is None else images.sample(count, seed)


def _by_class(images: ImageSet, path: str | Path) -> ImageSet:
    """Name and label the images of a split by its class folders.

    Args:
        images: all images of the folder.
        path: the folder of the split.

    Raises:
        ImageError: images have no class.
    """
    split_folder = Path(path)
    annotations = split_folder / _ANNOTATIONS
    folders = [name.rpartition("/")[0] for name in images.ids]
    labels = _annotated_classes(annotations, images.ids) if annotations.is_file() else folders
    # Tiny-ImageNet has a folder `images` between each class and its images.
    labels = [label.partition("/")[0] for label in labels]
    if "" in labels:
        image = split_folder / images.ids[labels.index("")]
        raise ImageError(f"{image} is not in a class folder; move it into one, or remove it")
    classes, values = np.unique(labels, return_inverse=True)
    name = f"{split_folder.absolute().parent.name}/{split_folder.name}"
    classed = images.changed(name=name, labels=labels, targets=Targets(values[:, None], len(classes)))
    return classed.made_by(_by_class, images=images, path=absolute_path(split_folder))


def image_folder(
    path: str | Path,
    split: str = "all",
    strict: bool = False,
    verify: bool = True,
    progress: bool = False,
    clips: int | None = None,
    axes: str | None = None,
) -> ImageSet:
    """Read all images of a folder (see `folder`), or one split of its class folders (see `class_folders`).

    Args:
        path: the folder.
        split: "all", "train" or "test".
        strict: raise an error if files are broken, instead of leaving them out.
        verify: read every file once now.
        progress: show a progress bar while reading.
        clips: read folders of frames as clips of this many frames; see `folder_of_clips`.
        axes: the order in which models take a batch of clips.

    Raises:
        ImageError: see `folder`, `folder_of_clips` and `class_folders`; or `clips` and a split are given.
    """
    if clips is not None:
        if split != "all":
            raise ImageError(
                f"clips do not go with split={split!r}; give the folder of the split, {Path(path) / split}"
            )
        return folder_of_clips(path, clips, axes, strict=strict, verify=verify, progress=progress)
    if split == "all":
        return folder(path, strict=strict, verify=verify, progress=progress)
    return class_folders(path, split, strict=strict, verify=verify, progress=progress)


def resized(images: ImageSet, size: int) -> ImageSet:
    """Resize images to a short side of `size` pixels, and crop them to `size` x `size` about the centre.

    Boxes of annotations follow; those of objects that are cropped away end up beyond the edges of the image.

    Raises:
        ImageError: the size is out of range. Images that are tensors raise it when they are loaded.
    """
    require_edge(size)

    def load(index: int) -> Image.Image | Clip:
        image = images.extract(images.load(index))
        if isinstance(image, Clip):
            return Clip([fitted(frame) for frame in image.frames], image.axes)
        return fitted(image)

    def fitted(image: Image.Image | Tensor) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise ImageError(f"only PIL images can be resized, but {images.name} holds tensors")
        return ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)

    smaller = images.changed(
        load=load,
        extract=_as_loaded,
        annotations=_resized_boxes(images, size),
        sizes=[(size, size)] * len(images) if len(images.sizes) else (),
        content=lambda: f"{images.content()} size={size}",
    )
    return smaller.made_by(resized, images=images, size=size)


def _resized_boxes(images: ImageSet, size: int) -> Sequence[Mapping[str, Any]]:
    """The annotations of resized images; images of unknown size are loaded when the annotation is asked for."""
    notes = images.annotations
    if not isinstance(notes, ItemObjects) and not any("boxes" in note for note in notes):
        return notes

    def note(index: int) -> Mapping[str, Any]:
        own = notes[index]
        if not own.get("boxes"):
            return own
        if len(images.sizes):
            width, height = images.sizes[index]
        else:
            image: Any = images[index]
            width, height = image.size
        # As `PIL.ImageOps.fit` crops.
        side = min(width, height)
        scale, left, top = size / side, (width - side) / 2, (height - side) / 2
        boxes = [
            [name, *((value - (left, top)[k % 2]) * scale for k, value in enumerate(corners))]
            for name, *corners in own["boxes"]
        ]
        return {**own, "boxes": boxes}

    return ItemObjects(len(images), note)


def _as_loaded(image: Loaded) -> Loaded:
    return image


def _has_classes(path: Path) -> bool:
    """Whether a folder gives the classes of its images; the test folder of Tiny-ImageNet does not."""
    if not path.is_dir():
        return False
    return (path / _ANNOTATIONS).is_file() or any(f.is_dir() and f.name != "images" for f in path.iterdir())


def _annotated_classes(file: Path, ids: Sequence[str]) -> list[str]:
    """Read the class of each image from a file with tab-separated lines: name, class, and further columns."""
    try:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read {file}: {error}") from error
    classes = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [name.rpartition("/")[2] for name in ids]
    missing = [name for name in names if name not in classes]
    if missing:
        raise ImageError(f"{file} gives no class for {len(missing)} images, first {missing[0]}")
    return [classes[name] for name in names]
