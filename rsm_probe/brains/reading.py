"""Read the RDMs of subjects from files of the formats that the field uses."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rsm_probe.arrays import require_distances
from rsm_probe.brains.formats.hdf5_files import read_hdf5
from rsm_probe.brains.formats.matlab_files import read_matlab
from rsm_probe.brains.formats.numpy_files import read_npy, read_npz
from rsm_probe.brains.formats.stored import ReadOptions, StoredRdm
from rsm_probe.brains.formats.tables import read_names, read_table
from rsm_probe.checks import brief, listed, require_text, require_texts
from rsm_probe.errors import ComparisonError, StorageError, did_you_mean, repeated
from rsm_probe.similarity import RSM, RSMs
from rsm_probe.storage.listing import storing
from rsm_probe.storage.paths import local_folder

# Suffix -> reader of one file.
FORMATS: dict[str, Callable[[Path, ReadOptions], list[StoredRdm]]] = {
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
    ".npy": read_npy,
    ".npz": read_npz,
    ".mat": read_matlab,
    ".csv": read_table,
    ".tsv": read_table,
}
_PICKLES = (".pkl", ".pickle")


def read_rsms(
    path: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    ids: Sequence[str] | str | Path | None = None,
    names: Sequence[str] | str | None = None,
    key: str | None = None,
    descriptor: str | None = None,
    kind: Literal["distance", "similarity"] = "distance",
    dissimilarity: str | None = None,
    allow_missing: bool = False,
    dimension: str = "subject",
    on: Literal["intersection"] | None = None,
) -> RSMs:
    """Read the RDMs of several subjects from one file, or from one file each.

    The suffix says the format: HDF5 of rsatoolbox or with plain datasets (`.h5`, `.hdf5`), NumPy (`.npy`, `.npz`),
    MATLAB of any version (`.mat`) and tables (`.csv`, `.tsv`). Arrays have shape (N, N), (subjects, N, N), or
    (subjects, N(N-1)/2) with pairs in the order of `scipy.spatial.distance.pdist`. Subjects may also come last, as in
    MATLAB; a cube (N, N, N) is cut into slices that are symmetric. Tables are square, with or without names of images,
    or have a row per pair, in the columns `image_a`, `image_b`, `value` and possibly `subject`. No file can run code:
    pickles are refused.

    Args:
        path: a file; a list of files; a mapping from subjects to files; a folder; or a pattern such as
            "rdms/sub-*.npy". Files of folders and patterns come in natural order. Each of several files holds one RDM.
        ids: names of the images, in the order of the rows; a text file with one name per line; or a column of a table,
            as "events.tsv:stimulus". By default those in the file, if there are any, else their positions.
        names: names of the subjects, in the order of the RDMs; or what holds them in the file: an RDM descriptor of
            rsatoolbox, a variable, a field of structs, or a column. By default the names of the files without their
            suffix; for the RDMs of one file, the descriptor or column called like `dimension`, or the field `name` of
            structs, or else "subject 0" and so on.
        key: the variable (`.mat`, `.npz`, HDF5) or column that holds the RDMs, if there are several.
        descriptor: what names the images in the file: a pattern descriptor of rsatoolbox (by default `image`), or a
            variable.
        kind: "distance", or "similarity" if larger values mean more alike.
        dissimilarity: name of the distances, as in `RSM.from_array`; by default what rsatoolbox noted.
        allow_missing: accept NaN for missing pairs, which tables may leave out or leave empty.
        dimension: what the RDMs are of, such as "subject", "session" or "region".
        on: "intersection" cuts RDMs of different images to those that all of them hold.

    Returns:
        RSMs, named after subjects, over the same images.

    Raises:
        StorageError: a file is missing, damaged, of an unknown or unsafe format, or needs a package that is missing.
        ComparisonError: the contents are not RDMs, as `RSM.from_array` checks them; unknown or ambiguous variables;
            names that are repeated, too few or too many; or different images. The message names file and subject.
        CostError: the RDMs do not fit into memory.
    """
    dimension = require_text(dimension, "dimension", ComparisonError)
    if kind not in ("distance", "similarity"):
        raise ComparisonError(f"kind must be 'distance' or 'similarity', found {brief(kind)}")
    for value, what in ((key, "key"), (descriptor, "descriptor")):
        if value is not None:
            require_text(value, what, ComparisonError)
    if ids is not None and descriptor is not None:
        raise ComparisonError("ids and descriptor both name the images; give one of them")
    images = read_names(ids) if isinstance(ids, str | Path) else ids
    if images is not None:
        images = require_texts(images, "ids", ComparisonError)
    subjects = require_text(names, "names", ComparisonError) if isinstance(names, str) else None
    files = _files(path)
    options = ReadOptions(key, descriptor, subjects, dimension, images)
    rdms = [(file, rdm) for file in files.values() for rdm in _read(file, options, several=len(files) > 1)]
    if names is None or isinstance(names, str):
        given = list(files) if isinstance(path, Mapping) else None
        labels = _labels(given, rdms, subjects, dimension, several=len(files) > 1)
    else:
        labels = require_texts(names, "names", ComparisonError)
    if len(labels) != len(rdms):
        raise ComparisonError(f"names holds {len(labels)} names for {len(rdms)} RDMs")
    if (twice := repeated(labels)) is not None:
        raise ComparisonError(
            f"two RDMs have the name {twice!r}; give names=, or a mapping from names to files as in "
            "{file.parent.name: file for file in sorted(Path('data').glob('sub-*/rdm.npy'))}"
        )
    places = {label: f"{file} ({label})" for label, (file, _) in zip(labels, rdms, strict=True)}
    rsms = {
        label: _as_rsm(rdm, images, places[label], kind, dissimilarity, allow_missing=allow_missing)
        for label, (_, rdm) in zip(labels, rdms, strict=True)
    }
    if on is None:
        _require_same_images(rsms, places)
    return RSMs.from_rsms(rsms, dimension, on=on)


def _files(path: Any) -> dict[str, Path]:
    """The files that the caller means, by name; the names are unique, and those of a mapping are the caller's."""
    if isinstance(path, Mapping):
        labels = require_texts(list(path), "the names of files", ComparisonError)
        files = {label: _file(file) for label, file in zip(labels, path.values(), strict=True)}
    elif isinstance(path, Sequence) and not isinstance(path, str | bytes):
        files = {str(number): _file(file) for number, file in enumerate(path)}
    else:
        place = local_folder(path, "path").expanduser()
        if place.is_dir():
            files = _numbered(_of_folder(place))
        elif not place.exists() and glob.has_magic(str(place)):
            matches = sorted(glob.glob(str(place), recursive=True), key=natural)
            if not matches:
                raise StorageError(f"no file matches {brief(str(place))}")
            files = _numbered([_file(match) for match in matches])
        else:
            files = _numbered([_file(place)])
    if not files:
        raise StorageError("path names no file")
    return files


