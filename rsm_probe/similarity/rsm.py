"""RSM: similarity values and what they are: which images, which matching, which kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from rsm_probe.errors import ComparisonError, MatchingError, RepresentationError, StorageError
from rsm_probe.matching.inputs import real_tensor
from rsm_probe.matching.protocol import Matching
from rsm_probe.matching.registry import get_matching
from rsm_probe.similarity.affinity import first_nonfinite
from rsm_probe.similarity.centering import Centering, check_centering, subtract_mean, token_mean
from rsm_probe.similarity.kernels import Kernel, check_kernel, get_kernel
from rsm_probe.similarity.pairs import PairMatcher
from rsm_probe.storage import open_dataset, save_dataset

if TYPE_CHECKING:
    import pandas as pd


class RSM:
    """A representational similarity matrix.

    Attributes:
        dataset: an `xarray.Dataset` with `similarity` (image_a, image_b), and, where it was computed here, the matched
            inner `product` of every pair and the squared norms `norm_a`, `norm_b`; coordinates are image ids.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def from_array(
        cls, values: np.ndarray, ids: Sequence[str] | None = None, other_ids: Sequence[str] | None = None
    ) -> Self:
        """Wraps a matrix from elsewhere (brain data, another tool).

        Args:
            values: similarities, shape (N, M); symmetric (N, N) unless `other_ids` is given.
            ids: N names of the images in the rows; numbers where left out.
            other_ids: M names of the images in the columns, where they are other images.

        Raises:
            ComparisonError: wrong shape, values that are not finite, repeated or too few ids, or no symmetry.
        """
        values = np.array(values, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ComparisonError(f"an RSM has shape (N, M), found {values.shape}")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise ComparisonError(f"similarity of images {row} and {column} is {values[row, column]}")
        if other_ids is None:
            if values.shape[0] != values.shape[1]:
                raise ComparisonError(f"an RSM of one set of images is square, found {values.shape}; give other_ids")
            if not np.allclose(values, values.T, rtol=1e-6, atol=1e-9 * np.abs(values).max()):
                raise ComparisonError("an RSM of one set of images is symmetric, and this matrix is not")
        rows = _names(ids, values.shape[0], "ids")
        columns = None if other_ids is None else _names(other_ids, values.shape[1], "other_ids")
        return cls(_dataset(values, rows, columns))

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
        """Matching, kernel and centring, as far as they are known."""
        return {key: value for key, value in self.dataset.attrs.items() if key not in ("image_sets", "one_to_one")}

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: below 0 where the RSM is not positive semi-definite, as semantic ones may be.

        Raises:
            ComparisonError: rows and columns are different images.
        """
        if self.dataset.attrs.get("image_sets", 1) != 1:
            raise ComparisonError("only the RSM of one set of images has eigenvalues")
        return float(np.linalg.eigvalsh(self.values)[0])

    def with_kernel(self, kernel: str | Kernel) -> RSM:
        """The same pairs and the same matchings under another kernel, at no cost of matching.

        Raises:
            ComparisonError: the RSM came from elsewhere, so its inner products are not known; or it holds a score,
                to which the kernel does not apply.
        """
        if "product" not in self.dataset:
            raise ComparisonError("this RSM holds no inner products, so its kernel cannot be changed")
        chosen = get_kernel(kernel)
        check_kernel(chosen, self.dataset.attrs["matching"], bool(self.dataset.attrs["one_to_one"]))
        norms = self.dataset["norm_a"].values, self.dataset["norm_b"].values
        values = chosen(self.dataset["product"].values, *norms, same=self.dataset.attrs.get("image_sets", 1) == 1)
        dataset = self.dataset.assign(similarity=(("image_a", "image_b"), values))
        return RSM(dataset.assign_attrs(kernel=chosen.name))

    def to_frame(self) -> pd.DataFrame:
        """A long table: one row for each pair of images, with `image_a`, `image_b` and `similarity`.

        Of one set of images, every unordered pair comes once, images with themselves included.
        """
        frame = self.dataset["similarity"].to_series().reset_index()
        if self.dataset.attrs.get("image_sets", 1) != 1:
            return frame
        rows, columns = np.triu_indices(len(self.ids))
        return frame.iloc[rows * len(self.ids) + columns].reset_index(drop=True)

    def to_rsatoolbox(self) -> Any:
        """An `rsatoolbox.rdm.RDMs`; see `rsm_probe.similarity.exchange`.

        Raises:
            ComparisonError: rows and columns are different images; rsatoolbox is not installed.
        """
        from rsm_probe.similarity.exchange import to_rsatoolbox

        return to_rsatoolbox(self)

    @classmethod
    def from_rsatoolbox(cls, rdms: Any, index: int = 0, descriptor: str | None = None) -> Self:
        """One matrix of an `rsatoolbox.rdm.RDMs`; see `rsm_probe.similarity.exchange`.

        Raises:
            ComparisonError: no such matrix or descriptor; distances that are not finite; repeated names.
        """
        from rsm_probe.similarity.exchange import similarities

        return cls.from_array(*similarities(rdms, index, descriptor))

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
            StorageError: there is no readable RSM at the path.
        """
        dataset = open_dataset(path)
        if "similarity" not in dataset:
            raise StorageError(f"{path} holds no RSM; it has {', '.join(map(str, dataset.data_vars)) or 'no arrays'}")
        return cls(dataset.load())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        what = ", ".join(f"{key}={value!r}" for key, value in self.attributes.items())
        return f"RSM({self.values.shape[0]} x {self.values.shape[1]} images{', ' if what else ''}{what})"


def rsm(
    z: Tensor | np.ndarray,
    other: Tensor | np.ndarray | None = None,
    matching: str | Matching = "optimal",
    kernel: str | Kernel = "cosine",
    centering: Centering | None = None,
    *,
    grid: tuple[int, int] | None = None,
    ids: Sequence[str] | None = None,
    other_ids: Sequence[str] | None = None,
    workers: int | None = None,
    memory: str | int = "1GB",
) -> RSM:
    """The similarity of every image with every image (paper, algorithm 1).

    Args:
        z: tokens (N, S, C), for example `probe.representations["layer1.0"].tokens`.
        other: tokens (M, T, C) of a database; None for the images of z among themselves. Where S differs from T,
            surplus locations stay unmatched, and norms are those of the whole images.
        matching: "identity" for spatio-semantic RSMs, "optimal" for semantic ones, or a method object.
        kernel: "linear", "cosine", "rbf", or a kernel object with its options.
        centering: None; "location-mean", subtracting the mean over images at each location, as the paper does; or
            "channel-mean", over images and locations, which keeps the invariance to permutations. The mean is the
            database's where `other` is given.
        grid: (H, W) of the locations, for `matching="translation"`; a square where it is not given.
        ids: names of the images of z.
        other_ids: names of the images of `other`.
        workers: CPU threads that match; None for all cores.
        memory: budget for affinities waiting to be matched.

    Returns:
        An `RSM` whose `values` are (N, M) float64.

    Raises:
        RepresentationError: wrong shapes, NaN or infinity (the message names the image), unknown centring.
        MatchingError: unknown matching.
        ComparisonError: unknown kernel, one that does not apply to a score, wrong number of ids.
        CostError: one affinity alone exceeds the memory budget.
    """
    label, method = get_matching(matching)
    chosen = get_kernel(kernel)
    check_kernel(chosen, label, method.one_to_one)
    centering = check_centering(centering)
    x, names = _tokens(z, "z", ids)
    y, other_names = (None, None) if other is None else _tokens(other, "other", other_ids)
    if y is not None and y.shape[2] != x.shape[2]:
        raise RepresentationError(f"z has {x.shape[2]} channels and other has {y.shape[2]}: not one layer's")
    if y is not None:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(x.device, dtype)
    if centering is not None:
        mean = token_mean(x if y is None else y, centering)
        x, y = subtract_mean(x, mean), None if y is None else subtract_mean(y, mean)
    with PairMatcher(workers, memory) as matcher:
        pending = matcher.submit(x, y, {label: method}, grid)
        products, (norms_x, norms_y) = pending.result()[label], pending.squared_norms
    values = chosen(products, norms_x, norms_y, same=y is None)
    dataset = _dataset(values, names, other_names).assign(
        product=(("image_a", "image_b"), products), norm_a=("image_a", norms_x), norm_b=("image_b", norms_y)
    )
    return RSM(
        dataset.assign_attrs(
            matching=label, one_to_one=int(method.one_to_one), kernel=chosen.name, centering=str(centering)
        )
    )


def _tokens(values: Tensor | np.ndarray, name: str, ids: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Checked tokens (N, S, C) and the names of their images."""
    if not isinstance(values, Tensor | np.ndarray):
        raise RepresentationError(f"{name} must be an array of tokens (N, S, C), found {type(values).__name__}")
    try:
        tokens = real_tensor(values)
    except MatchingError as error:
        raise RepresentationError(f"{name}: {error}") from None
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise RepresentationError(f"{name} must hold tokens (N, S, C), found shape {tuple(tokens.shape)}")
    names = _names(ids, len(tokens), "ids" if name == "z" else "other_ids")
    bad = first_nonfinite(tokens)
    if bad is not None:
        raise RepresentationError(f"{name} holds NaN or infinity, first in image {names[bad]}")
    return tokens, names


def _dataset(values: np.ndarray, rows: list[str], columns: list[str] | None) -> xr.Dataset:
    """Similarities with the names of their images; without names for the columns, those are the rows' images."""
    coordinates = {"image_a": rows, "image_b": rows if columns is None else columns}
    dataset = xr.Dataset({"similarity": (("image_a", "image_b"), values)}, coords=coordinates)
    # Two sets may bear the same names, so that names do not tell.
    return dataset.assign_attrs(image_sets=1 if columns is None else 2)


def _names(ids: Sequence[str] | None, count: int, what: str) -> list[str]:
    names = [str(k) for k in range(count)] if ids is None else [str(name) for name in ids]
    if len(names) != count:
        raise ComparisonError(f"{what} holds {len(names)} names for {count} images")
    if len(set(names)) != count:
        repeated = next(name for name in names if names.count(name) > 1)
        raise ComparisonError(f"{what} names image {repeated!r} more than once")
    return names
