"""What files of RDMs hold, whatever their format: matrices, with the names of subjects and images if they are there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsm_probe.arrays import images_of_pairs, real_array
from rsm_probe.checks import brief, listed
from rsm_probe.errors import ComparisonError, did_you_mean
from rsm_probe.execution.devices import require_memory
from rsm_probe.storage.listing import storing

_SHAPES = "RDMs have shape (N, N), (subjects, N, N), (N(N-1)/2,) or (subjects, N(N-1)/2)"


@dataclass(frozen=True)
class ReadOptions:
    """What the caller said about the inside of files.

    Attributes:
        key: the variable or column that holds the RDMs; None if there is only one.
        descriptor: the variable that names the images, or None.
        subjects: the variable, descriptor, field or column that names the subjects, or None.
        dimension: what the RDMs are of, such as "subject".
        ids: names of the images, if the caller gave them.
    """

    key: str | None = None
    descriptor: str | None = None
    subjects: str | None = None
    dimension: str = "subject"
    ids: Sequence[str] | None = None

    def require_plain(self, file: Path, names: Sequence[str], advice: str) -> None:
        """Refuse options that have no meaning in the format of a file.

        Raises:
            ComparisonError: one of the named options was given.
        """
        for name in names:
            if (value := getattr(self, name)) is not None:
                argument = "names" if name == "subjects" else name
                raise ComparisonError(f"{file} has nothing that {argument}={brief(value)} could name; {advice}")


@dataclass(frozen=True)
class StoredRdm:
    """One matrix of a file.

    Attributes:
        values: shape (N, N), float64.
        name: name of the subject, if the file has one.
        ids: names of the N images, if the file has them.
        dissimilarity: name of the distances, if the file has one.
        pairs_only: the file holds pairs of different images, and no diagonal.
    """

    values: np.ndarray
    name: str | None = None
    ids: Sequence[str] | None = None
    dissimilarity: str | None = None
    pairs_only: bool = False


@dataclass(frozen=True)
class Variables:
    """The variables of a file.

    Attributes:
        described: name -> type and shape, for messages.
        candidates: names of those that may hold RDMs.
        value: reads one: an array of numbers or texts, a list of them, or a list of structs (`Fields`).
    """

    described: Mapping[str, str]
    candidates: Sequence[str]
    value: Callable[[str], Any]


class Fields(Mapping[str, Any]):
    """The fields of a struct, each read when it is used: only some of them have to be readable.

    Args:
        names: names of the fields.
        read: reads one of them.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self._names = tuple(names)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn the errors of libraries that read a file into StorageError, and silence their warnings.

    Raises:
        StorageError: the file is missing, damaged or of another format.
        CostError: the memory ran out.
    """
    with storing(f"cannot read {file}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def candidates(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the arrays whose shape may be that of RDMs.

    A vector of pairs of fewer images than another array has is left out: it rather holds a fact of each subject.
    """
    counts = {name: _images_in(shape) for name, shape in shapes.items()}
    least = min(3, max(counts.values(), default=0))  # of two images only if there is nothing else
    images = {name: count for name, count in counts.items() if count >= max(least, 2)}
    vectors = {name for name in images if len(_long_sides(shapes[name])) == 1}
    most = max((count for name, count in images.items() if name not in vectors), default=0)
    return [name for name, count in images.items() if name not in vectors or count >= most]


def _long_sides(shape: Sequence[int]) -> list[int]:
    return [side for side in shape if side != 1]


def _images_in(shape: Sequence[int]) -> int:
    """Number of images of RDMs in an array of this shape; 0 if these cannot be RDMs."""
    sides = _long_sides(shape)
    if len(sides) == 2 and sides[0] == sides[1]:
        return sides[0]
    if len(sides) in (1, 2):
        return max(images_of_pairs(side) or 0 for side in sides)
    return sides[1] if len(sides) == 3 and sides[1] in (sides[0], sides[2]) else 0


def require_room(numbers: int, where: str) -> None:
    """Refuse to read more numbers than fit into memory, before any is allocated.

    Raises:
        CostError: they do not fit.
    """
    require_memory(16 * numbers, where, "read fewer subjects or images")