def _numbered(files: Sequence[Path]) -> dict[str, Path]:
    return {str(number): file for number, file in enumerate(files)}


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value: sub-2 before sub-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _of_folder(folder: Path) -> list[Path]:
    """The RDM files of a folder, which have one format."""
    with storing(f"cannot read {folder}"):
        entries = sorted(folder.iterdir(), key=lambda entry: natural(entry.name))
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    readable = [file for file in files if file.suffix.lower() in FORMATS]
    if any(entry.name in ("zarr.json", ".zgroup") for entry in entries):
        raise StorageError(f"{folder} is a Zarr group; RSMs.open reads what RSMs.save wrote")
    if not readable:
        pickles = [file for file in files if file.suffix.lower() in _PICKLES]
        if pickles:
            raise _unsafe(pickles[0])
        others = listed([entry.name for entry in entries]) or "nothing"
        raise StorageError(f"{folder} has no files of RDMs ({', '.join(FORMATS)}), but {others}")
    if len(suffixes := sorted({file.suffix for file in readable})) > 1:
        raise StorageError(
            f"{folder} has files of several formats ({', '.join(suffixes)}); name those with RDMs by a pattern, such "
            f"as '{folder}/*{suffixes[0]}'"
        )
    return readable


def _file(path: Any) -> Path:
    """Check that a path is that of a file in a known format."""
    file = local_folder(path, "path").expanduser()
    suffix = file.suffix.lower()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "missing"
        where = "" if file.is_absolute() else f" (the current folder is {Path.cwd()})"
        raise StorageError(f"the file {file} is {what}{where}")
    if suffix in _PICKLES:
        raise _unsafe(file)
    if suffix not in FORMATS:
        raise StorageError(
            f"{file} has the unknown suffix {suffix!r}{did_you_mean(suffix, FORMATS, 1)}; RDMs are read from "
            f"{', '.join(FORMATS)}"
        )
    return file


