"""RSM: similarity values, with their images, matching and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rsm_probe.checks import brief, positions_of, shared_names
from rsm_probe.errors import ComparisonError, StorageError
from rsm_probe.html_table import html_table
from rsm_probe.matching.registry import METHODS
from rsm_probe.similarity.conversions import distances_from, similarities_from
from rsm_probe.similarity.kernels import Kernel, get_kernel, highest_similarities
from rsm_probe.similarity.labelled import (
    given_dataset,
    known_kernel,
    loaded,
    of_distances,
    one_set,
    require_one_set,
    under_kernel,
    with_holes,
    with_width,
)
from rsm_probe.similarity.rsatoolbox import one_of_rdms, to_rdms
from rsm_probe.storage.files import open_dataset, save_dataset

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes


# Attributes that describe an RSM.
_KNOWN = ("layer", "matching", "kernel", "centering")


class RSM:
    """A representational similarity matrix: `values` (N, M), the similarities of N images with M images.

    Larger values mean more alike, always. An RSM that was made from distances `d` (`kind` is "distance") has the values
    `-d / 2`, by which every measure compares the distances; `distances` holds them as they were given.

    Example:
        >>> import numpy as np, rsm_probe
        >>> features = np.random.default_rng(0).normal(size=(4, 3))
        >>> brain = rsm_probe.RSM.from_array(features @ features.T, ids=["cat", "dog", "car", "bus"])
        >>> brain.values.shape, brain.ids[:2]
        ((4, 4), ['cat', 'dog'])

    Attributes:
        dataset: an `xarray.Dataset` with `similarity` (image_a, image_b). An RSM that was computed here also has the
            matched inner `product` of every pair, its upper `bound`, the squared norms `norm_a` and `norm_b`, the
            `permutation` of locations if it was kept, and labels from captures. Coordinates are image ids.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def from_array(
        cls,
        values: Any,
        ids: Sequence[str] | None = None,
        other_ids: Sequence[str] | None = None,
        *,
        kind: Literal["similarity", "distance"] | None = None,
        dissimilarity: str | None = None,
        allow_missing: bool = False,
    ) -> Self:
        """Wrap a matrix from elsewhere (brain data, another tool).

        Args:
            values: similarities, shape (N, M); symmetric (N, N) unless `other_ids` is given.
            ids: names of the N images in the rows; by default their indices.
            other_ids: names of the M images in the columns, if these differ from the images in the rows.
            kind: "distance" for dissimilarities such as an RDM, which become similarities `-values / 2`, so that every
                measure of RSMs applies. "similarity" accepts any similarities. None assumes similarities, and rejects
                values that look like distances.
            dissimilarity: name of the distances, such as "squared euclidean", "euclidean", "correlation", "cosine",
                "crossnobis" or a name of your own ("behavioural"); implies `kind="distance"`. `to_similarities` chooses
                its formula by it.
            allow_missing: accept NaN, which marks pairs that are missing (also on the diagonal, where distances become
                0). Comparisons refuse them unless they are asked to skip them.

        Raises:
            ComparisonError: the shape is wrong, values are not real, finite or symmetric, ids are repeated, too few or
                not text, distances are given without `kind`, or the diagonal contradicts `kind`.
        """
        return cls(
            given_dataset(values, ids, other_ids, kind=kind, dissimilarity=dissimilarity, allow_missing=allow_missing)
        )

    @classmethod
    def from_pairs(cls, pairs: xr.Dataset, kernel: str | Kernel = "linear") -> Self:
        """Make an RSM from matched inner products of `rsm_probe.all_pairs`; products are read into memory.

        Raises:
            ComparisonError: the kernel is unknown or does not apply.
            StorageError: a tile is missing or cannot be read.
        """
        names = [name for name in ("product", "bound", "norm_a", "norm_b", "image_a", "image_b") if name in pairs]
        try:
            pairs = pairs.assign({name: pairs[name].load() for name in names})
        except (OSError, ValueError, RuntimeError) as error:
            raise StorageError(
                f"a tile of the pairs is damaged ({error}); run them again: only that tile is recomputed"
            ) from error
        lost = [name for name in names if pairs[name].dtype.kind == "f" and np.isnan(pairs[name].values).any()]
        lost += [name for name in ("image_a", "image_b") if len(set(pairs[name].values)) < pairs[name].size]
        if lost:
            raise StorageError(f"parts of {lost[0]} are missing; run all pairs again: only these are recomputed")
        return cls(under_kernel(pairs, get_kernel(kernel)))

    @property
    def values(self) -> np.ndarray:
        """Similarities, shape (N, M), float64; `-d / 2` of distances `d`, NaN for missing pairs."""
        return self.dataset["similarity"].values

    @property
    def kind(self) -> Literal["similarity", "distance"]:
        """Whether the RSM was made from similarities or from distances."""
        return "distance" if self.dataset.attrs.get("kind") == "distance" or self.dissimilarity else "similarity"

    @property
    def dissimilarity(self) -> str | None:
        """Name of the distances, such as "correlation"; None for similarities and for distances without a name."""
        name = self.dataset.attrs.get("dissimilarity")
        return None if name is None else str(name)

    @property
    def distances(self) -> np.ndarray:
        """The distances that the RSM was made from, shape (N, M), float64.

        Raises:
            ComparisonError: the RSM was made from similarities.
        """
        if self.kind == "similarity":
            raise ComparisonError("this RSM holds similarities; to_distances(...) makes distances of them")
        return -2 * self.values + 0.0  # no negative zeros

    @property
    def missing(self) -> int:
        """Number of pairs of images without a value."""
        lost = np.isnan(self.values)
        return int(np.triu(lost, 1).sum() if one_set(self.dataset) else lost.sum())

    @property
    def highest_values(self) -> np.ndarray | None:
        """The largest similarities (N, M) that exact matching can reach, from the bounds of the products.

        Infinity where they are unknown, because the kernel is; None where the matching does not approximate the optimum
        (identity, translation, scores) and for RSMs from elsewhere. By RBF kernels they are meant at the width of the
        values.
        """
        pairs = self.dataset
        method = METHODS.get(pairs.attrs.get("matching", ""))
        if "bound" not in pairs or not pairs.attrs["one_to_one"] or (method is not None and method.at_once):
            return None
        sides = pairs["norm_a"].values, pairs["norm_b"].values
        if (kernel := known_kernel(pairs)) is None:
            return np.full(self.values.shape, np.inf)
        return highest_similarities(kernel, pairs["product"].values, pairs["bound"].values, *sides, same=one_set(pairs))

    @property
    def ids(self) -> list[str]:
        """Names of the images in the rows."""
        return [str(name) for name in self.dataset["image_a"].values]

    @property
    def other_ids(self) -> list[str]:
        """Names of the images in the columns."""
        return [str(name) for name in self.dataset["image_b"].values]

    @property
    def labels(self) -> list[str]:
        """Labels of the images in the rows; "" where unknown."""
        return self._labels("a")

    @property
    def other_labels(self) -> list[str]:
        """Labels of the images in the columns; "" where unknown."""
        return self._labels("b")

    def _labels(self, side: str) -> list[str]:
        if f"label_{side}" not in self.dataset:
            return [""] * self.dataset.sizes[f"image_{side}"]
        return [str(label) for label in self.dataset[f"label_{side}"].values]

    @property
    def attributes(self) -> dict[str, Any]:
        """Layer, matching, kernel and centring, if known."""
        return {key: self.dataset.attrs[key] for key in _KNOWN if key in self.dataset.attrs}

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue; it is negative if the RSM is not positive semi-definite, as semantic RSMs may be.

        Raises:
            ComparisonError: rows and columns are different images, or pairs are missing.
        """
        if not one_set(self.dataset):
            raise ComparisonError("only the RSM of one set of images has eigenvalues")
        if np.isnan(self.values).any():
            raise ComparisonError(f"{self.missing} pairs of images are missing, so there are no eigenvalues")
        return float(np.linalg.eigvalsh(self.values)[0])

    def with_kernel(self, kernel: str | Kernel) -> RSM:
        """The same pairs and matchings under a different kernel, without matching again.

        Raises:
            ComparisonError: the inner products are unknown because the RSM was computed elsewhere, or the kernel does
                not apply to the scores of its matching.
        """
        if "product" not in self.dataset:
            raise ComparisonError("this RSM has no inner products, so its kernel cannot be changed")
        return RSM(under_kernel(self.dataset, get_kernel(kernel)))

    def to_distances(self, dissimilarity: str = "squared euclidean") -> RSM:
        """Convert similarities `k` to distances.

        Args:
            dissimilarity: "squared euclidean": `k_ii + k_jj - 2 k_ij`, for inner products the squared distances of
                patterns (Schoenberg 1935); "euclidean": its square root; "cosine": `1 - k_ij / sqrt(k_ii k_jj)`.
                (Correlation distances follow from patterns alone: `scipy.spatial.distance.pdist`.)

        Returns:
            An RSM of `kind` "distance", with the images, labels and attributes of this one, without matched products.

        Raises:
            ComparisonError: an unknown name, distances already, two sets of images, or similarities that exceed those
                of images with themselves.
        """
        if self.kind == "distance":
            raise ComparisonError("this RSM holds distances already; they are in its attribute distances")
        require_one_set(self.dataset)
        return RSM(of_distances(self._with(-distances_from(self.values, dissimilarity, self.ids) / 2), dissimilarity))

    def to_similarities(self, formula: Literal["inner products", "one minus"] | None = None) -> RSM:
        """Convert distances `d` to similarities.

        Args:
            formula: "inner products": double centring of the squared distances, `-H D H / 2` (Torgerson 1952; Gower
                1966); "one minus": `1 - d`. By default the first for (squared) Euclidean, Mahalanobis and crossnobis
                distances, the second for correlation and cosine distances; other distances need it said.

        Returns:
            An RSM of `kind` "similarity", with the images, labels and attributes of this one.

        Raises:
            ComparisonError: an unknown formula, or none for these distances; similarities already; two sets of images;
                or inner products where pairs are missing.
        """
        if self.kind == "similarity":
            raise ComparisonError("this RSM holds similarities already")
        require_one_set(self.dataset)
        return RSM(with_holes(self._with(similarities_from(self.distances, self.dissimilarity, formula, self.ids))))

    def _with(self, values: np.ndarray) -> xr.Dataset:
        """The same images under other values, of which matched products say nothing."""
        names = ["similarity", *(name for name in ("label_a", "label_b") if name in self.dataset.data_vars)]
        dataset = self.dataset[names].assign(similarity=(("image_a", "image_b"), values))
        left = ("kind", "dissimilarity", "missing", "sigma2")
        dataset.attrs = {key: value for key, value in self.dataset.attrs.items() if key not in left}
        return dataset

    def subset(self, ids: Sequence[str] | None = None, other_ids: Sequence[str] | None = None) -> RSM:
        """Take some images, in the order given; labels, products, norms, bounds and permutations follow.

        Args:
            ids: names of images in the rows, and in the columns if these are the same; None for all.
            other_ids: names of images in the columns of an RSM of two sets; None for all.

        Raises:
            ComparisonError: no name, unknown or repeated names, or `other_ids` for one set of images.
        """
        one = one_set(self.dataset)
        if one and other_ids is not None:
            raise ComparisonError("other_ids is for RSMs of two sets of images, and this one has one set")
        where = {} if ids is None else {"image_a": positions_of(ids, self.ids, "ids", ComparisonError)}
        if one and ids is not None:
            where["image_b"] = where["image_a"]
        if other_ids is not None:
            where["image_b"] = positions_of(other_ids, self.other_ids, "other_ids", ComparisonError)
        return RSM(with_holes(with_width(self.dataset).isel(where)))

    def reorder(self, ids: Sequence[str]) -> RSM:
        """Put all images of the rows into another order (for one set of images, those of the columns, too).

        Raises:
            ComparisonError: an image is left out, repeated or unknown.
        """
        positions_of(ids, self.ids, "ids", ComparisonError, all_of_them=True)
        return self.subset(ids)

    def align(self, other: RSM) -> tuple[RSM, RSM]:
        """Cut this RSM and another to the images that both hold, in the order of this one.

        Returns:
            This RSM and the other, with equal `ids` (and `other_ids`).

        Raises:
            ComparisonError: not an RSM, no image in common, images that are called by their positions, or one set of
                images beside two.
        """
        if not isinstance(other, RSM):
            raise ComparisonError(f"expected an RSM, found {type(other).__name__}; give RSM.from_array(values, ids)")
        if one_set(self.dataset) != one_set(other.dataset):
            raise ComparisonError("an RSM of one set of images cannot be aligned with one of two sets")
        rows = shared_names(["this", "other"], [self.ids, other.ids], ComparisonError)
        columns = None
        if not one_set(self.dataset):
            columns = shared_names(["this", "other"], [self.other_ids, other.other_ids], ComparisonError)
        return self.subset(rows, columns), other.subset(rows, columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the similarities, or the distances of an RSM of distances, as a heatmap, sorted by known labels.

        Args:
            ax: Axes to draw on; by default those of a new figure.
        """
        from rsm_probe.figures import names_as_written, rsm_heatmap
        from rsm_probe.figures.style import axes_or_new

        rows, columns = self.labels, self.other_labels
        orders = [np.argsort(np.array(labels), kind="stable") for labels in (rows, columns)]
        rows, columns = ([labels[k] for k in order] for labels, order in zip((rows, columns), orders, strict=True))
        values = (self.values if self.kind == "similarity" else self.distances)[np.ix_(*orders)]
        meaning = f"{self.kind} ({self.dissimilarity})" if self.dissimilarity else self.kind
        with names_as_written():
            title = "\n".join(f"{key} {value}" for key, value in self.attributes.items())
            others = None if one_set(self.dataset) else columns
            ax = rsm_heatmap(axes_or_new(ax), values, rows, title, meaning=meaning, columns=others)
            ax.set(ylabel="image", xlabel="image")
        return ax

    def to_frame(self) -> pd.DataFrame:
        """Convert to a long table: one row per pair of images, with `image_a`, `image_b` and `similarity`.

        For one set of images, each unordered pair occurs once, including each image with itself.
        """
        frame = self.dataset["similarity"].to_series().reset_index()
        if not one_set(self.dataset):
            return frame
        rows, columns = np.triu_indices(len(self.ids))
        return frame.iloc[rows * len(self.ids) + columns].reset_index(drop=True)

    def to_rsatoolbox(self) -> Any:
        """Convert to an `rsatoolbox.rdm.RDMs`; see `rsm_probe.similarity.rsatoolbox`.

        Raises:
            ComparisonError: rows and columns are different images; rsatoolbox is not installed.
        """
        if not one_set(self.dataset):
            raise ComparisonError("rsatoolbox compares images of one set, but this RSM has two sets of images")
        measure = self.dissimilarity or ("squared kernel distance" if self.kind == "similarity" else None)
        facts = {key: [str(value)] for key, value in self.attributes.items()}
        return to_rdms(self.values[None], self.ids, measure, facts)

    @classmethod
    def from_rsatoolbox(
        cls, rdms: Any, index: int = 0, descriptor: str | None = None, *, allow_missing: bool = False
    ) -> Self:
        """Convert a matrix of an `rsatoolbox.rdm.RDMs` to similarities `-d / 2`; see `rsm_probe.similarity.rsatoolbox`.

        Args:
            rdms: one or more matrices of distances.
            index: index of the matrix.
            descriptor: the pattern descriptor that names the images; None for `image` if there is one.
            allow_missing: see `from_array`.

        Raises:
            ComparisonError: there is no such matrix or descriptor, distances are not finite, or names are repeated.
        """
        values, names, measure = one_of_rdms(rdms, index, descriptor)
        return cls.from_array(values, names, kind="distance", dissimilarity=measure, allow_missing=allow_missing)

    def save(self, path: str | Path) -> None:
        """Write a Zarr group that `xarray.open_zarr` opens.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_dataset(path, self.dataset)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an RSM that `save` wrote, or the products of `all_pairs` under the linear kernel.

        Raises:
            StorageError: there is no readable RSM at the path.
        """
        dataset = open_dataset(path)
        if "similarity" not in dataset and dataset.attrs.get("finished"):
            return cls.from_pairs(dataset)
        if "similarity" not in dataset:
            raise StorageError(
                f"{path} is not a stored RSM; it holds {', '.join(map(str, dataset.data_vars)) or 'no arrays'}"
            )
        lost = [name for name in ("image_a", "image_b") if name not in dataset.coords]
        if lost or dataset["similarity"].dims != ("image_a", "image_b"):
            what = f"no {lost[0]}" if lost else f"similarities along {dataset['similarity'].dims}"
            raise StorageError(f"{path} is not what RSM.save writes: it has {what}")
        return cls(loaded(dataset, path, "compute the RSM again"))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def _repr_html_(self) -> str:
        """Tabulate the most similar image of the first ones, for notebooks."""
        values, one = self.values, one_set(self.dataset)
        rows, columns = (
            [f"{name} ({label})" if label else name for name, label in zip(names, labels, strict=True)]
            for names, labels in ((self.ids, self.labels), (self.other_ids, self.other_labels))
        )
        facts: dict[str, object] = {"images": " x ".join(f"{count:,}" for count in values.shape), **self.attributes}
        near, name = ("most similar", "similarity") if self.kind == "similarity" else ("nearest", "distance")
        shown = values if self.kind == "similarity" else self.distances
        facts["similarities" if self.kind == "similarity" else f"{self.dissimilarity or ''} distances".strip()] = (
            f"{np.nanmin(shown):.4g} to {np.nanmax(shown):.4g}"
        )
        facts["missing pairs"] = self.missing or None  # left out if there are none

        def row(image: int) -> list[object]:
            others = np.where(np.isnan(values[image]), -np.inf, values[image])
            if one:
                others[image] = -np.inf  # itself
            best = int(others.argmax())
            return [rows[image], columns[best] if np.isfinite(others[best]) else "", float(shown[image, best])]

        count = len(rows) if len(columns) > one else 0
        return html_table("RSM", facts, ["image", near, name], map(row, range(count)), count=count)

    def __repr__(self) -> str:
        facts: dict[str, Any] = {} if self.kind == "similarity" else {"kind": self.kind}
        facts |= {} if self.dissimilarity is None else {"dissimilarity": self.dissimilarity}
        facts |= {"missing": self.missing} if self.missing else {}
        what = ", ".join(f"{key}={brief(value)}" for key, value in (facts | self.attributes).items())
        return f"RSM({self.values.shape[0]} x {self.values.shape[1]} images{', ' if what else ''}{what})"
