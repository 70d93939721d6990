"""Images with ids and labels, loaded one at a time."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rsm_probe.checks import brief, listed, require_seed, require_text, require_texts, require_whole
from rsm_probe.errors import ImageError, repeated
from rsm_probe.sources.images.clips import Clip
from rsm_probe.sources.images.contents.dataset_items import image_of
from rsm_probe.sources.images.contents.item_labels import ItemLabels
from rsm_probe.sources.images.objects.item_objects import ItemObjects
from rsm_probe.sources.images.origins import Origin
from rsm_probe.sources.images.pixels import tensor_bytes

# Errors that damaged files raise.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# What an image set loads as one image.
Loaded = Image.Image | Tensor | Clip


@dataclass(frozen=True)
class Targets:
    """Answers to train for: one or more questions per image, all with the same number of choices.

    Attributes:
        values: answers, shape (N, questions), integers in [0, choices).
        choices: number of possible answers to each question.
    """

    values: np.ndarray
    choices: int


@dataclass(frozen=True)
class ImageSet:
    """Images that are loaded one at a time, on demand.

    Attributes:
        name: the name of the set in results.
        ids: one unique name per image, as text.
        load: index -> PIL image, a tensor (C, H, W) that is ready for the model, or a `Clip` of these.
        labels: one label per image, as text; "" if unknown. Those that only items hold are read with the images.
        targets: answers to train for, if the set has any.
        annotations: the objects in each image (class counts, boxes), if known; see `rsm_probe.sources.images.objects`.
            Those that only items hold are read with the items.
        skipped: file -> reason why it cannot be read; such files are not part of the set.
        content: returns text that changes whenever the images change, apart from their ids; called only when needed.
        extract: makes an image of what `load` returns; by default that is an image, or contains one.
        sizes: width and height of each loaded image in pixels, if known without loading it.
        origin: how another process makes the same set; None if it cannot. Copies with other attributes have none.

    Raises:
        ImageError: ids or labels are not text that can be stored, ids repeat, or the number of labels, targets,
            annotations or sizes differs from the number of ids.
    """

    name: str
    ids: Sequence[str]
    load: Callable[[int], Loaded]
    labels: Sequence[str] = ()
    targets: Targets | None = None
    annotations: Sequence[Mapping[str, Any]] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    content: Callable[[], str] = str
    extract: Callable[[Any], Loaded] = image_of
    sizes: Sequence[tuple[int, int]] = field(default=(), kw_only=True)
    origin: Origin | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = require_text(self.name, "the name of an image set", ImageError)
        if not callable(self.load):
            raise ImageError(f"{name}: load must be a function of an index, found {brief(self.load)}")
        ids = require_texts(self.ids, f"{name}: ids", ImageError)
        if (twice := repeated(ids)) is not None:
            raise ImageError(f"{name}: id {brief(twice)} names more than one image; give each image its own id")
        labels: Any = self.labels
        if not isinstance(labels, ItemLabels):
            labels = [] if labels is None else require_texts(labels, f"{name}: labels", ImageError)
            labels = labels or [""] * len(ids)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "labels", labels)
        counts = {"labels": len(labels), "annotations": len(self.annotations) or len(ids)}
        counts["sizes"] = len(self.sizes) or len(ids)
        counts["targets"] = len(ids) if self.targets is None else len(self.targets.values)
        for what, count in counts.items():
            if count != len(ids):
                raise ImageError(f"{name}: {count} {what} for {len(ids)} images")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        facts = [f"{len(self)} images"]
        if isinstance(self.labels, ItemLabels):  # counting them would read all items
            facts += ["labels of its items"]
        else:
            facts += [f"{len(kinds)} labels"] if (kinds := set(self.labels) - {""}) else []
        facts += ["targets"] if self.targets is not None else []
        facts += ["annotations"] if len(self.annotations) else []
        facts += [f"{len(self.skipped)} files skipped"] if self.skipped else []
        return f"ImageSet({brief(self.name)}: {', '.join(facts)}; ids {listed(self.ids, 3)})"

    def __getitem__(self, index: int) -> Loaded:
        """Load one image; negative indices count from the end.

        Raises:
            ImageError: the image cannot be read; the message names it.
            IndexError: the index is out of range.
        """
        index = range(len(self))[index]
        try:
            return self.extract(self.load(index))
        except Exception as error:  # a user's data set may raise anything
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) or not str(error) else error
            raise ImageError(f"{self.name}: cannot read image {brief(self.ids[index])}: {reason}") from error

    def changed(self, **parts: Any) -> ImageSet:
        """Copy the set with some attributes replaced, unchecked, because a subset may repeat images."""
        other = copy(self)
        for name, value in {"origin": None, **parts}.items():
            object.__setattr__(other, name, value)
        return other

    def made_by(self, function: Callable[..., Any], /, **arguments: Any) -> ImageSet:
        """Remember the call that makes this set, so that another process can make it, too.

        Args:
            function: a function that can be imported by name, and returns this set.
            arguments: its arguments, as `Origin` takes them, or image sets; if one of these cannot be made elsewhere,
                this set cannot either.
        """
        origins = {name: value.origin if isinstance(value, ImageSet) else value for name, value in arguments.items()}
        if any(origins[name] is None for name, value in arguments.items() if isinstance(value, ImageSet)):
            return self
        return self.changed(origin=Origin.of(function, **origins))

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Select images by index, in the given order; indices may repeat.

        Raises:
            ImageError: `indices` is not a list of whole numbers (a mask, for example).
            IndexError: an index is out of range.
        """
        array = np.asarray(indices)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise ImageError(
                f"{self.name}: a subset must be a list of whole numbers, found {brief(indices)}; for a mask, give "
                f"numpy.flatnonzero(mask)"
            )
        numbers = [range(len(self))[index] for index in array.tolist()]
        labels, notes = self.labels, self.annotations
        part = self.changed(
            ids=[self.ids[k] for k in numbers],
            load=lambda index: self.load(numbers[index]),
            labels=labels.subset(numbers) if isinstance(labels, ItemLabels) else [labels[k] for k in numbers],
            targets=self.targets and Targets(self.targets.values[numbers], self.targets.choices),
            annotations=notes.subset(numbers)
            if isinstance(notes, ItemObjects)
            else [notes[k] for k in numbers if notes],
            sizes=[self.sizes[k] for k in numbers if self.sizes],
        )
        return part.made_by(_subset_of, images=self, indices=np.array(numbers, np.int32).tobytes())

    def sample(self, count: int, seed: int = 0) -> ImageSet:
        """Draw a random sample without replacement; return the whole set if it has at most `count` images.

        Raises:
            ImageError: `count` is not a whole number of at least 1, or `seed` not one of at least 0.
        """
        require_whole(count, "count", 1, ImageError)
        require_seed(seed, "seed", ImageError)
        if count >= len(self):
            return self
        drawn = self.subset(np.random.default_rng(seed).permutation(len(self))[:count])
        return drawn.made_by(ImageSet.sample, self=self, count=int(count), seed=int(seed))

    def fingerprint(self) -> str:
        """Hash the name, ids, order and content, by which stored results identify their images."""
        text = "\n".join([self.name, self.content(), *self.ids])
        return hashlib.sha256(text.encode()).hexdigest()


def _subset_of(images: ImageSet, indices: bytes) -> ImageSet:
    """See `ImageSet.subset`; the indices as the bytes of 32-bit numbers, which take the least of a message."""
    return images.subset(np.frombuffer(indices, np.int32))


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Hash byte strings, including their boundaries (SHA-256)."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def pixel_bytes(image: Loaded) -> bytes | memoryview:
    """The values of an image as bytes."""
    if isinstance(image, Clip):
        return digest(map(pixel_bytes, image.frames)).encode()
    return tensor_bytes(image) if isinstance(image, Tensor) else np.asarray(image).tobytes()
