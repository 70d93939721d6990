"""The arrays of an RSM store: matched inner products, norms and certified gaps of every mini-batch.

A store is a chunk store. The images that came to it together are a *part*, divided into mini-batches once and for all;
`images/000/` holds their names, labels and digests. `products/<set>/000/` holds the products of a `SeriesSet` in the
mini-batches of a part: `product` (batch, series, pair) in float64, `gap` of those series that certify their products,
in float32 and rounded up, and `norm` (batch, layer, image). Pairs are those of the lower triangle with its diagonal,
row by row. A mini-batch is there once its norms are, which are written last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from rsm_probe.errors import StorageError
from rsm_probe.pairs.products import MatchedProducts
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.declared import first_missing
from rsm_probe.storage.differences import differences
from rsm_probe.storage.locks import WatchedFolder
from rsm_probe.stored_products.series import MatchingText, SeriesSet

KIND = "rsms"
# Stores of other versions are refused.
_VERSION = 1
# Stands for an image that no mini-batch had yet; 0 marks chunks that were not written.
_NO_DIGEST = np.uint64(1)
# Chunks hold as many series of a mini-batch as fit into this: few files, and a series is read without many others.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class ImagePart:
    """Images that came to a store together.

    Attributes:
        ids: names of the images, in the order of their mini-batches.
        sizes: number of images in each mini-batch.
    """

    ids: tuple[str, ...]
    sizes: tuple[int, ...]

    def positions(self, batch: int) -> range:
        """Positions in the part of the images of a mini-batch."""
        start = sum(self.sizes[:batch])
        return range(start, start + self.sizes[batch])


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """A mini-batch of a store, as far as its images belong to a result.

    Attributes:
        part: number of the part.
        number: number of the mini-batch in the part.
        positions: positions in the part of the images of the result, ascending.
        images: indices of these images in the image set; empty for a loader.
    """

    part: int
    number: int
    positions: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


class ProductStore:
    """An RSM store; see the module.

    Args:
        chunks: the chunk store.

    Attributes:
        where: its path.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self.chunks, self.where = chunks, chunks.where
        version = chunks.attribute("version", int, _VERSION)
        if version != _VERSION:
            raise StorageError(
                f"{self.where} is an RSM store of format {version}, and this version of rsm_probe reads format "
                f"{_VERSION}; choose another folder, or use the version that wrote it"
            )
        self._folder: WatchedFolder | None = None
        self.sets = {key: SeriesSet.from_stored(stored) for key, stored in chunks.attribute("sets", dict, {}).items()}

    @classmethod
    def existing(cls, where: str | Path, writable: bool = False) -> Self | None:
        """Open a store; None if there is none.

        Raises:
            StorageError: the path holds something else, or the store is damaged or of another version.
        """
        chunks = ChunkStore.existing(where, KIND, writable)
        return None if chunks is None else cls(chunks)

    @classmethod
    @contextmanager
    def writing(cls, where: str | Path) -> Iterator[Self]:
        """Open or create a store as its only writer; see `ChunkStore.writing`."""
        with ChunkStore.writing(where, KIND) as chunks:
            yield cls(chunks)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what all mini-batches share, unless it is there.

        Raises:
            StorageError: the store cannot be written.
        """
        if "settings" not in self.chunks.attributes:
            self.chunks.set({"version": _VERSION, "settings": dict(settings)})
        self.chunks.claimed = True
        self._folder = WatchedFolder(self.where)

    def require_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a store whose mini-batches were made differently.

        Raises:
            StorageError: settings differ; the message names them.
        """
        stored = self.chunks.attribute("settings", dict, {})
        if stored and (changes := differences(stored, settings)):
            raise StorageError(
                f"{self.where} holds RSMs of other mini-batches ({changes}); choose another folder or remove it"
            )

    # Images

    @cached_property
    def parts(self) -> list[ImagePart]:
        """The parts of the images, in the order in which they came; StorageError where their names are lost."""
        try:
            return [
                ImagePart(tuple(map(str, self.chunks.read(f"images/{k:03d}/id"))), tuple(sizes))
                for k, sizes in enumerate(self.chunks.attribute("parts", list, []))
            ]
        except StorageError as error:  # nothing writes them again
            raise StorageError(
                f"{str(error).partition('; ')[0]}, and the names of images with it; restore that file from a copy, or "
                f"remove {self.where} and rerun the same work, which starts over"
            ) from error

    @property
    def image_sets(self) -> dict[str, list[list[int]]]:
        """Fingerprint of an image set -> positions, part by part, of the stored images that it lacks."""
        return self.chunks.attribute("image_sets", dict, {})

    def put_image_set(self, fingerprint: str, left_out: Mapping[int, Sequence[int]]) -> None:
        """Note which stored images an image set lacks; `put_part` comes before.

        Raises:
            StorageError: the store cannot be written.
        """
        absent = [list(left_out.get(k, ())) for k in range(len(self.parts))]
        if self.image_sets.get(fingerprint) != absent:
            self.chunks.set({"image_sets": {**self.image_sets, fingerprint: absent}})

    def batches_of(self, fingerprint: str) -> list[StoredBatch]:
        """The mini-batches of an image set whose sweep was finished, without its indices."""
        batches = []
        for number, (part, absent) in enumerate(zip(self.parts, self.image_sets[fingerprint], strict=False)):
            for batch in range(len(part.sizes)):
                positions = np.setdiff1d(np.array(part.positions(batch)), absent)
                if len(positions):
                    batches.append(StoredBatch(number, batch, positions, np.empty(0, np.int64)))
        return batches

    def labels(self, part: int) -> list[str]:
        """Labels of the images of a part, "" where unknown."""
        return [str(label) for label in self.chunks.read(f"images/{part:03d}/label")]

    def put_part(self, number: int, part: ImagePart, labels: Sequence[str]) -> None:
        """Add a part, or write names and labels again that became known, as those of a loader do.

        Raises:
            StorageError: the store cannot be written.
        """
        folder = f"images/{number:03d}"
        self.chunks.put_names(f"{folder}/id", part.ids, "image")
        self.chunks.put_names(f"{folder}/label", labels, "image")
        self._create_digests(number, part)
        sizes = [list(other.sizes) for other in self.parts]
        if number == len(sizes):
            self.chunks.set({"parts": [*sizes, list(part.sizes)]})
        self.__dict__.pop("parts", None)  # read again

    def _create_digests(self, number: int, part: ImagePart) -> None:
        shape = len(part.sizes), max(part.sizes)
        self.chunks.create(f"images/{number:03d}/digest", shape, (1, shape[1]), np.uint64, 0, ("batch", "image"))

    def has_digests(self, batch: StoredBatch) -> bool:
        """Whether the digests of all images of a mini-batch, as far as they belong to the result, were written."""
        row = self._digests(batch.part, batch.number)
        return bool((row[batch.positions - self.parts[batch.part].positions(batch.number).start] > _NO_DIGEST).all())

    def put_digests(self, batch: StoredBatch, digests: np.ndarray) -> None:
        """Write the digests (n,) of the images of a mini-batch; those of images that were there before stay."""
        name, row = f"images/{batch.part:03d}/digest", self._digests(batch.part, batch.number)
        own = batch.positions - self.parts[batch.part].positions(batch.number).start
        row[own] = np.where(row[own] > _NO_DIGEST, row[own], digests)
        self._create_digests(batch.part, self.parts[batch.part])  # where someone removed them
        padded = np.full(self.chunks.array(name).shape[1], _NO_DIGEST, np.uint64)
        padded[: len(row)] = row
        self.chunks.write(name, (slice(batch.number, batch.number + 1),), padded[None])

    def _digests(self, part: int, batch: int) -> np.ndarray:
        """The digests of all images of a mini-batch."""
        name, size = f"images/{part:03d}/digest", self.parts[part].sizes[batch]
        where = (slice(batch, batch + 1),)
        there = self.chunks.files.size(f"{name}/zarr.json") is not None and self._has(name, where[0])
        return self.chunks.read(name, where)[0, :size] if there else np.full(size, _NO_DIGEST)

    def digests(self, part: int) -> np.ndarray:
        """Digests of the images of a part, in order; 1 where none was written."""
        return np.concatenate([self._digests(part, batch) for batch in range(len(self.parts[part].sizes))])

    # Products

    def declare(self, wanted: SeriesSet, parts: Sequence[int]) -> None:
        """Create the arrays of a set of series in some parts, unless they are there.

        Raises:
            StorageError: they cannot be written.
        """
        if wanted.key not in self.sets:
            self.chunks.set({"sets": {**self.chunks.attribute("sets", dict, {}), wanted.key: wanted.as_stored()}})
            self.sets[wanted.key] = wanted
        for part in parts:
            folder, sizes = _folder(wanted, part), self.parts[part].sizes
            batches, largest, pairs = len(sizes), max(sizes), _pairs(max(sizes))
            for name, count, width, dtype in (
                ("product", len(wanted.series), pairs, np.float64),
                ("gap", len(wanted.bounded), pairs, np.float32),
                ("norm", len(wanted.layers), largest, np.float64),
            ):
                if count:
                    fit = count if name == "norm" else _CHUNK_BYTES // (8 * pairs)
                    self.chunks.create(
                        f"{folder}/{name}", (batches, count, width), (1, fit, width), dtype, np.nan,
                        ("batch", "layer" if name == "norm" else "series", "image" if name == "norm" else "pair"),
                    )  # fmt: skip

    @staticmethod
    def bytes_per_batch(wanted: SeriesSet, size: int) -> int:
        """Bytes that a mini-batch of a set of series takes on disk."""
        return _pairs(size) * (8 * len(wanted.series) + 4 * len(wanted.bounded)) + 8 * size * len(wanted.layers)

    def write(self, wanted: SeriesSet, batch: StoredBatch, matched: Sequence[MatchedProducts]) -> None:
        """Write the products of a mini-batch, one for each series of a declared set.

        Raises:
            StorageError: they cannot be written, or the store was removed.
        """
        self.require_there()
        folder, where = _folder(wanted, batch.part), (slice(batch.number, batch.number + 1),)
        products = np.stack([one.products for one in matched])
        self._write(f"{folder}/product", where, _triangles(products))
        if wanted.bounded:
            gaps = [gap for k in wanted.bounded if (gap := matched[k].gap) is not None]
            self._write(f"{folder}/gap", where, _triangles(np.stack(gaps)))
        norms = {layer: one.norms_x for (layer, _), one in zip(wanted.series, matched, strict=True)}
        self._write(f"{folder}/norm", where, np.stack([norms[k] for k in range(len(wanted.layers))]))

    def require_there(self) -> None:
        """Check that the store was not removed while work on it went on.

        Raises:
            StorageError: it was removed, or another is in its place.
        """
        if (self._folder and not self._folder.is_there()) or self.chunks.files.size("zarr.json") is None:
            raise StorageError(
                f"{self.where} was removed or replaced while the sweep was running, and its RSMs are lost; run it "
                f"again, in a folder that is not removed meanwhile"
            )

    def _write(self, name: str, where: tuple[slice], values: np.ndarray) -> None:
        """Write the rows of a mini-batch (series, width), padded to the width of the largest one."""
        count, width = self.chunks.array(name).shape[1:]
        padded = np.zeros((1, count, width), values.dtype)
        padded[0, :, : values.shape[1]] = values
        self.chunks.write(name, where, padded)

    def missing(
        self, matchings: Mapping[str, Sequence[MatchingText]], batch: StoredBatch
    ) -> dict[str, list[MatchingText]]:
        """Those of some series that a mini-batch lacks: key of a layer -> its matchings."""
        there = {
            (one.layers[layer], matching)
            for one in self._serving(matchings, batch)
            if self.holds(one, batch)
            for layer, matching in one.series
        }
        left = {key: [text for text in texts if (key, text) not in there] for key, texts in matchings.items()}
        return {key: texts for key, texts in left.items() if texts}

    def holds(self, one: SeriesSet, batch: StoredBatch) -> bool:
        """Whether all files of a mini-batch are there; they are not read."""
        where, folder = slice(batch.number, batch.number + 1), _folder(one, batch.part)
        names = [f"{folder}/{name}" for name in ("norm", "product", *(["gap"] if one.bounded else []))]
        there = all(self.chunks.files.size(f"{name}/zarr.json") is not None for name in names)
        return there and all(self._has(name, where) for name in names)

    def _has(self, name: str, where: slice) -> bool:
        array = self.chunks.array(name)
        return first_missing(array, lambda key: self.chunks.files.size(f"{name}/{key}"), (where,)) is None

    def _serving(self, layers: Collection[str], batch: StoredBatch) -> list[SeriesSet]:
        """The sets with some of these layers that cover the images of a mini-batch."""
        needed = set(batch.positions.tolist())
        return [
            one
            for one in self.sets.values()
            if not needed & set(one.absent(batch.part)) and any(layer in layers for layer in one.layers)
        ]

    def read(self, series: Sequence[tuple[str, MatchingText]], batch: StoredBatch) -> tuple[np.ndarray, np.ndarray]:
        """Read the products of some series, (key of a layer, matching), in a mini-batch.

        Returns:
            Products (R, n, n), symmetric, and squared norms (R, n), both float64.

        Raises:
            StorageError: the store lacks a series, or a chunk is missing or damaged; the message names the file.
        """
        count = len(batch)
        products, norms = np.empty((len(series), count, count)), np.empty((len(series), count))
        for one, numbers in self._sets_of(series, batch).items():
            stored = {(one.layers[layer], text): (k, layer) for k, (layer, text) in enumerate(one.series)}
            rows, layers = zip(*(stored[series[number]] for number in numbers), strict=True)
            images, computed = self._images(one, batch)
            squares = _squares(self._rows("product", one, batch, rows), computed)
            products[numbers] = squares[:, images[:, None], images]
            norms[numbers] = self._rows("norm", one, batch, layers)[:, images]
        return products, norms

    def rsms(
        self, series: Sequence[tuple[str, MatchingText]], kernels: Sequence[Kernel], batch: StoredBatch, part: slice
    ) -> np.ndarray:
        """Compute RSMs of a mini-batch from its products.

        Args:
            series: (key of a layer, matching), each of which makes one RSM per kernel.
            kernels: the kernels.
            batch: the mini-batch.
            part: of the RSMs, which are ordered by series, then by kernel.

        Returns:
            Shape (R, n, n), float64.

        Raises:
            StorageError: as `read`.
        """
        numbers = range(*part.indices(len(series) * len(kernels)))
        first, last = numbers[0] // len(kernels), numbers[-1] // len(kernels)
        products, norms = self.read(series[first : last + 1], batch)
        values = np.empty((len(numbers), len(batch), len(batch)))
        for k, number in enumerate(numbers):
            one, kernel = divmod(number, len(kernels))
            own = norms[one - first]
            values[k] = kernels[kernel](products[one - first], own, own, same=True)
        return values

    def gaps(self, series: Sequence[tuple[str, MatchingText]], batch: StoredBatch) -> list[np.ndarray | None]:
        """Upper bounds minus products (n, n) of some series; None for a matching that certifies nothing.

        Raises:
            StorageError: as `read`.
        """
        gaps: list[np.ndarray | None] = [None] * len(series)
        for one, numbers in self._sets_of(series, batch).items():
            stored = {(one.layers[layer], text): k for k, (layer, text) in enumerate(one.series)}
            if bounded := [number for number in numbers if stored[series[number]] in one.bounded]:
                images, computed = self._images(one, batch)
                rows = [one.bounded.index(stored[series[number]]) for number in bounded]
                for number, row in zip(bounded, self._rows("gap", one, batch, rows), strict=True):
                    square = _squares(row.astype(np.float64)[None], computed)[0]
                    gaps[number] = square[images[:, None], images]
        return gaps

    def _sets_of(self, series: Sequence[tuple[str, MatchingText]], batch: StoredBatch) -> dict[SeriesSet, list[int]]:
        """The sets that hold some series: set -> indices of the series.

        Raises:
            StorageError: the store lacks a series.
        """
        serving = self._serving({key for key, _ in series}, batch)
        # Where none is whole, one that is not, so that reading it names the file.
        serving.sort(key=lambda one: self.holds(one, batch))
        holding = {(one.layers[layer], text): one for one in serving for layer, text in one.series}
        sets: dict[SeriesSet, list[int]] = {}
        for number, wanted in enumerate(series):
            if wanted not in holding:
                raise StorageError(f"{self.where} lacks RSMs by {wanted[1]}; run the same sweep again")
            sets.setdefault(holding[wanted], []).append(number)
        return sets

    def _rows(self, name: str, one: SeriesSet, batch: StoredBatch, rows: Sequence[int]) -> np.ndarray:
        """Rows (R, width) of an array in a mini-batch."""
        first = min(rows)
        where = slice(batch.number, batch.number + 1), slice(first, max(rows) + 1)
        return self.chunks.read(f"{_folder(one, batch.part)}/{name}", where)[0][[row - first for row in rows]]

    def _images(self, one: SeriesSet, batch: StoredBatch) -> tuple[np.ndarray, int]:
        """Indices of the images of a mini-batch in the triangles of a set, and the number of images in these."""
        absent = set(one.absent(batch.part))
        computed = [position for position in self.parts[batch.part].positions(batch.number) if position not in absent]
        return np.searchsorted(computed, batch.positions), len(computed)


def _folder(one: SeriesSet, part: int) -> str:
    return f"products/{one.key}/{part:03d}"


def _pairs(images: int) -> int:
    return images * (images + 1) // 2


def _triangles(values: np.ndarray) -> np.ndarray:
    """The lower triangles (R, n (n + 1) / 2) of matrices (R, n, n), row by row."""
    rows, columns = np.tril_indices(values.shape[-1])
    return values[:, rows, columns]


def _squares(triangles: np.ndarray, images: int) -> np.ndarray:
    """The symmetric matrices (R, n, n) of triangles, which may be padded."""
    rows, columns = np.tril_indices(images)
    squares = np.empty((len(triangles), images, images))
    squares[:, rows, columns] = squares[:, columns, rows] = triangles[:, : len(rows)]
    return squares
