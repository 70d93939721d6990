"""Mini-batches of representations -> RSMs -> sums from which the CKA of every RSM with every other follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
import torch

from rsm_probe.checks import require_callable
from rsm_probe.comparison.alignment import Estimator, get_estimator
from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.errors import ComparisonError, RepresentationError, repeated
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_consumer import ImageBatch
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.matcher import PairMatcher, PendingProducts
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.streaming.batch_consumer import BatchConsumer, Probed, TakenLayer, naming, walk
from rsm_probe.streaming.cka_sums import CkaSums
from rsm_probe.streaming.kept_rsms import BatchRsms, KeptLayers
from rsm_probe.streaming.means import Means
from rsm_probe.streaming.result import SweepResult

if TYPE_CHECKING:
    import xarray as xr

_Batch = TypeVar("_Batch")


class Accumulator(BatchConsumer[PendingProducts]):
    """Collects RSMs batch by batch and compares every one with every other: layers, models, matchings, kernels.

    Only sums are kept, so memory does not grow with the number of images. They run over pairs of images: a batch counts
    by its pairs. Pairs are matched by worker threads while the device computes the affinities of further pairs
    and, where it is not the CPU, the next batch.

    One last batch may be too small for an estimator ("unbiased" needs 4 images, "biased" 2), as data loaders leave it:
    it is left out for all estimators, and of `images`, with a warning. A batch after it is an error.

    With `Probe(..., reduce=accumulator.reducer())` identity needs no copy of the tokens; other matchings keep those
    that workers have not come to.

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
        on_batch: called with the RSMs to keep after each finished mini-batch; by default they go into
            `batch_rsms`.
        on_pairs: called with the number of pairs whenever some were matched.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: what may be held at a time, as bytes or text such as "2GB", of affinities that wait to be matched.

    Attributes:
        batch_rsms: RSMs of finished mini-batches, where no `on_batch` takes them.

    Raises:
        RsmProbeError: an argument of the wrong kind, an unknown name, or one that comes twice. `update` raises
            ComparisonError also for layers that differ from the batch before, for a first batch that is too small for
            an estimator, and for a batch after one that was; LayerError where `keep` names a layer that is not there;
            MatchingError for tokens that a matching cannot take, such as those beyond 1e150; CostError where one
            affinity alone exceeds the memory budget.
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
        on_pairs: Callable[[int], None] = lambda count: None,
        workers: int | None = None,
        memory: str | int = "2GB",
    ) -> None:
        super().__init__()
        self.methods: dict[str, Matching] = _by_name(matchings, "matchings", get_matching)
        known = _by_name(kernels, "kernels", lambda kernel: (get_kernel(kernel).name, get_kernel(kernel)))
        self.kernels: list[Kernel] = list(known.values())
        for kernel in self.kernels:
            for label, method in self.methods.items():
                check_kernel(kernel, label, method.one_to_one)
        known = _by_name(estimators, "estimators", lambda name: (get_estimator(name).name, get_estimator(name)))
        self.estimators: list[Estimator] = list(known.values())
        if not isinstance(means, Means | None):
            raise RepresentationError(f"means must be a Means of a first pass, found {type(means).__name__}")
        self.means = means
        self.batch_rsms: list[BatchRsms] = []
        self.keep = KeptLayers(keep)
        if on_batch is not None:
            require_callable(on_batch, "on_batch", ComparisonError)
        require_callable(on_pairs, "on_pairs", ComparisonError)
        self.on_batch = on_batch or self._collect
        self.on_pairs = on_pairs
        self._sums = CkaSums(self.estimators)
        self._keys: list[RsmKey] = []
        self._backlog: Backlog[tuple[ImageBatch, Mapping[tuple[str, str], TakenLayer[PendingProducts]]]]
        self._backlog = Backlog(lambda batch: self._finish_batch(*batch))
        self._opened = ExitStack()
        execution = Execution(workers=workers, memory=memory)
        self._matcher = self._opened.enter_context(PairMatcher(execution, lambda count: self.on_pairs(count)))

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
        self._opened.close()

    def _lasting(self, representation: Representation) -> Representation:
        if self.means is not None or all(method.at_once for method in self.methods.values()):
            return representation  # centring copies the tokens, and what is done at once needs no copy
        # The model may change its own tensors before workers come to them.
        return replace(representation, tokens=representation.tokens.clone(memory_format=torch.contiguous_format))

    def _work_on(self, model: str, layer: str, representation: Representation) -> PendingProducts:
        tokens = representation.tokens
        tokens = tokens if self.means is None else self.means.subtract(model, layer, tokens)
        with naming(model, layer):
            return self._matcher.submit(tokens, None, self.methods, representation.grid)

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        self._sums.require_open()
        keys = self._keys_of(layers)
        if self._keys and keys != self._keys:
            differing = [f"{a.label()} became {b.label()}" for a, b in zip(self._keys, keys, strict=False) if a != b]
            counts = f"{len(self._keys)} RSMs became {len(keys)}"
            raise ComparisonError(f"this batch has other layers than the ones before: {(differing or [counts])[0]}")
        self.keep.require_among({layer for _, layer in layers})
        if self._sums.too_small(images):
            self.finish()  # only the last batch may be
            self._sums.leave_out(images)
            return False
        return True

    def _keys_of(self, layers: Sequence[tuple[str, str]]) -> list[RsmKey]:
        """What the RSMs of a batch are, in the order in which they are made: layers in forward order within a model."""
        keys, depths = [], dict.fromkeys((model for model, _ in layers), 0)
        for model, layer in layers:
            keys += [RsmKey(model, layer, depths[model], name, k.name) for name in self.methods for k in self.kernels]
            depths[model] += 1
        return keys

    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[PendingProducts]]) -> None:
        self._keys = self._keys_of(list(taken))
        # A device of its own works on the next batch while workers match this one. On the CPU both would share the
        # cores: waiting costs nothing there, and an interruption loses one batch at most.
        self._backlog.add((batch, taken), ahead=int(any(part.device.type != "cpu" for part in taken.values())))

    def rehearse(self, probed: Probed) -> None:
        """Matches one pair of images of every layer and keeps nothing, so that what cannot be matched is refused early.

        Raises:
            MatchingError: a matching cannot take a layer; the message names it.
            CostError: one affinity alone exceeds the memory budget.
        """
        for model, layer, representation in walk(probed):
            with naming(model, layer):
                self._matcher.submit(representation.tokens[:2], None, self.methods, representation.grid).result()

    def finish(self) -> None:
        """Waits for the pairs that workers still hold."""
        self._backlog.finish()

    def _finish_batch(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[PendingProducts]]) -> None:
        values = []
        for (model, layer), part in taken.items():
            assert part.work is not None
            norms, _ = part.work.squared_norms
            with naming(model, layer):
                matched = part.work.result().values()
            values += [kernel(products, norms, norms, same=True) for products in matched for kernel in self.kernels]
        stack = np.stack(values)
        self._sums.add(self._keys, stack)
        wanted = [k for k, key in enumerate(self._keys) if key.layer in self.keep]
        names = list(batch.ids) or [str(self.images - stack.shape[1] + k) for k in range(stack.shape[1])]
        labels = list(batch.labels) or [""] * stack.shape[1]
        self.on_batch(BatchRsms([self._keys[k] for k in wanted], stack[wanted], names, labels))

    def _collect(self, rsms: BatchRsms) -> None:
        if rsms.keys:
            self.batch_rsms.append(rsms)

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
        return SweepResult.build(grids, self.batch_rsms, self._sums.smallest, **counts)

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


