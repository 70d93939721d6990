"""Correlations of outputs with similarities, of more images than have all their pairs in memory.

Values over pairs lie in files that are mapped into memory. For each value, pairs are sorted once; every bootstrap
sample then reads them in this order. The sums, in `pair_sums.py`, are exact up to rounding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.resampling import drawn_images
from rsm_probe.errors import ComparisonError
from rsm_probe.execution.execution import Execution
from rsm_probe.paper.outputs.divergence import SAME_OUTPUTS
from rsm_probe.paper.outputs.pair_sums import (
    Block,
    PairOrder,
    correlation,
    pair_weights,
    rank_correlation,
    weighted_sums,
)
from rsm_probe.paper.similarity_rows import SimilarityRows
from rsm_probe.runs.pieces import once, stacked
from rsm_probe.storage.disk_space import require_space

# Bytes in memory per value of a block of rows, and per pair that is read in order.
_PER_VALUE, _PER_PAIR = 128, 128
# Pairs that are read in order at once, at least and at most; and pairs of a figure.
_FEWEST, _MOST, _PICTURED = 1 << 9, 1 << 22, 300_000
# Bytes on disk per pair: for each rule, and besides for the divergence and the rule at hand.
_OF_RULE, _AT_ONCE = 17, 64


def least_memory(images: int, tile: int | None) -> int:
    """Bytes that streaming needs: a row of pairs, or a row of tiles."""
    return _PER_VALUE * images * (tile or 1) + _PER_PAIR * _FEWEST


@dataclass(frozen=True)
class StreamedCorrelations:
    """Pearson and Spearman correlations over all pairs, and the same in bootstrap samples of the images.

    Attributes:
        folder: folder of the model's results. Results are stored in pieces, from which an interrupted run resumes;
            files over pairs are removed at the end.
        owner: text that changes whenever the results do.
        images: number of images, N.
        divergence: divergence of images `start` to `stop` with all from `start` on, (stop - start, N - start).
        rows: makes the similarities of each rule.
        tile: see `SimilarityRows`.
        repeats: number of bootstrap samples.
        seed: seed of the draws, which are those of `bootstrap_samples`.
        execution: memory and workers.
    """

    folder: Path
    owner: str
    images: int
    divergence: Callable[[int, int], np.ndarray]
    rows: Mapping[Any, Callable[[], SimilarityRows]]
    tile: int | None
    repeats: int
    seed: int
    execution: Execution

    def values(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Compute, for each measure, its value for every rule, (rules,), and in every sample, (repeats, rules).

        Raises:
            ComparisonError: the divergence is constant, products are not finite, or there are too few images to draw.
            StorageError: the disk is too small, or a file cannot be written.
        """
        owner = f"{self.owner} {self.repeats} samples, seed {self.seed}"
        with self._files() as files:
            linear = once(self.folder / "pearson.npz", owner, lambda: {"values": files().pearson})
            once(self._picture, self.owner, lambda: files().pictured)
            with self.execution.bar("bootstrap", self.repeats + 1, "sample", leave=False) as bar:
                ranked = stacked(
                    self.folder / "spearman.npz", owner, self.repeats + 1,
                    lambda number: {"values": files().spearman(number)}, bar.update,
                )  # fmt: skip
        by_measure = {"rsa-pearson": linear["values"], "rsa-spearman": ranked["values"]}
        return {measure: (values[0], values[1:]) for measure, values in by_measure.items()}

    def pictured(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The divergence of some pairs drawn at random, and their similarities under every rule."""
        with self._files() as files:
            arrays = once(self._picture, self.owner, lambda: files().pictured)
        return arrays["divergence"], [arrays[str(number)] for number in range(len(self.rows))]

    @property
    def _picture(self) -> Path:
        return self.folder / "pictured.npz"

    @contextmanager
    def _files(self) -> Iterator[Callable[[], _PairFiles]]:
        """Yield what makes the files over pairs when they are first used."""
        folder = self.folder / "streamed"
        try:
            yield cache(lambda: _PairFiles(folder, self))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _weights(work: StreamedCorrelations, measure: str) -> np.ndarray:
    """How often each image counts, (1 + repeats, N): once, and in the bootstrap samples of a measure."""
    draw = drawn_images([work.images], get_measure(measure), work.repeats, work.seed)
    weights = np.ones((1 + work.repeats, work.images), np.int32)
    for number in range(work.repeats):
        drawn = draw(number, 0).weights
        assert drawn is not None
        weights[number + 1] = drawn
    return weights


class _PairFiles:
    """The pairs of images, sorted by divergence and by the similarity of each rule, in files.

    Attributes:
        pearson: Pearson correlations, without and with weights, (1 + repeats, rules).
        pictured: values of some pairs; see `StreamedCorrelations.pictured`.
    """

    def __init__(self, folder: Path, work: StreamedCorrelations) -> None:
        self._folder, self._images, self._tile = folder, work.images, work.tile
        self._count = work.images * (work.images - 1) // 2
        memory, self._workers = work.execution.memory_bytes, work.execution.worker_count
        self._chunk = min(max(memory // (_PER_PAIR * self._workers), _FEWEST), _MOST)
        rows = max(1, memory // (_PER_VALUE * work.images))
        self._rows = rows if work.tile is None else max(rows // work.tile, 1) * work.tile
        # Index among all pairs of the first pair of each row.
        starts = np.arange(work.images, dtype=np.int64)
        self._offsets = starts * work.images - starts * (starts + 1) // 2
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        space = require_space(folder, self._count * (len(work.rows) * _OF_RULE + _AT_ONCE))
        work.execution.say(
            f"the similarities of {self._count:,} pairs exceed memory: they are streamed from the disk, {space}"
        )
        self._weights, self._rank_weights = (_weights(work, measure) for measure in ("rsa-pearson", "rsa-spearman"))
        picked = np.random.default_rng(work.seed).choice(
            self._count, min(self._count, _PICTURED), replace=False, shuffle=False
        )
        picked.sort()
        self._divergence = self._filled("divergence", work.divergence)
        if not self._divergence.any():
            raise ComparisonError(SAME_OUTPUTS)
        # By index of the pair, where its divergence begins among the sorted ones.
        self._begins = self._array("divergence-begins", self._position)
        self._divergence_order, _ = self._sorted("divergence", self._divergence)
        self._table = self._array("table", np.float64)
        self.pictured = {"divergence": self._divergence[picked]}
        centre = float(self._divergence.mean())
        divergence = weighted_sums(self._blocks(centre, None, 0.0), self._weights)
        self._rules: list[tuple[PairOrder, np.ndarray]] = []
        correlations = []
        for number, make in enumerate(work.rows.values()):
            values = self._similarities(make())
            self.pictured[str(number)] = values[picked]
            own = float(values.mean())
            sums = weighted_sums(self._blocks(centre, values, own), self._weights)
            counts = pair_weights(self._weights)
            correlations.append(correlation(counts, (own, centre), sums[:2], divergence, sums[2]))
            self._rules.append(self._sorted(str(number), values))
            self._remove(values)
        self.pearson = np.stack(correlations, axis=1)

    def spearman(self, sample: int) -> np.ndarray:
        """Spearman correlations of all rules, (rules,), in a sample; 0 stands for all images once each."""
        weights = self._rank_weights[sample]
        count = float(pair_weights(weights[None])[0])
        divergence = self._divergence_order.rank(weights, self._table)

        def of_rule(rule: tuple[PairOrder, np.ndarray]) -> float:
            own, product = rule[0].compare(weights, rule[1], self._table)
            return rank_correlation(count, own, divergence, product)

        with ThreadPoolExecutor(self._workers) as pool:
            return np.array(list(pool.map(of_rule, self._rules)))

    # Files

    @property
    def _position(self) -> type[np.integer]:
        return np.uint32 if self._count < 2**32 else np.int64

    def _array(self, name: str, dtype: Any) -> np.memmap:
        return np.memmap(self._folder / f"{name}.bin", dtype, "w+", shape=(self._count,))

    def _remove(self, *arrays: np.memmap) -> None:
        for array in arrays:
            assert array.filename is not None
            Path(array.filename).unlink()

    def _parts(self) -> Iterator[slice]:
        for start in range(0, self._count, self._chunk):
            yield slice(start, min(start + self._chunk, self._count))

    # Blocks of rows

    def _row_blocks(self) -> Iterator[tuple[int, int, slice, np.ndarray]]:
        """Yield the first row and the end of each block, its part of all pairs, and which of its values are pairs."""
        for start in range(0, self._images - 1, self._rows):
            stop = min(start + self._rows, self._images)
            inside = np.triu(np.ones((stop - start, self._images - start), dtype=bool), 1)
            begin = int(self._offsets[start])
            yield start, stop, slice(begin, begin + int(inside.sum())), inside

    def _filled(self, name: str, block: Callable[[int, int], np.ndarray]) -> np.memmap:
        values = self._array(name, np.float64)
        for start, stop, part, inside in self._row_blocks():
            values[part] = block(start, stop)[inside]
        return values

    def _similarities(self, rows: SimilarityRows) -> np.memmap:
        """The similarities of all pairs under a rule, divided by the largest if their squares would overflow."""
        values = self._filled("values", rows.block)
        if rows.needs_median:
            ordered = self._ordered(values)
            middle = ordered[(self._count - 1) // 2], ordered[self._count // 2]
            median = float(np.mean(middle))
            self._remove(ordered)
            for part in self._parts():
                values[part] = rows.of_distances(np.asarray(values[part]), median)
        largest = max(float(np.abs(values[part]).max()) for part in self._parts())
        if largest and not 1e-100 < largest < 1e100:
            for part in self._parts():
                values[part] /= largest
        return values

    def _blocks(self, centre: float, values: np.ndarray | None, own: float) -> Iterator[Block]:
        """Yield blocks of the centred divergence and its square; or of values, their squares and the products."""
        for start, stop, part, inside in self._row_blocks():
            arrays: list[np.ndarray] = []
            for source, mean in ((self._divergence, centre), *(() if values is None else ((values, own),))):
                array = np.zeros(inside.shape)
                array[inside] = source[part] - mean
                arrays.append(array)
            divergence, last = arrays[0], arrays[-1]
            products: Sequence[np.ndarray] = () if values is None else (divergence * last,)
            yield slice(start, stop), slice(start, None), (last, last**2, *products)

    # Sorted pairs

    def _ordered(self, values: np.ndarray) -> np.memmap:
        ordered = self._array("ordered", np.float64)
        for part in self._parts():
            ordered[part] = values[part]
        ordered.sort()
        return ordered

    def _sorted(self, name: str, values: np.ndarray) -> tuple[PairOrder, np.ndarray]:
        """Sort pairs by their values.

        Returns:
            The pairs in this order and, for each of them, where its divergence begins among the sorted ones.
        """
        kind = np.uint16 if self._images <= 2**16 else np.uint32
        first, second = (self._array(f"{name}-{side}", kind) for side in ("first", "second"))
        begins, partners = self._array(f"{name}-new", bool), self._array(f"{name}-partners", self._position)
        ordered, placed = self._ordered(values), self._array("placed", self._position)
        begins[0] = True
        for part in self._parts():
            begins[max(part.start, 1) : part.stop] = (
                ordered[max(part.start, 1) : part.stop] != ordered[max(part.start, 1) - 1 : part.stop - 1]
            )
            of_part = np.asarray(values[part])
            by = np.argsort(of_part, kind="stable")
            at = np.searchsorted(ordered, of_part[by])
            new = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
            lengths = np.diff(new, append=len(at))
            # Behind the equal values of earlier parts and of this one.
            position = at + placed[at] + (np.arange(len(at)) - np.repeat(new, lengths))
            placed[at[new]] += lengths.astype(self._position)
            pair = np.arange(part.start, part.stop)[by]
            row = np.searchsorted(self._offsets[:-1], pair, "right") - 1
            first[position], second[position] = row, pair - self._offsets[row] + row + 1
            if values is self._divergence:
                self._begins[pair] = at
            partners[position] = self._begins[pair]
        self._remove(ordered, placed)
        return PairOrder(first, second, begins), partners
