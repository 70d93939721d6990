"""RSM: similarity values, with their images, matching and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rsm_probe.arrays import condensed_hint, real_matrix, require_distances, require_similarities, require_symmetric
from rsm_probe.checks import brief, require_texts
from rsm_probe.errors import ComparisonError, StorageError, repeated
from rsm_probe.html_table import html_table
from rsm_probe.matching.registry import METHODS
from rsm_probe.similarity.kernels import RBF, Kernel, check_kernel, get_kernel, highest_similarities
from rsm_probe.similarity.rsatoolbox import distances, to_rdms
from rsm_probe.storage.files import open_dataset, save_dataset

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes


# Attributes that describe an RSM.
_KNOWN = ("layer", "matching", "kernel", "centering")


class RSM:
    """A representational similarity matrix: `values` (N, M), the similarities of N images with M images.

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
    ) -> Self:
        """Wrap a matrix from elsewhere (brain data, another tool).

        Args:
            values: similarities, shape (N, M); symmetric (N, N) unless `other_ids` is given.
            ids: names of the N images in the rows; by default their indices.
            other_ids: names of the M images in the columns, if these differ from the images in the rows.
            kind: "distance" for dissimilarities such as an RDM, which become similarities `-values / 2`, so that every
                measure of RSMs applies. "similarity" accepts any similarities. None assumes similarities, and rejects
                values that look like distances.

        Raises:
            ComparisonError: the shape is wrong, values are not real, finite or symmetric, ids are repeated, too few or
                not text, distances are given without `kind`, or the diagonal contradicts `kind`.
        """
        if not isinstance(kind, str | None) or kind not in (None, "similarity", "distance"):
            raise ComparisonError(f"kind must be 'similarity' or 'distance', found {brief(kind)}")
        values = real_matrix(values, "the matrix", ComparisonError)
        if values.ndim != 2 or 0 in values.shape:
            raise ComparisonError(f"an RSM has shape (N, M), found {values.shape}{condensed_hint(values)}")
        if other_ids is None and values.shape[0] != values.shape[1]:
            raise ComparisonError(f"an RSM of one set of images is square, found {values.shape}; give other_ids")
        rows = image_names(ids, values.shape[0], "ids")
        columns = None if other_ids is None else image_names(other_ids, values.shape[1], "other_ids")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            pair = f"{rows[row]} and {(columns or rows)[column]}"
            raise ComparisonError(f"the {kind or 'similarity'} of images {pair} is {values[row, column]}")
        if columns is None:
            require_symmetric(values, "the matrix", ComparisonError)
            if kind is None:
                require_similarities(values, "the matrix", ComparisonError)
            if kind == "distance":
                require_distances(values, "the matrix", ComparisonError)
        return cls(dataset_of(-values / 2 if kind == "distance" else values, rows, columns))

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
        return cls(_under(pairs, get_kernel(kernel)))

    @property
    def values(self) -> np.ndarray:
        """Similarities, shape (N, M), float64."""
        return self.dataset["similarity"].values

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
        if (kernel := _known_kernel(pairs)) is None:
            return np.full(self.values.shape, np.inf)
        return highest_similarities(
            kernel, pairs["product"].values, pairs["bound"].values, *sides, same=_one_set(pairs)
        )

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
            ComparisonError: rows and columns are different images.
        """
        if not _one_set(self.dataset):
            raise ComparisonError("only the RSM of one set of images has eigenvalues")
        return float(np.linalg.eigvalsh(self.values)[0])

    def with_kernel(self, kernel: str | Kernel) -> RSM:
        """The same pairs and matchings under a different kernel, without matching again.

        Raises:
            ComparisonError: the inner products are unknown because the RSM was computed elsewhere, or the kernel does
                not apply to the scores of its matching.
        """
        if "product" not in self.dataset:
            raise ComparisonError("this RSM has no inner products, so its kernel cannot be changed")
        return RSM(_under(self.dataset, get_kernel(kernel)))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the similarities as a heatmap, with images sorted by label where labels are known.

        Args:
            ax: Axes to draw on; by default those of a new figure.
        """
        from rsm_probe.figures import names_as_written, rsm_heatmap
        from rsm_probe.figures.style import axes_or_new

        rows, columns = self.labels, self.other_labels
        orders = [np.argsort(np.array(labels), kind="stable") for labels in (rows, columns)]
        rows, columns = ([labels[k] for k in order] for labels, order in zip((rows, columns), orders, strict=True))
        values = self.values[np.ix_(*orders)]
        with names_as_written():
            title = "\n".join(f"{key} {value}" for key, value in self.attributes.items())
            ax = rsm_heatmap(axes_or_new(ax), values, rows, title, columns=None if _one_set(self.dataset) else columns)
            ax.set(ylabel="image", xlabel="image")
        return ax

    def to_frame(self) -> pd.DataFrame:
        """Convert to a long table: one row per pair of images, with `image_a`, `image_b` and `similarity`.

        For one set of images, each unordered pair occurs once, including each image with itself.
        """
        frame = self.dataset["similarity"].to_series().reset_index()
        if not _one_set(self.dataset):
            return frame
        rows, columns = np.triu_indices(len(self.ids))
        return frame.iloc[rows * len(self.ids) + columns].reset_index(drop=True)

    def to_rsatoolbox(self) -> Any:
        """Convert to an `rsatoolbox.rdm.RDMs`; see `rsm_probe.similarity.rsatoolbox`.

        Raises:
            ComparisonError: rows and columns are different images; rsatoolbox is not installed.
        """
        if not _one_set(self.dataset):
            raise ComparisonError("rsatoolbox compares images of one set, but this RSM has two sets of images")
        measure = self.dataset.attrs.get("dissimilarity", "squared kernel distance")
        return to_rdms(self.values, self.ids, measure, self.attributes)

    @classmethod
    def from_rsatoolbox(cls, rdms: Any, index: int = 0, descriptor: str | None = None) -> Self:
        """Convert a matrix of an `rsatoolbox.rdm.RDMs` to similarities `-d / 2`; see `rsm_probe.similarity.rsatoolbox`.

        Raises:
            ComparisonError: there is no such matrix or descriptor, distances are not finite, or names are repeated.
        """
        values, names, measure = distances(rdms, index, descriptor)
        rsm = cls.from_array(values, names, kind="distance")
        return rsm if measure is None else cls(rsm.dataset.assign_attrs(dissimilarity=measure))

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
        dataset = dataset.load()
        if not np.isfinite(dataset["similarity"].values).all():
            raise StorageError(f"similarities in {path} are missing or not finite; compute the RSM again")
        return cls(dataset)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def _repr_html_(self) -> str:
        """Tabulate the most similar image of the first ones, for notebooks."""
        values, one = self.values, _one_set(self.dataset)
        rows, columns = (
            [f"{name} ({label})" if label else name for name, label in zip(names, labels, strict=True)]
            for names, labels in ((self.ids, self.labels), (self.other_ids, self.other_labels))
        )
        facts: dict[str, object] = {"images": " x ".join(f"{count:,}" for count in values.shape), **self.attributes}
        facts["similarities"] = f"{values.min():.4g} to {values.max():.4g}"

        def row(image: int) -> list[object]:
            others = values[image].copy()
            if one:
                others[image] = -np.inf  # itself
            best = int(others.argmax())
            return [rows[image], columns[best], float(others[best])]

        count = len(rows) if len(columns) > one else 0
        return html_table("RSM", facts, ["image", "most similar", "similarity"], map(row, range(count)), count=count)

    def __repr__(self) -> str:
        what = ", ".join(f"{key}={brief(value)}" for key, value in self.attributes.items())
        return f"RSM({self.values.shape[0]} x {self.values.shape[1]} images{', ' if what else ''}{what})"


