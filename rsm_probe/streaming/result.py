"""The result of a sweep: CKA between all RSMs, and the kept RSMs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from rsm_probe.checks import listed
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.comparison.grid import label_grid, layer_grid, rsm_positions
from rsm_probe.comparison.mini_batches import bootstrap_batch_samples
from rsm_probe.comparison.statistics import check_level, over_models, summarise
from rsm_probe.errors import ComparisonError, StorageError, did_you_mean, look_up
from rsm_probe.html_table import html_table
from rsm_probe.storage.files import open_dataset, save_dataset
from rsm_probe.streaming.cka_sums import CkaSums
from rsm_probe.streaming.kept_rsms import BatchRsms, PaddedRsms, stack_rsms

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes


class InTraining(Protocol):
    """A model, as far as its training goes: its network and its step there, or None."""

    @property
    def network(self) -> str:
        """Name of the network; "" for that of the model."""

    @property
    def step(self) -> int | None:
        """Number of the step."""


class SweepResult:
    """The outcome of a layer sweep, stored and read as one Zarr group.

    Attributes:
        dataset: an `xarray.Dataset` with `cka` (rsm_a, rsm_b) by the first estimator and `cka_<name>` by the others;
            each axis has plain coordinates model, layer, depth (index in forward order), matching and kernel (suffixed
            `_a`, `_b`); and input, if a model has several (see `Representation`); and network and step, if a model is
            a checkpoint of a training. `smallest_eigenvalue` (rsm_a) is the smallest over all mini-batches for matched
            RSMs, which need not be positive semi-definite, and NaN for the identity matching. `proven_low` and
            `proven_high` (rsm_a, rsm_b), and those that end in `_<name>`, are intervals for exact matching; see
            `proven`. If RSMs were kept: `rsm`
            (batch, rsm, image_a, image_b), padded with NaN for smaller batches, with ids and labels of the images of
            each batch.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def build(
        cls,
        grids: Mapping[str, xr.DataArray],
        rsms: Sequence[BatchRsms],
        smallest: np.ndarray,
        intervals: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        **attributes: int | str,
    ) -> Self:
        """Combine CKA grids and intervals by estimator, smallest eigenvalues and kept mini-batch RSMs in a dataset."""
        import xarray as xr

        first = next(iter(grids))
        variables = {"cka" if name == first else f"cka_{name}": grid for name, grid in grids.items()}
        dataset = xr.Dataset(variables).assign_attrs(estimator=first, **attributes)
        for number, end in ((1, "high"), (0, "low")):
            for name, ends in (intervals or {}).items():
                variable = f"proven_{end}" if name == first else f"proven_{end}_{name}"
                dataset[variable] = (("rsm_a", "rsm_b"), ends[number], {"estimator": name})
        dataset["smallest_eigenvalue"] = ("rsm_a", smallest)
        for name, grid in grids.items():
            dataset["cka" if name == first else f"cka_{name}"].attrs["estimator"] = name
            dataset.attrs[f"undefined_{name}"] = int(np.isnan(np.diagonal(grid.values)).sum())
        if rsms:
            dataset = dataset.merge(stack_rsms(rsms))
        return cls(dataset)

    @classmethod
    def of_sums(cls, sums: CkaSums, rsms: Sequence[BatchRsms]) -> Self:
        """The result of summed mini-batches, and the kept RSMs.

        Warns:
            UserWarning: images that are left out, and RSMs whose CKA is undefined.
        """
        grids = {name: label_grid(grid, sums.keys, sums.keys) for name, grid in sums.grids().items()}
        for words in sums.remarks():
            warnings.warn(words, stacklevel=3)
        counts = {"images": sums.images, "batches": sums.batches, "left_out": sums.left_out or 0}
        return cls.build(grids, rsms, sums.smallest, sums.intervals(), **counts)

    def with_inputs(self, inputs: Mapping[tuple[str, str], str]) -> Self:
        """Add the coordinates `input_a` and `input_b`, if a model has several inputs.

        Args:
            inputs: (model, layer) -> the input that its tokens belong to; see `Representation`.
        """
        if any(inputs.values()):
            for side in "ab":
                keys = zip(self.dataset[f"model_{side}"].values, self.dataset[f"layer_{side}"].values, strict=True)
                names = [inputs[str(model), str(layer)] for model, layer in keys]
                self.dataset = self.dataset.assign_coords({f"input_{side}": (f"rsm_{side}", names)})
        return self

    def with_steps(self, models: Mapping[str, InTraining]) -> Self:
        """Add the coordinates `network_a/_b` and `step_a/_b`, if a model is a checkpoint of a training.

        A model that is none is a network of its own, and its step is NaN.

        Args:
            models: name -> model, or its network and step.
        """
        if any(model.step is not None for model in models.values()):
            for side in "ab":
                names = [str(name) for name in self.dataset[f"model_{side}"].values]
                networks = [models[name].network or name for name in names]
                steps = np.array([models[name].step for name in names], dtype=np.float64)  # None becomes NaN
                self.dataset = self.dataset.assign_coords(
                    {f"network_{side}": (f"rsm_{side}", networks), f"step_{side}": (f"rsm_{side}", steps)}
                )
        return self

    @property
    def networks(self) -> dict[str, dict[int, str]]:
        """Network -> step -> name of the model, for models that are checkpoints, in the order of their steps.

        Raises:
            ComparisonError: two models are of one network and step.
        """
        networks: dict[str, dict[int, str]] = {}
        if "step_a" not in self.dataset.coords:
            return networks
        columns = (self.dataset[name].values for name in ("network_a", "step_a", "model_a"))
        for network, step, model in zip(*columns, strict=True):
            if np.isfinite(step):
                other = networks.setdefault(str(network), {}).setdefault(int(step), str(model))
                if other != model:
                    raise ComparisonError(
                        f"models {other!r} and {str(model)!r} are both step {int(step)} of network {str(network)!r}; "
                        f"give networks different names: load_checkpoints(..., name=)"
                    )
        return {network: dict(sorted(steps.items())) for network, steps in networks.items()}

    @property
    def cka(self) -> xr.DataArray:
        """CKA by the first estimator, dimensions (rsm_a, rsm_b).

        NaN if an RSM is constant or, for the unbiased estimator, if its summed HSIC with itself is not positive.
        """
        return self.dataset["cka"]

    def cka_by(self, estimator: str) -> xr.DataArray:
        """CKA by one of the estimators of the sweep.

        Raises:
            ComparisonError: the sweep did not use that estimator.
        """
        if estimator == self.dataset.attrs["estimator"]:
            return self.cka
        if f"cka_{estimator}" not in self.dataset:
            raise ComparisonError(f"this sweep did not use the {estimator!r} estimator")
        return self.dataset[f"cka_{estimator}"]

    @property
    def proven(self) -> xr.Dataset | None:
        """Intervals that contain the CKA of exact matching, by the first estimator; see `proven_by`."""
        return self.proven_by(self.dataset.attrs["estimator"])

    def proven_by(self, estimator: str) -> xr.Dataset | None:
        """Intervals that contain the CKA of exact matching in place of approximate ones.

        They follow from the certified bounds of matched inner products (see `rsm_probe.comparison.certified`), refer to
        affinities as they were computed, and by RBF kernels to the width of the values. Matchings that do not
        approximate the optimum (identity, translation, scores) count as they are.

        Returns:
            Dimensions (rsm_a, rsm_b): `value`, `low` and `high`; -1 and 1 where nothing is proven. None if no matching
            is an approximation, and for results of earlier versions.

        Raises:
            ComparisonError: the sweep did not use that estimator.
        """
        import xarray as xr

        value = self.cka_by(estimator)
        ending = "" if estimator == self.dataset.attrs["estimator"] else f"_{estimator}"
        if f"proven_low{ending}" not in self.dataset:
            return None
        ends = {end: self.dataset[f"proven_{end}{ending}"] for end in ("low", "high")}
        return xr.Dataset({"value": value, **ends}).assign_attrs(estimator=estimator)

    def _words_on_proof(self) -> str:
        """How far the values can be from those of exact matching, in one clause; "" where nothing is approximated."""
        if (proven := self.proven) is None:
            return ""
        low, high, value = (proven[name].values for name in ("low", "high", "value"))
        known = np.isfinite(value) & ~((low == -1) & (high == 1))
        if not known.any():
            return "; nothing is proven on CKA of exact matching"
        most = float(np.maximum(high - value, value - low)[known].max())
        cells = "every cell" if known.all() else f"{known.sum():,} of {known.size:,} cells"
        return f"; CKA of exact matching lies within ±{most:.2g} of {cells}"

    @property
    def rsms(self) -> xr.DataArray | None:
        """Kept mini-batch RSMs (batch, rsm, image_a, image_b), or None if none were kept."""
        return self.dataset.get("rsm")

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order given."""
        return self._names("model")

    def layers(self, model: str) -> list[str]:
        """Names of a model's layers, in forward order.

        Raises:
            ComparisonError: the sweep has no such model.
        """
        if model not in self.models:
            raise ComparisonError(f"no model {model!r} in this sweep{did_you_mean(model, self.models)}")
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
        """Select the layer-by-layer grid of two models.

        Args:
            model_a: model of the rows.
            model_b: model of the columns; by default `model_a`.
            matching_a: matching of the rows.
            matching_b: matching of the columns; by default `matching_a`.
            kernel: kernel of both.
            estimator: CKA estimator; by default the first one.

        Returns:
            CKA with dimensions (layer_a, layer_b) and layer names as coordinates.

        Raises:
            ComparisonError: the sweep has no such combination.
        """
        rows = {"model": model_a, "matching": matching_a, "kernel": kernel}
        columns = {"model": model_b or model_a, "matching": matching_b or matching_a, "kernel": kernel}
        return layer_grid(self.cka_by(estimator) if estimator else self.cka, rows, columns)

    def within(
        self, models: Sequence[str], matching_a: str, matching_b: str | None = None, kernel: str = "linear"
    ) -> xr.Dataset:
        """CKA between layers of the same model: mean and spread over models, such as seeds.

        Raises:
            ComparisonError: the sweep has no such combination, or the models have different layers.
        """
        return over_models([self.grid(model, model, matching_a, matching_b, kernel) for model in models])

    def across(self, models: Sequence[str], matching: str, kernel: str = "linear") -> xr.Dataset:
        """CKA between layers of different models: mean and spread over pairs of models, such as seeds.

        Each pair counts once, as the mean of both orders.

        Raises:
            ComparisonError: fewer than two models, no such combination, or models with different layers.
        """
        if len(models) < 2:
            raise ComparisonError(f"a comparison across models needs at least two, found {', '.join(models) or 'none'}")
        grids = []
        for a, b in combinations(models, 2):
            both = [self.grid(*pair, matching, kernel=kernel) for pair in ((a, b), (b, a))]
            grids.append(over_models(both)["mean"])
        return over_models(grids)

    def over_training(
        self, network: str, matching_a: str = "identity", matching_b: str | None = None, kernel: str = "linear"
    ) -> xr.DataArray:
        """CKA of each layer between the checkpoints of a network.

        Args:
            network: one of `networks`.
            matching_a: matching of the RSMs of one step.
            matching_b: matching of the RSMs of the other; by default `matching_a`.
            kernel: kernel of both.

        Returns:
            Dimensions (step_a, step_b, layer), with steps and names of layers as coordinates.

        Raises:
            ComparisonError: the sweep has no such network or combination, or layers differ between steps.
        """
        import xarray as xr

        steps = look_up(network, self.networks, "network of checkpoints", ComparisonError)
        models = list(steps.values())
        layers = self.layers(models[0])
        if any(self.layers(model) != layers for model in models):
            raise ComparisonError(
                f"the checkpoints of {network!r} have different layers, and cannot be compared by layer"
            )

        def positions(matching: str) -> np.ndarray:
            shared = {"matching": matching, "kernel": kernel}
            return np.stack([rsm_positions(self.cka, "a", {"model": model, **shared}) for model in models])

        values = self.cka.values[positions(matching_a)[:, None], positions(matching_b or matching_a)[None]]
        coordinates = {"step_a": list(steps), "step_b": list(steps), "layer": layers}
        return xr.DataArray(values, dims=("step_a", "step_b", "layer"), coords=coordinates, name="cka")

    def plot(
        self,
        model_a: str | None = None,
        model_b: str | None = None,
        matching_a: str | None = None,
        matching_b: str | None = None,
        kernel: str | None = None,
        estimator: str | None = None,
        *,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw the layer-by-layer grid of two models as a heatmap.

        Args:
            model_a: see `grid`; by default the first model, matching and kernel of the sweep.
            model_b: see `grid`.
            matching_a: see `grid`.
            matching_b: see `grid`.
            kernel: see `grid`.
            estimator: see `grid`.
            ax: Axes to draw on; by default those of a new figure.

        Raises:
            ComparisonError: the sweep has no such combination.
        """
        from rsm_probe.figures import cka_heatmap, names_as_written
        from rsm_probe.figures.style import axes_or_new

        first = {name: self._names(name)[0] for name in ("model", "matching", "kernel")}
        rows = model_a or first["model"], matching_a or first["matching"]
        columns = model_b or rows[0], matching_b or rows[1]
        kernel = kernel or first["kernel"]
        grid = self.grid(rows[0], columns[0], rows[1], columns[1], kernel, estimator)
        with names_as_written():
            title = f"{estimator or self.dataset.attrs['estimator']} CKA, {kernel} kernel"
            ax = cka_heatmap(axes_or_new(ax), grid, title, lowest=float(np.nanmin(grid.values, initial=0.0)))
            ax.set(ylabel="layers of {}, {}".format(*rows), xlabel="layers of {}, {}".format(*columns))
        return ax

    def _names(self, what: str) -> list[str]:
        """The models, matchings or kernels of the sweep, in their order."""
        return list(dict.fromkeys(str(name) for name in self.dataset[f"{what}_a"].values))

    def to_frame(self) -> pd.DataFrame:
        """Convert all comparisons to a long table: one row per pair of RSMs, with `cka` and the coordinates of both."""
        return self.cka.to_dataframe().reset_index()

    def bootstrap(
        self,
        repeats: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        on_repeat: Callable[[int], object] = lambda _: None,
    ) -> xr.Dataset:
        """Compute bootstrap intervals of CKA between the kept RSMs, resampling images within mini-batches.

        Args:
            repeats: number of bootstrap samples.
            level: level of the interval, in (0, 1).
            seed: seed of the samples.
            on_repeat: called with 1 after each repeat, for a progress bar.

        Returns:
            Dimensions (rsm_a, rsm_b): `value`, `low`, `high`, `std`; see `rsm_probe.bootstrap`.

        Raises:
            ComparisonError: no RSMs were kept, or an argument is of the wrong type or out of range.
        """
        check_level(level)
        if self.rsms is None:
            raise ComparisonError("this sweep kept no RSMs to resample; name layers in keep=, or '*' for all")
        batches = PaddedRsms(self.rsms)
        measure = get_estimator(self.dataset.attrs["estimator"]).measure
        samples = bootstrap_batch_samples(batches, measure, repeats, seed, on_repeat)
        names = [str(name) for name in self.cka["rsm_a"].values]
        positions = [names.index(key.label()) for key in batches.keys]
        return summarise(self.cka.isel(rsm_a=positions, rsm_b=positions), samples, level).assign_attrs(seed=seed)

    def save(self, path: str | Path) -> None:
        """Write a Zarr group that `xarray.open_zarr` opens.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_dataset(path, self.dataset)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a result that `save` wrote.

        Raises:
            StorageError: there is no stored sweep at the path.
        """
        dataset = open_dataset(path)
        if "cka" not in dataset:
            raise StorageError(
                f"{path} is not a stored sweep; it holds {', '.join(map(str, dataset.data_vars)) or 'no arrays'}"
            )
        return cls(dataset)

    def __repr__(self) -> str:
        layers = listed([f"{model}: {len(self.layers(model))}" for model in self.models])
        batches = "" if self.rsms is None else ", mini-batch RSMs kept"
        return (
            f"SweepResult({self.cka.sizes['rsm_a']} RSMs, {self.dataset.attrs.get('images')} images{batches}; layers "
            f"of each model: {layers}{self._words_on_proof()})"
        )

    def _repr_html_(self) -> str:
        """Tabulate, for notebooks, the layers of each model and where semantic and spatio-semantic RSMs differ most."""
        attrs, matchings, kernels = self.dataset.attrs, self._names("matching"), self._names("kernel")
        semantic = [name for name in matchings if name != "identity" and "identity" in matchings]
        facts = {"images": attrs.get("images"), "mini-batches": attrs.get("batches"), "CKA": attrs["estimator"]}
        facts |= {"matchings": ", ".join(matchings), "kernels": ", ".join(kernels)}
        note = f"CKA is that of the {kernels[0]} kernel{self._words_on_proof()}." if semantic else ""

        def row(model: str) -> list[object]:
            layers = self.layers(model)
            cells: list[object] = [model, len(layers), layers[0], layers[-1]]
            for matching in semantic:
                values = np.diagonal(self.grid(model, model, matching, "identity", kernels[0]).values)
                lowest = None if np.isnan(values).all() else int(np.nanargmin(values))
                cells.append("undefined" if lowest is None else f"{values[lowest]:.3f} at {layers[lowest]}")
            return cells

        columns = ["model", "layers", "first", "last", *(f"lowest CKA, {name} against identity" for name in semantic)]
        return html_table("SweepResult", facts, columns, map(row, self.models), count=len(self.models), note=note)
