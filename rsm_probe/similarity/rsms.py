"""RSMs of several subjects over the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rsm_probe.arrays import images_of_pairs, real_array
from rsm_probe.checks import brief, positions_of, require_text, require_texts, shared_names
from rsm_probe.errors import ComparisonError, StorageError, look_up, repeated
from rsm_probe.similarity.labelled import Kind, loaded, one_set, with_holes
from rsm_probe.similarity.rsatoolbox import named_rdms, to_rdms
from rsm_probe.similarity.rsm import RSM
from rsm_probe.storage.files import open_dataset, save_dataset

if TYPE_CHECKING:
    import xarray as xr


class RSMs(Mapping[str, RSM]):
    """RSMs of several subjects, sessions or regions over the same images: a mapping from names to `RSM`s.

    Functions that take RSMs by name, such as `rsm_probe.compare`, take it as it is.

    Example:
        >>> import numpy as np, rsm_probe
        >>> patterns = np.random.default_rng(0).normal(size=(3, 6, 4))    # 3 subjects, 6 images, 4 voxels
        >>> distances = ((patterns[:, :, None] - patterns[:, None]) ** 2).sum(axis=-1)
        >>> subjects = rsm_probe.RSMs.from_array(distances, dissimilarity="squared euclidean")
        >>> subjects, subjects["subject 1"].distances.shape
        (RSMs(3 subjects, 6 x 6 images, kind='distance', dissimilarity='squared euclidean'), (6, 6))

    Attributes:
        dataset: an `xarray.Dataset` with `similarity` (subject, image_a, image_b), or with the name of another first
            dimension.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    @classmethod
    def from_rsms(
        cls, rsms: Mapping[str, RSM], dimension: str = "subject", *, on: Literal["intersection"] | None = None
    ) -> Self:
        """Put RSMs together.

        Args:
            rsms: names of subjects and their RSMs, each of one set of images.
            dimension: what the names are: "subject", "session", "region", ...
            on: "intersection" takes the images that all RSMs hold, in the order of the first. None demands the same
                images in the same order.

        Raises:
            ComparisonError: no RSM, repeated or unusable names, other images or orders, similarities beside distances,
                or distances of several kinds.
        """
        import xarray as xr

        if not isinstance(rsms, Mapping) or not rsms:
            raise ComparisonError(f"give RSMs by name, as in {{'sub-01': rsm}}; found {brief(rsms)}")
        names = require_texts(list(rsms), "the names", ComparisonError)
        dimension = _dimension(dimension)
        for name, rsm in rsms.items():
            if not isinstance(rsm, RSM):
                raise ComparisonError(f"{name} is {type(rsm).__name__}, not an RSM; give RSM.from_array(values, ids)")
            if not one_set(rsm.dataset):
                raise ComparisonError(f"the RSM of {name} has two sets of images, but all must be over one set")
        taken = list(rsms.values())
        if on == "intersection":
            shared = shared_names(names, [rsm.ids for rsm in taken], ComparisonError)
            taken = [rsm.subset(shared) for rsm in taken]
        elif on is not None:
            raise ComparisonError(f"on is 'intersection' or None, found {brief(on)}")
        first = taken[0]
        for name, rsm in zip(names[1:], taken[1:], strict=True):
            _require_alike(names[0], first, name, rsm)
        facts = {
            key: first.dataset.attrs[key] for key in ("dissimilarity", *first.attributes) if key in first.dataset.attrs
        }
        facts |= {"kind": first.kind, "dimension": dimension, "image_sets": 1}
        labels = {key: first.dataset[key] for key in ("label_a", "label_b") if key in first.dataset}
        values = np.stack([rsm.values for rsm in taken])
        dataset = xr.Dataset(
            {"similarity": ((dimension, "image_a", "image_b"), values), **labels},
            coords={dimension: names, "image_a": first.ids, "image_b": first.ids},
        )
        return cls(with_holes(dataset.assign_attrs(facts)))

    @classmethod
    def from_array(
        cls,
        values: Any,
        ids: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        dimension: str = "subject",
        *,
        kind: Kind | None = None,
        dissimilarity: str | None = None,
        allow_missing: bool = False,
    ) -> Self:
        """Wrap matrices from elsewhere.

        Args:
            values: K matrices over the same N images, (K, N, N). Distances also as K rows of the N (N - 1) / 2 entries
                above the diagonal, row by row, as `scipy.spatial.distance.pdist` gives them.
            ids: names of the N images; by default their indices.
            names: K names; by default "subject 0" and so on.
            dimension: what the names are: "subject", "session", "region", ...
            kind: see `RSM.from_array`.
            dissimilarity: see `RSM.from_array`.
            allow_missing: see `RSM.from_array`.

        Raises:
            ComparisonError: the shape is wrong, or as `RSM.from_array`; the message names the subject.
        """
        dimension = _dimension(dimension)
        stack = real_array(values, "the stack of matrices", ComparisonError)
        if stack.ndim == 2 and stack.size and (kind == "distance" or dissimilarity is not None):
            _require_rows(stack)
            stack = np.stack([_square(row, len(stack)) for row in stack])
        if stack.ndim != 3 or 0 in stack.shape:
            condensed = " or, of distances, (K, N (N - 1) / 2)"
            raise ComparisonError(f"RSMs of K {dimension}s have shape (K, N, N){condensed}; found {stack.shape}")
        names = [f"{dimension} {k}" for k in range(len(stack))] if names is None else names
        names = require_texts(names, "names", ComparisonError)
        if len(names) != len(stack):
            raise ComparisonError(f"names holds {len(names)} names for {len(stack)} matrices")
        if (twice := repeated(names)) is not None:
            raise ComparisonError(f"names holds {twice!r} more than once")
        rsms = {}
        for name, matrix in zip(names, stack, strict=True):
            try:
                rsms[name] = RSM.from_array(
                    matrix, ids, kind=kind, dissimilarity=dissimilarity, allow_missing=allow_missing
                )
            except ComparisonError as error:
                raise ComparisonError(f"{name}: {error}") from error
        return cls.from_rsms(rsms, dimension)

    @classmethod
    def from_rsatoolbox(
        cls,
        rdms: Any,
        descriptor: str | None = None,
        names: str | None = None,
        dimension: str = "subject",
        *,
        allow_missing: bool = False,
    ) -> Self:
        """Convert all matrices of an `rsatoolbox.rdm.RDMs` to similarities `-d / 2`.

        Args:
            rdms: the matrices of distances.
            descriptor: the pattern descriptor that names the images; None for `image` if there is one.
            names: the RDM descriptor that names the matrices; None for the one called like `dimension`, if there is
                one, or else "subject 0" and so on.
            dimension: what the names are: "subject", "session", "region", ...
            allow_missing: see `RSM.from_array`.

        Raises:
            ComparisonError: as `RSM.from_rsatoolbox`; or no such RDM descriptor.
        """
        values, ids, measure, matrix_names = named_rdms(rdms, descriptor, names, _dimension(dimension))
        return cls.from_array(
            values, ids, matrix_names, dimension, kind="distance", dissimilarity=measure, allow_missing=allow_missing
        )

    @property
    def similarities(self) -> np.ndarray:
        """Similarities, shape (K, N, N), float64; `-d / 2` of distances `d`, NaN for missing pairs."""
        return self.dataset["similarity"].values

    @property
    def dimension(self) -> str:
        """What the names are: "subject", "session", "region", ..."""
        return str(self.dataset["similarity"].dims[0])

    @property
    def names(self) -> list[str]:
        """K names of subjects."""
        return [str(name) for name in self.dataset[self.dimension].values]

    @property
    def ids(self) -> list[str]:
        """N names of images."""
        return [str(name) for name in self.dataset["image_a"].values]

    @property
    def kind(self) -> Kind:
        """Whether the RSMs were made from similarities or from distances."""
        return "distance" if self.dataset.attrs.get("kind") == "distance" else "similarity"

    @property
    def dissimilarity(self) -> str | None:
        """Name of the distances, such as "correlation"; None for similarities and for distances without a name."""
        name = self.dataset.attrs.get("dissimilarity")
        return None if name is None else str(name)

    @property
    def missing(self) -> np.ndarray:
        """Number of pairs of images without a value, (K,)."""
        first, second = np.triu_indices(len(self.ids), 1)
        return np.isnan(self.similarities[:, first, second]).sum(axis=1)

    def __getitem__(self, name: str) -> RSM:
        one = self.dataset.isel({self.dimension: self._number(name)}, drop=True)
        one.attrs = {key: value for key, value in self.dataset.attrs.items() if key not in ("dimension", "missing")}
        return RSM(with_holes(one))

    def _number(self, name: str) -> int:
        numbers = {known: number for number, known in enumerate(self.names)}
        return look_up(name, numbers, self.dimension, ComparisonError)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, ids: Sequence[str] | None = None, names: Sequence[str] | None = None) -> RSMs:
        """Take some images and some subjects, in the order given.

        Args:
            ids: names of images; None for all.
            names: names of subjects; None for all.

        Raises:
            ComparisonError: no name, or unknown or repeated names.
        """
        where: dict[str, Any] = {}
        if ids is not None:
            where["image_a"] = where["image_b"] = positions_of(ids, self.ids, "ids", ComparisonError)
        if names is not None:
            names = require_texts(names, "names", ComparisonError)
            if not names or (twice := repeated(names)) is not None:
                raise ComparisonError(f"names holds {twice!r} more than once" if names else "names is empty")
            where[self.dimension] = [self._number(name) for name in names]
        return RSMs(with_holes(self.dataset.isel(where)))

    def reorder(self, ids: Sequence[str]) -> RSMs:
        """Put all images into another order.

        Raises:
            ComparisonError: an image is left out, repeated or unknown.
        """
        positions_of(ids, self.ids, "ids", ComparisonError, all_of_them=True)
        return self.subset(ids)

    def mean(self) -> RSM:
        """Average over subjects: each pair over those that know it; a pair that none knows stays missing."""
        return self._mean(np.ones(len(self), dtype=bool))

    def leave_one_out(self) -> Iterator[tuple[str, RSM]]:
        """Yield the name of each subject and the mean of all others.

        Raises:
            ComparisonError: fewer than two subjects.
        """
        if len(self) < 2:
            raise ComparisonError(f"there is one {self.dimension}, {self.names[0]}, so none is left without it")
        for number, name in enumerate(self.names):
            yield name, self._mean(np.arange(len(self)) != number)

    def _mean(self, taken: np.ndarray) -> RSM:
        values = self.similarities[taken]
        known = (~np.isnan(values)).sum(axis=0)
        mean = np.where(known > 0, np.nansum(values, axis=0) / np.maximum(known, 1), np.nan)
        first = self[self.names[0]].dataset
        return RSM(with_holes(first.assign(similarity=(("image_a", "image_b"), mean))))

    def to_rsatoolbox(self) -> Any:
        """Convert to an `rsatoolbox.rdm.RDMs`, whose RDM descriptor of the dimension's name holds the names.

        Raises:
            ComparisonError: rsatoolbox is not installed.
        """
        measure = self.dissimilarity or ("squared kernel distance" if self.kind == "similarity" else None)
        return to_rdms(self.similarities, self.ids, measure, {self.dimension: self.names})

    def save(self, path: str | Path) -> None:
        """Write a Zarr group that `xarray.open_zarr` opens.

        Raises:
            StorageError: the folder cannot be written.
        """
        save_dataset(path, self.dataset)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open RSMs that `save` wrote.

        Raises:
            StorageError: there are no readable RSMs at the path.
        """
        dataset = open_dataset(path)
        dimension = str(dataset.attrs.get("dimension", "subject"))
        dims = dataset["similarity"].dims if "similarity" in dataset else ()
        if dims != (dimension, "image_a", "image_b") or any(name not in dataset.coords for name in dims):
            held = ", ".join(map(str, dataset.data_vars)) or "no arrays"
            raise StorageError(f"{path} is not what RSMs.save writes: it holds {held}")
        return cls(loaded(dataset, path, "make the file again"))

    def __repr__(self) -> str:
        facts: dict[str, Any] = {} if self.kind == "similarity" else {"kind": self.kind}
        facts |= {} if self.dissimilarity is None else {"dissimilarity": self.dissimilarity}
        facts |= {"missing": int(self.missing.sum())} if self.missing.any() else {}
        what = "".join(f", {key}={brief(value)}" for key, value in facts.items())
        plural = "" if len(self) == 1 else "s"
        return f"RSMs({len(self)} {self.dimension}{plural}, {len(self.ids)} x {len(self.ids)} images{what})"


def _dimension(name: Any) -> str:
    name = require_text(name, "dimension", ComparisonError)
    if name in ("image_a", "image_b", "similarity", "label_a", "label_b"):
        raise ComparisonError(f"dimension is what the names are, such as 'subject' or 'region', not {name!r}")
    return name


def _require_rows(stack: np.ndarray) -> None:
    """Refuse one square matrix, whose rows might pass for the pairs of fewer images."""
    if stack.shape[0] == stack.shape[1] and not stack.diagonal().any() and np.array_equal(stack, stack.T, True):
        raise ComparisonError(
            f"this is one matrix of {len(stack)} images (symmetric, with zeros on the diagonal), not one row of "
            "distances per subject; give RSM.from_array(values, ids), or values[None] for one subject"
        )


def _square(row: np.ndarray, rows: int) -> np.ndarray:
    """Distances (N, N) from those above the diagonal."""
    from scipy.spatial.distance import squareform

    if images_of_pairs(len(row)) is None:
        hint = "; one square matrix is RSM.from_array(values, ids)" if rows == len(row) else ""
        raise ComparisonError(f"a row of {len(row)} distances does not hold every pair of N images once{hint}")
    return np.asarray(squareform(row, checks=False))


def _require_alike(first: str, rsm: RSM, second: str, other: RSM) -> None:
    if rsm.ids != other.ids:
        missing = sorted(set(rsm.ids) ^ set(other.ids))
        what = (
            f"other images than {first}, such as {missing[0]!r}" if missing else f"another order of images than {first}"
        )
        raise ComparisonError(
            f"{second} has {what}; RSMs.from_rsms(..., on='intersection') takes what all hold, in the "
            "order of the first"
        )
    if (rsm.kind, rsm.dissimilarity) != (other.kind, other.dissimilarity):
        kinds = [f"{one.dissimilarity or ''} {one.kind}".strip() for one in (rsm, other)]
        how = "one by to_distances or to_similarities" if rsm.kind != other.kind else "both by to_similarities"
        raise ComparisonError(f"{first} holds {kinds[0]} values and {second} {kinds[1]} values; convert {how}")
