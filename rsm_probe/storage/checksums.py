"""Checksums that detect damage: of metadata documents, of whole folders, and of the parts of a single file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rsm_probe.errors import StorageError
from rsm_probe.storage.listing import Files

# The file that lists the SHA-256 of every other file of a stored dataset.
MANIFEST = "checksums.json"
# The attribute of a metadata document that holds the checksum of the rest of the document.
ATTRIBUTE = "_checksum"
# The attribute of a finished group that names its arrays. A group that has it also has a checksum.
ARRAYS = "arrays"


def checksum(parts: Iterable[str | bytes | memoryview]) -> str:
    """Hash texts and bytes in order, including where each one ends (SHA-256).

    Files of any format can keep it among their metadata, taken over the names, shapes, dtypes and values they hold.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = memoryview(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part).cast("B")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the manifest that `require_manifest` checks a folder against. Call it when the folder is complete.

    Raises:
        OSError: the file cannot be written.
    """
    files = Files(str(folder))
    sums = {name: checksum([files.read(name)]) for name in sorted(files.sizes())}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def require_manifest(files: Files, sizes: Mapping[str, int], advice: str) -> None:
    """Check that a folder holds exactly the files that its manifest lists, bit for bit.

    Raises:
        StorageError: a file is missing, damaged or not listed; the message names the first.
    """
    sums = files.document(MANIFEST, advice)
    for name in sorted({*sums, *sizes} - {MANIFEST}):
        if name not in sizes:
            raise StorageError(f"{files.where}/{name} is missing; {advice}")
        if name not in sums:
            raise StorageError(f"{files.where}/{name} is not listed in {MANIFEST}; remove it, or {advice}")
        if checksum([files.read(name)]) != sums[name]:
            raise StorageError(f"{files.where}/{name} is damaged: its checksum differs from {MANIFEST}; {advice}")


def signed(attributes: Mapping[str, Any], rest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Add a checksum to attributes.

    Args:
        attributes: values that JSON can store.
        rest: the other entries of the document that the checksum covers; see `covered`.
    """
    plain = {key: value for key, value in attributes.items() if key != ATTRIBUTE}
    return {**plain, ATTRIBUTE: _of_document(plain, rest or {})}


def require_signed(document: Mapping[str, Any], file: str, advice: str) -> bool:
    """Check the metadata of a group or an array against their checksum.

    Returns:
        Whether there is a checksum. Earlier versions of this package wrote none.

    Raises:
        StorageError: the metadata are damaged.
    """
    if document.get("node_type") not in ("array", "group"):
        raise StorageError(f"{file} is damaged: its node_type must be 'array' or 'group'; {advice}")
    attributes = document.get("attributes", {})
    if not isinstance(attributes, dict):
        raise StorageError(f"{file} is damaged: its attributes must be a JSON object; {advice}")
    if ATTRIBUTE not in attributes:
        if ARRAYS in attributes:
            raise StorageError(f"{file} is damaged: its checksum is missing; {advice}")
        return False
    plain = {key: value for key, value in attributes.items() if key != ATTRIBUTE}
    if attributes[ATTRIBUTE] != _of_document(plain, covered(document)):
        raise StorageError(f"{file} is damaged: its checksum differs; {advice}")
    return True


def covered(document: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a checksum covers besides the attributes: all others for an array, none for a group.

    The attributes of a group are replaced in one step, before Zarr decides what else to write.
    """
    if document.get("node_type") == "group":
        return {}
    return {key: value for key, value in document.items() if key != "attributes"}


def _of_document(attributes: Mapping[str, Any], rest: Mapping[str, Any]) -> str:
    return checksum([json.dumps([attributes, rest], sort_keys=True)])