def rdms_in(variables: Variables, file: Path, options: ReadOptions, *, matlab: bool = False) -> list[StoredRdm]:
    """Read the RDMs of a file of named variables.

    Args:
        variables: what the file holds.
        file: the file, for messages.
        options: see `ReadOptions`.
        matlab: pairs may be along either axis, as no order is usual in MATLAB.

    Raises:
        ComparisonError: unknown variables, several that may hold RDMs, or contents that are not RDMs.
    """
    name = _select(variables, options.key, file)
    ids = options.ids
    if options.descriptor is not None:
        ids = _texts_of(variables, options.descriptor, "descriptor", file)
    value = variables.value(name)
    where = f"{file}: {name}"
    if isinstance(value, list) and value and isinstance(value[0], Fields):
        return [
            rdm
            for number, fields in enumerate(value, 1)
            for rdm in _of_struct(fields, f"{where}({number})", options.subjects, ids, matlab=matlab)
        ]
    names = None if options.subjects is None else _texts_of(variables, options.subjects, "names", file)
    return stored(value, where, names=names, ids=ids, matlab=matlab)


def _of_struct(
    fields: Fields, where: str, subjects: str | None, ids: Sequence[str] | None, *, matlab: bool
) -> list[StoredRdm]:
    """RDMs of a struct as rsatoolbox for MATLAB makes it, with the fields RDM, name and color."""
    field = next((field for field in fields if field.lower() == "rdm"), "RDM")
    for needed in (field, subjects):
        if needed is not None and needed not in fields:
            raise ComparisonError(f"{where} is a struct without the field {needed}; it has {listed(fields)}")
    name = "".join(texts(fields.get(subjects or "name", []), f"{subjects or 'name'} of {where}"))
    return stored(fields[field], f"{where}.{field}", names=[name] if name else None, ids=ids, matlab=matlab)


def stored(
    value: Any,
    where: str,
    *,
    names: Sequence[str] | None,
    ids: Sequence[str] | None,
    dissimilarity: str | None = None,
    matlab: bool = False,
) -> list[StoredRdm]:
    """Make RDMs of an array, or of a list with one array per subject.

    Args:
        value: see `matrices`.
        where: what the array is, for messages.
        names: names of the subjects, or None.
        ids: names of the images, or None.
        dissimilarity: name of the distances, or None.
        matlab: see `rdms_in`.

    Raises:
        ComparisonError: the contents are not RDMs, or there are more or fewer names than RDMs.
    """
    parts = value if isinstance(value, list) else [value]
    if not parts or any(isinstance(part, list | Fields | str) for part in parts):
        raise ComparisonError(f"{where} holds no numbers; {_SHAPES}")
    images = None if ids is None else len(ids)
    stacks = [matrices(part, where, images, matlab=matlab) for part in parts]
    rdms = [(matrix, pairs_only) for stack, pairs_only in stacks for matrix in stack]
    if names is not None and len(names) != len(rdms):
        raise ComparisonError(f"{where} holds {len(rdms)} RDMs, and there are {len(names)} names ({listed(names)})")
    return [
        StoredRdm(matrix, None if names is None else names[k], ids, dissimilarity, pairs_only)
        for k, (matrix, pairs_only) in enumerate(rdms)
    ]


def matrices(value: Any, where: str, images: int | None, *, matlab: bool = False) -> tuple[np.ndarray, bool]:
    """Find subjects and images among the axes of an array.

    A square array is one RDM. Of three axes, the first or last two, of equal length, are images; if all have the same
    length, those whose slices are symmetric. Other arrays hold pairs in the order of `scipy.spatial.distance.pdist` and
    MATLAB's `pdist`: along the last axis, or along the first one if only its length is N(N-1)/2.

    Args:
        value: array of numbers of one, two or three axes.
        where: what it is, for messages.
        images: number of images, if it is known.
        matlab: see `rdms_in`.

    Returns:
        Shape (subjects, N, N), float64; and whether it held pairs, and no diagonals.

    Raises:
        ComparisonError: these are not real numbers, their shape is not that of RDMs, or it is not clear which axis has
            the pairs.
    """
    array = real_array(value, where, ComparisonError)
    if array.ndim == 2 and array.shape[0] == array.shape[1]:
        square = array[None].astype(np.float64)
        count = images_of_pairs(len(array))
        if count is not None and count > 2 and not _symmetric_slices(square):
            raise ComparisonError(
                f"{where} has shape {array.shape}, and is not symmetric as one RDM of {len(array)} images is; if it "
                f"holds {len(array)} RDMs of {count} images, save them as square matrices, ({len(array)}, {count}, "
                f"{count})"
            )
        return square, False
    if array.ndim == 3:
        return np.moveaxis(array, _axis_of_subjects(array, where), 0).astype(np.float64), False
    if array.ndim not in (1, 2) or not array.size:
        raise ComparisonError(f"{where} has shape {array.shape}; {_SHAPES}")
    # In MATLAB, every vector is a row or a column.
    rows = array.reshape(1, -1) if 1 in array.shape else np.atleast_2d(array)
    rows = np.moveaxis(rows, _axis_of_pairs(rows, where, images, matlab=matlab), -1)
    count = images_of_pairs(rows.shape[1])
    assert count is not None
    require_room(len(rows) * count**2, where)
    values = np.zeros((len(rows), count, count))
    upper = np.triu_indices(count, 1)
    values[:, *upper] = rows
    values[:, upper[1], upper[0]] = rows
    return values, True


