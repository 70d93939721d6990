"""Images with ids and labels: a folder, tensors or a data set of one's own, and the embedded sets by name."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from rsm_probe.errors import ImageError, nearest

# How many images of a data set are read to know it again.
_KNOWN_BY = 256
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Targets:
    """What a network can be trained to answer: one or more questions per image, each with the same choices.

    Attributes:
        values: answers, shape (N, questions), integers in [0, choices).
        choices: number of answers to choose from.
    """

    values: np.ndarray
    choices: int


@dataclass(frozen=True)
class ImageSet:
    """Images that are loaded one at a time, when they are needed.

    Attributes:
        name: what the set is called in results.
        ids: one unique name per image.
        load: index -> PIL image, or a tensor (C, H, W) that is ready for the model.
        labels: one label per image, "" where unknown.
        targets: answers to train for, where the set has them.
        annotations: per image, what is in it (class counts, boxes), where the set knows.
        skipped: files left out because they are no readable images, with the reason.
        content: gives text that changes whenever the images do, beyond their ids; called only when it is needed.
    """

    name: str
    ids: Sequence[str]
    load: Callable[[int], Image.Image | Tensor]
    labels: Sequence[str] = ()
    targets: Targets | None = None
    annotations: Sequence[Mapping[str, Any]] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    content: Callable[[], str] = str

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", [""] * len(self.ids))
        if len(self.labels) != len(self.ids):
            raise ImageError(f"{self.name}: {len(self.labels)} labels for {len(self.ids)} images")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image | Tensor:
        """Loads one image; negative numbers count from the end.

        Raises:
            ImageError: it cannot be read; the message names it.
            IndexError: there is no such image.
        """
        index = range(len(self))[index]
        try:
            return self.load(index)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"{self.name}: cannot read image {self.ids[index]!r}: {error}") from error

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Some of the images, in the order given."""
        chosen = [int(index) for index in indices]
        targets = self.targets and Targets(self.targets.values[chosen], self.targets.choices)
        return replace(
            self,
            ids=[self.ids[k] for k in chosen],
            load=lambda index: self.load(chosen[index]),
            labels=[self.labels[k] for k in chosen],
            targets=targets,
            annotations=[self.annotations[k] for k in chosen] if self.annotations else (),
        )

    def sample(self, count: int, seed: int = 0) -> ImageSet:
        """A random sample without repetition; all images where there are no more than `count`."""
        if count >= len(self):
            return self
        return self.subset(np.random.default_rng(seed).permutation(len(self))[:count])

    def fingerprint(self) -> str:
        """A hash of ids, order and content, by which a stored result knows its images again."""
        text = "\n".join([self.name, self.content(), *self.ids])
        return hashlib.sha256(text.encode()).hexdigest()


def as_images(images: Any) -> ImageSet:
    """Whatever a user calls images, as an `ImageSet`.

    Args:
        images: an `ImageSet`; the name of an embedded set ("digits", "scenes", "cluttered", "photos"); the path of a
            folder; a tensor (N, C, H, W) that is ready for the models; or a data set with `__len__` and `__getitem__`
            giving images or (image, label) pairs, as torchvision's do.

    Raises:
        ImageError: none of these.
    """
    from rsm_probe.sources.embedded import EMBEDDED

    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str) and images in EMBEDDED:
        return EMBEDDED[images]()
    if isinstance(images, str | Path):
        path = Path(images)
        if not path.exists() and len(path.parts) == 1:
            hint = nearest(str(images), EMBEDDED)
            raise ImageError(
                f"no folder and no embedded image set {str(images)!r}{hint} (embedded: {', '.join(EMBEDDED)})"
            )
        return folder(path)
    if isinstance(images, Tensor | np.ndarray):
        return from_tensor(torch.as_tensor(images))
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return from_dataset(images)
    raise ImageError(f"cannot take images from {type(images).__name__}; give a folder, a tensor or a data set")


