"""Datasets of similarities with the names of their images, and what their attributes say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsm_probe.arrays import condensed_hint, real_matrix, require_distances, require_similarities, require_symmetric
from rsm_probe.checks import brief, require_flag, require_text, require_texts
from rsm_probe.errors import ComparisonError, StorageError, repeated
from rsm_probe.similarity.kernels import RBF, Kernel, NarrowRBF, check_kernel, get_kernel

if TYPE_CHECKING:
    import xarray as xr

Kind = Literal["similarity", "distance"]


def one_set(dataset: xr.Dataset) -> bool:
    """Whether rows and columns are the same images."""
    return bool(dataset.attrs.get("image_sets", 1) == 1)


def require_one_set(dataset: xr.Dataset) -> None:
    """Refuse to convert similarities of two sets of images, which lack those of images with themselves.

    Raises:
        ComparisonError: rows and columns are different images.
    """
    if not one_set(dataset):
        raise ComparisonError("only an RSM of one set of images can be converted, but this one has two sets")


def of_distances(dataset: xr.Dataset, dissimilarity: str) -> xr.Dataset:
    """Note that similarities were distances, and their name unless it is empty."""
    return with_holes(
        dataset.assign_attrs(kind="distance", **({"dissimilarity": dissimilarity} if dissimilarity else {}))
    )


def with_holes(dataset: xr.Dataset) -> xr.Dataset:
    """Note how many entries are missing, so that a file that lost others is recognised."""
    dataset = dataset.copy(deep=False)
    dataset.attrs = {key: value for key, value in dataset.attrs.items() if key != "missing"}
    lost = int(np.isnan(dataset["similarity"].values).sum())
    return dataset.assign_attrs(missing=lost) if lost else dataset


def loaded(dataset: xr.Dataset, path: str | Path, advice: str) -> xr.Dataset:
    """Read stored similarities into memory, and refuse them if any were lost.

    Raises:
        StorageError: entries are not finite beyond those that were missing when they were stored.
    """
    dataset = dataset.load()
    values = dataset["similarity"].values
    if np.isinf(values).any() or np.isnan(values).sum() != dataset.attrs.get("missing", 0):
        raise StorageError(f"similarities in {path} are missing or not finite; {advice}")
    return dataset


def with_width(pairs: xr.Dataset) -> xr.Dataset:
    """Note the width of an RBF kernel that took it from all images, before some of them are left out."""
    if "product" not in pairs or not isinstance(kernel := known_kernel(pairs), RBF):
        return pairs
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    fixed = kernel.at_width_of(pairs["product"].values, *norms, same=one_set(pairs))
    return pairs if isinstance(fixed, NarrowRBF) or not isinstance(fixed, RBF) else described(pairs, fixed)


def under_kernel(pairs: xr.Dataset, kernel: Kernel) -> xr.Dataset:
    """Add the similarities under a kernel to products."""
    check_kernel(kernel, pairs.attrs["matching"], bool(pairs.attrs["one_to_one"]))
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    values = kernel(pairs["product"].values, *norms, same=one_set(pairs))
    return described(pairs.assign(similarity=(("image_a", "image_b"), values)), kernel)


def described(pairs: xr.Dataset, kernel: Kernel) -> xr.Dataset:
    """Note the kernel of similarities, and a width that was given."""
    other = {key: value for key, value in pairs.attrs.items() if key != "sigma2"}
    width = {"sigma2": kernel.sigma2} if isinstance(kernel, RBF) and kernel.sigma2 is not None else {}
    pairs = pairs.copy(deep=False)
    pairs.attrs = {**other, "kernel": kernel.name, **width}
    return pairs


def known_kernel(pairs: xr.Dataset) -> Kernel | None:
    """The kernel of similarities, if it gives them again; None for a user's own, and for widths that were not noted."""
    try:
        kernel = get_kernel(pairs.attrs["kernel"])
    except ComparisonError:
        return None
    if isinstance(kernel, RBF) and "sigma2" in pairs.attrs:
        kernel = RBF(float(pairs.attrs["sigma2"]))
    norms = pairs["norm_a"].values, pairs["norm_b"].values
    again = kernel(pairs["product"].values, *norms, same=one_set(pairs))
    return kernel if np.allclose(again, pairs["similarity"].values, rtol=1e-13, atol=0) else None


