"""RSM: similarity values, with their images, matching and kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rsm_probe.arrays import condensed_hint, real_matrix, require_distances, require_similarities, require_symmetric
from rsm_probe.checks import brief, require_texts
from rsm_probe.errors import ComparisonError, StorageError, repeated
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.similarity.rsatoolbox import distances, to_rdms
from rsm_probe.storage.files import open_dataset, save_dataset

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


# Attributes that describe an RSM.
_KNOWN = ("layer", "matching", "kernel", "centering")


class RSM:
    """A representational similarity matrix.

    Attributes:
        dataset: an `xarray.Dataset` with `similarity` (image_a, image_b), and, where it was computed here, the matched
            inner `product` of every pair, its upper `bound`, the squared norms `norm_a`, `norm_b`, and the
            `permutation` of locations where it was kept; from captures also labels. Coordinates are image ids.
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
            ids: N names of the images in the rows; numbers where left out.
            other_ids: M names of the images in the columns, where these differ from those in the rows.
            kind: "distance" for dissimilarities such as an RDM, which become similarities `-values / 2`, so that every
                measure of RSMs applies. "similarity" accepts any similarities. None assumes similarities, and refuses
                values that look like distances.

        Raises:
            ComparisonError: wrong shape, values that are not real or not finite, repeated or too few ids, ids that are
                not text, no symmetry; distances without `kind`, or a kind that the diagonal contradicts.
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
        """The RSM of matched inner products, as `rsm_probe.all_pairs` gives them; products are read into memory.

        Raises:
            ComparisonError: unknown kernel, or one that does not apply.
            StorageError: a tile cannot be read.
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
    def ids(self) -> list[str]:
        """Names of the images in the rows."""
        return [str(name) for name in self.dataset["image_a"].values]

    @property
    def other_ids(self) -> list[str]:
        """Names of the images in the columns."""
        return [str(name) for name in self.dataset["image_b"].values]

    @property
    def attributes(self) -> dict[str, Any]:
        """Layer, matching, kernel and centring, as far as they are known."""
        return {key: self.dataset.attrs[key] for key in _KNOWN if key in self.dataset.attrs}

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: below 0 where the RSM is not positive semi-definite, as semantic ones may be.

        Raises:
            ComparisonError: rows and columns are different images.
        """
        if not _one_set(self.dataset):
            raise ComparisonError("only the RSM of one set of images has eigenvalues")
        return float(np.linalg.eigvalsh(self.values)[0])

    def with_kernel(self, kernel: str | Kernel) -> RSM:
        """The same pairs and matchings under a different kernel, without matching again.

        Raises:
            ComparisonError: the RSM came from elsewhere, so its inner products are not known; or it holds a score,
                to which the kernel does not apply.
        """
        if "product" not in self.dataset:
            raise ComparisonError("this RSM has no inner products, so its kernel cannot be changed")
        return RSM(_under(self.dataset, get_kernel(kernel)))

    def to_frame(self) -> pd.DataFrame:
        """A long table: one row for each pair of images, with `image_a`, `image_b` and `similarity`.

        Of one set of images, every unordered pair comes once, images with themselves included.
        """
        frame = self.dataset["similarity"].to_series().reset_index()
        if not _one_set(self.dataset):
            return frame
        rows, columns = np.triu_indices(len(self.ids))
        return frame.iloc[rows * len(self.ids) + columns].reset_index(drop=True)

    def to_rsatoolbox(self) -> Any:
        """An `rsatoolbox.rdm.RDMs`; see `rsm_probe.similarity.rsatoolbox`.

        Raises:
            ComparisonError: rows and columns are different images; rsatoolbox is not installed.
        """
        if not _one_set(self.dataset):
            raise ComparisonError("rsatoolbox compares images of one set, but this RSM has two sets of images")
        measure = self.dataset.attrs.get("dissimilarity", "squared kernel distance")
        return to_rdms(self.values, self.ids, measure, self.attributes)

    @classmethod
    def from_rsatoolbox(cls, rdms: Any, index: int = 0, descriptor: str | None = None) -> Self:
        """One matrix of an `rsatoolbox.rdm.RDMs`, as the similarities `-d / 2`; see `rsm_probe.similarity.rsatoolbox`.

        Raises:
            ComparisonError: no such matrix or descriptor; distances that are not finite; repeated names.
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
        """Read what `save` wrote, or the products of a run of all pairs, whose kernel is then linear.

        Raises:
            StorageError: the path has no readable RSM.
        """
        dataset = open_dataset(path)
        if "similarity" not in dataset and dataset.attrs.get("finished"):
            return cls.from_pairs(dataset)
        if "similarity" not in dataset:
            raise StorageError(f"{path} is not an RSM; it has {', '.join(map(str, dataset.data_vars)) or 'no arrays'}")
        lost = [name for name in ("image_a", "image_b") if name not in dataset.coords]
        if lost or dataset["similarity"].dims != ("image_a", "image_b"):
            what = f"no {lost[0]}" if lost else f"similarities along {dataset['similarity'].dims}"
            raise StorageError(f"{path} is not what RSM.save writes: it has {what}")
        dataset = dataset.load()
        if not np.isfinite(dataset["similarity"].values).all():
            raise StorageError(f"similarities in {path} are missing or not finite; make the RSM again")
        return cls(dataset)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        what = ", ".join(f"{key}={value!r}" for key, value in self.attributes.items())
        return f"RSM({self.values.shape[0]} x {self.values.shape[1]} images{', ' if what else ''}{what})"


def _one_set(dataset: xr.Dataset) -> bool:
    """Whether rows and columns are the same images."""
    return bool(dataset.attrs.get("image_sets", 1) == 1)


def _under(pairs: xr.Dataset, kernel: Kernel) -> xr.Dataset:
    """Products with their similarities under a kernel."""
    check_kernel(kernel, pairs.attrs["matching"], bool(pairs.attrs["one_to_one"]))
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    values = kernel(pairs["product"].values, *norms, same=_one_set(pairs))
    return pairs.assign(similarity=(("image_a", "image_b"), values)).assign_attrs(kernel=kernel.name)


def dataset_of(values: np.ndarray, rows: list[str], columns: list[str] | None) -> xr.Dataset:
    """Similarities with the names of their images; without names for the columns, those are the rows' images."""
    import xarray as xr

    coordinates = {"image_a": rows, "image_b": rows if columns is None else columns}
    dataset = xr.Dataset({"similarity": (("image_a", "image_b"), values)}, coords=coordinates)
    # Two sets may bear the same names, so that names do not tell.
    return dataset.assign_attrs(image_sets=1 if columns is None else 2)


def image_names(ids: Sequence[str] | None, count: int, what: str) -> list[str]:
    """The names of images as they were given, or numbers.

    Raises:
        ComparisonError: too few, too many or repeated names; names that are not text.
    """
    names = [str(k) for k in range(count)] if ids is None else require_texts(ids, what, ComparisonError)
    if len(names) != count:
        raise ComparisonError(f"{what} holds {len(names)} names for {count} images")
    if (twice := repeated(names)) is not None:
        raise ComparisonError(f"{what} names image {twice!r} more than once")
    return names
