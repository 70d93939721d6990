"""Whether the images and the trained networks of a study are on this machine, and how to get them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rsm_probe.runs.fields import IN_PYTHON
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.missing.requirement import Requirement
from rsm_probe.shipped import configuration_name, is_shipped, shipped_files
from rsm_probe.sources.images.registry import IMAGE_SETS
from rsm_probe.sources.training.recipe import TrainingConfig

# Addresses of published sets, and the bytes of their archives; EgoObjects states none.
_EGOOBJECTS = "https://github.com/facebookresearch/EgoObjects"
_CITYSCAPES = "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip: https://www.cityscapes-dataset.com"
_CITYSCAPES_BYTES = 11.3e9
_CIFAR_BYTES = 169e6
# What folders of these names usually hold: the last part of a path -> address, bytes.
_FOLDERS = {
    "tiny-imagenet-200": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248e6),
    "imagenet": ("https://www.image-net.org/download.php (train 138 GB, val 6.3 GB)", None),
}
# A network that `rsm-probe train` writes: name of the recipe, seed.
_TRAINED = re.compile(r"(?P<recipe>.+)-(?P<seed>\d+)\.safetensors")


def required_images(images: ImagesConfig) -> Iterator[Requirement]:
    """What an image set reads from disk; nothing for embedded sets and code of the user."""
    source, root = images.source, Path(images.root).expanduser()
    if source.startswith(f"{IN_PYTHON}:") or "://" in source:
        return
    if source == "cifar100":
        yield _cifar100(root)
    elif source == "egoobjects":
        yield _files("images of egoobjects", _EGOOBJECTS, None, root / images.annotations, root / "images")
    elif source == "cityscapes":
        part = "val" if images.split == "test" else "train"
        folders = (root / "leftImg8bit" / part, root / "gtFine" / part)
        yield _files(f"images of cityscapes ({part})", _CITYSCAPES, _CITYSCAPES_BYTES, *folders)
    elif source in IMAGE_SETS:
        for key in ("cutouts", "backgrounds"):
            if (folder := getattr(images, key, None)) is not None:
                yield _folder(f"{key} of {source}", Path(folder))
        if source == "coco":
            written = Path(images.annotations).expanduser()
            file = written if written.exists() else root / written
            yield _files("images of coco", "https://cocodataset.org/#download", None, file, root)
    elif not source.rpartition(":")[0].endswith(".py"):
        path = Path(source).expanduser()
        yield _folder(f"images in {source}", path) if images.split == "all" else _class_folders(path, images.split)
    if images.labels is not None:
        yield required_file(images.labels, None, "labels")


def required_for_training(recipe: TrainingConfig) -> Iterator[Requirement]:
    """What a recipe trains on."""
    if recipe.images == "cifar100":
        yield _cifar100(Path(recipe.root).expanduser())
    elif recipe.images not in IMAGE_SETS:
        for split in ("train", "test"):
            yield _class_folders(Path(recipe.images).expanduser(), split)


def required_file(path: str, recipes: Path | None, kind: str = "weights") -> Requirement:
    """A file of the user's, such as a network that `rsm-probe train` writes.

    Args:
        path: the file, or a folder of weights.
        recipes: the folder that holds configurations, where a recipe of that name may lie.
        kind: what the file holds.
    """
    file, what = Path(path).expanduser(), f"{kind} in {path}"
    named = _TRAINED.fullmatch(file.name)
    if named is None:
        return Requirement(what, file.exists(), f"put the file at {path}")
    recipe = recipe_file(path, recipes) or Path(f"{named['recipe']}.yaml")
    written = configuration_name(recipe) if is_shipped(recipe) else recipe
    command = f"rsm-probe train {written} --seed {named['seed']} --out {file.parent} --device auto"
    return Requirement(what, file.exists(), command, size=0.0)


def recipe_file(path: str, recipes: Path | None) -> Path | None:
    """The recipe of a trained network by the name of its file: beside a configuration, or with the package.

    Args:
        path: the file of the network.
        recipes: the folder of the configuration that names it, or the working directory.

    Returns:
        The recipe; None if there is none of that name.
    """
    named = _TRAINED.fullmatch(Path(path).name)
    if named is None:
        return None
    beside = (recipes or Path()) / f"{named['recipe']}.yaml"
    return beside if beside.is_file() else shipped_files().get(named["recipe"])


def _cifar100(root: Path) -> Requirement:
    from torchvision.datasets import CIFAR100

    there = all((root / CIFAR100.base_folder / name).exists() for name in ("train", "test", "meta"))
    return Requirement("images of cifar100", there, str(CIFAR100.url), f"unpack in {root}", _CIFAR_BYTES)


def _files(what: str, address: str, size: float | None, *paths: Path) -> Requirement:
    absent = [str(path) for path in paths if not path.exists()]
    return Requirement(what, not absent, address, f"so that there is {' and '.join(absent or map(str, paths))}", size)


def _class_folders(path: Path, split: str) -> Requirement:
    names = ("train",) if split == "train" else ("test", "val", "validation")
    address, size = _known(path) or ("images in class folders", None)
    put = f"so that there is {path / ('train' if split == 'train' else 'val')}"
    return Requirement(f"{split} images in {path}", any((path / name).is_dir() for name in names), address, put, size)


def _folder(what: str, path: Path) -> Requirement:
    address, size = _known(path) or ("images", None)
    return Requirement(what, path.exists(), address, f"put into {path}", size)


def _known(path: Path) -> tuple[str, float | None] | None:
    return next((_FOLDERS[part] for part in reversed(path.parts) if part in _FOLDERS), None)