def _unsafe(file: Path) -> StorageError:
    return StorageError(
        f"{file} is a pickle, which can run any code when it is read. If you trust its source, convert it once: "
        f"rsatoolbox.rdm.load_rdm({str(file)!r}).save({str(file.with_suffix('.h5'))!r}, file_type='hdf5')"
    )


def _read(file: Path, options: ReadOptions, *, several: bool) -> list[StoredRdm]:
    rdms = FORMATS[file.suffix.lower()](file, options)
    if several and len(rdms) != 1:
        raise ComparisonError(
            f"{file} holds {len(rdms)} RDMs, but each of several files is one {options.dimension}; read it alone, and "
            "average its RDMs by RSMs.mean()"
        )
    return rdms


def _labels(
    given: list[str] | None,
    rdms: Sequence[tuple[Path, StoredRdm]],
    subjects: str | None,
    dimension: str,
    *,
    several: bool,
) -> list[str]:
    """Names of RDMs: those of the caller's mapping, of the files' contents, or of the files."""
    inside = [rdm.name for _, rdm in rdms if rdm.name]
    if given is not None and len(given) == len(rdms):
        return given
    if len(inside) == len(rdms) and (subjects is not None or not several):
        return inside
    if several or len(rdms) == 1:
        return [file.stem for file, _ in rdms]
    return [f"{dimension} {number}" for number in range(len(rdms))]


def _as_rsm(
    rdm: StoredRdm,
    ids: Sequence[str] | None,
    where: str,
    kind: Literal["distance", "similarity"],
    dissimilarity: str | None,
    *,
    allow_missing: bool,
) -> RSM:
    """Check an RDM, with the file and subject in messages."""
    if kind == "similarity" and rdm.pairs_only:
        raise ComparisonError(
            f"{where}: there are pairs of different images only, and similarities need those of images with "
            "themselves; save square matrices"
        )
    if len(rdm.values) < 2:
        raise ComparisonError(f"{where}: there is one image, and thus no pair of images")
    if ids is not None and rdm.ids is not None and list(ids) != list(rdm.ids) and set(ids) == set(rdm.ids):
        raise ComparisonError(f"{where}: ids= holds the images of the file in another order; give them in its order")
    name = (dissimilarity or rdm.dissimilarity) if kind == "distance" else dissimilarity
    if kind == "distance":
        try:
            require_distances(rdm.values, "the matrix", ComparisonError, named=bool(name))
        except ComparisonError as error:
            raise ComparisonError(f"{where}: {error}, as in read_rsms(..., kind='similarity')") from error
    try:
        return RSM.from_array(
            rdm.values, rdm.ids if ids is None else ids, kind=kind, dissimilarity=name, allow_missing=allow_missing
        )
    except ComparisonError as error:
        raise ComparisonError(f"{where}: {error}") from error


def _require_same_images(rsms: Mapping[str, RSM], places: Mapping[str, str]) -> None:
    """Refuse RSMs of different images, saying which.

    Raises:
        ComparisonError: an RSM has other images than the first one, or another order.
    """
    first, *others = rsms
    images = rsms[first].ids
    for other in others:
        if (theirs := rsms[other].ids) == images:
            continue
        shared = {*images} & {*theirs}
        lost, extra = ([image for image in side if image not in shared] for side in (images, theirs))
        what = "hold the same images in different orders"
        if lost or extra:
            sides = ((lost, "first"), (extra, "second"))
            only = [f"{listed(names, 3)} only in the {side}" for names, side in sides if names]
            what = f"hold different images, {' and '.join(only)}"
        raise ComparisonError(
            f"{places[first]} and {places[other]} {what}; on='intersection' takes the images that all hold, in the "
            "order of the first"
        )
