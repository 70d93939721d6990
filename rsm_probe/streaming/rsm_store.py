"""`RsmStore`: the RSMs that sweeps keep, for comparisons without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from rsm_probe.checks import listed
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.comparison.mini_batches import Drawn, bootstrap_batches, compare_batches, permutation_test_batches
from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError, StorageError, did_you_mean
from rsm_probe.probe.facets.facet_names import matches
from rsm_probe.similarity.kernels import Kernel, check_kernel
from rsm_probe.similarity.rsm import RSM
from rsm_probe.storage.paths import local_folder
from rsm_probe.stored_products.product_store import ProductStore, StoredBatch
from rsm_probe.stored_products.series import in_forward_order, matching_text
from rsm_probe.streaming.cka_sums import CkaSums, box_of
from rsm_probe.streaming.kept_rsms import BatchRsms, RsmKinds
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.sweep_request import STORE, SweepRequest

if TYPE_CHECKING:
    import xarray as xr


class StoredModel(NamedTuple):
    """The network and the step of a model that is a checkpoint of a training; "" and None for others."""

    network: str
    step: int | None


class _Series(NamedTuple):
    """The RSMs of a layer by a matching: the key of the layer, the matching, and whether it pairs locations."""

    layer: str
    matching: str
    one_to_one: bool


class RsmStore:
    """The RSMs of all mini-batches of one or more sweeps in a folder, or those of some models, layers and matchings.

    RSMs are computed from stored products whenever they are needed, one mini-batch at a time, so every kernel,
    estimator and measure is available without a model and without a matching.

    Example:
        >>> import torch, rsm_probe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> _ = rsm_probe.sweep({"net": model}, torch.rand(20, 3, 8, 8), ["0", "1"], batch_size=10, out="runs/net")
        >>> store = rsm_probe.RsmStore.open("runs/net")
        >>> store.select(matchings="optimal").compare("rsa-spearman").shape
        (2, 2)
        >>> store.result(kernels="rbf").cka.shape    # another kernel, without a model and without a matching
        (4, 4)

    Attributes:
        where: path of the store.
        keys: keys of the R RSMs of every mini-batch: models as they came, their layers in forward order, matchings,
            kernels.
        sizes: number of images in each mini-batch.
    """

    def __init__(
        self,
        store: ProductStore,
        batches: Sequence[StoredBatch],
        series: Mapping[RsmKey, _Series],
        kinds: RsmKinds,
        trained: Mapping[str, StoredModel],
    ) -> None:
        self.where, self._store, self._batches, self._series, self._kinds = store.where, store, batches, series, kinds
        self._trained = trained
        self.keys = [key._replace(kernel=kernel.name) for key in series for kernel in kinds.kernels]
        self.sizes = [len(batch) for batch in batches]

    @classmethod
    def open(cls, where: str | Path) -> RsmStore:
        """Open the store of a sweep, with the linear kernel.

        RSMs that do not cover all images of the latest sweep are not listed: those of models that were not part of it,
        after images were added.

        Args:
            where: the folder of the sweep, a run folder, or the store within it.

        Raises:
            StorageError: there is no store, it is damaged (the message names the file) or of another version, or no
                sweep was finished there.
        """
        folder = local_folder(where, "where")
        store = ProductStore.existing(folder / STORE) or ProductStore.existing(folder)
        if store is None:
            raise StorageError(f"no RSM store at {folder}; a sweep with out= makes {STORE} there")
        latest = store.chunks.attribute("latest", str, "")
        if not latest:
            raise StorageError(f"no sweep was finished in {store.where}; run it again, it continues")
        batches, series = store.batches_of(latest), dict[RsmKey, _Series]()
        trained = {}
        for model, stored in store.chunks.attribute("models", dict).items():
            trained[model] = StoredModel(stored["network"], stored["step"])
            for depth, (layer, key) in enumerate(stored["layers"]):
                for label, (text, one_to_one) in stored["matchings"].items():
                    series[RsmKey(model, layer, depth, label, "")] = _Series(key, text, one_to_one)
        wanted: dict[str, list[str]] = {}
        for one in series.values():
            wanted.setdefault(one.layer, []).append(one.matching)
        missing = {
            (key, text) for batch in batches for key, texts in store.missing(wanted, batch).items() for text in texts
        }
        whole = {key: one for key, one in series.items() if (one.layer, one.matching) not in missing}
        if not whole:
            raise StorageError(
                f"no RSMs in {store.where} are complete; run the sweep again, it computes what is missing"
            )
        return cls(store, batches, whole, RsmKinds.of("identity", "linear", ("unbiased", "biased"), ()), trained)

    def select(
        self,
        models: str | Sequence[str] | None = None,
        layers: str | Sequence[str] | None = None,
        matchings: str | Sequence[str] | None = None,
        kernels: str | Kernel | Sequence[str | Kernel] | None = None,
    ) -> RsmStore:
        """Some of the RSMs; None for all, and of kernels for the same as before.

        Args:
            models: names or globs.
            layers: names or globs.
            matchings: names.
            kernels: names or kernel objects, as for `sweep`.

        Raises:
            ComparisonError: nothing matches a name (the message suggests another), or an unknown kernel.
        """
        series = dict(self._series)
        for field, wanted in (("model", models), ("layer", layers), ("matching", matchings)):
            patterns = [] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
            for pattern in patterns:
                there = dict.fromkeys(getattr(key, field) for key in self._series)
                if not any(matches(name, pattern) for name in there):
                    raise ComparisonError(
                        f"no {field} {pattern!r} in {self.where}{did_you_mean(str(pattern), there)}; there are: "
                        f"{listed(there)}"
                    )
            if wanted is not None:
                series = {
                    key: one for key, one in series.items() if any(matches(getattr(key, field), p) for p in patterns)
                }
        if not series:
            raise ComparisonError(f"no RSM in {self.where} is of these models, layers and matchings together")
        kinds = self._kinds
        if kernels is not None:
            kinds = RsmKinds.of("identity", kernels, ("unbiased", "biased"), ())
            for label, one_to_one in {(key.matching, one.one_to_one) for key, one in series.items()}:
                for kernel in kinds.kernels:
                    check_kernel(kernel, label, one_to_one)
        return RsmStore(self._store, self._batches, series, kinds, self._trained)

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order in which they came."""
        return list(dict.fromkeys(key.model for key in self._series))

    def layers(self, model: str) -> list[str]:
        """Names of the layers of a model, in forward order.

        Raises:
            ComparisonError: there is no such model.
        """
        return list(dict.fromkeys(key.layer for key in self.select(models=model)._series))

    @property
    def ids(self) -> list[list[str]]:
        """Names of the images of each mini-batch."""
        return [[self._store.parts[batch.part].ids[k] for k in batch.positions] for batch in self._batches]

    def rsms(self, batch: int, part: slice = slice(None)) -> np.ndarray:
        """Compute the RSMs of a mini-batch.

        Args:
            batch: number of the mini-batch.
            part: of the RSMs, in the order of `keys`.

        Returns:
            Shape (R, n, n), float64.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        series = [(one.layer, one.matching) for one in self._series.values()]
        return self._store.rsms(series, self._kinds.kernels, self._batches[batch], part)

    def rsm(self, model: str, layer: str, matching: str, kernel: str | Kernel = "linear", batch: int = 0) -> RSM:
        """One RSM of a mini-batch, with the names of its images.

        Raises:
            ComparisonError: there is no such model, layer or matching.
        """
        only = self.select(model, layer, matching, kernel)
        return RSM.from_array(only.rsms(batch)[0], self.ids[batch])

    def bounds(self, model: str, layer: str, matching: str, batch: int = 0) -> np.ndarray | None:
        """Upper bounds (n, n) of the matched inner products of a mini-batch; None where the matching certifies nothing.

        Raises:
            ComparisonError: there is no such model, layer or matching.
        """
        (one,) = self.select(model, layer, matching)._series.values()
        series = [(one.layer, one.matching)]
        (gap,) = self._store.gaps(series, self._batches[batch])
        return None if gap is None else self._store.read(series, self._batches[batch])[0][0] + gap

    def boxes(self, batch: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The RSMs of a mini-batch, and the highest that exact matching can make of them.

        They are equal where a matching does not approximate the optimum, such as the identity and scores.

        Args:
            batch: number of the mini-batch.
            part: of the RSMs, in the order of `keys`.

        Returns:
            Two arrays (R, n, n), float64; no entry of the second is below that of the first.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        series = [(one.layer, one.matching) for one in self._series.values()]
        scores = [not one.one_to_one for one in self._series.values()]
        return boxes(self._store, series, scores, self._kinds.kernels, self._batches[batch], part)

    def result(
        self,
        kernels: str | Kernel | Sequence[str | Kernel] | None = None,
        estimators: str | Sequence[str] = ("unbiased", "biased"),
    ) -> SweepResult:
        """CKA between all RSMs, as a sweep returns it, in the memory of two blocks of RSMs of one mini-batch.

        Args:
            kernels: see `select`.
            estimators: as for `sweep`.

        Raises:
            ComparisonError: an unknown name.
            StorageError: a chunk is missing or damaged; the message names its file.
        """
        wanted = self if kernels is None else self.select(kernels=kernels)
        kinds = replace(wanted._kinds, estimators=RsmKinds.of("identity", "linear", estimators, ()).estimators)
        series = [(one.layer, one.matching) for one in wanted._series.values()]
        scores = [not one.one_to_one for one in wanted._series.values()]
        sums = StoredSums(self._store, self._batches, series, wanted.keys, kinds, scores)
        sums.until(len(self._batches))
        return sums.result().with_steps({name: self._trained[name] for name in wanted.models})

    def compare(self, measure: str | Measure = "cka") -> xr.DataArray:
        """Compare every RSM with every other by any measure; see `rsm_probe.comparison.compare_batches`."""
        return compare_batches(self, measure)

    def bootstrap(
        self,
        measure: str | Measure = "cka",
        repeats: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        on_repeat: Callable[[int], object] = lambda count: None,
        *,
        draw: Drawn | None = None,
    ) -> xr.Dataset:
        """Compute intervals of all comparisons; see `rsm_probe.comparison.bootstrap_batches`."""
        return bootstrap_batches(self, measure, repeats, level, seed, on_repeat, draw=draw)

    def permutation_test(
        self,
        measure: str | Measure = "cka",
        repeats: int = 1000,
        seed: int = 0,
        on_repeat: Callable[[int], object] = lambda count: None,
    ) -> xr.Dataset:
        """Test all comparisons against shuffled images; see `rsm_probe.comparison.permutation_test_batches`."""
        return permutation_test_batches(self, measure, repeats, seed, on_repeat)

    def __repr__(self) -> str:
        models = listed([f"{model}: {len(self.layers(model))}" for model in self.models])
        matchings = listed(list(dict.fromkeys(key.matching for key in self._series)))
        return (
            f"RsmStore({self.where!r}: {len(self.keys)} RSMs of each of {len(self.sizes)} mini-batches, "
            f"{sum(self.sizes)} images; layers of each model: {models}; matchings {matchings}; kernels "
            f"{listed([kernel.name for kernel in self._kinds.kernels])})"
        )


class StoredSums:
    """Sums over the mini-batches of a store, in their order.

    Args:
        store: the store.
        batches: the mini-batches.
        series: (key of a layer, matching), each of which makes one RSM per kernel.
        keys: keys of the RSMs.
        kinds: kernels, estimators, and the layers whose RSMs the result keeps.
        scores: for each of the series, whether it pairs no locations.

    Attributes:
        done: number of mini-batches that were added.
        batch_rsms: RSMs of the layers that the result keeps, without the labels of their images.
    """

    def __init__(
        self,
        store: ProductStore,
        batches: Sequence[StoredBatch],
        series: Sequence[tuple[str, str]],
        keys: Sequence[RsmKey],
        kinds: RsmKinds,
        scores: Sequence[bool],
    ) -> None:
        self._store, self._batches, self._series, self._keys, self._kinds = store, batches, series, keys, kinds
        self._scores = scores
        self._sums = CkaSums(kinds.estimators)
        self.batch_rsms: list[BatchRsms] = []
        self.done = 0

    def until(self, stop: int) -> None:
        """Add the mini-batches before a number that were not added yet; all of their RSMs are in the store.

        Raises:
            StorageError: a chunk is missing or damaged; the message names its file.
            ComparisonError: RSMs overflow, or a mini-batch that is too small is not the last one.
        """
        for batch in self._batches[self.done : stop]:
            self._add(batch)
            self.done += 1

    def _add(self, batch: StoredBatch) -> None:
        self._sums.require_open()
        if self._sums.too_small(len(batch)):
            self._sums.leave_out(len(batch))
            return
        rsms = partial(self._store.rsms, self._series, self._kinds.kernels, batch)
        own = partial(boxes, self._store, self._series, self._scores, self._kinds.kernels, batch)
        self._sums.add(self._keys, rsms, len(batch), own)
        if wanted := [k for k, key in enumerate(self._keys) if key.layer in self._kinds.keep]:
            values = np.concatenate([rsms(slice(k, k + 1)) for k in wanted])
            ids = [self._store.parts[batch.part].ids[k] for k in batch.positions]
            self.batch_rsms.append(BatchRsms([self._keys[k] for k in wanted], values, ids, []))

    def result(self) -> SweepResult:
        """CKA between all RSMs over the mini-batches so far, and the kept RSMs."""
        return SweepResult.of_sums(self._sums, self.batch_rsms)


def boxes(
    store: ProductStore,
    series: Sequence[tuple[str, str]],
    scores: Sequence[bool],
    kernels: Sequence[Kernel],
    batch: StoredBatch,
    part: slice,
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest entries of some RSMs of a mini-batch; see `RsmStore.boxes` and `ProductStore.rsms`."""
    numbers = range(*part.indices(len(series) * len(kernels)))
    first, last = numbers[0] // len(kernels), numbers[-1] // len(kernels)
    products, norms = store.read(series[first : last + 1], batch)
    gaps = store.gaps(series[first : last + 1], batch)
    low, high = np.empty((2, len(numbers), len(batch), len(batch)))
    for k, number in enumerate(numbers):
        one, kernel = divmod(number, len(kernels))
        gap = None if scores[one] else gaps[one - first]
        low[k], high[k] = box_of(kernels[kernel], products[one - first], gap, norms[one - first])
    return low, high


