"""Data sets that others publish, read from disk: CIFAR-100, and class folders such as those of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.folders import folder
from rsm_probe.sources.images.image_set import ImageSet, Targets
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.pixels import to_rgb

# Where the folders of classes of each split may lie; of several, the first counts.
_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
# Tiny-ImageNet has no class folders for validation: this file beside its images names the class of each.
_ANNOTATIONS = "val_annotations.txt"


def cifar100(root: str | Path, split: str, count: int | None = None, seed: int = 0) -> ImageSet:
    """CIFAR-100: 32 x 32 images of 100 classes. Labels are the names of the classes, targets their numbers.

    Args:
        root: the folder that holds `cifar-100-python` with its files train, test and meta.
        split: "train" (50 000 images) or "test" (10 000).
        count: a random sample of so many; None for the whole split.
        seed: of the sample.

    Raises:
        ImageError: unknown split, or files that are missing or damaged; the message says where to get them.
    """
    from torchvision.datasets import CIFAR100

    _known(split)
    place = Path(root).expanduser().absolute()
    # The files are pickles, which could run any code. torchvision reads them only after their MD5 sums have shown that
    # they are those that were published.
    try:
        data = CIFAR100(place, train=split == "train", download=False)
    except RuntimeError as error:
        raise ImageError(
            f"{place} holds no intact CIFAR-100: download {CIFAR100.url} and unpack it in {place}, so that "
            f"the files train, test and meta lie in {place / CIFAR100.base_folder}"
        ) from error
    numbers = np.asarray(data.targets)
    images = ImageSet(
        "cifar100",
        [f"{split}-{k:05d}" for k in range(len(numbers))],
        lambda index: Image.fromarray(data.data[index]),
        labels=[data.classes[number] for number in numbers],
        targets=Targets(numbers[:, None], len(data.classes)),
    )
    return images if count is None else images.sample(count, seed)


def class_folders(
    path: str | Path,
    split: str,
    count: int | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: bool = False,
) -> ImageSet:
    """Images in one folder for each class, laid out as ImageNet and Tiny-ImageNet are.

    Labels are the names of the class folders, targets their numbers in alphabetical order. Images come in their own
    sizes; `resized` makes them equal.

    Args:
        path: the folder that holds `train/<class>/` and, with the same classes, `test`, `val` or `validation`.
            Tiny-ImageNet is read as it is published: `val/images/` with `val/val_annotations.txt`; its `test`, which
            has no labels, is passed over.
        split: "train" or "test", which stands for the first of the other three that is there.
        count: a random sample of so many; None for all.
        seed: of the sample.
        verify: read every file once now and leave out broken ones, as `folder` does.
        progress: show a bar while reading.

    Raises:
        ImageError: unknown split, a folder is missing, or images have no class.
    """
    root = Path(path).expanduser()
    _known(split)
    places = [root / name for name in _SPLITS[split]]
    place = next((place for place in places if _has_classes(place)), None)
    if place is None:
        looked = ", ".join(str(place / "<class>") for place in places)
        raise ImageError(f"no {split} images of {root}: looked for class folders {looked}")
    images = folder(place, verify=verify, progress=progress)
    annotated = (place / _ANNOTATIONS).is_file()
    labels = _annotated(place, images.ids) if annotated else [name.rpartition("/")[0] for name in images.ids]
    # Tiny-ImageNet puts another folder, `images`, between a class and its images.
    labels = [label.partition("/")[0] for label in labels]
    if "" in labels:
        raise ImageError(f"{place / images.ids[labels.index('')]} is in no class folder; move it into one or away")
    classes = sorted(set(labels))
    numbers = {label: number for number, label in enumerate(classes)}
    values = np.array([[numbers[label]] for label in labels])
    name = f"{root.absolute().name}/{place.name}"
    images = images.changed(name=name, labels=labels, targets=Targets(values, len(classes)))
    return images if count is None else images.sample(count, seed)


def image_folder(
    path: str | Path, split: str = "all", strict: bool = False, verify: bool = True, progress: bool = False
) -> ImageSet:
    """The images of a folder: all of them (see `folder`), or one split of its class folders (see `class_folders`).

    Args:
        path: the folder.
        split: "all", "train" or "test".
        strict: raise at broken files instead of leaving them out.
        verify: read every file once now.
        progress: show a bar while reading.

    Raises:
        ImageError: as `folder` and `class_folders`.
    """
    if split == "all":
        return folder(path, strict=strict, verify=verify, progress=progress)
    images = class_folders(path, split, verify=verify, progress=progress)
    if strict and images.skipped:
        name, reason = next(iter(images.skipped.items()))
        raise ImageError(f"{images.name}: {len(images.skipped)} files cannot be read, first {name}: {reason}")
    return images


def resized(images: ImageSet, size: int) -> ImageSet:
    """The same images with a short side of `size` pixels, cropped about the centre to `size` x `size`.

    Raises:
        ImageError: a size out of range; and when an image is loaded that is a tensor, ready for a model.
    """
    require_edge(size)

    def load(index: int) -> Image.Image:
        image = images.load(index)
        if not isinstance(image, Image.Image):
            raise ImageError(f"only images can be resized, and {images.name} holds tensors")
        return ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)

    return images.changed(load=load, content=lambda: f"{images.content()} size={size}")


def _known(split: str) -> None:
    if split not in _SPLITS:
        raise ImageError(f"unknown split {split!r} (known: {', '.join(_SPLITS)})")


def _has_classes(place: Path) -> bool:
    """Whether a folder says the classes of its images; the test images of Tiny-ImageNet have none."""
    if not place.is_dir():
        return False
    return (place / _ANNOTATIONS).is_file() or any(f.is_dir() and f.name != "images" for f in place.iterdir())


def _annotated(place: Path, ids: Sequence[str]) -> list[str]:
    """The class of every image by the file of annotations: name, class and more, separated by tabs."""
    file = place / _ANNOTATIONS
    try:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read {file}: {error}") from error
    classes = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [name.rpartition("/")[2] for name in ids]
    missing = [name for name in names if name not in classes]
    if missing:
        raise ImageError(f"{file} names no class of {len(missing)} images, first {missing[0]}")
    return [classes[name] for name in names]
