"""What a sweep found: CKA of every RSM with every other, and the RSMs that were kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.comparison.statistics import bootstrap_samples, check_level, over_models, summarise
from rsm_probe.errors import ComparisonError, StorageError, nearest
from rsm_probe.storage.files import open_dataset, save_dataset
from rsm_probe.streaming.kept_rsms import BatchRsms, stack_rsms

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


class SweepResult:
    """The outcome of a layer sweep, stored and read as one Zarr group.

    Attributes:
        dataset: an `xarray.Dataset` with `cka` (rsm_a, rsm_b) by the first estimator and `cka_<name>` by others, each
            axis with plain coordinates model, layer, depth (position in forward order), matching and kernel (suffixed
            `_a`, `_b`); `smallest_eigenvalue` (rsm_a), over all mini-batches, of matched RSMs, which need not be
            positive semi-definite (NaN of others). Where RSMs were kept: `rsm` (batch, rsm, image_a, image_b), NaN
            beyond a smaller batch, with the ids and labels of the images of each batch.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def build(
        cls,
        grids: Mapping[str, xr.DataArray],
        batches: Sequence[BatchRsms],
        smallest: np.ndarray,
        **attributes: int | str,
    ) -> Self:
        """Puts grids by estimator name, smallest eigenvalues and kept mini-batch RSMs into one dataset."""
        import xarray as xr

        first = next(iter(grids))
        variables = {"cka" if name == first else f"cka_{name}": grid for name, grid in grids.items()}
        dataset = xr.Dataset(variables).assign_attrs(estimator=first, **attributes)
        dataset["smallest_eigenvalue"] = ("rsm_a", smallest)
        for name, grid in grids.items():
            dataset["cka" if name == first else f"cka_{name}"].attrs["estimator"] = name
            dataset.attrs[f"undefined_{name}"] = int(np.isnan(np.diagonal(grid.values)).sum())
        if batches:
            dataset = dataset.merge(stack_rsms(batches))
        return cls(dataset)

    @property
    def cka(self) -> xr.DataArray:
        """CKA by the first estimator, dimensions (rsm_a, rsm_b).

        NaN stands where an RSM is constant or, unbiased, where its summed HSIC with itself is not above 0.
        """
        return self.dataset["cka"]

    def cka_by(self, estimator: str) -> xr.DataArray:
        """CKA by one of the estimators that were summed.

        Raises:
            ComparisonError: that estimator was not summed.
        """
        if estimator == self.dataset.attrs["estimator"]:
            return self.cka
        if f"cka_{estimator}" not in self.dataset:
            raise ComparisonError(f"this sweep did not sum the {estimator!r} estimator")
        return self.dataset[f"cka_{estimator}"]

    @property
    def rsms(self) -> xr.DataArray | None:
        """Kept mini-batch RSMs (batch, rsm, image_a, image_b), or None if none were asked for."""
        return self.dataset.get("rsm")

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order given."""
        return list(dict.fromkeys(str(name) for name in self.dataset["model_a"].values))

    def layers(self, model: str) -> list[str]:
        """Names of a model's layers, in forward order.

        Raises:
            ComparisonError: no such model.
        """
        if model not in self.models:
            raise ComparisonError(f"no model {model!r} in this sweep{nearest(model, self.models)}")
        mine = self.dataset["layer_a"].values[self.dataset["model_a"].values == model]
        return list(dict.fromkeys(str(name) for name in mine))

    def grid(
        self,
        model_a: str,
        model_b: str | None = None,
        matching_a: str = "identity",
        matching_b: str | None = None,
        kernel: str = "linear",
        estimator: str | None = None,
    ) -> xr.DataArray:
        """One layer-by-layer grid out of all comparisons.

        Args:
            model_a: rows.
            model_b: columns; the same model where left out.
            matching_a: of the rows.
            matching_b: of the columns; the same where left out.
            kernel: of both.
            estimator: the first one by default.

        Returns:
            Dimensions (layer_a, layer_b), with layer names as coordinates.

        Raises:
            ComparisonError: the sweep holds no such combination.
        """
        values = self.cka_by(estimator) if estimator else self.cka
        import xarray as xr

        parts = {}
        for side, model, matching in (
            ("a", model_a, matching_a),
            ("b", model_b or model_a, matching_b or matching_a),
        ):
            wanted = {"model": model, "matching": matching, "kernel": kernel}
            mask = np.ones(values.sizes[f"rsm_{side}"], dtype=bool)
            for name, value in wanted.items():
                known = values[f"{name}_{side}"].values
                if value not in known:
                    names = list(dict.fromkeys(map(str, known)))
                    raise ComparisonError(f"no {name} {value!r} in this sweep (there are: {', '.join(names)})")
                mask &= known == value
            parts[f"rsm_{side}"] = np.flatnonzero(mask)
        part = values.isel(parts)
        coordinates = {f"layer_{side}": [str(v) for v in part[f"layer_{side}"].values] for side in "ab"}
        return xr.DataArray(part.values, dims=("layer_a", "layer_b"), coords=coordinates, name="cka")

    def within(
        self, models: Sequence[str], matching_a: str, matching_b: str | None = None, kernel: str = "linear"
    ) -> xr.Dataset:
        """Layers of a model against layers of the same model: mean and spread over models, such as seeds.

        Raises:
            ComparisonError: no such combination, or models with other layers.
        """
        return over_models([self.grid(model, model, matching_a, matching_b, kernel) for model in models])

    def across(self, models: Sequence[str], matching: str, kernel: str = "linear") -> xr.Dataset:
        """Layers of a model against layers of another: mean and spread over pairs of models, such as seeds.

        A pair counts once, as the mean of both its orders.

        Raises:
            ComparisonError: fewer than two models, no such combination, or models with other layers.
        """
        if len(models) < 2:
            raise ComparisonError(f"there is no other model to compare {', '.join(models) or 'none'} with")
        grids = []
        for a, b in combinations(models, 2):
            both = [self.grid(*pair, matching, kernel=kernel) for pair in ((a, b), (b, a))]
            grids.append(over_models(both)["mean"])
        return over_models(grids)

    def to_frame(self) -> pd.DataFrame:
        """All comparisons as a long table: one row for each pair of RSMs, `cka` and what each of the two is."""
        return self.cka.to_dataframe().reset_index()

    def bootstrap(
        self,
        repeats: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        on_repeat: Callable[[int], object] = lambda _: None,
    ) -> xr.Dataset:
        """Intervals of CKA between the RSMs that were kept, from images drawn with replacement within mini-batches.

        Args:
            repeats: how many draws.
            level: of the interval, in (0, 1).
            seed: of the draws.
            on_repeat: called with 1 after each repeat, for a progress bar.

        Returns:
            Dimensions (rsm_a, rsm_b): `value`, `low`, `high`, `std`; see `rsm_probe.bootstrap`.

        Raises:
            ComparisonError: no RSMs were kept; repeats, level or seed of the wrong kind.
        """
        check_level(level)
        if self.rsms is None:
            raise ComparisonError("this sweep kept no RSMs to draw from; name layers in keep=, or '*' for all")
        # Beyond a smaller batch there is NaN.
        counts = np.isfinite(self.rsms.values[:, 0, 0]).sum(axis=1)
        batches = [self.rsms.values[k][:, :count, :count] for k, count in enumerate(counts)]
        measure = get_estimator(self.dataset.attrs["estimator"]).measure
        samples = bootstrap_samples([(batch, batch) for batch in batches], measure, repeats, seed, on_repeat)
        fields = zip(*(self.rsms[name].values for name in RsmKey._fields), strict=True)
        names = [str(name) for name in self.cka["rsm_a"].values]
        positions = [names.index(RsmKey.from_texts(texts).label()) for texts in fields]
        return summarise(self.cka.isel(rsm_a=positions, rsm_b=positions), samples, level).assign_attrs(seed=seed)

    def save(self, path: str | Path) -> None:
        """Writes a Zarr group that `xarray.open_zarr` opens.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_dataset(path, self.dataset)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            StorageError: there is no stored sweep at the path.
        """
        dataset = open_dataset(path)
        if "cka" not in dataset:
            raise StorageError(f"{path} holds no sweep; it has {', '.join(map(str, dataset.data_vars)) or 'no arrays'}")
        return cls(dataset)

    def __repr__(self) -> str:
        layers = {model: len(self.layers(model)) for model in self.models}
        return (
            f"SweepResult({layers} layers, {self.cka.sizes['rsm_a']} RSMs, {self.dataset.attrs.get('images')} images)"
        )
