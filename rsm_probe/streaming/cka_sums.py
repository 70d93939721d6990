"""Sums over mini-batches of RSMs, from which CKA follows for any division of the images into batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rsm_probe.comparison.alignment import Estimator, cka_grid
from rsm_probe.comparison.certified import Boxes, CertifiedSums
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError
from rsm_probe.similarity.kernels import Kernel, highest_similarities

# The exponent of an RSM that was 0 so far: below that of any number.
_NOTHING = -1100
# Precedes the names of the sums of bounds in a state.
_CERTIFIED = "certified_"
# Most entries of RSMs that are compared with each other at a time. It decides in which order products are summed, and
# with it the last digits: those of a sweep must not depend on the memory of a machine.
_BLOCK_ENTRIES = 1 << 26


class CkaSums:
    """Sums over the pairs of images of all batches, from which CKA between all RSMs follows.

    An estimator divides a sum over pairs of images by their number. The sums here are not divided, so each batch is
    weighted by its pairs. Each RSM is scaled by a power of two, so that squares do not overflow; this changes no digit
    of CKA.

    Args:
        estimators: estimators to sum for.

    Attributes:
        keys: keys of the R RSMs; empty before the first batch.
        batches: number of batches.
        images: number of images in the batches.
        left_out: number of images of a last batch that was too small and is left out, or None.
        smallest: shape (R,), the smallest eigenvalue of each matched RSM over the batches; NaN for the identity
            matching.
    """

    def __init__(self, estimators: Sequence[Estimator]) -> None:
        self.estimators = list(estimators)
        self.keys: list[RsmKey] = []
        self.batches = 0
        self.images = 0
        self.left_out: int | None = None
        self.smallest = np.empty(0)
        self._sums: dict[str, np.ndarray] = {}
        # None once the bounds of a batch are unknown.
        self._certified: dict[str, CertifiedSums] | None = {e.name: CertifiedSums(e) for e in self.estimators}
        self._exponents = np.empty(0, dtype=np.int64)

    def require_open(self) -> None:
        """Reject batches after one that was left out: which images count must not depend on the order of batches.

        Raises:
            ComparisonError: a batch was left out.
        """
        if self.left_out is not None:
            raise ComparisonError(
                f"the previous batch, number {self.batches + 1}, was left out: a batch of "
                f"{self._words(self.left_out)}, and only the very last batch may be too small. Start again with "
                f"drop_last=True in the DataLoader or a different batch size"
            )

    def too_small(self, count: int) -> bool:
        """Whether a batch of `count` images is too small for an estimator."""
        return count < self._strictest.fewest

    def leave_out(self, count: int) -> None:
        """Leave out a last batch that is too small, with a warning.

        Raises:
            ComparisonError: it is the first batch.
        """
        if not self.batches:
            raise ComparisonError(f"a batch of {self._words(count)}; use larger batches")
        self.left_out = count
        warnings.warn(
            f"a batch of {self._words(count)}: it is left out for all estimators and not counted in `images`; only "
            f"the last batch may be too small. drop_last=True in the DataLoader or a different batch size avoids this",
            stacklevel=5,  # above this method, and `_accepts`, `_close` and `update` of the accumulator
        )

    @property
    def _strictest(self) -> Estimator:
        """The estimator that needs the most images."""
        return max(self.estimators, key=lambda estimator: estimator.fewest)

    def _words(self, count: int) -> str:
        return f"{count} images is too small for {self._strictest.name} CKA, which needs {self._strictest.fewest}"

    def add(
        self,
        keys: Sequence[RsmKey],
        rsms: np.ndarray | Callable[[slice], np.ndarray],
        count: int,
        boxes: Boxes | None = None,
    ) -> None:
        """Add the RSMs of one batch.

        All are compared with all in blocks, of which two are in memory at a time.

        Args:
            keys: keys of the R RSMs.
            rsms: the RSMs (R, N, N), or a function that returns a slice of them; it is called several times where R
                RSMs make more than one block.
            count: number of images, N.
            boxes: returns the lowest and highest entries of a slice of the RSMs, see `CertifiedSums.add`; None where
                bounds are unknown, so that the sums prove no intervals.

        Raises:
            ComparisonError: an RSM is not finite; the message names its layer.
        """
        step, first = rsms_per_block(count), not self.batches
        blocks = [slice(start, min(start + step, len(keys))) for start in range(0, len(keys), step)]
        load = rsms.__getitem__ if isinstance(rsms, np.ndarray) else rsms
        before = np.full(len(keys), _NOTHING) if first else self._exponents
        exponents, smallest = before.copy(), np.full(len(keys), np.nan)
        added = {estimator.name: np.empty((len(keys), len(keys))) for estimator in self.estimators}
        for number, block in enumerate(blocks):
            values = load(block)
            self._require_finite(keys[block], values)
            smallest[block] = _smallest_eigenvalues(keys[block], values)
            largest = np.abs(values).max(axis=(1, 2))
            exponents[block] = np.maximum(np.where(largest > 0, np.frexp(largest)[1], _NOTHING), before[block])
            rows = self._rows(values, exponents[block])
            del values
            for other in blocks[: number + 1]:
                columns = rows if other is block else self._rows(load(other), exponents[other])
                for estimator in self.estimators:
                    product = (rows[estimator.name] @ columns[estimator.name].T) * estimator.divisor(count)
                    added[estimator.name][block, other] = product
                    added[estimator.name][other, block] = product.T
        shift = before - exponents
        for name, sums in added.items():
            if not first:
                sums += np.ldexp(self._sums[name], shift[:, None] + shift[None, :])
        self.keys, self._sums, self._exponents = list(keys), added, exponents
        self.smallest = smallest if first else np.fmin(self.smallest, smallest)
        self._certify(boxes, len(keys), count)
        self.batches += 1
        self.images += count

    def _certify(self, boxes: Boxes | None, rsms: int, count: int) -> None:
        """Add the bounds of a batch, whose work fills more memory than that of the values: in smaller blocks."""
        if boxes is None or self._certified is None:
            self._certified = None
            return
        step = max(4, rsms_per_block(count) // 4)
        blocks = [slice(start, min(start + step, rsms)) for start in range(0, rsms, step)]
        if len(blocks) == 1:  # read once for all estimators
            box = boxes(blocks[0])
            boxes = lambda _: box  # noqa: E731
        for sums in self._certified.values():
            sums.add(boxes, blocks, count)

    def _rows(self, rsms: np.ndarray, exponents: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of some RSMs by estimator; see `Estimator.rows`."""
        scaled = np.ldexp(rsms, -exponents[:, None, None])
        return {estimator.name: estimator.rows(scaled) for estimator in self.estimators}

    @staticmethod
    def _require_finite(keys: Sequence[RsmKey], rsms: np.ndarray) -> None:
        finite = np.isfinite(rsms).all(axis=(1, 2))
        if not finite.all():
            key = keys[int(np.flatnonzero(~finite)[0])]
            raise ComparisonError(
                f"the similarities of layer {key.layer!r} of model {key.model!r} by {key.matching}/{key.kernel} "
                f"overflow: the outputs of the layer are too large; scale them or use kernel 'cosine'"
            )

    def grids(self) -> dict[str, np.ndarray]:
        """CKA between all RSMs by estimator, shape (R, R) each; see `cka_grid`."""
        return {name: cka_grid(sums) for name, sums in self._sums.items()}

    def intervals(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Lowest and highest CKA of exact matching by estimator, (R, R) each; {} if no matching is an approximation."""
        grids = self.grids()
        known = {name: sums for name, sums in (self._certified or {}).items() if sums.approximate}
        return {name: sums.intervals(grids[name]) for name, sums in known.items()}

    def remarks(self) -> list[str]:
        """Warnings about the grids: images that are left out, RSMs with undefined CKA."""
        lines = []
        if self.left_out is not None:
            lines.append(
                f"CKA covers {self.images} images in {self.batches} batches; a last batch of {self.left_out} images "
                f"was too small and is left out"
            )
        for name, grid in self.grids().items():
            undefined = [
                key.label() for key, value in zip(self.keys, np.diagonal(grid), strict=True) if np.isnan(value)
            ]
            if undefined:
                lines.append(
                    f"{name} CKA is undefined (NaN) for {len(undefined)} RSMs, which are constant or whose HSIC with "
                    f"themselves is not positive, first {undefined[0]}; more images or larger batches may help"
                )
        return lines

    def state(self) -> dict[str, np.ndarray]:
        """The sums as plain arrays, from which `restore` continues."""
        return {
            "batches": np.array(self.batches),
            "images": np.array(self.images),
            "left_out": np.array(-1 if self.left_out is None else self.left_out),
            "keys": np.array([[str(part) for part in key] for key in self.keys], dtype=np.str_).reshape(-1, 5),
            "smallest": self.smallest,
            "exponents": self._exponents,
            **{f"pairs_{name}": sums for name, sums in self._sums.items()},
            **{
                f"{_CERTIFIED}{name}_{part}": values
                for name, sums in (self._certified or {}).items()
                for part, values in sums.state().items()
            },
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`.

        Raises:
            ComparisonError: the sums are those of different estimators, or of an earlier version, which weighted all
                batches equally.
        """
        if any(name.startswith("hsic_") for name in state):
            raise ComparisonError(
                "these sums are from an earlier version of rsm_probe, which weighted small and large batches equally; "
                "this version weights batches by their pairs and cannot continue them: start again"
            )
        missing = {"batches", "images", "left_out", "keys", "smallest", "exponents"} - set(state)
        names = {name.removeprefix("pairs_") for name in state if name.startswith("pairs_")}
        wanted = {estimator.name for estimator in self.estimators}
        if missing or (int(state["batches"]) and names != wanted):
            raise ComparisonError(
                f"this is not the state of an accumulator for {', '.join(sorted(wanted))} CKA: "
                + (f"{', '.join(sorted(missing))} missing" if missing else f"it holds {', '.join(sorted(names))}")
            )
        self.batches, self.images = int(state["batches"]), int(state["images"])
        left_out = int(state["left_out"])
        self.left_out = None if left_out < 0 else left_out
        self.keys = [RsmKey.from_texts(texts) for texts in state["keys"]]
        self.smallest, self._exponents = np.array(state["smallest"]), np.array(state["exponents"], dtype=np.int64)
        # In the order of the estimators: the first gives `SweepResult.cka`.
        self._sums = {e.name: np.array(state[f"pairs_{e.name}"]) for e in self.estimators if e.name in names}
        self._certified = {e.name: CertifiedSums(e) for e in self.estimators}
        for name, sums in self._certified.items():
            before = f"{_CERTIFIED}{name}_"
            sums.restore({key.removeprefix(before): v for key, v in state.items() if key.startswith(before)})
        if self.batches and not any(key.startswith(_CERTIFIED) for key in state):
            self._certified = None  # the state of a version without bounds, or of batches without them


def rsms_per_block(count: int) -> int:
    """Number of RSMs of `count` images in a block, of which two are compared at a time."""
    return max(16, _BLOCK_ENTRIES // count**2)


def _smallest_eigenvalues(keys: Sequence[RsmKey], rsms: np.ndarray) -> list[float]:
    """The smallest eigenvalue of each matched RSM; NaN by identity, whose RSMs are positive semi-definite."""
    return [
        float(np.linalg.eigvalsh(rsm)[0]) if key.matching != "identity" else np.nan
        for key, rsm in zip(keys, rsms, strict=True)
    ]


def box_of(
    kernel: Kernel, products: np.ndarray, gap: np.ndarray | None, norms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest entries of an RSM, (n, n) each.

    Args:
        kernel: the kernel.
        products: matched inner products, (n, n).
        gap: upper bounds minus products, (n, n); None where the matching is not an approximation.
        norms: squared norms, (n,).
    """
    low = kernel(products, norms, norms, same=True)
    if gap is None:
        return low, low
    try:
        return low, highest_similarities(kernel, products, products + gap, norms, norms, same=True)
    except ComparisonError:  # a kernel of the user's, whose bounds are unknown
        return low, np.full(low.shape, np.inf)
