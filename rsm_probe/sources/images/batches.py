"""Batches of images as they are loaded, and what yields them: an image set, or a loader (`loaders.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rsm_probe.sources.images.image_set import ImageSet, Loaded


@dataclass(frozen=True)
class RawBatch:
    """A batch of images before any model's preprocessing.

    Attributes:
        source: name of the image set or loader, for messages.
        images: PIL images, tensors and clips, or one tensor (N, ...) that is ready for the models.
        ids: names of the images.
        labels: labels of the images, "" where unknown.
        numbers: indices in the image set, or positions in the pass.
        whole: the tuple or mapping that a loader yielded, which `forward=` receives; None if it yielded images alone.
        unclear: why `images` may not be the images, "" if they are; only `forward=` takes the batch then.
        remark: what to say where `forward=` does not take the batch, of other entries that may be images.
    """

    source: str
    images: Sequence[Loaded] | Tensor
    ids: Sequence[str]
    labels: Sequence[str]
    numbers: np.ndarray
    whole: Any = None
    unclear: str = ""
    remark: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, count: int) -> RawBatch:
        """The first images alone, without `whole`."""
        return replace(
            self, images=self.images[:count], ids=self.ids[:count], labels=self.labels[:count],
            numbers=self.numbers[:count], whole=None,
        )  # fmt: skip


class BatchSource(Protocol):
    """Yields the batches of a pass over the images; passes repeat.

    Attributes:
        name: of the images.
        count: number of images; None if it is unknown before a pass.
        sizes: number of images in each batch; for a loader, an estimate until a pass has ended.
        advice: end of the message that a store holds other images; "" if there is nothing to advise.
    """

    name: str
    advice: str

    @property
    def count(self) -> int | None:
        """See the class."""

    @property
    def sizes(self) -> Sequence[int]:
        """See the class."""

    def first_image(self) -> Loaded:
        """Load one image, which shows whether images are pictures or ready for the models."""

    def sample(self, count: int, whole: bool = False) -> RawBatch:
        """A few of the first images.

        Args:
            count: number of images.
            whole: return the whole batch if it holds more than images.
        """

    def batches(self, done: Collection[int] = ()) -> Iterator[RawBatch]:
        """Pass over the images.

        Args:
            done: positions of batches to leave out.
        """

    def fingerprint(self) -> str:
        """A hash by which stored results identify their images."""

    def repeat(self, why: str, needed: bool) -> None:
        """Prepare for passes that must repeat the first one, or those of an earlier process.

        Args:
            why: what needs them, for messages.
            needed: whether there will be a second pass in any case, or only if this one is interrupted.
        """

    def state(self) -> dict[str, np.ndarray]:
        """What a later process needs to recognise the order of the batches; {} if nothing."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`."""

    def require_same(self, state: Mapping[str, np.ndarray]) -> None:
        """Compare the images with those of a finished pass, as far as `fingerprint` does not.

        Args:
            state: of that pass.
        """


class SetBatches:
    """Batches of an image set, in an order that is known beforehand; see `BatchSource`.

    Args:
        images: the image set.
        numbers: indices of the images in each batch.
        sampled: indices of the images of `sample`; by default those of the first batch.
    """

    advice = ""

    def __init__(self, images: ImageSet, numbers: Sequence[np.ndarray], sampled: np.ndarray | None = None) -> None:
        self.name, self.images, self.numbers = images.name, images, numbers
        self._sampled = numbers[0] if sampled is None else sampled

    @property
    def count(self) -> int:
        """See `BatchSource`."""
        return len(self.images)

    @property
    def sizes(self) -> Sequence[int]:
        """See `BatchSource`."""
        return [len(numbers) for numbers in self.numbers]

    def first_image(self) -> Loaded:
        """See `BatchSource`."""
        return self.images[0]

    def sample(self, count: int, whole: bool = False) -> RawBatch:
        """See `BatchSource`."""
        return batch_of(self.images, self._sampled[:count])

    def batches(self, done: Collection[int] = ()) -> Iterator[RawBatch]:
        """See `BatchSource`."""
        return (batch_of(self.images, numbers) for k, numbers in enumerate(self.numbers) if k not in done)

    def fingerprint(self) -> str:
        """See `BatchSource`."""
        return self.images.fingerprint()

    def repeat(self, why: str, needed: bool) -> None:
        """See `BatchSource`; image sets always repeat."""

    def state(self) -> dict[str, np.ndarray]:
        """See `BatchSource`."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `BatchSource`."""

    def require_same(self, state: Mapping[str, np.ndarray]) -> None:
        """See `BatchSource`; the fingerprint identifies images of a set."""


def batch_of(images: ImageSet, numbers: np.ndarray) -> RawBatch:
    """Load a batch of an image set.

    Args:
        images: the image set.
        numbers: indices of n images.

    Raises:
        ImageError: an image cannot be read.
    """
    raw = [images[int(number)] for number in numbers]  # before the labels, which items may hold
    return RawBatch(images.name, raw, [images.ids[k] for k in numbers], [images.labels[k] for k in numbers], numbers)
