"""Published data sets, read from disk: CIFAR-100, and class folders such as those of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.folders import folder
from rsm_probe.sources.images.image_set import ImageSet, Targets
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.pixels import to_rgb

# Where the folders of classes of each split may lie; of several, the first counts.
_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
# Tiny-ImageNet has no class folders for validation: this file beside its images names the class of each.
_ANNOTATIONS = "val_annotations.txt"


def cifar100(root: str | Path, split: str, count: int | None = None, seed: int = 0) -> ImageSet:
    """Read CIFAR-100: 32 x 32 images of 100 classes. Labels are the names of the classes, targets their numbers.

    Args:
        root: the folder that holds `cifar-100-python` with its files train, test and meta.
        split: "train" (50 000 images) or "test" (10 000).
        count: size of a random sample; None for the whole split.
        seed: of the sample.

    Raises:
        ImageError: unknown split, or files that are missing or damaged; the message says where to get them.
    """
    from torchvision.datasets import CIFAR100

    look_up(split, _SPLITS, "split", ImageError)
    root = Path(root).expanduser().absolute()
    # The files are pickles, which could run any code. torchvision reads them only after their MD5 sums have shown that
    # they are the published ones.
    try:
        data = CIFAR100(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise ImageError(
            f"{root} holds no intact CIFAR-100: download {CIFAR100.url} and unpack it in {root}, so that "
            f"the files train, test and meta lie in {root / CIFAR100.base_folder}"
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
    strict: bool = False,
) -> ImageSet:
    """Read images in one folder per class, laid out as ImageNet and Tiny-ImageNet are.

    Labels are the names of the class folders, targets their numbers in alphabetical order. Images keep their own
    sizes; `resized` makes them equal.

    Args:
        path: the folder that holds `train/<class>/` and, with the same classes, `test`, `val` or `validation`.
            Tiny-ImageNet is read as published: `val/images/` with `val/val_annotations.txt`; its `test`, which has no
            labels, is ignored.
        split: "train" or "test", which stands for the first of the other three that is there.
        count: size of a random sample; None for all.
        seed: of the sample.
        verify: read every file once now and leave out broken ones, as `folder` does.
        progress: show a bar while reading.
        strict: raise at broken files instead of leaving them out.

    Raises:
        ImageError: unknown split, a folder is missing, or images have no class; with `strict`, broken files.
    """
    root = Path(path).expanduser()
    candidates = [root / name for name in look_up(split, _SPLITS, "split", ImageError)]
    split_folder = next((candidate for candidate in candidates if _has_classes(candidate)), None)
    if split_folder is None:
        looked = ", ".join(str(candidate / "<class>") for candidate in candidates)
        raise ImageError(f"no {split} images of {root}: looked for class folders {looked}")
    images = folder(split_folder, strict=strict, verify=verify, progress=progress)
    annotations = split_folder / _ANNOTATIONS
    folders = [name.rpartition("/")[0] for name in images.ids]
    labels = _annotated_classes(annotations, images.ids) if annotations.is_file() else folders
    # Tiny-ImageNet puts another folder, `images`, between a class and its images.
    labels = [label.partition("/")[0] for label in labels]
    if "" in labels:
        image = split_folder / images.ids[labels.index("")]
        raise ImageError(f"{image} is in no class folder; move it into one or away")
    classes, values = np.unique(labels, return_inverse=True)
    name = f"{root.absolute().name}/{split_folder.name}"
    images = images.changed(name=name, labels=labels, targets=Targets(values[:, None], len(classes)))
    return images if count is None else images.sample(count, seed)


def image_folder(
    path: str | Path, split: str = "all", strict: bool = False, verify: bool = True, progress: bool = False
) -> ImageSet:
    """Read all images of a folder (see `folder`), or one split of its class folders (see `class_folders`).

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
    return class_folders(path, split, strict=strict, verify=verify, progress=progress)


def resized(images: ImageSet, size: int) -> ImageSet:
    """Resize images to a short side of `size` pixels, and crop them about the centre to `size` x `size`.

    Raises:
        ImageError: a size out of range; and, on loading, an image that is a tensor, ready for a model.
    """
    require_edge(size)

    def load(index: int) -> Image.Image:
        image = images.load(index)
        if not isinstance(image, Image.Image):
            raise ImageError(f"only images can be resized, and {images.name} holds tensors")
        return ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)

    return images.changed(load=load, content=lambda: f"{images.content()} size={size}")


def _has_classes(path: Path) -> bool:
    """Whether a folder says the classes of its images; the test images of Tiny-ImageNet have none."""
    if not path.is_dir():
        return False
    return (path / _ANNOTATIONS).is_file() or any(f.is_dir() and f.name != "images" for f in path.iterdir())


def _annotated_classes(file: Path, ids: Sequence[str]) -> list[str]:
    """Read the class of every image from annotations: name, class and more, separated by tabs."""
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
