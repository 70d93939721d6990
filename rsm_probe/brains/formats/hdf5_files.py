"""HDF5: what `RDMs.save` of rsatoolbox writes, and plain datasets.

Read by h5py rather than by rsatoolbox, whose loader reads every group and link of a file, whatever size it declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.brains.formats.stored import (
    ReadOptions,
    StoredRdm,
    Variables,
    candidates,
    rdms_in,
    readable,
    require_room,
    stored,
    texts,
)
from rsm_probe.checks import listed
from rsm_probe.errors import ComparisonError, StorageError, did_you_mean

if TYPE_CHECKING:
    import h5py


def read_hdf5(file: Path, options: ReadOptions) -> list[StoredRdm]:
    """Read RDMs of rsatoolbox, or a dataset of RDMs.

    Raises:
        StorageError: the file is missing, torn or not HDF5, its values lie in other files, or h5py is missing.
        ComparisonError: unknown datasets or descriptors, several datasets that may be RDMs, or these are not RDMs.
    """
    h5py = import_h5py(file)
    with readable(file), h5py.File(file, "r") as root:
        items = items_of(root)
        if "dissimilarities" in items and "pattern_descriptors" in items and options.key is None:
            return _of_rsatoolbox(root, items, file, options)
        datasets = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}
        described = {name: f"{dataset.dtype} {dataset.shape}" for name, dataset in datasets.items()}
        shapes = {name: dataset.shape or () for name, dataset in datasets.items() if dataset.dtype.kind in "fiubc"}
        variables = Variables(described, candidates(shapes), lambda name: values_of(datasets[name], file))
        return rdms_in(variables, file, options)


def import_h5py(file: Path) -> ModuleType:
    """Import h5py.

    Raises:
        StorageError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise StorageError(f"{file} needs h5py: pip install 'rsm-probe[brains]'") from error
    return h5py


def items_of(root: h5py.File) -> dict[str, Any]:
    """All groups and datasets by path. Links are not followed, because they may lead to other files."""
    items: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        items[name] = item

    root.visititems(note)
    return items


def values_of(dataset: h5py.Dataset, file: Path) -> np.ndarray:
    """Read a dataset of numbers or texts.

    Raises:
        StorageError: its values lie in other files.
        ComparisonError: it holds neither numbers nor texts.
        CostError: they do not fit into memory.
    """
    from h5py import check_string_dtype

    where = f"{file}: {dataset.name}"
    if dataset.shape is None:
        return np.empty(0)
    if dataset.is_virtual or dataset.external:
        raise StorageError(f"the values of {where} lie in other files, which are not read; write them into one file")
    require_room(dataset.size, where)
    if check_string_dtype(dataset.dtype) is not None:
        return np.asarray(dataset.asstr(errors="backslashreplace")[()], dtype=object)
    if dataset.dtype.kind not in "fiubc":
        raise ComparisonError(f"{where} holds neither numbers nor texts, but {dataset.dtype}")
    return np.asarray(dataset[()])


def _of_rsatoolbox(root: h5py.File, items: Mapping[str, Any], file: Path, options: ReadOptions) -> list[StoredRdm]:
    """RDMs as rsatoolbox stores them: pairs, and a group of descriptors each for patterns and RDMs."""
    ids = options.ids or _image_names(items, options.descriptor, file)
    subjects = _descriptors(items, "rdm_descriptors")
    if options.subjects is not None and options.subjects not in subjects:
        raise ComparisonError(
            f"{file} has no RDM descriptor {options.subjects!r}, which names= asks for"
            f"{did_you_mean(options.subjects, subjects)} (there are {listed(subjects, 20) or 'none'})"
        )
    subject = options.subjects or (options.dimension if options.dimension in subjects else None)
    measure = root.attrs.get("dissimilarity_measure")
    return stored(
        values_of(items["dissimilarities"], file),
        str(file),
        names=None if subject is None else _names(subjects[subject], f"{file}: {subject}", file),
        ids=ids,
        dissimilarity=measure if isinstance(measure, str) else None,
    )


def _image_names(items: Mapping[str, Any], descriptor: str | None, file: Path) -> list[str] | None:
    patterns = _descriptors(items, "pattern_descriptors")
    known = [name for name in patterns if name != "index"]
    name = descriptor or "image"
    if name in patterns:
        return _names(patterns[name], f"{file}: {name}", file)
    # Do not invent names: they would agree with those of any other RSM, whatever the order of its images.
    if descriptor is not None or known:
        raise ComparisonError(
            f"{file} has no pattern descriptor {name!r} that names the images{did_you_mean(name, known)}; give "
            f"descriptor= (there are {listed(known, 20) or 'none'}), or the names as ids="
        )
    return None


def _descriptors(items: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Descriptors of patterns or RDMs by name: attributes, datasets, or one dataset per entry."""
    descriptors: dict[str, Any] = dict(items[group].attrs) if group in items else {}
    for path, item in items.items():
        folder, _, rest = path.partition("/")
        name, _, entry = rest.partition("/")
        if folder == group and entry.isdecimal():
            descriptors.setdefault(name, {})[int(entry)] = item
        elif folder == group and hasattr(item, "asstr"):
            descriptors[name] = item
    return descriptors


def _names(descriptor: Any, where: str, file: Path) -> list[str]:
    if isinstance(descriptor, dict):
        descriptor = [values_of(descriptor[number], file).item() for number in sorted(descriptor)]
    return texts(values_of(descriptor, file) if hasattr(descriptor, "asstr") else descriptor, where)
