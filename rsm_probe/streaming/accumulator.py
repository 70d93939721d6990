"""Turn mini-batches of representations into RSMs, and sum what CKA between all RSMs needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
import torch

from rsm_probe.checks import listed, require_callable
from rsm_probe.comparison.alignment import Estimator, get_estimator
from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.errors import ComparisonError, RepresentationError, repeated
from rsm_probe.execution.execution import Execution
from rsm_probe.faces import FormerName
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
    """Compute RSMs batch by batch and compare all of them with each other: layers, models, matchings, kernels.

    Only sums over pairs of images are kept, so memory does not grow with the number of images, and each batch is
    weighted by its pairs. Worker threads match pairs while the device computes the affinities of further pairs and,
    unless the device is the CPU, the next batch.

    The last batch may be too small for an estimator ("unbiased" needs 4 images, "biased" 2), as batches of data loaders
    can be. It is then left out for all estimators and not counted in `images`, with a warning. A batch after it is an
    error.

    With `Probe(..., reduce=accumulator.reducer())`, the identity matching needs no copy of the tokens; all other
    matchings keep a copy until the workers have matched it.

    Example:
        >>> accumulator = Accumulator(matchings=("identity", "optimal"))
        >>> with accumulator, Probe(model, "blocks") as probe:
        ...     for images in batches:
        ...         model(images)
        ...         accumulator.update(probe)
        >>> accumulator.cka                         # xarray.DataArray (rsm_a, rsm_b)

    Args:
        matchings: names or method objects; "identity" gives spatio-semantic RSMs, "optimal" semantic RSMs.
        kernels: names or kernel objects.
        estimators: CKA estimators to sum: "unbiased" (batches of at least 4 images) and "biased".
        means: means over all images to subtract first; None does not centre.
        keep: names or globs of layers whose mini-batch RSMs are kept.
        on_batch: called with the RSMs to keep after each finished mini-batch; by default they are appended to
            `batch_rsms`.
        on_pairs: called with a number of pairs each time pairs were matched.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB", for affinities that wait to be matched.

    Attributes:
        batch_rsms: kept RSMs of finished mini-batches; stays empty with `on_batch`.

    Raises:
        RsmProbeError: an argument of the wrong type, an unknown name, or a name that occurs twice. `update` also raises
            ComparisonError if layers differ from those of the previous batch, if the first batch is too small for an
            estimator, and for any batch after a too small one; LayerError if `keep` matches no layer; MatchingError for
            tokens that a matching cannot take, such as values beyond 1e150; CostError if a single affinity exceeds the
            memory budget.
    """

    kept = FormerName("batch_rsms")

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
            raise RepresentationError(f"means must be the Means of a first pass, found {type(means).__name__}")
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
        self.workers, self.memory = execution.worker_count, execution.memory_bytes
        self._matcher = self._opened.enter_context(PairMatcher(execution, lambda count: self.on_pairs(count)))

    @property
    def batches(self) -> int:
        """Number of finished mini-batches."""
        return self._sums.batches

    @property
    def images(self) -> int:
        """Number of images in the finished mini-batches."""
        return self._sums.images

    def __repr__(self) -> str:
        return (
            f"Accumulator({self.batches} batches, {self.images} images, {len(self._keys)} RSMs; matchings "
            f"{listed(self.methods)}; kernels {listed([kernel.name for kernel in self.kernels])})"
        )

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
        """Stop the worker threads and drop pairs that wait to be matched."""
        self._opened.close()

    def _lasting(self, representation: Representation) -> Representation:
        if self.means is not None or all(method.at_once for method in self.methods.values()):
            return representation  # centring copies the tokens, and immediate matchings need no copy
        # The model may change its own tensors before the workers have matched them.
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
            raise ComparisonError(
                f"the layers of this batch differ from those of previous batches: {(differing or [counts])[0]}"
            )
        self.keep.require_among({layer for _, layer in layers})
        if self._sums.too_small(images):
            self.finish()  # only the last batch may be too small
            self._sums.leave_out(images)
            return False
        return True

    def _keys_of(self, layers: Sequence[tuple[str, str]]) -> list[RsmKey]:
        """Keys of the RSMs of a batch, in computation order: layers in forward order within each model."""
        keys, depths = [], dict.fromkeys((model for model, _ in layers), 0)
        for model, layer in layers:
            keys += [RsmKey(model, layer, depths[model], name, k.name) for name in self.methods for k in self.kernels]
            depths[model] += 1
        return keys

    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[PendingProducts]]) -> None:
        self._keys = self._keys_of(list(taken))
        # A GPU computes the next batch while workers match this one. On the CPU both would share the cores: waiting
        # costs nothing there, and an interruption loses at most one batch.
        self._backlog.add((batch, taken), ahead=int(any(part.device.type != "cpu" for part in taken.values())))

    def rehearse(self, probed: Probed) -> None:
        """Match one pair of images of every layer and discard the result, to raise errors of matching early.

        Raises:
            MatchingError: a matching cannot take a layer; the message names it.
            CostError: a single affinity exceeds the memory budget.
        """
        for model, layer, representation in walk(probed):
            with naming(model, layer):
                self._matcher.submit(representation.tokens[:2], None, self.methods, representation.grid).result()

    def finish(self) -> None:
        """Wait until the workers have matched all pairs."""
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
        """CKA between all RSMs over the batches so far, and the kept RSMs.

        Raises:
            ComparisonError: there was no batch yet.
        """
        self.finish()
        if not self.batches:
            raise ComparisonError("nothing to compare: no batch was added")
        grids = {name: label_grid(grid, self._keys, self._keys) for name, grid in self._sums.grids().items()}
        for words in self._sums.remarks():
            warnings.warn(words, stacklevel=2)
        counts = {"images": self.images, "batches": self.batches, "left_out": self._sums.left_out or 0}
        return SweepResult.build(grids, self.batch_rsms, self._sums.smallest, **counts)

    @property
    def cka(self) -> xr.DataArray:
        """CKA between all RSMs over the batches so far, by the first estimator; see `SweepResult.cka`."""
        return self.result().cka

    def state(self) -> dict[str, np.ndarray]:
        """The sums over finished batches as plain arrays, from which `restore` continues."""
        return self._sums.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`.

        Raises:
            ComparisonError: the sums are those of different estimators or of an earlier version.
        """
        self._sums.restore(state)
        self._keys = self._sums.keys


