"""Images that a loader yields batch by batch, such as a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from rsm_probe.checks import require_texts
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.batches import RawBatch
from rsm_probe.sources.images.contents.dataset_items import Key, Path, described, path_of, shown_key
from rsm_probe.sources.images.contents.item_labels import choose_labels, other_labels
from rsm_probe.sources.images.contents.loaded_batches import (
    BatchParts,
    class_names,
    images_of_batch,
    label_candidates,
    labels_at,
)
from rsm_probe.sources.images.image_set import Loaded
from rsm_probe.sources.images.pixels import in_order, tensor_bytes

_ADVICE = (
    "the order of a loader repeats with shuffle=False, or with generator=torch.Generator().manual_seed(0) in a new "
    "DataLoader, and without random transforms"
)
# With more images, labels that all differ are unlikely to be classes.
_DISTINCT = 8
_ONCE = "an iterator that can be used once does not repeat: give a DataLoader, or ImageLoader(list(batches))"


class ImageLoader:
    """Images that a loader yields batch by batch; its batches pass through all models as they come.

    A batch is a tensor (N, C, H, W) that is ready for the models, a list of PIL images, or a tuple or mapping that
    contains one of these, with labels if it has any. What needs a second pass compares hashes of the batches.

    Args:
        loader: a `DataLoader`, or anything else that yields batches.
        name: name of the images in results; by default the class of the loader's data set.
        ids: names of all images, in the order of a pass; numbers by default.
        labels: labels of all images, as text or whole numbers; by default those in the batches; [] for none.
        image_key: name or index of the images within a batch, if it cannot be recognised; several lead into nested
            entries.
        label_key: name or index of the labels within a batch, if the entry that is recognised holds others.
        axes: the axes of the images of a batch, one letter each, as in "NHWC"; see `as_images`. They are turned into
            (N, C, ...), except in the whole batch that `forward=` gets.

    Attributes:
        advice: see `BatchSource`.

    Raises:
        ImageError: the loader cannot be iterated; ids or labels are not text.
    """

    advice = f"; {_ADVICE}"

    def __init__(
        self,
        loader: Iterable[Any],
        name: str | None = None,
        *,
        ids: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        image_key: Key | None = None,
        label_key: Key | None = None,
        axes: str | None = None,
    ) -> None:
        if not isinstance(loader, Iterable):
            raise ImageError(f"a loader must yield batches, but {type(loader).__name__} cannot be iterated")
        self.loader, self.image_key, self.label_key, self.axes = loader, image_key, label_key, axes
        self.name = name or type(getattr(loader, "dataset", loader)).__name__
        self.ids = None if ids is None else require_texts(ids, "ids", ImageError)
        self.labels = None if labels is None else require_texts(labels, "labels", ImageError)
        self._classes = class_names(getattr(loader, "dataset", None))
        self._label_path: Path | None = None
        self._doubted = False
        self._ahead: tuple[Any, Iterator[Any]] | None = None
        self._first: RawBatch | None = None
        self._states: list[tuple[torch.Generator, Tensor]] = []
        self._hashes: list[str] | None = None
        self._complete = False
        self._exact: list[int] | None = None
        self._first_size = 0
        self.labels_seen: list[str] = []

    def __repr__(self) -> str:
        return f"ImageLoader({self.name!r}, {type(self.loader).__name__})"

    def fresh(self) -> ImageLoader:
        """The same images in the same order, of which no pass has begun."""
        return self.read_as(self.ids, self.labels, self.image_key, self.label_key, self.axes)

    def read_as(
        self,
        ids: Sequence[str] | None,
        labels: Sequence[str] | None,
        image_key: Key | None,
        label_key: Key | None,
        axes: str | None,
    ) -> ImageLoader:
        """The same images in the same order, read with other names and entries; no pass has begun."""
        again = ImageLoader(
            self.loader, self.name, ids=ids, labels=labels, image_key=image_key, label_key=label_key, axes=axes
        )
        again._states = self._states
        return again

    @property
    def sizes(self) -> list[int]:
        """See `BatchSource`."""
        if self._exact is not None:
            return self._exact
        first = self._first_size or len(self._first_batch())  # looking at a batch begins a pass
        expected = _expected_sizes(self.loader)
        if expected and expected[0] == first:
            return expected
        return [first] * max(_length(self.loader) or 1, 1)

    @property
    def count(self) -> int | None:
        """See `BatchSource`."""
        known = self._exact is not None or _length(self.loader) is not None
        return sum(self.sizes) if known else None

    @property
    def sizes_known(self) -> bool:
        """Whether `sizes` holds the number of images of every batch."""
        expected = _expected_sizes(self.loader)
        return self._exact is not None or (bool(expected) and expected == self.sizes)

    def first_image(self) -> Loaded:
        """See `BatchSource`."""
        return self._first_batch().images[0]

    def sample(self, count: int, whole: bool = False) -> RawBatch:
        """See `BatchSource`."""
        batch = self._first_batch()
        return batch if whole and batch.whole is not None else batch.head(count)

    def fingerprint(self) -> str:
        """A hash of what is known without a pass: name, lengths, names given, and the content of the first batch.

        Raises:
            ImageError: the first batch cannot be read.
        """
        first = self._first_batch()
        known = [self.name, str(_length(self.loader)), str(_expected_sizes(self.loader)), str(self.ids)]
        known += [] if self.axes is None else [self.axes]
        return hashlib.sha256("\n".join([*known, str(self.labels), _hash(self._content(first))]).encode()).hexdigest()

    def repeat(self, why: str, needed: bool) -> None:
        """See `BatchSource`.

        Raises:
            ImageError: a second pass is needed, and the loader shuffles without a seed.

        Warns:
            UserWarning: the loader shuffles without a seed, and an interrupted run cannot be continued.
        """
        self._hashes = [] if self._hashes is None else self._hashes
        if self._shuffles():
            if needed:
                raise ImageError(
                    f"{self.name}: {why} passes over the images twice, in the same batches, but the loader shuffles "
                    f"without a seed; {_ADVICE}"
                )
            warnings.warn(
                f"{self.name}: {why} can be continued only if batches repeat, but the loader shuffles without a seed; "
                f"{_ADVICE}",
                stacklevel=4,
            )

    def state(self) -> dict[str, np.ndarray]:
        """See `BatchSource`."""
        hashes = self._hashes or []
        return {"hashes": np.array(hashes, dtype=np.str_), "complete": np.array(self._complete)} if hashes else {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `BatchSource`."""
        self._hashes, self._complete = [str(text) for text in state["hashes"]], bool(state.get("complete", False))

    def require_same(self, state: Mapping[str, np.ndarray]) -> None:
        """See `BatchSource`.

        A loader that gives its batches by position (a list, or a `DataLoader` that does not shuffle) shows one in the
        middle and the last, without a pass; the fingerprint holds the first. Of all others, only the first is compared.

        Raises:
            ImageError: a batch differs or cannot be read.
        """
        hashes = [str(text) for text in state.get("hashes", ())]
        for position in sorted({len(hashes) // 2, len(hashes) - 1} - {-1, 0}):
            try:
                content = self._at(position)
            except Exception as error:  # a user's data set may raise anything
                raise self._unreadable(position, error) from error
            if content is not None and _hash(self._content(self._batch(content, position, 0))) != hashes[position]:
                raise ImageError(
                    f"{self.name}: batch {position} differs from that of the finished result in this folder, which "
                    f"would not hold for these images; choose another folder, or repeat the images: {_ADVICE}"
                )

    def _at(self, position: int) -> Any:
        """The batch at a position, or None if it takes a pass to read it."""
        loader = self.loader
        if isinstance(loader, list | tuple):
            return loader[position]
        if not isinstance(loader, DataLoader) or type(loader.sampler) is not SequentialSampler:
            return None
        if type(loader.batch_sampler) is not BatchSampler:
            return None
        numbers = next(itertools.islice(loader.batch_sampler, position, None))
        fetch = getattr(loader.dataset, "__getitems__", None)
        items = fetch(numbers) if fetch else [loader.dataset[number] for number in numbers]
        return loader.collate_fn(items)

    def batches(self, done: Collection[int] = ()) -> Iterator[RawBatch]:
        """See `BatchSource`.

        Raises:
            ImageError: a batch cannot be read or holds no images, there is none, or batches differ from those of an
                earlier pass.
        """
        if self._complete and self._hashes and set(range(len(self._hashes))) <= set(done):
            return
        sizes: list[int] = []
        self.labels_seen = []
        for position, content in enumerate(self._contents()):
            batch = self._batch(content, position, sum(sizes))
            self._compare(position, batch)
            sizes.append(len(batch))
            self.labels_seen += batch.labels
            if position not in done:
                yield batch
        if self._hashes is not None and len(sizes) < len(self._hashes):
            raise ImageError(
                f"{self.name}: this pass ended after {len(sizes)} batches, but an earlier one had {len(self._hashes)} "
                f"or more; {_ADVICE}"
            )
        for what, names in (("ids", self.ids), ("labels", self.labels)):
            if names and len(names) != sum(sizes):
                raise ImageError(f"{len(names)} {what} for {sum(sizes)} images of {self.name}")
        if not self._complete and self.label_key is None and not self._doubted:
            self._doubt_distinct_labels()
        self._exact, self._complete = sizes, True

    def _doubt_distinct_labels(self) -> None:
        """Warn at the end of a pass if labels of an unnamed entry all differ."""
        path, texts = self._label_path, self.labels_seen
        if path is None or isinstance(path[-1], str) or not _DISTINCT < len(texts) == len(set(texts)):
            return
        warnings.warn(
            f"{self.name}: the labels, entry {shown_key(path)} of the batches, differ for every image, as numbers and "
            f"names of images do; {other_labels('loader')}",
            stacklevel=3,
        )

    def measure(self) -> None:
        """Pass over the loader once, to count its images.

        Raises:
            ImageError: as `batches`.
        """
        for _ in self.batches():
            pass

    def _first_batch(self) -> RawBatch:
        """The first batch of the next pass, which begins with it."""
        if self._first is None:
            iterator = self._begin()
            try:
                content = next(iterator)
            except StopIteration:
                again = f" in a second pass; {_ONCE}" if self._complete else ""
                raise ImageError(f"{self.name}: the loader yields no batch{again}") from None
            except Exception as error:  # a user's data set may raise anything
                raise self._unreadable(0, error) from error
            self._ahead = content, iterator
            self._first = self._batch(content, 0, 0)
            self._first_size = len(self._first)
        return self._first

    def _contents(self) -> Iterator[Any]:
        """What the loader yields in one pass; a batch that was looked at before comes first."""
        self._first_batch()
        assert self._ahead is not None
        content, iterator = self._ahead
        self._ahead = self._first = None
        for position in itertools.count(1):
            yield content
            # Not by a loop over the iterator, which calls iter() on it: some loaders then begin again.
            try:
                content = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # a user's data set may raise anything
                raise self._unreadable(position, error) from error

    def _begin(self) -> Iterator[Any]:
        """Begin a pass, with generators in the state of the first pass."""
        if not self._states:
            self._states += [(generator, generator.get_state()) for generator in _generators(self.loader)]
        for generator, state in self._states:
            generator.set_state(state)
        return iter(self.loader)

    def _batch(self, content: Any, position: int, start: int) -> RawBatch:
        try:
            sizes = _expected_sizes(self.loader)
            size = sizes[position] if position < len(sizes) else None
            parts = images_of_batch(content, self.image_key, size)
            images = self._in_order(parts.images)
            count = len(images)
        except ImageError as error:
            raise ImageError(f"{self.name}: batch {position}: {error}") from error
        numbers = np.arange(start, start + count)
        for what, names in (("ids", self.ids), ("labels", self.labels)):
            if names and len(names) < start + count:
                raise ImageError(
                    f"{len(names)} {what}, but batch {position} of {self.name} ends at image {start + count}"
                )
        ids = [str(k) for k in numbers] if self.ids is None else self.ids[start : start + count]
        labels = self._labels_of(parts, content, numbers) if self.labels is None else self.labels[start:]
        whole = content if parts.path else None
        unclear, remark = (text and f"{self.name}: batch {position}: {text}" for text in (parts.unclear, parts.remark))
        labels = labels[:count] or [""] * count
        return RawBatch(self.name, images, ids, labels, numbers, whole, unclear, remark)

    def _in_order(self, images: Any) -> Any:
        if self.axes is None:
            return images
        if not isinstance(images, Tensor):
            raise ImageError("axes= names the axes of a tensor of images, and this batch holds a list of them")
        return images.permute(in_order(self.axes, tuple(images.shape))).contiguous()

    def _labels_of(self, parts: BatchParts, content: Any, numbers: np.ndarray) -> list[str]:
        """The labels in a batch; the first batch decides which entry holds them."""
        count = len(numbers)
        if self._label_path is None:
            if self.label_key is not None:
                self._label_path = path_of(self.label_key)
                if not any(labels_at(self._label_path, parts, content, count, {})):
                    raise ImageError(
                        f"{self.name}: label_key={self.label_key!r} names no entry of {described(content)} with a "
                        f"whole number or text for each of {count} images"
                    )
            elif candidates := label_candidates(parts, content, count):
                self._label_path, doubt = choose_labels(candidates, numbers.tolist(), "loader")
                self._doubted = bool(doubt)
                if doubt:
                    warnings.warn(f"{self.name}: of {described(content)}, {doubt}", stacklevel=2)
        return labels_at(self._label_path, parts, content, count, self._classes)

    @staticmethod
    def _content(batch: RawBatch) -> Any:
        return batch.images if batch.whole is None else batch.whole

    def _compare(self, position: int, batch: RawBatch) -> None:
        """Compare a batch with that of an earlier pass, or remember it."""
        if self._hashes is None:
            return
        value = _hash(self._content(batch))
        if position < len(self._hashes):
            same = self._hashes[position] == value
        else:
            same = not self._complete
            self._hashes.append(value)
        if not same:
            raise ImageError(
                f"{self.name}: batch {position} differs from that of an earlier pass, which this one must repeat; "
                f"{_ADVICE}"
            )

    def _shuffles(self) -> bool:
        samplers = _samplers(self.loader)
        unseeded = any(getattr(sampler, "generator", self) is None for sampler in samplers)
        return unseeded and not _generators(self.loader)

    def _unreadable(self, position: int, error: Exception) -> ImageError:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) or not str(error) else error
        pictures = "; a loader of pictures needs collate_fn=list" if "PIL" in str(reason) else ""
        return ImageError(f"{self.name}: the loader fails at batch {position}: {reason}{pictures}")


def _samplers(loader: Any) -> list[Any]:
    """The samplers of a loader that may draw random numbers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def _generators(loader: Any) -> list[torch.Generator]:
    owners = [loader, *_samplers(loader)]
    by_id = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    return list(by_id.values())


def _length(loader: Any) -> int | None:
    """The number of batches, if it is known."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _expected_sizes(loader: Any) -> list[int]:
    """The sizes of batches that PyTorch's own batch sampler makes; [] for all other loaders."""
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if type(sampler) is not BatchSampler or (length := _length(sampler)) is None:
        return []
    size = sampler.batch_size
    rest = 0 if sampler.drop_last else len(sampler.sampler) % size  # type: ignore[arg-type]
    return [*[size] * (length - (rest > 0)), *([rest] if rest else [])]


def _hash(content: Any) -> str:
    total = hashlib.sha256()
    _add(total, content)
    return total.hexdigest()[:32]


def _add(total: Any, content: Any) -> None:
    """Add the values of a batch to a hash; objects that are neither numbers, texts nor pictures count by their type."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            total.update(str(key).encode())
            _add(total, value)
    elif isinstance(content, list | tuple):
        total.update(b"%d" % len(content))
        for value in content:
            _add(total, value)
    elif isinstance(content, Tensor | np.ndarray):
        total.update(f"{content.dtype}{tuple(content.shape)}".encode())
        dense = isinstance(content, Tensor) or content.dtype.kind not in "OV"
        if dense:
            total.update(tensor_bytes(content) if isinstance(content, Tensor) else np.ascontiguousarray(content).data)
    elif isinstance(content, Image.Image):
        total.update(f"{content.mode}{content.size}".encode() + content.tobytes())
    else:
        plain = isinstance(content, str | bytes | int | float | complex | np.generic) or content is None
        total.update((repr(content) if plain else type(content).__name__).encode())
