"""Labelled grids of comparisons between RSMs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rsm_probe.checks import brief, shared_names
from rsm_probe.comparison.certified import CertifiedSums
from rsm_probe.comparison.inputs import known_pairs, stack_rsms
from rsm_probe.comparison.measures import get_measure, require_one_kind
from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError, repeated

if TYPE_CHECKING:
    import xarray as xr


class RsmKey(NamedTuple):
    """The identity of an RSM in a sweep: model, layer, depth of the layer, matching and kernel."""

    model: str
    layer: str
    depth: int
    matching: str
    kernel: str

    def label(self) -> str:
        """Join the non-empty fields into one text."""
        return "/".join(part for part in (self.model, self.layer, self.matching, self.kernel) if part)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> RsmKey:
        """Parse a key from its fields, stored as texts."""
        model, layer, depth, matching, kernel = map(str, texts)
        return cls(model, layer, int(depth), matching, kernel)


class RsmStack(NamedTuple):
    """RSMs over the same images, with their keys.

    Attributes:
        values: (R, N, N), float64.
        keys: R keys, in forward order within a model.
    """

    values: np.ndarray
    keys: list[RsmKey]


def compare(
    rsms: Any,
    others: Any = None,
    measure: str | Measure = "cka",
    *,
    eigenvalues: bool = True,
    on: Literal["intersection"] | None = None,
    skip_missing: bool = False,
) -> xr.DataArray:
    """Compare every RSM with every other: layers with layers, models with models, models with brains.

    CKA and RSA take one matrix product for the whole grid. RSMs need not be positive semi-definite (semantic RSMs are
    not in general): all measures but Bures are defined for any symmetric matrix, and CKA is a cosine in [-1, 1].

    Args:
        rsms: mapping from names to RSMs or symmetric arrays (N, N). Names are texts or pairs (model, layer); layers of
            a model come in forward order.
        others: the RSMs in the columns; by default those in the rows.
        measure: a name from `MEASURES`, or a measure object with its options.
        eigenvalues: report the smallest eigenvalue of each RSM, which takes a decomposition of every matrix; NaN where
            pairs are missing.
        on: "intersection" takes the images that all RSMs hold, by their ids, in the order of the first RSM. None
            demands the same images in the same order.
        skip_missing: leave out pairs of images that are missing (NaN) in any of the RSMs, for CKA and the correlations.
            All values rest on the same pairs; to use all pairs that two RSMs share, compare them alone.

    Returns:
        Dimensions (rsm_a, rsm_b) with plain coordinates model, layer, depth, matching, kernel and smallest_eigenvalue
        (suffixed `_a`, `_b`). Undefined values are NaN, with a warning that names the RSM. For CKA of RSMs by
        approximate matchings, the coordinates `proven_low` and `proven_high` (rsm_a, rsm_b) are an interval that
        contains the CKA of exact matching; see `rsm_probe.comparison.certified`. It is [-1, 1] where nothing is
        proven, and by RBF kernels it is meant at the width of the values. There is none where pairs are missing. The
        attributes say how many `images` were compared and, if missing ones were skipped, how many `pairs`.

    Example:
        >>> import numpy as np, rsm_probe
        >>> x, y = np.random.default_rng(0).normal(size=(2, 20, 5))    # features of 20 images, by two layers
        >>> grid = rsm_probe.compare({("net", "early"): x @ x.T, ("net", "late"): y @ y.T}, measure="rsa-spearman")
        >>> grid.dims, grid.shape
        (('rsm_a', 'rsm_b'), (2, 2))
        >>> grid["layer_a"].values.tolist()
        ['early', 'late']

    Raises:
        ComparisonError: no RSM, different images or orders, an asymmetric matrix, non-finite values, an unknown
            measure, a measure that is not defined where pairs are missing, or similarities beside distances by a
            measure that depends on where 0 is.
    """
    measure = get_measure(measure)
    sides, rows, columns = label_rsms(rsms, others, measure, on=on, skip_missing=skip_missing)
    grid = measured_grid(rows, columns, measure).rename(measure.name).assign_attrs(kind=measure.properties.kind)
    grid = _with_proven(grid, sides, [rows, columns], measure).assign_attrs(used_images(rows, skip_missing))
    if eigenvalues:
        smallest = [_smallest_eigenvalues(rows.values)]
        smallest.append(smallest[0] if columns is rows else _smallest_eigenvalues(columns.values))
        for side, numbers in zip("ab", smallest, strict=True):
            grid = grid.assign_coords({f"smallest_eigenvalue_{side}": (f"rsm_{side}", numbers)})
    return grid


def _with_proven(
    grid: xr.DataArray, sides: Sequence[Mapping[Any, Any]], stacks: Sequence[RsmStack], measure: Measure
) -> xr.DataArray:
    """Add the interval of exact matching to a grid, if a matching is an approximation; sides as in `label_rsms`."""
    highest = [getattr(rsm, "highest_values", None) for side in sides for rsm in side.values()]
    sums = measure.certified()
    if sums is None or all(one is None for one in highest) or known_pairs(stacks[0].values) is not None:
        return grid
    low = np.concatenate([stack.values for stack in stacks[: len(sides)]])
    high = np.stack([own if one is None else one for own, one in zip(low, highest, strict=True)])
    sums.add(lambda part: (low[part], high[part]), [slice(0, len(low))], low.shape[-1])
    if len(sides) == 1:
        return with_interval(grid, sums, grid.values)
    # Rows and columns as one square, of which a corner is wanted.
    rows = len(stacks[0].keys)
    values = np.zeros((len(low), len(low)))
    values[:rows, rows:], values[rows:, :rows] = grid.values, grid.values.T
    return with_interval(grid, sums, values, (slice(rows), slice(rows, None)))


def with_interval(
    grid: xr.DataArray,
    sums: CertifiedSums,
    values: np.ndarray,
    corner: tuple[slice, slice] = (slice(None), slice(None)),
) -> xr.DataArray:
    """Add the coordinates `proven_low` and `proven_high` to a grid, if a matching is an approximation.

    Args:
        grid: the grid.
        sums: of all RSMs.
        values: all values between these RSMs.
        corner: the rows and columns of these that the grid has.
    """
    if not sums.approximate:
        return grid
    low, high = (end[corner] for end in sums.intervals(values))
    return grid.assign_coords(proven_low=(("rsm_a", "rsm_b"), low), proven_high=(("rsm_a", "rsm_b"), high))


def label_rsms(
    rsms: Any, others: Any, measure: Measure, *, on: str | None, skip_missing: bool
) -> tuple[list[Mapping[Any, Any]], RsmStack, RsmStack]:
    """Check, align and stack the RSMs in the rows and in the columns; arguments as those of `compare`.

    Returns:
        The aligned RSMs of the rows and, with `others`, of the columns; their stacks, which are the same object without
        `others`.

    Raises:
        ComparisonError: as `compare`.
    """
    sides = [rsms] if others is None else [rsms, others]
    for side in sides:
        if not isinstance(side, Mapping):
            raise ComparisonError(f"RSMs are given by name, as in {{'layer1': rsm}}; found {type(side).__name__}")
    keys = [_keys(side) for side in sides]
    if not all(keys):
        raise ComparisonError("there is no RSM to compare")
    names = [key.label() for side in keys for key in side]
    matrices = [rsm for side in sides for rsm in side.values()]
    require_one_kind(matrices, names, measure)
    if on is not None:
        matrices = _over_shared_images(matrices, names, on)
        remaining = iter(matrices)
        sides = [{name: next(remaining) for name in side} for side in sides]
    values = stack_rsms(matrices, names, skip_missing=skip_missing)
    rows = RsmStack(values[: len(keys[0])], keys[0])
    return sides, rows, rows if others is None else RsmStack(values[len(keys[0]) :], keys[1])


def _over_shared_images(matrices: Sequence[Any], names: Sequence[str], on: str) -> list[Any]:
    """Cut RSMs to the images that all of them hold."""
    if on != "intersection":
        raise ComparisonError(f"on is 'intersection' or None, found {brief(on)}")
    for name, rsm in zip(names, matrices, strict=True):
        if not hasattr(rsm, "subset"):
            raise ComparisonError(
                f"the {name} RSM is an array, which names no images; give RSM.from_array(values, ids) to compare on "
                "the images that RSMs share"
            )
    shared = shared_names(names, [rsm.ids for rsm in matrices], ComparisonError)
    return [rsm.subset(shared) for rsm in matrices]


def used_images(stack: RsmStack, skip_missing: bool) -> dict[str, int]:
    """The number of images that are compared and, if missing ones were skipped, of pairs of images."""
    known = ~np.isnan(stack.values[0]) & ~np.eye(stack.values.shape[-1], dtype=bool)
    images = int(known.any(axis=0).sum()) if len(known) > 1 else len(known)
    return {"images": images, "pairs": int(known.sum()) // 2} if skip_missing else {"images": images}


def measured_grid(rows: RsmStack, columns: RsmStack, measure: Measure) -> xr.DataArray:
    """Compute and label all values between rows and columns; warn and name the first RSM without a value.

    Raises:
        ComparisonError: as `Measure.grid`.
    """
    values = measure.grid(rows.values, columns.values)
    if np.isnan(values).any():
        stacks = [rows] if columns is rows else [rows, columns]
        single = [(key, rsm[None]) for stack in stacks for key, rsm in zip(stack.keys, stack.values, strict=True)]
        undefined = [key.label() for key, rsm in single if np.isnan(measure.grid(rsm, rsm)).any()]
        warn_undefined(measure, undefined)
    return label_grid(values, rows.keys, columns.keys)


def warn_undefined(measure: Measure, undefined: Sequence[str], where: str = "") -> None:
    """Warn and name the first of the RSMs for which a measure is undefined, if there are any."""
    if undefined:
        warnings.warn(
            f"{measure.name} is undefined (NaN) for {len(undefined)} RSMs, which are constant over all pairs of "
            f"images{where}, first {undefined[0]}",
            stacklevel=4,  # above this function, its caller, and the function that users call
        )


def _keys(rsms: Mapping[Any, Any]) -> list[RsmKey]:
    keys: list[RsmKey] = []
    depths: dict[str, dict[str, int]] = {}
    for name, rsm in rsms.items():
        if isinstance(name, RsmKey):
            keys.append(name)
            continue
        if not isinstance(name, str) and not (isinstance(name, tuple) and len(name) == 2):
            raise ComparisonError(f"the name of an RSM is a text or a pair (model, layer), found {name!r}")
        model, layer = ("", name) if isinstance(name, str) else map(str, name)
        attributes = getattr(rsm, "attributes", {})
        depth = depths.setdefault(model, {}).setdefault(layer, len(depths[model]))
        matching, kernel = (str(attributes.get(name, "")) for name in ("matching", "kernel"))
        keys.append(RsmKey(model, layer, depth, matching, kernel))
    if (twice := repeated(key.label() for key in keys)) is not None:
        raise ComparisonError(f"two RSMs are called {twice!r}; names must be unique")
    return keys


def _smallest_eigenvalues(rsms: np.ndarray) -> list[float]:
    from scipy.linalg import eigh

    return [
        float("nan") if np.isnan(rsm).any() else float(eigh(rsm, eigvals_only=True, subset_by_index=[0, 0])[0])
        for rsm in rsms
    ]


def label_grid(values: np.ndarray, rows: Sequence[RsmKey], columns: Sequence[RsmKey]) -> xr.DataArray:
    """Label a grid of comparisons with plain coordinates on both axes, because stores cannot keep a multi-index."""
    import xarray as xr

    coordinates: dict[str, Any] = {}
    for side, keys in (("a", rows), ("b", columns)):
        coordinates[f"rsm_{side}"] = [key.label() for key in keys]
        for name in RsmKey._fields:
            coordinates[f"{name}_{side}"] = (f"rsm_{side}", [getattr(key, name) for key in keys])
    return xr.DataArray(values, dims=("rsm_a", "rsm_b"), coords=coordinates, name="cka")


def layer_grid(grid: xr.DataArray, rows: Mapping[str, str], columns: Mapping[str, str]) -> xr.DataArray:
    """Cut the layers of one kind of RSM against those of another out of a labelled grid.

    Args:
        grid: dimensions (rsm_a, rsm_b), labelled as `label_grid` does.
        rows: coordinate -> value that the rows share, such as model, matching and kernel.
        columns: the same for the columns.

    Returns:
        Dimensions (layer_a, layer_b), with the names of layers as coordinates.

    Raises:
        ComparisonError: a value does not occur.
    """
    import xarray as xr

    part = grid.isel(rsm_a=rsm_positions(grid, "a", rows), rsm_b=rsm_positions(grid, "b", columns))
    coordinates = {f"layer_{side}": [str(v) for v in part[f"layer_{side}"].values] for side in "ab"}
    return xr.DataArray(part.values, dims=("layer_a", "layer_b"), coords=coordinates, name="cka")


def rsm_positions(grid: xr.DataArray, side: str, shared: Mapping[str, str]) -> np.ndarray:
    """The positions along one side, "a" or "b", of a labelled grid at which its coordinates have the values shared.

    Raises:
        ComparisonError: a value does not occur.
    """
    mask = np.ones(grid.sizes[f"rsm_{side}"], dtype=bool)
    for name, value in shared.items():
        known = grid[f"{name}_{side}"].values
        if value not in known:
            names = ", ".join(dict.fromkeys(map(str, known)))
            raise ComparisonError(f"no {name} {value!r} in this sweep (there are: {names})")
        mask &= known == value
    return np.flatnonzero(mask)