def dataset_of(values: np.ndarray, rows: list[str], columns: list[str] | None) -> xr.Dataset:
    """Make a dataset of similarities and image names; without `columns`, the columns are the images of the rows."""
    import xarray as xr

    coordinates = {"image_a": rows, "image_b": rows if columns is None else columns}
    dataset = xr.Dataset({"similarity": (("image_a", "image_b"), values)}, coords=coordinates)
    # Names cannot tell: two sets of images may have the same names.
    return dataset.assign_attrs(image_sets=1 if columns is None else 2)


def require_known(
    values: np.ndarray, kind: str, rows: Sequence[str], columns: Sequence[str] | None, *, allow_missing: bool
) -> None:
    """Refuse infinite entries, NaN unless it is allowed, and matrices of which every pair is missing.

    Raises:
        ComparisonError: see above; the message names the pair.
    """
    bad = ~np.isfinite(values) if not allow_missing else np.isinf(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        pair = f"{rows[row]} and {(columns or rows)[column]}"
        advice = "; if it is missing, give allow_missing=True" if np.isnan(values[row, column]) else ""
        raise ComparisonError(f"the {kind} of images {pair} is {values[row, column]}{advice}")
    others = values[~np.eye(len(values), dtype=bool)] if columns is None else values.ravel()
    if np.isnan(others).all() and np.isnan(values).any():
        raise ComparisonError("every pair of different images is missing, so there is nothing to compare")


def given_dataset(
    values: Any,
    ids: Sequence[str] | None,
    other_ids: Sequence[str] | None,
    *,
    kind: Kind | None,
    dissimilarity: str | None,
    allow_missing: bool,
) -> xr.Dataset:
    """Check a matrix from elsewhere and make a dataset of it; arguments and errors are those of `RSM.from_array`."""
    if not isinstance(kind, str | None) or kind not in (None, "similarity", "distance"):
        raise ComparisonError(f"kind must be 'similarity' or 'distance', found {brief(kind)}")
    if dissimilarity is not None:
        dissimilarity = require_text(dissimilarity, "dissimilarity", ComparisonError)
        if kind == "similarity":
            raise ComparisonError("dissimilarity names distances, but kind is 'similarity'; leave one of them out")
        kind = "distance"
    require_flag(allow_missing, "allow_missing", ComparisonError)
    values = real_matrix(values, "the matrix", ComparisonError)
    if values.ndim != 2 or 0 in values.shape:
        raise ComparisonError(f"an RSM has shape (N, M), found {values.shape}{condensed_hint(values)}")
    if other_ids is None and values.shape[0] != values.shape[1]:
        raise ComparisonError(f"an RSM of one set of images is square, found {values.shape}; give other_ids")
    rows = image_names(ids, values.shape[0], "ids")
    columns = None if other_ids is None else image_names(other_ids, values.shape[1], "other_ids")
    if allow_missing and kind == "distance" and columns is None:
        own = np.diagonal(values)
        np.fill_diagonal(values, np.where(np.isnan(own), 0.0, own))
    require_known(values, kind or "similarity", rows, columns, allow_missing=allow_missing)
    if columns is None:
        require_symmetric(values, "the matrix", ComparisonError)
        if kind is None:
            require_similarities(values, "the matrix", ComparisonError)
        if kind == "distance":
            require_distances(values, "the matrix", ComparisonError, named=bool(dissimilarity))
    dataset = dataset_of(-values / 2 if kind == "distance" else values, rows, columns)
    return of_distances(dataset, dissimilarity or "") if kind == "distance" else with_holes(dataset)


def image_names(ids: Sequence[str] | None, count: int, what: str) -> list[str]:
    """Check the names of images; by default, make names from their indices.

    Raises:
        ComparisonError: the number of names is wrong, or names are repeated or not text.
    """
    names = [str(k) for k in range(count)] if ids is None else require_texts(ids, what, ComparisonError)
    if len(names) != count:
        raise ComparisonError(f"{what} holds {len(names)} names for {count} images")
    if (twice := repeated(names)) is not None:
        raise ComparisonError(
            f"{what} names image {twice!r} more than once; average its rows and columns, or name them apart"
        )
    return names