def list_models(store: ProductStore, request: SweepRequest, layers: Mapping[str, Mapping[str, str]]) -> None:
    """Write which models, layers and matchings a store has, by their names in a sweep; `RsmStore.open` reads it.

    Args:
        store: the store.
        request: the sweep.
        layers: model -> its layers in forward order, with the input that each belongs to.
    """
    readings, models = (store.chunks.attribute(name, dict, {}) for name in ("readings", "models"))
    read = {request.reading_key(name): [list(one) for one in own.items()] for name, own in layers.items()}
    now = {name: _listed(request, name, list(own), models.get(name, {})) for name, own in layers.items()}
    if {**models, **now} != models or {**readings, **read} != readings:
        store.chunks.set({"readings": {**readings, **read}, "models": {**models, **now}})


def _listed(request: SweepRequest, model: str, layers: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """A model with its layers in forward order and its matchings, also those of earlier sweeps."""
    loaded, fingerprint = request.models[model], request.fingerprints[model]
    same = before.get("fingerprint") == fingerprint
    known: dict[str, str] = dict(before["layers"]) if same else {}
    keys = {layer: request.layer_key(model, layer) for layer in layers}
    modules = [name for name, _ in loaded.module.named_modules()] if isinstance(loaded.module, nn.Module) else []
    ordered = {layer: {**known, **keys}[layer] for layer in in_forward_order(list(keys), list(known), modules)}
    texts = {label: [matching_text(method), method.one_to_one] for label, method in request.kinds.methods.items()}
    return {
        "fingerprint": fingerprint,
        "network": loaded.network,
        "step": loaded.step,
        "layers": [list(one) for one in ordered.items()],
        "matchings": {**before["matchings"], **texts} if same else texts,
    }
