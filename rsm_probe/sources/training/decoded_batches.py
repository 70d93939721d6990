"""Batches of decoded images: held in memory if all of them fit, else decoded one batch ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.pixels import to_rgb

# Bytes of decoded images that are held in memory.
MEMORY = 2 * 10**9
_THREADS = 8


def shuffled(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of the images in each batch, from one random permutation after another.

    Batches may span two permutations, so that all have the same size.

    Args:
        count: number of images.
        size: images per batch.
        steps: number of batches.
        seed: seed of the permutations.

    Raises:
        ImageError: there are fewer images than a batch takes.
    """
    if count < size:
        raise ImageError(f"{count} training images do not fill one batch of {size}")
    rng, order = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def in_memory(images: ImageSet, progress: bool = False, memory: int = MEMORY) -> Tensor | None:
    """Decode all images into memory.

    Args:
        images: PIL images of one size.
        progress: show a progress bar.
        memory: bytes that the images may take.

    Returns:
        uint8 (N, 3, H, W), or None if they take more memory than allowed.

    Raises:
        ImageError: an image cannot be read.
    """
    first = _decoded(images, 0)
    if len(images) * first.numel() > memory:
        return None
    pixels = torch.empty(len(images), *first.shape, dtype=torch.uint8)

    with _workers() as pool:
        decoded = pool.map(lambda number: pixels[number].copy_(_decoded(images, number)), range(len(images)))
        for _ in tqdm(decoded, f"reading {images.name}", len(images), disable=not progress, leave=False):
            pass
    return pixels


def batches(
    images: ImageSet, pixels: Tensor | None, order: Iterable[np.ndarray]
) -> Generator[tuple[np.ndarray, Tensor]]:
    """Yield batches in the given order; they are the same whether held in memory or decoded one batch ahead.

    Args:
        images: PIL images of one size.
        pixels: what `in_memory` returned for them.
        order: the indices of the images in each batch.

    Yields:
        Indices, shape (B,), and their images, uint8 (B, 3, H, W).

    Raises:
        ImageError: an image cannot be read.
    """
    if pixels is not None:
        yield from ((numbers, pixels[numbers]) for numbers in order)
        return
    ahead: deque[tuple[np.ndarray, list[Future[Tensor]]]] = deque()
    with _workers() as pool:
        for numbers in order:
            ahead.append((numbers, [pool.submit(_decoded, images, int(number)) for number in numbers]))
            if len(ahead) > 1:
                yield _stacked(*ahead.popleft())
        while ahead:
            yield _stacked(*ahead.popleft())


def augmented(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift each image of a batch (B, C, H, W) by up to an eighth of its width into black, and mirror half of them."""
    margin, (height, width) = pixels.shape[-1] // 8, pixels.shape[-2:]
    padded = functional.pad(pixels, [margin] * 4)
    corners = rng.integers(0, 2 * margin + 1, (len(pixels), 2))
    mirrored = rng.random(len(pixels)) < 0.5
    crops = [
        image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, corners, strict=True)
    ]
    return torch.stack([crop.flip(-1) if mirror else crop for crop, mirror in zip(crops, mirrored, strict=True)])


def _decoded(images: ImageSet, number: int) -> Tensor:
    image = images[number]
    assert isinstance(image, Image.Image)  # as in every set that a recipe can name
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _stacked(numbers: np.ndarray, decoded: list[Future[Tensor]]) -> tuple[np.ndarray, Tensor]:
    return numbers, torch.stack([image.result() for image in decoded])


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread pool that cancels pending work at the end, so that an interruption does not wait for it."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
