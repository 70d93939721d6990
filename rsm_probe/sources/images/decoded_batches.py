"""Batches of decoded images: out of memory where all of them fit, else decoded while the batch before is used."""

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

# So many bytes of decoded images are kept.
MEMORY = 2 * 10**9
_THREADS = 8


def shuffled(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The numbers of the images in each batch: one random order after another, without end effects.

    Raises:
        ImageError: the images do not fill one batch.
    """
    if count < size:
        raise ImageError(f"{count} training images do not fill one batch of {size}")
    rng, order = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def in_memory(images: ImageSet, progress: bool = False) -> Tensor | None:
    """All images decoded, uint8 (N, 3, H, W), or None where they take more than `MEMORY`.

    Args:
        images: PIL images of one size.
        progress: show a bar.

    Raises:
        ImageError: an image cannot be read.
    """
    first = _decoded(images, 0)
    if len(images) * first.numel() > MEMORY:
        return None
    pixels = torch.empty(len(images), *first.shape, dtype=torch.uint8)

    def keep(number: int) -> None:
        pixels[number] = _decoded(images, number)

    with _workers() as pool:
        done = pool.map(keep, range(len(images)))
        for _ in tqdm(done, f"reading {images.name}", len(images), disable=not progress, leave=False):
            pass
    return pixels


def batches(
    images: ImageSet, pixels: Tensor | None, order: Iterable[np.ndarray]
) -> Generator[tuple[np.ndarray, Tensor]]:
    """Batches in the order given, the same from memory as decoded on the way.

    Args:
        images: PIL images of one size.
        pixels: what `in_memory` gave for them.
        order: the numbers of the images in each batch.

    Yields:
        Numbers, shape (B,), and their images, uint8 (B, 3, H, W).

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
                yield _due(ahead)
        while ahead:
            yield _due(ahead)


def augmented(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Every image of a batch (B, C, H, W), moved by up to an eighth of its edge into black, half of them mirrored."""
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
    assert isinstance(image, Image.Image)  # as in all sets that a recipe can name
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _due(ahead: deque[tuple[np.ndarray, list[Future[Tensor]]]]) -> tuple[np.ndarray, Tensor]:
    numbers, parts = ahead.popleft()
    return numbers, torch.stack([part.result() for part in parts])


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that leave undone what nobody waits for any more, so that an interruption is not kept waiting."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
