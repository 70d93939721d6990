"""Random samples of the images of mini-batches: drawn with replacement, in random orders, or whole mini-batches.

The stream of random numbers runs over samples, then mini-batches, so that one seed means the same draws for one set of
RSMs and for the same set as the only mini-batch. Values are computed mini-batch by mini-batch, for all samples at once.
Therefore each sample has a generator of its own, at its own position of the stream; no draw is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np

from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError

# Largest share of images in mini-batches that are too small to draw from.
_FIXED = 0.05


class Sample(NamedTuple):
    """How the images of one mini-batch count in one sample.

    Attributes:
        times: how often the mini-batch counts.
        weights: how often each image counts, (N,); None for once each.
        order: order of the images in the columns, (N,); None for that of the rows.
    """

    times: int = 1
    weights: np.ndarray | None = None
    order: np.ndarray | None = None


# Number of a sample and of a mini-batch -> how its images count. For each sample, mini-batches come in their order.
Sampler = Callable[[int, int], Sample]


def drawn_images(sizes: Sequence[int], measure: Measure, repeats: int, seed: int) -> Sampler:
    """Draw the images of each mini-batch with replacement.

    Samples that leave too few different images for the measure are drawn again. Mini-batches that are too small to draw
    from, such as a last one of 4 images, count as they are if they hold at most 5 % of the images.

    Args:
        sizes: number of images in each mini-batch.
        measure: a measure that can weight images.
        repeats: number of samples.
        seed: seed of the draws.

    Raises:
        ComparisonError: the measure cannot weight images, or more than half of the samples leave too few images.
    """
    for size in sizes:
        measure.require_images(size, np.ones(size))
    starts, refusals = _accepted(sizes, measure, repeats, seed)
    drawn = np.full(len(sizes), True)
    if len(starts) < repeats:
        drawn = refusals <= refusals.max() / 2
        images = np.array(sizes)
        if images[~drawn].sum() <= _FIXED * images.sum():
            starts, _ = _accepted(images[drawn], measure, repeats, seed)
    if len(starts) < repeats:
        smallest = f" (the smallest mini-batch holds {min(sizes)}); draw whole mini-batches with draw='mini-batches'"
        raise ComparisonError(
            f"there are too few images to draw from: in most draws, too few different images are left for "
            f"{measure.name}{smallest if len(sizes) > 1 else ''}"
        )
    if not drawn.all():
        warnings.warn(
            f"{int((~drawn).sum())} mini-batches are too small to draw images from for {measure.name}; their "
            f"{int(images[~drawn].sum())} of {int(images.sum())} images count once in every draw",
            stacklevel=4,
        )
    return lambda sample, batch: Sample(weights=_counts(starts[sample], sizes[batch])) if drawn[batch] else Sample()


def _accepted(
    sizes: Sequence[int] | np.ndarray, measure: Measure, repeats: int, seed: int
) -> tuple[list[np.random.Generator], np.ndarray]:
    """Find samples that leave enough different images in every mini-batch, until there are enough or more are refused.

    Returns:
        A generator before each of these samples, and how often each mini-batch was left with too few images.
    """
    rng, tries = np.random.default_rng(seed), 0
    starts: list[np.random.Generator] = []
    refusals = np.zeros(len(sizes))
    # After more refusals than repeats, the samples that survive would be a biased choice.
    while len(starts) < repeats and tries <= len(starts) + repeats:
        start, refused = deepcopy(rng), np.array([not _enough(measure, _counts(rng, size)) for size in sizes])
        tries += 1
        refusals += refused
        if not refused.any():
            starts.append(start)
    return starts, refusals


def _enough(measure: Measure, counts: np.ndarray) -> bool:
    try:
        measure.require_images(len(counts), counts)
    except ComparisonError:
        return False
    return True


def shuffled_images(sizes: Sequence[int], repeats: int, seed: int) -> Sampler:
    """Put the images of each mini-batch in random orders.

    Args:
        sizes: number of images in each mini-batch.
        repeats: number of samples.
        seed: seed of the orders.
    """
    rng = np.random.default_rng(seed)
    starts: list[np.random.Generator] = []
    for _ in range(repeats):
        starts.append(deepcopy(rng))
        for size in sizes:
            rng.permutation(size)
    return lambda sample, batch: Sample(order=starts[sample].permutation(sizes[batch]))


def _counts(rng: np.random.Generator, size: int) -> np.ndarray:
    """How often each of `size` images was drawn."""
    return np.bincount(rng.integers(size, size=size), minlength=size)