class Backlog(Generic[_Batch]):
    """A queue of batches that are not yet finished, in their order.

    Args:
        finish: finishes one batch.
    """

    def __init__(self, finish: Callable[[_Batch], None]) -> None:
        self._finish_one = finish
        self._waiting: list[_Batch] = []

    def add(self, batch: _Batch, ahead: int = 0) -> None:
        """Append a batch, then finish the oldest batches until at most `ahead` wait."""
        self._waiting.append(batch)
        self.finish(ahead)

    def finish(self, ahead: int = 0) -> None:
        """Finish the oldest batches until at most `ahead` wait."""
        while len(self._waiting) > ahead:
            try:
                self._finish_one(self._waiting[0])
            except BaseException:
                # If later batches counted after a failed one, the sums would silently lack it.
                self._waiting.clear()
                raise
            self._waiting.pop(0)


def _by_name(values: Any, what: str, known: Callable[[Any], tuple[str, Any]]) -> dict[str, Any]:
    """Resolve one value or several into objects by name.

    Args:
        values: the argument as the user gave it.
        what: the name of the argument, for messages.
        known: value -> name and object.

    Raises:
        ComparisonError: the sequence is empty, or a name occurs twice.
    """
    several = [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)
    if not several:
        raise ComparisonError(f"{what} is empty; name at least one")
    named = [known(value) for value in several]
    if (twice := repeated(name for name, _ in named)) is not None:
        raise ComparisonError(f"{what} holds {twice!r} more than once, but results are identified by name")
    return dict(named)
