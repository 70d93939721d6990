"""Checksums by which damage is told from content: of metadata, of whole folders, of anything that is one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rsm_probe.errors import StorageError
from rsm_probe.storage.listing import Files

# Names every other file of a stored dataset with its SHA-256.
MANIFEST = "checksums.json"
# The attribute of a metadata document that holds the checksum of the rest.
ATTRIBUTE = "_checksum"
# The attribute of a finished group that names its arrays; whatever has it has a checksum, too.
ARRAYS = "arrays"


def checksum(parts: Iterable[str | bytes | memoryview]) -> str:
    """SHA-256 of texts and bytes in their order, and of where each ends.

    For files of other formats: the names, shapes, dtypes and values of what they hold, kept among their metadata.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = memoryview(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part).cast("B")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Adds the file that `require_manifest` checks a folder against; to be called once everything is there.

    Raises:
        OSError: it cannot be written.
    """
    files = Files(str(folder))
    sums = {name: checksum([files.read(name)]) for name in sorted(files.sizes())}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def require_manifest(files: Files, sizes: Mapping[str, int], advice: str) -> None:
    """Makes sure that a folder holds exactly what its manifest says, to the last bit.

    Raises:
        StorageError: names the first file that is missing, damaged or does not belong there.
    """
    sums = files.document(MANIFEST, advice)
    for name in sorted({*sums, *sizes} - {MANIFEST}):
        if name not in sizes:
            raise StorageError(f"{files.where}/{name} is missing; {advice}")
        if name not in sums:
            raise StorageError(f"{files.where}/{name} does not belong there; remove it, or {advice}")
        if checksum([files.read(name)]) != sums[name]:
            raise StorageError(f"{files.where}/{name} is damaged: its checksum differs from {MANIFEST}; {advice}")


def signed(attributes: Mapping[str, Any], rest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Attributes together with a checksum of them, and of the rest of their document.

    Args:
        attributes: to be stored as JSON.
        rest: what else the document holds and the checksum covers.
    """
    plain = {key: value for key, value in attributes.items() if key != ATTRIBUTE}
    return {**plain, ATTRIBUTE: _of_document(plain, rest or {})}


def require_signed(document: Mapping[str, Any], file: str, advice: str) -> bool:
    """Makes sure that the metadata of a group or an array are what was written.

    Returns:
        Whether there is a checksum; those of earlier versions of this package have none.

    Raises:
        StorageError: they are damaged.
    """
    if document.get("node_type") not in ("array", "group"):
        raise StorageError(f"{file} is damaged: it must say 'array' or 'group' as its node_type; {advice}")
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
    """What the checksum of a document covers beside its attributes: everything of an array, nothing of a group.

    The attributes of a group are replaced in one step, before Zarr has decided what else to write.
    """
    if document.get("node_type") == "group":
        return {}
    return {key: value for key, value in document.items() if key != "attributes"}


def _of_document(attributes: Mapping[str, Any], rest: Mapping[str, Any]) -> str:
    return checksum([json.dumps([attributes, rest], sort_keys=True)])