def _axis_of_subjects(array: np.ndarray, where: str) -> int:
    first, second, third = array.shape
    axes = [axis for axis, square in ((0, second == third), (2, first == second)) if square]
    if not axes or not array.size:
        raise ComparisonError(f"{where} has shape {array.shape}; {_SHAPES}")
    # If slices along both axes are symmetric, so is the cube under all permutations of its axes: either axis will do.
    symmetric = [axis for axis in axes if len(axes) == 2 and _symmetric_slices(np.moveaxis(array, axis, 0))]
    return (symmetric or axes)[0]


def _symmetric_slices(stack: np.ndarray) -> bool:
    return np.allclose(stack, stack.transpose(0, 2, 1), rtol=1e-6, equal_nan=True)


def _axis_of_pairs(rows: np.ndarray, where: str, images: int | None, *, matlab: bool) -> int:
    fitting = [
        axis
        for axis in (1, 0)
        if (count := images_of_pairs(rows.shape[axis])) is not None and count > 1 and images in (None, count)
    ]
    # One subject's vector has no other axis.
    fitting = [axis for axis in fitting if axis == 1 or len(rows) > 1]
    if not fitting:
        needed = "" if images is None else f", and {images} images have {images * (images - 1) // 2} pairs"
        shape = rows.shape if len(rows) > 1 else f"({rows.shape[1]},)"
        raise ComparisonError(f"{where} has shape {shape}{needed}; {_SHAPES}")
    if len(fitting) == 2 and matlab:
        raise ComparisonError(
            f"{where} has shape {rows.shape}, and both could be numbers of pairs; give ids=, which say how many images "
            "there are, or save square matrices"
        )
    return fitting[0]


def texts(value: Any, where: str) -> list[str]:
    """Convert names as files hold them to texts; whole numbers are written out.

    Raises:
        ComparisonError: these are neither texts nor whole numbers.
    """
    if isinstance(value, list):  # cells of MATLAB, which hold one text each
        entries = [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in value]
    else:
        entries = [value] if isinstance(value, str | bytes) else np.asarray(value, dtype=object).ravel().tolist()
    names = []
    for entry in entries:
        entry = entry.item() if isinstance(entry, np.ndarray | np.generic) and entry.size == 1 else entry
        if isinstance(entry, float) and entry.is_integer():  # MATLAB's numbers
            entry = int(entry)
        if isinstance(entry, bytes):
            entry = entry.decode("utf-8", "backslashreplace")
        if not isinstance(entry, str | int) or isinstance(entry, bool):
            raise ComparisonError(f"{where} must hold names, found {brief(entry)} ({type(entry).__name__})")
        names.append(str(entry))
    return names


def _select(variables: Variables, key: str | None, file: Path) -> str:
    """The variable with the RDMs."""
    if key is not None:
        _require_variable(variables, key, "key", file)
        return key
    names = variables.candidates
    if len(names) == 1:
        return names[0]
    shown = listed([f"{name} {variables.described[name]}" for name in names or variables.described], 20)
    if not names:
        raise ComparisonError(f"{file} holds no RDMs, but {shown or 'nothing'}; {_SHAPES}")
    raise ComparisonError(f"{file} has several variables that may hold RDMs: {shown}; choose one by key=")


def _texts_of(variables: Variables, name: str, argument: str, file: Path) -> list[str]:
    _require_variable(variables, name, argument, file)
    return texts(variables.value(name), f"{file}: {name}")


def _require_variable(variables: Variables, name: str, argument: str, file: Path) -> None:
    known = variables.described
    if name not in known:
        raise ComparisonError(
            f"{file} has no {brief(name)}, which {argument}= names{did_you_mean(name, known)} "
            f"(it holds {listed(known, 20) or 'nothing'})"
        )
