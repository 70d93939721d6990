"""Turn mini-batches of representations into RSMs, and sum what CKA between all RSMs needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsm_probe.checks import listed, require_callable
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError, RepresentationError
from rsm_probe.execution.execution import Execution
from rsm_probe.faces import FormerName
from rsm_probe.forward.layer_consumer import ImageBatch
from rsm_probe.matching.matching import Matching
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.streaming.batch_consumer import ProductConsumer, Products, naming
from rsm_probe.streaming.cka_sums import CkaSums, box_of
from rsm_probe.streaming.kept_rsms import BatchRsms, RsmKinds
from rsm_probe.streaming.means import Means
from rsm_probe.streaming.result import SweepResult

if TYPE_CHECKING:
    import xarray as xr


class Accumulator(ProductConsumer):
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
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> accumulator = rsm_probe.Accumulator(matchings=("identity", "optimal"))
        >>> with torch.no_grad(), accumulator, rsm_probe.Probe(model, ["0", "1"]) as probe:
        ...     for images in torch.rand(2, 10, 3, 8, 8):    # two batches of ten images
        ...         _ = model(images)
        ...         accumulator.update(probe)
        >>> accumulator.cka.dims, accumulator.cka.shape    # two layers by two matchings
        (('rsm_a', 'rsm_b'), (4, 4))

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
        execution = Execution(workers=workers, memory=memory)
        self.kinds = RsmKinds.of(matchings, kernels, estimators, keep)
        if not isinstance(means, Means | None):
            raise RepresentationError(f"means must be the Means of a first pass, found {type(means).__name__}")
        self.batch_rsms: list[BatchRsms] = []
        if on_batch is not None:
            require_callable(on_batch, "on_batch", ComparisonError)
        require_callable(on_pairs, "on_pairs", ComparisonError)
        self.on_batch = on_batch or self._collect
        self._sums = CkaSums(self.kinds.estimators)
        self._keys: list[RsmKey] = []
        self.workers, self.memory = execution.worker_count, execution.memory_bytes
        super().__init__(execution, means, on_pairs, bounds=True)

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
            f"{listed(self.kinds.methods)}; kernels {listed([kernel.name for kernel in self.kinds.kernels])})"
        )

    def methods_of(self, model: str, layer: str) -> Mapping[str, Matching]:
        """See `ProductConsumer`; all layers have the same."""
        return self.kinds.methods

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        self._sums.require_open()
        keys = self.kinds.keys(layers)
        if self._keys and keys != self._keys:
            differing = [f"{a.label()} became {b.label()}" for a, b in zip(self._keys, keys, strict=False) if a != b]
            counts = f"{len(self._keys)} RSMs became {len(keys)}"
            raise ComparisonError(
                f"the layers of this batch differ from those of previous batches: {(differing or [counts])[0]}"
            )
        self.kinds.keep.require_among({layer for _, layer in layers})
        if self._sums.too_small(images):
            self.finish()  # only the last batch may be too small
            self._sums.leave_out(images)
            return False
        return True

    def _add(self, batch: ImageBatch, taken: Products) -> None:
        self._keys = self.kinds.keys(list(taken))
        self._await(batch, taken)

    def _finish_batch(self, batch: ImageBatch, taken: Products) -> None:
        boxes = []
        for (model, layer), part in taken.items():
            assert part.work is not None
            with naming(model, layer):
                matched = part.work.matched()
            for label, one in matched.items():
                method = self.kinds.methods[label]
                gap = one.gap if method.one_to_one and not method.at_once else None
                boxes += [box_of(kernel, one.products, gap, one.norms_x) for kernel in self.kinds.kernels]
        stack, highest = (np.stack(ends) for ends in zip(*boxes, strict=True))
        del boxes
        self._sums.add(self._keys, stack, stack.shape[1], lambda part: (stack[part], highest[part]))
        wanted = [k for k, key in enumerate(self._keys) if key.layer in self.kinds.keep]
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
        return SweepResult.of_sums(self._sums, self.batch_rsms)

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