def _one_set(dataset: xr.Dataset) -> bool:
    """Whether rows and columns are the same images."""
    return bool(dataset.attrs.get("image_sets", 1) == 1)


def _under(pairs: xr.Dataset, kernel: Kernel) -> xr.Dataset:
    """Add the similarities under a kernel to products."""
    check_kernel(kernel, pairs.attrs["matching"], bool(pairs.attrs["one_to_one"]))
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    values = kernel(pairs["product"].values, *norms, same=_one_set(pairs))
    return described(pairs.assign(similarity=(("image_a", "image_b"), values)), kernel)


def described(pairs: xr.Dataset, kernel: Kernel) -> xr.Dataset:
    """Note the kernel of similarities, and a width that was given."""
    other = {key: value for key, value in pairs.attrs.items() if key != "sigma2"}
    width = {"sigma2": kernel.sigma2} if isinstance(kernel, RBF) and kernel.sigma2 is not None else {}
    pairs = pairs.copy(deep=False)
    pairs.attrs = {**other, "kernel": kernel.name, **width}
    return pairs


def _known_kernel(pairs: xr.Dataset) -> Kernel | None:
    """The kernel of similarities, if it gives them again; None for a user's own, and for widths that were not noted."""
    try:
        kernel = get_kernel(pairs.attrs["kernel"])
    except ComparisonError:
        return None
    if isinstance(kernel, RBF) and "sigma2" in pairs.attrs:
        kernel = RBF(float(pairs.attrs["sigma2"]))
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    again = kernel(pairs["product"].values, *norms, same=_one_set(pairs))
    return kernel if np.allclose(again, pairs["similarity"].values, rtol=1e-13, atol=0) else None


def dataset_of(values: np.ndarray, rows: list[str], columns: list[str] | None) -> xr.Dataset:
    """Make a dataset of similarities and image names; without `columns`, the columns are the images of the rows."""
    import xarray as xr

    coordinates = {"image_a": rows, "image_b": rows if columns is None else columns}
    dataset = xr.Dataset({"similarity": (("image_a", "image_b"), values)}, coords=coordinates)
    # Names cannot tell: two sets of images may have the same names.
    return dataset.assign_attrs(image_sets=1 if columns is None else 2)


def image_names(ids: Sequence[str] | None, count: int, what: str) -> list[str]:
    """Check the names of images; by default, make names from their indices.

    Raises:
        ComparisonError: the number of names is wrong, or names are repeated or not text.
    """
    names = [str(k) for k in range(count)] if ids is None else require_texts(ids, what, ComparisonError)
    if len(names) != count:
        raise ComparisonError(f"{what} holds {len(names)} names for {count} images")
    if (twice := repeated(names)) is not None:
        raise ComparisonError(f"{what} names image {twice!r} more than once")
    return names
