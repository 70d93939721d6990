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

from rsm_probe.comparison.cka import cka_grid, get_estimator
from rsm_probe.comparison.grid import RsmKey, label_grid
from rsm_probe.errors import ComparisonError, RepresentationError
from rsm_probe.arrays import first_nonfinite
from rsm_probe.matching.protocol import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.probe.tokens import Representation, require_finite
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.similarity.pairs import PairMatcher
from rsm_probe.studies.means import Means
from rsm_probe.studies.names import check_kept, first_difference, is_kept, require_distinct, several
from rsm_probe.studies.probed import Probed, walk
from rsm_probe.studies.result import BatchRsms, SweepResult
from rsm_probe.studies.submitted import Batch, Submitted


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
        require_distinct("matchings", [label for label, _ in named])
        require_distinct("kernels", [kernel.name for kernel in self.kernels])
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
        self._smallest = np.empty(0)
        self._waiting: list[Batch] = []
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
        counts = [
            (model, layer, part.count if isinstance(part, Submitted) else len(part.tokens))
            for model, layer, part in layers
        ]
        self._check_batch(counts, ids, labels)
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
        self._waiting.append(Batch(submitted, list(ids), list(labels)))
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
            return Submitted(self, model, count, bad, ahead, None)
        centred = kept.tokens if self.means is None else self.means.subtract(model, layer, kept.tokens)
        return Submitted(self, model, count, None, ahead, self._matcher.submit(centred, None, self.methods, kept.grid))

    def _check_batch(self, layers: list[tuple[str, str, int]], ids: Sequence[str], labels: Sequence[str]) -> None:
        count = layers[0][2]
        for estimator in self.estimators:
            if count < estimator.fewest:
                raise ComparisonError(
                    f"a batch of {count} images is too small for {estimator.name} CKA, which needs {estimator.fewest}"
                )
        for what, names in (("ids", ids), ("labels", labels)):
            if len(names) not in (0, count):
                raise RepresentationError(f"{what} holds {len(names)} names for a batch of {count} images")
        for model, layer, found in layers:
            if found != count:
                raise RepresentationError(
                    f"layer {layer!r} of model {model!r} holds {found} images, others {count}; "
                    f"all models must see the same batch"
                )
        keys = self._make_keys([(model, layer) for model, layer, _ in layers])
        if self._keys and keys != self._keys:
            raise ComparisonError(
                f"this batch has other layers than the ones before: {first_difference(self._keys, keys)}"
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

    def _finish_batch(self, batch: Batch) -> None:
        values = []
        for part in batch.layers:
            assert part.products is not None
            norms, _ = part.products.squared_norms
            for products in part.products.result().values():
                values += [kernel(products, norms, norms, same=True) for kernel in self.kernels]
        stack = np.stack(values)
        # Matched RSMs need not be positive semi-definite; of the others it is known.
        ends = [
            np.linalg.eigvalsh(rsm)[0] if key.matching != "identity" else np.nan
            for key, rsm in zip(self._keys, stack, strict=True)
        ]
        self._smallest = np.fmin(self._smallest, ends) if self.batches else np.array(ends)
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
        return SweepResult.build(grids, self.kept, self._smallest, images=self.images, batches=self.batches)

    @property
    def cka(self) -> xr.DataArray:
        """CKA of every RSM with every other over all batches so far, by the first estimator; see `SweepResult.cka`."""
        return self.result().cka

    def state(self) -> dict[str, np.ndarray]:
        """Plain arrays of finished batches from which `restore` continues."""
        keys = np.array([[str(part) for part in key] for key in self._keys], dtype=np.str_)
        sums = {f"hsic_{name}": value for name, value in self._sums.items()}
        counts = {"batches": np.array(self.batches), "images": np.array(self.images)}
        return {**counts, "keys": keys, "smallest": self._smallest, **sums}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        self.batches, self.images = int(state["batches"]), int(state["images"])
        self._keys = [RsmKey.from_texts(texts) for texts in state["keys"]]
        self._smallest = state.get("smallest", np.full(len(self._keys), np.nan))
        self._sums = {name.removeprefix("hsic_"): v for name, v in state.items() if name.startswith("hsic_")}