def folder(path: str | Path, strict: bool = False, verify: bool = True, progress: bool = False) -> ImageSet:
    """The image files in a folder, at any depth; the folder that holds an image is its label.

    Args:
        path: the folder.
        strict: raise at the first broken file instead of leaving it out and counting it in `skipped`.
        verify: read every file once now, so that batches hold only good images. Without it, a broken file is an error
            when its turn comes.
        progress: show a bar while reading.

    Raises:
        ImageError: the folder is missing, holds no readable image, or (strict) holds a broken one.
    """
    root = Path(path)
    if not root.is_dir():
        raise ImageError(f"no image folder at {root}" + (" (it is a file)" if root.exists() else ""))
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ImageError(f"{root} holds no image files (looked for {', '.join(sorted(IMAGE_SUFFIXES))} at any depth)")
    problems = _broken_files(files, progress) if verify else {}
    if problems and strict:
        file, reason = next(iter(problems.items()))
        raise ImageError(f"{len(problems)} of {len(files)} images cannot be read, first {file}: {reason}")
    good = [f for f in files if f not in problems]
    if not good:
        file, reason = next(iter(problems.items()))
        raise ImageError(f"none of the {len(files)} image files in {root} can be read, first {file}: {reason}")
    ids = [f.relative_to(root).as_posix() for f in good]
    skipped = {f.relative_to(root).as_posix(): reason for f, reason in problems.items()}
    if skipped:
        names = ", ".join(list(skipped)[:5]) + (", ..." if len(skipped) > 5 else "")
        warnings.warn(f"{len(skipped)} of {len(files)} image files left out: {names} cannot be read", stacklevel=2)
    return ImageSet(
        name=root.name or str(root),
        ids=ids,
        load=lambda index: _read_file(good[index]),
        labels=[name.rpartition("/")[0] for name in ids],
        skipped=skipped,
        content=lambda: _digest(file.read_bytes() for file in good),
    )


def _read_file(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _broken_files(files: Sequence[Path], progress: bool) -> dict[Path, str]:
    def problem(file: Path) -> str | None:
        try:
            _read_file(file)
        except UnidentifiedImageError:
            return "no image format that can be read"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(problem, files), "checking images", len(files), disable=not progress, leave=False)
        return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}


def from_tensor(tensor: Tensor, ids: Sequence[str] | None = None, labels: Sequence[str] = ()) -> ImageSet:
    """Images (N, C, H, W) that are ready for the models; ids are numbers where left out.

    Double precision, NumPy's default, becomes single precision, which models take.

    Raises:
        ImageError: another number of axes, no image, or integers.
    """
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise ImageError(f"images as a tensor have shape (N, C, H, W), found {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ImageError(f"images as a tensor hold what the models take, as floating numbers; found {tensor.dtype}")
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    names = [str(k) for k in range(len(tensor))] if ids is None else list(ids)
    if len(names) != len(tensor):
        raise ImageError(f"{len(names)} ids for {len(tensor)} images")
    content = lambda: _digest(map(_bytes, tensor))  # noqa: E731
    return ImageSet("tensor", names, lambda index: tensor[index], labels=labels, content=content)


def from_dataset(dataset: Any, name: str | None = None) -> ImageSet:
    """Any sequence of images or of (image, label) pairs, such as a torchvision data set.

    Labels are read only where the data set lists them (`targets`), so that no image is decoded twice.

    Raises:
        ImageError: the data set is empty.
    """
    if not len(dataset):
        raise ImageError(f"{type(dataset).__name__} holds no images")
    classes = getattr(dataset, "classes", None)
    targets = getattr(dataset, "targets", None)
    labels: list[str] = []
    if targets is not None and len(targets) == len(dataset):
        plain = targets.tolist() if hasattr(targets, "tolist") else targets
        labels = [str(t if classes is None else classes[int(t)]) for t in plain]

    def load(index: int) -> Image.Image | Tensor:
        item = dataset[index]
        return item[0] if isinstance(item, tuple | list) else item

    title = name or type(dataset).__name__
    # Decoding all images only to know them again would cost a whole pass: some, spread evenly, stand for all.
    some = np.unique(np.linspace(0, len(dataset) - 1, _KNOWN_BY).astype(int))
    content = lambda: _digest(_bytes(load(int(index))) for index in some)  # noqa: E731
    return ImageSet(title, [str(k) for k in range(len(dataset))], load, labels=labels, content=content)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _bytes(image: Image.Image | Tensor) -> bytes:
    if isinstance(image, Tensor):
        # NumPy lacks some number formats; their bytes are all that counts here.
        return image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.asarray(image).tobytes()