class Backlog(Generic[_Batch]):
    """Batches that were handed over and are not yet finished, in their order.

    Args:
        finish: finishes one batch.
    """

    def __init__(self, finish: Callable[[_Batch], None]) -> None:
        self._finish_one = finish
        self._waiting: list[_Batch] = []

    def add(self, batch: _Batch, ahead: int = 0) -> None:
        """Hands over a batch, and finishes the first ones until at most `ahead` wait."""
        self._waiting.append(batch)
        self.finish(ahead)

    def finish(self, ahead: int = 0) -> None:
        """Finishes the first batches until at most `ahead` wait."""
        while len(self._waiting) > ahead:
            try:
                self._finish_one(self._waiting[0])
            except BaseException:
                # A later batch must never count in place of one that failed: what continues here would leave a gap.
                self._waiting.clear()
                raise
            self._waiting.pop(0)


def _by_name(values: Any, what: str, known: Callable[[Any], tuple[str, Any]]) -> dict[str, Any]:
    """One thing or several, by their names.

    Args:
        values: as a user gave them.
        what: the argument, for messages.
        known: value -> name and object.

    Raises:
        ComparisonError: an empty sequence, or two of one name.
    """
    several = [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)
    if not several:
        raise ComparisonError(f"{what} is empty; name at least one")
    named = [known(value) for value in several]
    if (twice := repeated(name for name, _ in named)) is not None:
        raise ComparisonError(f"{what} holds {twice!r} more than once, and results are told apart by name")
    return dict(named)
