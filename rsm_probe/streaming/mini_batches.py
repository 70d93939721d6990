"""Mini-batches of a sweep: how images are divided into them, and how those of a store grow with the images."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsm_probe.captures.recording import count_images
from rsm_probe.checks import brief, listed, require_seed, require_whole
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.errors import ImageError, StorageError
from rsm_probe.execution.execution import Execution
from rsm_probe.sources.images.batches import BatchSource, SetBatches
from rsm_probe.sources.images.contents.item_labels import ItemLabels
from rsm_probe.sources.images.image_set import ImageSet, Loaded, pixel_bytes
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.stored_products.product_store import ImagePart, ProductStore, StoredBatch

# Images per mini-batch, unless said otherwise.
BATCH_SIZE = 250


def batch_source(images: ImageSet | ImageLoader, batch_size: int, seed: int, estimators: Sequence[str]) -> BatchSource:
    """The batches of a sweep: those of a loader as they come, or an image set in a seeded random order.

    Raises:
        ImageError: as `make_batches`, or batch_size or seed is given for a loader, which decides on both.
    """
    if isinstance(images, ImageSet):
        return SetBatches(images, make_batches(images, batch_size, seed, estimators))
    for name, value, default in (("batch_size", batch_size, BATCH_SIZE), ("seed", seed, 0)):
        if value != default:
            raise ImageError(
                f"{name}={brief(value)} applies to images that a sweep divides itself, but {images.name} comes from a "
                f"loader, whose batches are taken as they come; leave it out, or give the loader's data set"
            )
    source, fewest = images.fresh(), max(get_estimator(estimator).fewest for estimator in estimators)
    if source.sizes[0] < fewest:
        raise ImageError(
            f"the first batch of {source.name} holds {source.sizes[0]} images; {' and '.join(estimators)} CKA needs at "
            f"least {fewest}: make larger batches"
        )
    return source


def make_batches(images: ImageSet, batch_size: int, seed: int, estimators: Sequence[str]) -> list[np.ndarray]:
    """Divide the images, in a seeded random order, into batches whose sizes differ by at most one.

    Returns:
        The indices of the images of each batch.

    Raises:
        ImageError: batches are too small for the estimators, or size or seed is not a whole number in range.
    """
    require_whole(batch_size, "batch_size", 1, ImageError)
    require_seed(seed, "seed", ImageError)
    fewest = max(get_estimator(estimator).fewest for estimator in estimators)
    needed = f"{' and '.join(estimators)} CKA needs at least {fewest}"
    if batch_size < fewest:
        raise ImageError(f"batch_size={batch_size} is too small: {needed}")
    if len(images) < fewest:
        raise ImageError(f"{images.name} holds {len(images)} images; {needed}")
    # Rounding up keeps every batch within batch_size; the minimum avoids batches that are too small.
    count = min(-(-len(images) // batch_size), len(images) // fewest)
    return np.array_split(np.random.default_rng(seed).permutation(len(images)), count)


@dataclass(frozen=True, eq=False)
class Division:
    """The mini-batches of a store that cover the images of a sweep.

    Attributes:
        batches: the mini-batches, in order.
        left_out: part -> positions of stored images that the sweep does not have.
        added: a part that the store does not have yet; its number is the number of stored parts.
        labels: labels of the images of that part.
        notes: what a user should know of images that came or went.
    """

    batches: list[StoredBatch]
    left_out: Mapping[int, Sequence[int]]
    added: ImagePart | None = None
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()


def divide(
    store: ProductStore | None,
    images: ImageSet,
    batch_size: int,
    seed: int,
    estimators: Sequence[str],
    execution: Execution,
    fingerprint: str,
) -> Division:
    """Find the images of a sweep in the mini-batches of a store, and divide the others into further ones.

    An image is that of a store if name and content are the same. Images that came later form mini-batches of their own
    behind the others, so that nothing has to be matched again; a sweep over all images at once would draw the
    mini-batches anew, and its values differ within their uncertainty.

    Args:
        store: the store; None before there is one.
        images: the images of the sweep.
        batch_size: largest number of images in further mini-batches.
        seed: of their order.
        estimators: of CKA, whose smallest numbers of images hold.
        execution: whether to show progress.
        fingerprint: of the images.

    Warns:
        UserWarning: images are left out, because too few others of their mini-batches are left.

    Raises:
        ImageError: too few images were added to form a mini-batch, none that is stored is left, or the stored
            mini-batches are too small for an estimator.
    """
    fewest = max(get_estimator(estimator).fewest for estimator in estimators)
    parts = [] if store is None else store.parts
    if store is None or not parts:
        added = _part(images, make_batches(images, batch_size, seed, estimators))
        return Division(_batches_of(added[0], 0, added[1]), {}, added[0], _labels(images, added[1]))
    if (smallest := min(size for part in parts for size in part.sizes)) < fewest:
        raise ImageError(
            f"{store.where} has mini-batches of {smallest} images, and {' and '.join(estimators)} CKA needs at "
            f"least {fewest}: a sweep with it would draw others; choose another folder, or leave out that estimator"
        )
    planned = fingerprint in store.image_sets
    held, changed = _held(store, images, execution, fingerprint)
    batches, left_out, taken = list[StoredBatch](), dict[int, list[int]](), set[int]()
    for part_number, (part, numbers) in enumerate(zip(parts, held, strict=True)):
        left_out[part_number] = []
        for batch in range(len(part.sizes)):
            own = np.array(part.positions(batch))
            positions = own[numbers[own] >= 0]
            if len(positions) >= fewest:
                batches.append(StoredBatch(part_number, batch, positions, numbers[positions]))
                taken |= set(numbers[positions].tolist())
            else:
                positions = positions[:0]
            left_out[part_number] += np.setdiff1d(own, positions).tolist()
    gone = len({name for part in parts for name in part.ids} - set(images.ids))
    # Of too few for a mini-batch, all that were stored stay out of the result.
    others = [] if planned else [k for k in range(len(images)) if k not in taken]
    new = len(set(images.ids) - {name for part in parts for name in part.ids}) + changed
    left = len(images) - len(taken) - len(others)
    if not new and len(others) < fewest:
        left, others = left + len(others), []
    notes = _notes(new, gone, changed, len(others) - new if others else 0)
    if left:
        warnings.warn(
            f"{left} images are left out of the result, because too few others are left in their mini-batches",
            stacklevel=2,
        )
    if not others:
        if not batches:
            raise ImageError(f"{images.name} holds too few of the images in {store.where}; choose another folder")
        return Division(batches, left_out, notes=notes)
    if len(others) < fewest:
        raise ImageError(
            f"{len(others)} images of {images.name} are new to {store.where}, first {brief(images.ids[others[0]])}, "
            f"and a mini-batch of {listed(estimators)} CKA needs at least {fewest}; add more, or choose another folder"
        )
    further = make_batches(images.subset(others), batch_size, seed + len(parts), estimators)
    added = _part(images, [np.array(others)[batch] for batch in further])
    batches += _batches_of(added[0], len(parts), added[1])
    return Division(batches, left_out, added[0], _labels(images, added[1]), notes)


def _held(
    store: ProductStore, images: ImageSet, execution: Execution, fingerprint: str
) -> tuple[list[np.ndarray], int]:
    """Where the images are in a store: index in the image set by part and position, -1 where it is not among them.

    Returns:
        These indices, and the number of images whose content differs from that of the stored ones of their names.
    """
    index, parts = {name: k for k, name in enumerate(images.ids)}, store.parts
    held = [np.array([index.get(name, -1) for name in part.ids]) for part in parts]
    if (known := store.image_sets.get(fingerprint)) is not None:
        for numbers, absent in itertools.zip_longest(held, known):
            numbers[slice(None) if absent is None else absent] = -1
        return held, 0
    digests, changed, taken = [store.digests(k) for k in range(len(parts))], set[int](), set[int]()
    there = [
        (part, position) for part, numbers in [*enumerate(held)][::-1] for position in np.flatnonzero(numbers >= 0)
    ]  # where an image joined a later part, that one has it
    for part, position in execution.bar("comparing images", len(there), "image", items=there, leave=False):
        number, digest = int(held[part][position]), digests[part][position]
        # Of an image that had no part in any mini-batch yet, there is nothing to compare.
        same = number not in taken and (digest == 1 or image_digest(images[number]) == digest)
        (taken if same else changed).add(number)
        held[part][position] = number if same else -1
    return held, len(changed - taken)


def divided_by_loader(store: ProductStore, loader: ImageLoader) -> Division:
    """The mini-batches of a loader, which are those of the store if there are any.

    Raises:
        StorageError: the store holds those of other images.
    """
    if store.parts and loader.fingerprint() not in store.image_sets:
        raise StorageError(
            f"{store.where} holds RSMs of other images; choose another folder or remove it{loader.advice}"
        )
    if (order := store.chunks.attribute("order", list, [])) and not loader.state():
        loader.restore({"hashes": np.array(order, np.str_)})
    count_images(loader)
    if store.parts:
        part, added = store.parts[0], None
    else:
        ids = loader.ids or [str(k) for k in range(sum(loader.sizes))]
        part = added = ImagePart(tuple(ids), tuple(loader.sizes))
    batches = [StoredBatch(0, k, np.array(part.positions(k)), np.empty(0, np.int64)) for k in range(len(part.sizes))]
    return Division(batches, {}, added, loader.labels or [""] * len(part.ids))


def image_digest(image: Loaded) -> int:
    """A number that stands for the content of an image, from 2 to 2^64 - 1."""
    return max(2, int.from_bytes(hashlib.sha256(pixel_bytes(image)).digest()[:8]))


def image_digests(images: Iterable[Loaded]) -> np.ndarray:
    """The digests (n,) of some images."""
    return np.array([image_digest(image) for image in images], np.uint64)


def _part(images: ImageSet, batches: Sequence[np.ndarray]) -> tuple[ImagePart, np.ndarray]:
    """A part of these mini-batches, and the indices of its images."""
    order = np.concatenate(batches)
    return ImagePart(tuple(images.ids[k] for k in order), tuple(len(batch) for batch in batches)), order


def _labels(images: ImageSet, numbers: np.ndarray) -> list[str]:
    """Labels of some images; "" where reading them would read the images, which then give them in the sweep."""
    return [""] * len(numbers) if isinstance(images.labels, ItemLabels) else [images.labels[k] for k in numbers]


def _batches_of(part: ImagePart, number: int, order: np.ndarray) -> list[StoredBatch]:
    positions = [part.positions(batch) for batch in range(len(part.sizes))]
    return [
        StoredBatch(number, batch, np.array(own), order[own.start : own.stop]) for batch, own in enumerate(positions)
    ]


def _notes(new: int, gone: int, changed: int, regrouped: int) -> list[str]:
    notes = []
    if new:
        notes.append(
            f"{new} images are new and form mini-batches after the stored ones; one sweep over all images would draw "
            f"other mini-batches, and differ within the uncertainty of CKA"
        )
    if gone:
        notes.append(f"{gone} stored images are no longer among the images, and are left out of the result")
    if changed:
        notes.append(f"{changed} of the new images differ in content from stored ones of the same name")
    if regrouped:
        notes.append(f"{regrouped} images join new mini-batches, because too few others are left in theirs")
    return notes
