"""Grids of comparisons, labelled by what each RSM is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rsm_probe.comparison.inputs import stack_rsms
from rsm_probe.comparison.measures import get_measure
from rsm_probe.comparison.protocol import Measure
from rsm_probe.errors import ComparisonError, repeated

if TYPE_CHECKING:
    import xarray as xr


class RsmKey(NamedTuple):
    """What one RSM of a sweep is: which layer of which model, matched and compared how."""

    model: str
    layer: str
    depth: int
    matching: str
    kernel: str

    def label(self) -> str:
        """One text for all of it."""
        return "/".join(part for part in (self.model, self.layer, self.matching, self.kernel) if part)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> RsmKey:
        """A key from its fields as stored text."""
        model, layer, depth, matching, kernel = map(str, texts)
        return cls(model, layer, int(depth), matching, kernel)


class RsmStack(NamedTuple):
    """RSMs over the same images, and what each is.

    Attributes:
        values: shape (R, N, N), float64.
        keys: R of them, in forward order within a model.
    """

    values: np.ndarray
    keys: list[RsmKey]


def compare(rsms: Any, others: Any = None, measure: str | Measure = "cka", *, eigenvalues: bool = True) -> xr.DataArray:
    """Compares every RSM with every other: layers with layers, models with models, models with brains.

    CKA and RSA take one matrix product for the whole grid. RSMs need not be positive semi-definite, as semantic ones
    are not in general: all measures but Bures are defined for any symmetric matrix, and CKA is a cosine in [-1, 1].

    Args:
        rsms: name -> RSM or symmetric array (N, N); names are texts, or pairs (model, layer). A model's layers come in
            forward order.
        others: the same for the columns; the rows again where left out.
        measure: see `MEASURES`, or a measure object with its options.
        eigenvalues: report each RSM's smallest eigenvalue; it costs a decomposition of every matrix.

    Returns:
        Dimensions (rsm_a, rsm_b), with plain coordinates model, layer, depth, matching, kernel, and
        smallest_eigenvalue (suffixed `_a`, `_b`). NaN, with a warning that names the RSM, where a value is undefined.

    Raises:
        ComparisonError: no RSM, other images or orders, no symmetry, values that are not finite, unknown measure.
    """
    measure = get_measure(measure)
    rows, columns = label_rsms(rsms, others)
    values = measure.grid(rows.values, columns.values)
    warn_undefined(values, rows, columns, measure)
    grid = label_grid(values, rows.keys, columns.keys).rename(measure.name).assign_attrs(kind=measure.about.kind)
    if eigenvalues:
        smallest = [_smallest_eigenvalues(rows.values)]
        smallest.append(smallest[0] if columns is rows else _smallest_eigenvalues(columns.values))
        for side, numbers in zip("ab", smallest, strict=True):
            grid = grid.assign_coords({f"smallest_eigenvalue_{side}": (f"rsm_{side}", numbers)})
    return grid


def label_rsms(rsms: Any, others: Any = None) -> tuple[RsmStack, RsmStack]:
    """Checked stacks of the RSMs in the rows and in the columns, which are the same object where `others` is None.

    Raises:
        ComparisonError: as `compare`.
    """
    parts = [
        dict(part) if isinstance(part, Mapping) else part for part in ([rsms] if others is None else [rsms, others])
    ]
    for part in parts:
        if not isinstance(part, dict):
            raise ComparisonError(f"RSMs come by name, as in {{'layer1': rsm}}; found {type(part).__name__}")
    keys = [_keys(part) for part in parts]
    names = [key.label() for part in keys for key in part]
    values = stack_rsms([rsm for part in parts for rsm in part.values()], names)
    stacks = [RsmStack(values[: len(keys[0])], keys[0]), RsmStack(values[len(keys[0]) :], keys[-1])]
    if others is None:
        return stacks[0], stacks[0]
    if not keys[0] or not keys[1]:
        raise ComparisonError("there is no RSM to compare")
    return stacks[0], stacks[1]


def warn_undefined(values: np.ndarray, rows: RsmStack, columns: RsmStack, measure: Measure) -> None:
    """Names the first RSM that has no value even with itself, where a grid of values is not defined throughout."""
    if not np.isnan(values).any():
        return
    stacks = [rows] if columns is rows else [rows, columns]
    alone = [(key, rsm[None]) for stack in stacks for key, rsm in zip(stack.keys, stack.values, strict=True)]
    undefined = [key for key, rsm in alone if np.isnan(measure.grid(rsm, rsm)).any()]
    if undefined:
        warnings.warn(
            f"{measure.name} is undefined (NaN) for {len(undefined)} RSMs, which are constant over all pairs of "
            f"images, first {undefined[0].label()}",
            stacklevel=3,
        )


def _keys(rsms: Mapping[Any, Any]) -> list[RsmKey]:
    keys: list[RsmKey] = []
    layers: dict[str, dict[str, None]] = {}
    for name, rsm in rsms.items():
        if isinstance(name, RsmKey):
            keys.append(name)
            continue
        if not isinstance(name, str) and not (isinstance(name, tuple) and len(name) == 2):
            raise ComparisonError(f"an RSM is named by a text or a pair (model, layer), found {name!r}")
        model, layer = ("", name) if isinstance(name, str) else map(str, name)
        about = getattr(rsm, "attributes", {})
        seen = layers.setdefault(model, {})
        seen.setdefault(layer)
        depth = list(seen).index(layer)
        keys.append(RsmKey(model, layer, depth, str(about.get("matching", "")), str(about.get("kernel", ""))))
    labels = [key.label() for key in keys]
    if (twice := repeated(labels)) is not None:
        raise ComparisonError(f"two RSMs are called {twice!r}, and results are told apart by name")
    return keys


def _smallest_eigenvalues(rsms: np.ndarray) -> list[float]:
    from scipy.linalg import eigh

    return [float(eigh(rsm, eigvals_only=True, subset_by_index=[0, 0])[0]) for rsm in rsms]


def label_grid(values: np.ndarray, rows: Sequence[RsmKey], columns: Sequence[RsmKey]) -> xr.DataArray:
    """A grid of RSM comparisons with plain coordinates on both axes, so that it can be stored as it is."""
    import xarray as xr

    coordinates: dict[str, Any] = {}
    for side, keys in (("a", rows), ("b", columns)):
        coordinates[f"rsm_{side}"] = [key.label() for key in keys]
        for name in RsmKey._fields:
            coordinates[f"{name}_{side}"] = (f"rsm_{side}", [getattr(key, name) for key in keys])
    return xr.DataArray(values, dims=("rsm_a", "rsm_b"), coords=coordinates, name="cka")
