"""`.mat`: arrays, cells and structs of all versions of the format.

SciPy reads versions 4 to 7. Version 7.3 is HDF5: arrays have their axes reversed, texts are UTF-16, and cells and
arrays of structs hold references to what they contain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.brains.formats.hdf5_files import import_h5py, items_of, values_of
from rsm_probe.brains.formats.matlab_elements import require_sound
from rsm_probe.brains.formats.stored import (
    Fields,
    ReadOptions,
    StoredRdm,
    Variables,
    candidates,
    rdms_in,
    readable,
    require_room,
)
from rsm_probe.errors import ComparisonError, StorageError

if TYPE_CHECKING:
    import h5py

_NUMBERS = ("double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
# MATLAB writes a header of its own before that of HDF5.
_HEADER, _HDF5 = 512, b"\x89HDF\r\n\x1a\n"
# Structs in cells in structs: more cannot be RDMs, and references could lead in circles.
_DEEPEST = 3


def read_matlab(file: Path, options: ReadOptions) -> list[StoredRdm]:
    """Read an array of RDMs, a cell array with one per subject, or structs with the fields RDM and name.

    Arrays are (N, N), or (N, N, subjects) as MATLAB stacks them, or (subjects, N, N); see `matrices`.

    Raises:
        StorageError: the file is missing, damaged or not of MATLAB, or needs h5py, which is missing.
        ComparisonError: unknown variables, several that may hold RDMs, or these are not RDMs.
    """
    with readable(file):
        with file.open("rb") as stream:
            start = stream.read(_HEADER + len(_HDF5))
        if not start.endswith(_HDF5):
            if 0 not in start[:4]:  # as in version 4, which has neither a header nor elements
                require_sound(file)
            return rdms_in(_by_scipy(file), file, options, matlab=True)
        with import_h5py(file).File(file, "r") as root:
            return rdms_in(_in_hdf5(root, file), file, options, matlab=True)


def _variables(classes: dict[str, tuple[str, tuple[int, ...]]], value: Callable[[str], Any]) -> Variables:
    """Variables by class and shape. RDMs are in arrays or structs, or else in cells, which often hold names."""
    described = {name: f"{kind} {shape}" for name, (kind, shape) in classes.items()}
    arrays = candidates({name: shape for name, (kind, shape) in classes.items() if kind in (*_NUMBERS, "sparse")})
    by_class = {kind: [name for name, (other, _) in classes.items() if other == kind] for kind in ("struct", "cell")}
    return Variables(described, [*arrays, *by_class["struct"]] or by_class["cell"], value)


def _by_scipy(file: Path) -> Variables:
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    try:
        classes = {name: (kind, shape) for name, shape, kind in whosmat(file, appendmat=False)}
    except MatReadError as error:
        raise StorageError(f"cannot read {file}: {error}") from error

    def value(name: str) -> Any:
        require_room(math.prod(classes[name][1]), f"{file}: {name}")
        try:
            return _plain(loadmat(file, appendmat=False, variable_names=[name])[name], f"{file}: {name}")
        except MatReadError as error:
            raise StorageError(f"cannot read {name} in {file}: {error}") from error

    return _variables(classes, value)


def _plain(value: Any, where: str) -> Any:
    """What SciPy made of a variable, as numbers, texts, and lists, also of the fields of structs."""
    if hasattr(value, "toarray"):
        raise _sparse(where)
    if not isinstance(value, np.ndarray):
        raise ComparisonError(f"{where} is neither an array, a cell array nor a struct")
    if value.dtype.names is not None:
        names = value.dtype.names
        return [
            Fields(names, lambda name, entry=entry: _plain(entry[name], f"{where}.{name}"))  # type: ignore[misc]
            for entry in value.ravel(order="F")
        ]
    if value.dtype.kind == "O":
        return [_plain(entry, where) for entry in value.ravel(order="F")]
    return [str(text).rstrip() for text in value.ravel()] if value.dtype.kind == "U" else value


def _in_hdf5(root: h5py.File, file: Path) -> Variables:
    items = {name: item for name, item in items_of(root).items() if "/" not in name and name[0] != "#"}
    classes = {name: (_class(item), _shape(item)) for name, item in items.items()}
    return _variables(classes, lambda name: _referred(root, items[name], file, f"{file}: {name}", 0))


def _class(item: Any) -> str:
    name = item.attrs.get("MATLAB_class", b"")
    name = name.decode("ascii", "backslashreplace") if isinstance(name, bytes) else str(name)
    return "sparse" if "MATLAB_sparse" in item.attrs else name


def _shape(item: Any) -> tuple[int, ...]:
    return tuple(reversed(getattr(item, "shape", None) or ()))


def _referred(root: h5py.File, item: Any, file: Path, where: str, depth: int) -> Any:
    """A variable of version 7.3, in the same form as `_plain` gives."""
    from h5py import Reference, check_ref_dtype

    if depth > _DEEPEST:
        raise ComparisonError(f"{where} is nested too deeply to hold RDMs")
    kind = _class(item)
    if kind == "sparse":
        raise _sparse(where)
    if not hasattr(item, "dtype"):
        return _structs(root, item, file, where, depth)
    if "MATLAB_empty" in item.attrs:
        return np.empty(0)
    if check_ref_dtype(item.dtype) is Reference:
        require_room(item.size, where)
        return [_referred(root, root[entry], file, where, depth + 1) for entry in item[()].ravel()]
    if item.dtype.names is not None:
        raise ComparisonError(f"{where} holds complex numbers; save real(x) or abs(x)")
    if kind not in (*_NUMBERS, "char"):
        raise ComparisonError(f"{where} has the class {kind}; save numbers as double(x), and texts as cellstr(x)")
    values = values_of(item, file)
    if kind == "char":
        rows = np.atleast_2d(values.T).astype("<u2")
        return [row.tobytes().decode("utf-16-le", "backslashreplace").rstrip() for row in rows]
    return values.T


def _structs(root: h5py.File, group: Any, file: Path, where: str, depth: int) -> list[Fields]:
    """One struct, or those of an array of structs, whose fields hold references."""
    from h5py import HardLink

    items = {name: group[name] for name in group if isinstance(group.get(name, getlink=True), HardLink)}
    # Fields of one struct have classes of their own; those of an array of structs have none.
    if not items or any(_class(item) for item in items.values()):
        return [Fields(items, lambda name: _referred(root, items[name], file, f"{where}.{name}", depth + 1))]
    references = {name: item[()].ravel() for name, item in items.items()}
    return [
        Fields(items, lambda name, k=k: _referred(root, root[references[name][k]], file, f"{where}.{name}", depth + 1))  # type: ignore[misc]
        for k in range(min(map(len, references.values())))
    ]


def _sparse(where: str) -> ComparisonError:
    return ComparisonError(f"{where} is a sparse matrix; save full(x), where x is the variable")
