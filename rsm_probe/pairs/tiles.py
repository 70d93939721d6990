"""Tiles of image pairs on disk: a worker reads captures, matches the pairs of a tile and writes its chunks.

A result is a chunk store whose chunks are the tiles: `product` and `bound` (image_a, image_b), `norm_a` and `norm_b`,
and `permutation` (image_a, image_b, location) where it is kept. Within one set of images, both halves are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from rsm_probe.captures.captured_layers import KIND as CAPTURE
from rsm_probe.captures.captured_layers import Capture, CapturedLayer, layers_of
from rsm_probe.errors import StorageError
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.device_cache import DeviceCache
from rsm_probe.pairs.pair_loop import match_sides
from rsm_probe.pairs.products import MatchedProducts, permutation_dtype
from rsm_probe.pairs.sides import Side
from rsm_probe.pairs.token_sets import centred_tokens
from rsm_probe.similarity.centering import Centering
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.paths import absolute

KIND = "pairs"
_tokens_on_devices = DeviceCache()
# Array of a result -> attribute of `MatchedProducts` that it stores.
_FIELDS = {
    "norm_a": "norms_x", "norm_b": "norms_y", "bound": "bounds", "product": "products", "permutation": "permutations",
}  # fmt: skip
# Fill value of permutations that were not written; never a partner.
_NOT_WRITTEN = -2


@dataclass(frozen=True)
class LayerAddress:
    """How a worker finds a captured layer.

    Attributes:
        where: path or URL of the capture.
        layer: name.
        digest: hash of its tokens, which reveals a capture that was replaced.
        chunk: images per chunk when the layer was opened.
    """

    where: str
    layer: str
    digest: str
    chunk: int

    @classmethod
    def of(cls, layer: CapturedLayer) -> LayerAddress:
        """The address of an open layer."""
        return cls(absolute(layer.where), layer.name, layer.digest, layer.images_per_chunk)

    def open(self) -> CapturedLayer:
        """Open the layer, once in each process.

        Raises:
            StorageError: the capture is missing, damaged or was replaced.
        """
        store = ChunkStore.open(self.where, CAPTURE)
        digests = {layer["name"]: layer["digest"] for layer in layers_of(store)}
        if digests.get(self.layer) != self.digest:
            raise StorageError(f"the capture at {self.where} was replaced by another while it was being used")
        return _opened(self)


@lru_cache(maxsize=16)
def _opened(address: LayerAddress) -> CapturedLayer:
    return Capture.open(address.where)[address.layer]


@dataclass(frozen=True)
class Job:
    """The settings that all tiles of a result share.

    Attributes:
        x: the images in the rows.
        y: the images in the columns; None for those of x.
        out: path or URL of the result.
        method: the matching.
        centering: which mean is subtracted: that of y where y is given, else that of x.
        device: where affinities are computed.
        permutations: whether they are kept.
        tile: images on each side of a tile.
        workload: the size of the whole work, which decides whether the device of a worker solves the pairs.
    """

    x: LayerAddress
    y: LayerAddress | None
    out: str
    method: Matching
    centering: Centering | None
    device: str
    permutations: bool
    tile: int
    workload: Workload

    def tasks(self, rows: int, columns: int) -> Iterator[Task]:
        """Yield the tiles; within one set of images, those on and above the diagonal."""
        for i in range(0, rows, self.tile):
            for j in range(0 if self.y else i, columns, self.tile):
                yield Task(self, i, min(i + self.tile, rows), j, min(j + self.tile, columns))


@dataclass(frozen=True)
class Task:
    """One tile: images `top` to `bottom` in the rows, `left` to `right` in the columns."""

    job: Job
    top: int
    bottom: int
    left: int
    right: int

    @property
    def on_diagonal(self) -> bool:
        """Whether rows and columns are the same images."""
        return self.job.y is None and self.top == self.left

    @property
    def pairs(self) -> int:
        """Number of pairs of different images; within one set, unordered pairs."""
        rows, columns = (self.bottom - self.top, 1), (self.right - self.left, 1)
        return Workload.of(rows, None if self.on_diagonal else columns).pairs

    def parts(self) -> list[tuple[str, tuple[slice, ...]]]:
        """Arrays and regions that the tile writes; the last one marks it as finished."""
        rows, columns = slice(self.top, self.bottom), slice(self.left, self.right)
        regions = [(rows, columns)]
        if self.job.y is None and not self.on_diagonal:
            regions.insert(0, (columns, rows))
        names = ["permutation"] * self.job.permutations + ["bound", "product"]
        norms: list[tuple[str, tuple[slice, ...]]] = []
        if self.left == 0 or self.on_diagonal:
            norms.append(("norm_a", (rows,)))
        if (self.top == 0 and self.job.y is not None) or self.on_diagonal:
            norms.append(("norm_b", (columns,)))
        return norms + [(name, region) for name in names for region in regions]

    def is_there(self, store: ChunkStore) -> bool:
        """Whether the tile was finished and is intact."""
        return all(store.intact(name, region) for name, region in reversed(self.parts()))


def forget_tokens() -> None:
    """Free tokens of tiles that are cached on devices."""
    _tokens_on_devices.clear()


def array_names(job: Job) -> list[str]:
    """The names of all arrays of a finished result."""
    sides = [f"{part}_{side}" for side in "ab" for part in ("image", "label", "norm")]
    return [*sides, "product", "bound", *(["permutation"] if job.permutations else [])]


def holds_all(store: ChunkStore, job: Job, x: CapturedLayer, y: CapturedLayer) -> bool:
    """Whether a result has all its arrays, and these names of images.

    Raises:
        StorageError: an array lost its metadata.
    """
    named = all(
        store.holds_names(f"image_{side}", layer.ids) and store.holds_names(f"label_{side}", layer.labels)
        for side, layer in (("a", x), ("b", y))
    )
    return named and all(name in store for name in array_names(job))


def create_arrays(store: ChunkStore, job: Job, x: CapturedLayer, y: CapturedLayer) -> None:
    """Create the arrays of a result where they are missing.

    Raises:
        StorageError: they cannot be written.
    """
    shape, tile = (len(x), len(y)), (job.tile, job.tile)
    dimensions = ("image_a", "image_b")
    for suffix, layer in (("a", x), ("b", y)):
        store.put_names(f"image_{suffix}", layer.ids, f"image_{suffix}")
        store.put_names(f"label_{suffix}", layer.labels, f"image_{suffix}")
        store.create(f"norm_{suffix}", (len(layer),), (job.tile,), np.float64, np.nan, (f"image_{suffix}",))
    for name in ("product", "bound"):
        store.create(name, shape, tile, np.float64, np.nan, dimensions)
    if job.permutations:
        locations, dtype = x.shape[1], permutation_dtype(y.shape[1])
        store.create(
            "permutation", (*shape, locations), (*tile, locations), dtype, _NOT_WRITTEN, (*dimensions, "location")
        )


def compute(task: Task) -> int:
    """Read the images of a tile, match its pairs in one thread and write them; return the number of pairs.

    Raises:
        StorageError: a capture cannot be read, or the result cannot be written.
    """
    job = task.job
    x = job.x.open()
    y = x if job.y is None else job.y.open()
    with one_thread(), torch.no_grad():
        rows = _side(job, job.x, x, (task.top, task.bottom), y)
        columns = rows if task.on_diagonal else _side(job, job.y or job.x, y, (task.left, task.right), y)
        tile = match_sides(rows, columns, job.method, job.workload, job.permutations)
    _write(task, tile, x.shape[1])
    return task.pairs


def _side(
    job: Job, address: LayerAddress, layer: CapturedLayer, numbers: tuple[int, int], reference: CapturedLayer
) -> Side:
    """Some images of a layer, centred, on the device."""
    key = (address, numbers, job.y or job.x, job.centering)
    read = partial(centred_tokens, layer, slice(*numbers), reference, job.centering)
    return Side.of(_tokens_on_devices.get(key, read, torch.device(job.device)).contiguous(), layer.grid)


def _write(task: Task, tile: MatchedProducts, locations: int) -> None:
    store = ChunkStore.open(task.job.out, KIND, writable=True)
    turned = tile.transposed(locations) if task.job.y is None and not task.on_diagonal else tile
    for name, region in task.parts():
        mirrored = len(region) > 1 and region[0] != slice(task.top, task.bottom)
        values = getattr(turned if mirrored else tile, _FIELDS[name])
        assert values is not None
        store.write(name, region, values)
