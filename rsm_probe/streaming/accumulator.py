"""Mini-batches of representations -> RSMs -> sums from which the CKA of every RSM with every other follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import torch
import xarray as xr

from rsm_probe.arrays import first_nonfinite
from rsm_probe.checks import require_callable, require_text, require_texts
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.errors import ComparisonError, RepresentationError
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.matcher import PairMatcher
from rsm_probe.probe.representation import Representation, require_finite
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.streaming.means import Means
from rsm_probe.streaming.names import check_kept, is_kept, kept_names, require_distinct, require_same, rsm_keys, several
from rsm_probe.streaming.pending import Batch, Submitted
from rsm_probe.streaming.probed_layers import Probed, TakenPasses, naming, require_one_batch, walk
from rsm_probe.streaming.result import BatchRsms, SweepResult
from rsm_probe.streaming.sums import Sums


class Accumulator:
    """Collects RSMs batch by batch and compares every one with every other: layers, models, matchings, kernels.

    Only sums are kept, so memory does not grow with the number of images. They run over pairs of images: a batch counts
    by its pairs. Pairs are matched by worker threads while the device computes the affinities of further pairs
    and, where it is not the CPU, the next batch.

    One last batch may be too small for an estimator ("unbiased" needs 4 images, "biased" 2), as data loaders leave it:
    it is left out for all estimators, and of `images`, with a warning. A batch after it is an error.

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
        kept: RSMs of finished mini-batches, where no `on_batch` takes them.

    Raises:
        RsmProbeError: an argument of the wrong kind, an unknown name, or one that comes twice.
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
        require_distinct("matchings", [label for label, _ in named])
        require_distinct("kernels", [kernel.name for kernel in self.kernels])
        for kernel in self.kernels:
            for label, method in self.methods.items():
                check_kernel(kernel, label, method.one_to_one)
        self.estimators = [get_estimator(estimator) for estimator in several(estimators, "estimators")]
        require_distinct("estimators", [estimator.name for estimator in self.estimators])
        if not isinstance(means, Means | None):
            raise RepresentationError(f"means must be a Means of a first pass, found {type(means).__name__}")
        self.means = means
        self.kept: list[BatchRsms] = []
        self.keep = kept_names(keep)
        if on_batch is not None:
            require_callable(on_batch, "on_batch", ComparisonError)
        require_callable(on_pairs, "on_pairs", ComparisonError)
        self.on_batch = on_batch or self._collect
        self._sums = Sums(self.estimators)
        self._keys: list[RsmKey] = []
        self._taken = TakenPasses()
        self._waiting: list[Batch] = []
        self.on_pairs = on_pairs
        self._matcher = PairMatcher(workers, memory, lambda count: self.on_pairs(count))
        self.workers, self.memory = self._matcher.workers, self._matcher.memory

    @property
    def batches(self) -> int:
        """Number of finished mini-batches."""
        return self._sums.batches

    @property
    def images(self) -> int:
        """Number of images in them."""
        return self._sums.images

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
            ComparisonError: layers that differ from the batch before; a first batch that is too small for an estimator,
                or a batch after one that was.
            LayerError: nothing was captured, or a pass that was taken already; `keep` names a layer that is not there.
            MatchingError: tokens that a matching cannot take, such as those beyond 1e150.
            CostError: one affinity alone exceeds the memory budget.
        """
        self._taken.require_new(probed)
        self._sums.require_open()
        layers = walk(probed, Submitted)
        count = require_one_batch(
            [(m, n, part.count if isinstance(part, Submitted) else len(part.tokens)) for m, n, part in layers],
            ids := require_texts(ids, "ids", RepresentationError),
            labels := require_texts(labels, "labels", RepresentationError),
        )
        keys = self._new_keys([(model, layer) for model, layer, _ in layers])
        if self._sums.too_small(count):
            self.finish()  # only the last batch may be
            self._sums.leave_out(count)
            self._taken.take(probed)
            return
        submitted = []
        for model, layer, part in layers:
            part = part if isinstance(part, Submitted) else self._submit(model, layer, part)
            if part.owner is not self or part.model != model:
                raise ComparisonError(
                    f"layer {layer!r} of model {model!r} was reduced by the reducer({part.model!r}) of "
                    f"{'this' if part.owner is self else 'another'} accumulator; use this one's reducer({model!r})"
                )
            require_finite(model, layer, part.bad, ids)
            submitted.append(part)
        self._keys = keys
        self._taken.take(probed)
        self._waiting.append(Batch(submitted, ids, labels))
        # A device of its own works on the next batch while workers match this one. On the CPU both would share the
        # cores: waiting costs nothing there, and an interruption loses one batch at most.
        while len(self._waiting) > int(any(part.ahead for part in submitted)):
            self._finish_first()

    def reducer(self, model: str = "model") -> Callable[[str, Representation], Submitted]:
        """What a `Probe` can do with every layer as soon as it has run, so that no batch is held as a whole.

        Pass it as `Probe(..., reduce=accumulator.reducer())`, and the probe to `update` as ever. Identity needs no
        copy of the tokens then; other matchings keep those that workers have not come to.

        Args:
            model: the name of the model in `update`.
        """
        require_text(model, "the name of a model", RepresentationError)
        outlives = self.means is None and not all(method.at_once for method in self.methods.values())

        def submit(layer: str, kept: Representation) -> Submitted:
            if outlives:  # the model may change its own tensors before workers come to them
                kept = replace(kept, tokens=kept.tokens.clone(memory_format=torch.contiguous_format))
            return self._submit(model, layer, kept)

        return submit

    def _submit(self, model: str, layer: str, kept: Representation) -> Submitted:
        count, ahead = len(kept.tokens), kept.tokens.device.type != "cpu"
        bad = first_nonfinite(kept.tokens)
        if bad is not None:
            return Submitted(self, model, layer, count, bad, ahead, None)
        centred = kept.tokens if self.means is None else self.means.subtract(model, layer, kept.tokens)
        with naming(model, layer):
            products = self._matcher.submit(centred, None, self.methods, kept.grid)
        return Submitted(self, model, layer, count, None, ahead, products)

    def rehearse(self, probed: Probed) -> None:
        """Matches one pair of images of every layer and keeps nothing, so that what cannot be matched is refused early.

        Raises:
            MatchingError: a matching cannot take a layer; the message names it.
            CostError: one affinity alone exceeds the memory budget.
        """
        for model, layer, kept in walk(probed):
            with naming(model, layer):
                self._matcher.submit(kept.tokens[:2], None, self.methods, kept.grid).result()

    def _new_keys(self, layers: list[tuple[str, str]]) -> list[RsmKey]:
        """What the RSMs of a batch will be, which is the same for all batches."""
        keys = rsm_keys(layers, list(self.methods), [kernel.name for kernel in self.kernels])
        require_same(self._keys or keys, keys)
        check_kept(self.keep, {layer for _, layer in layers})
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

    def _finish_batch(self, batch: Batch) -> None:
        values = []
        for part in batch.layers:
            assert part.products is not None
            norms, _ = part.products.squared_norms
            with naming(part.model, part.layer):
                products = part.products.result().values()
            values += [kernel(found, norms, norms, same=True) for found in products for kernel in self.kernels]
        stack = np.stack(values)
        self._sums.add(self._keys, stack)
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
        if not self.batches:
            raise ComparisonError("nothing was compared: no batch was seen")
        grids = {name: label_grid(grid, self._keys, self._keys) for name, grid in self._sums.grids().items()}
        for words in self._sums.remarks():
            warnings.warn(words, stacklevel=2)
        counts = {"images": self.images, "batches": self.batches, "left_out": self._sums.left_out or 0}
        return SweepResult.build(grids, self.kept, self._sums.smallest, **counts)

    @property
    def cka(self) -> xr.DataArray:
        """CKA of every RSM with every other over all batches so far, by the first estimator; see `SweepResult.cka`."""
        return self.result().cka

    def state(self) -> dict[str, np.ndarray]:
        """Plain arrays of finished batches from which `restore` continues."""
        return self._sums.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned.

        Raises:
            ComparisonError: sums of other estimators, or of an earlier version.
        """
        self._sums.restore(state)
        self._keys = self._sums.keys
