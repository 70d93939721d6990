"""Mini-batches of representations -> RSMs -> sums from which the CKA of every RSM with every other follows."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr

from rsm_probe.comparison.cka import cka_grid, get_estimator
from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.errors import ComparisonError, LayerError, RepresentationError, nearest
from rsm_probe.matching.protocol import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.probe.tokens import Representation
from rsm_probe.similarity.affinity import squared_norms
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.similarity.pairs import PairMatcher, PendingProducts
from rsm_probe.studies.means import Means
from rsm_probe.studies.probed import Probed, require_finite, walk
from rsm_probe.studies.result import BatchRsms, SweepResult


@dataclass
class _Batch:
    """A mini-batch whose pairs may still be in the hands of the workers."""

    pending: list[tuple[str, str, PendingProducts, np.ndarray]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


class Accumulator:
    """Collects RSMs batch by batch and compares every one with every other: layers, models, matchings, kernels.

    Only sums are kept, so memory does not grow with the number of images. Pairs are matched by worker threads while the
    device computes the affinities of further pairs and, where it is not the CPU, the next batch.

    Example:
        >>> accumulator = Accumulator(matchings=("identity", "optimal"))
        >>> with accumulator, Probe(model, "blocks") as probe:
        ...     for images in batches:
        ...         model(images)
        ...         accumulator.update(probe)
        >>> accumulator.cka                         # xarray.DataArray (rsm_a, rsm_b)

    Args:
        matchings: names or method objects; "identity" gives spatio-semantic RSMs, "optimal" semantic ones.
        kernels: names or kernel objects.
        estimators: which CKA estimates to sum up: "unbiased" (batches of at least 4) and "biased".
        means: means over all images to subtract first; None leaves representations as they are.
        keep: names or globs of layers whose mini-batch RSMs are kept.
        on_batch: called with the RSMs to keep after each finished mini-batch; by default they are collected in `kept`.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: budget for affinities waiting to be matched.
        on_pairs: called with the number of pairs whenever some were matched.

    Attributes:
        batches: finished mini-batches.
        images: images in them.
        kept: RSMs of finished mini-batches, where no `on_batch` takes them.
    """

    def __init__(
        self,
        matchings: Sequence[str | Matching] = ("identity", "optimal"),
        kernels: Sequence[str | Kernel] = ("linear",),
        estimators: Sequence[str] = ("unbiased", "biased"),
        *,
        means: Means | None = None,
        keep: Sequence[str] = (),
        on_batch: Callable[[BatchRsms], None] | None = None,
        workers: int | None = None,
        memory: str | int = "1GB",
        on_pairs: Callable[[int], None] = lambda count: None,
    ) -> None:
        named = [get_matching(matching) for matching in several(matchings, "matchings")]
        self.methods = dict(named)
        self.kernels = [get_kernel(kernel) for kernel in several(kernels, "kernels")]
        _require_distinct("matchings", [label for label, _ in named])
        _require_distinct("kernels", [kernel.name for kernel in self.kernels])
        for kernel in self.kernels:
            for label, method in self.methods.items():
                check_kernel(kernel, label, method.one_to_one)
        self.estimators = [get_estimator(estimator) for estimator in several(estimators, "estimators")]
        self.means = means
        self.batches = 0
        self.images = 0
        self.kept: list[BatchRsms] = []
        self.keep = [keep] if isinstance(keep, str) else list(keep)
        self.on_batch = on_batch or self._collect
        self._keys: list[RsmKey] = []
        self._sums: dict[str, np.ndarray] = {}
        self._waiting: list[_Batch] = []
        self._matcher = PairMatcher(workers, memory, on_pairs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Stops the worker threads; pairs that wait are dropped."""
        self._matcher.__exit__(None, None, None)

    def update(self, probed: Probed, ids: Sequence[str] = (), labels: Sequence[str] = ()) -> None:
        """Takes the representations of one mini-batch.

        Args:
            probed: a `Probe` after a forward pass, or model name -> probe for several models that saw the same images.
            ids: names of the images, for error messages and kept RSMs.
            labels: their labels.

        Raises:
            RepresentationError: NaN or infinity (the message names layer and image), or another number of images than
                in another layer.
            ComparisonError: too few images for an estimator; layers that differ from the batch before.
        LayerError: `keep` names a layer that is not there.
            CostError: one affinity alone exceeds the memory budget.
        """
        layers = list(walk(probed))
        count = len(layers[0][2].tokens)
        self._check_batch(layers, count, ids, labels)
        batch = _Batch(ids=list(ids), labels=list(labels))
        for model, layer, kept in layers:
            require_finite(model, layer, kept.tokens, ids)
            centred = kept.tokens if self.means is None else self.means.subtract(model, layer, kept.tokens)
            pending = self._matcher.submit(centred, None, self.methods, kept.grid)
            batch.pending.append((model, layer, pending, squared_norms(centred)))
        self._waiting.append(batch)
        # A device of its own works on the next batch while workers match this one. On the CPU both would share the
        # cores: waiting costs nothing there, and an interruption loses one batch at most.
        ahead = any(kept.tokens.device.type != "cpu" for _, _, kept in layers)
        while len(self._waiting) > int(ahead):
            self._finish_first()

    def _check_batch(
        self, layers: list[tuple[str, str, Representation]], count: int, ids: Sequence[str], labels: Sequence[str]
    ) -> None:
        for estimator in self.estimators:
            if count < estimator.fewest:
                raise ComparisonError(
                    f"a batch of {count} images is too small for {estimator.name} CKA, which needs {estimator.fewest}"
                )
        for what, names in (("ids", ids), ("labels", labels)):
            if len(names) not in (0, count):
                raise RepresentationError(f"{what} holds {len(names)} names for a batch of {count} images")
        for model, layer, kept in layers:
            if len(kept.tokens) != count:
                raise RepresentationError(
                    f"layer {layer!r} of model {model!r} holds {len(kept.tokens)} images, others {count}; "
                    f"all models must see the same batch"
                )
        keys = self._make_keys([(model, layer) for model, layer, _ in layers])
        if self._keys and keys != self._keys:
            raise ComparisonError(
                f"this batch has other layers than the ones before: {_first_difference(self._keys, keys)}"
            )
        check_kept(self.keep, {layer for _, layer, _ in layers})
        self._keys = keys

    def _make_keys(self, layers: list[tuple[str, str]]) -> list[RsmKey]:
        keys, depths = [], dict.fromkeys((model for model, _ in layers), 0)
        for model, layer in layers:
            for matching in self.methods:
                keys += [RsmKey(model, layer, depths[model], matching, kernel.name) for kernel in self.kernels]
            depths[model] += 1
        return keys

    def finish(self) -> None:
        """Waits for the pairs that workers still hold."""
        while self._waiting:
            self._finish_first()

    def _finish_first(self) -> None:
        try:
            self._finish_batch(self._waiting[0])
        except BaseException:
            # A later batch must never count in place of one that failed: what continues here would leave a gap.
            self._waiting.clear()
            raise
        self._waiting.pop(0)

    def _finish_batch(self, batch: _Batch) -> None:
        values = []
        for _, _, pending, norms in batch.pending:
            for products in pending.result().values():
                values += [kernel(products, norms, norms, same=True) for kernel in self.kernels]
        stack = np.stack(values)
        for estimator in self.estimators:
            rows = estimator.rows(stack)
            self._sums[estimator.name] = self._sums.get(estimator.name, 0.0) + rows @ rows.T
        self.batches += 1
        self.images += stack.shape[1]
        kept = [k for k, key in enumerate(self._keys) if is_kept(key.layer, self.keep)]
        names = batch.ids or [str(self.images - stack.shape[1] + k) for k in range(stack.shape[1])]
        labels = batch.labels or [""] * stack.shape[1]
        self.on_batch(BatchRsms([self._keys[k] for k in kept], stack[kept], names, labels))

    def _collect(self, rsms: BatchRsms) -> None:
        if rsms.keys:
            self.kept.append(rsms)

    def result(self) -> SweepResult:
        """The comparison of everything over all batches so far, and the RSMs that were kept.

        Raises:
            ComparisonError: no batch was seen.
        """
        self.finish()
        if not self._sums:
            raise ComparisonError("nothing was compared: no batch was seen")
        grids = {}
        for name, sums in self._sums.items():
            grid = cka_grid(sums)
            undefined = [
                key.label() for key, value in zip(self._keys, np.diagonal(grid), strict=True) if np.isnan(value)
            ]
            if undefined:
                warnings.warn(
                    f"{name} CKA is undefined (NaN) for {len(undefined)} RSMs, which are constant or whose HSIC with "
                    f"themselves is not above 0, first {undefined[0]}; more images or larger batches may help",
                    stacklevel=2,
                )
            grids[name] = label_grid(grid, self._keys, self._keys)
        return SweepResult.build(grids, self.kept, images=self.images, batches=self.batches)

    @property
    def cka(self) -> xr.DataArray:
        """CKA of every RSM with every other over all batches so far, by the first estimator; see `SweepResult.cka`."""
        return self.result().cka

    def state(self) -> dict[str, np.ndarray]:
        """Plain arrays of finished batches from which `restore` continues."""
        keys = np.array([[str(part) for part in key] for key in self._keys], dtype=np.str_)
        sums = {f"hsic_{name}": value for name, value in self._sums.items()}
        return {"batches": np.array(self.batches), "images": np.array(self.images), "keys": keys, **sums}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        self.batches, self.images = int(state["batches"]), int(state["images"])
        self._keys = [RsmKey.from_texts(texts) for texts in state["keys"]]
        self._sums = {name.removeprefix("hsic_"): v for name, v in state.items() if name.startswith("hsic_")}


def is_kept(layer: str, keep: Sequence[str]) -> bool:
    """Whether a layer is among the names and globs of those to keep."""
    return any(layer == pattern or fnmatch.fnmatchcase(layer, pattern) for pattern in keep)


def check_kept(keep: Sequence[str], layers: Collection[str]) -> None:
    """Refuses names and globs that match none of the layers.

    Raises:
        LayerError: holds the nearest names.
    """
    for pattern in keep:
        if not any(is_kept(layer, [pattern]) for layer in layers):
            raise LayerError(f"keep names no layer of this sweep: {pattern!r}{nearest(pattern, layers)}")


def _require_distinct(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ComparisonError(f"{what} holds {name!r} more than once, and results are told apart by name")


def several(values: Any, what: str) -> list[Any]:
    """One thing or a sequence of things, as a list.

    Raises:
        ComparisonError: an empty sequence.
    """
    found = [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)
    if not found:
        raise ComparisonError(f"{what} is empty; name at least one")
    return found


def _first_difference(before: list[RsmKey], now: list[RsmKey]) -> str:
    for a, b in zip(before, now, strict=False):
        if a != b:
            return f"{a.label()} became {b.label()}"
    return f"{len(before)} RSMs became {len(now)}"
