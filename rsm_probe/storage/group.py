"""A Zarr group on disk: open or create it, lock it for one writer, and read and write its attributes.

The attributes carry a checksum (earlier versions wrote none), and their types are checked when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rsm_probe.checks import brief
from rsm_probe.errors import StorageError
from rsm_probe.storage.checksums import ARRAYS, ATTRIBUTE, require_signed, signed
from rsm_probe.storage.listing import Files, store_at, storing
from rsm_probe.storage.locks import sole_writer
from rsm_probe.storage.paths import is_url, path_or_url

if TYPE_CHECKING:
    import zarr

_Value = TypeVar("_Value")
# The file that holds the metadata of a group or an array.
METADATA = "zarr.json"
# Zarr's name for a file that is being written; files of the user never match it.
UNFINISHED = re.compile(r".*\.[0-9a-f]{32}\.partial")


class StoredGroup:
    """A Zarr group (format 3) and its attributes.

    Args:
        group: the open group.
        where: its path or URL, for error messages.

    Attributes:
        where: the path or URL.
        claimed: set it once the group holds data worth keeping after an error; see `writing`.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        self.group = group
        self.where = where
        self.claimed = False
        self.files = Files(where)

    @classmethod
    def open(cls, where: str | Path, kind: str, writable: bool = False) -> Self:
        """Open an existing group.

        Args:
            where: a path, or a URL of a file system that fsspec knows.
            kind: the kind of store it must be, such as "capture".
            writable: whether chunks will be written.

        Raises:
            StorageError: the group does not exist, cannot be read, is damaged (the message names the file), or is of
                another kind.
        """
        store = cls.existing(where, kind, writable)
        if store is None:
            raise StorageError(f"no {kind} at {where}: {where}/{METADATA} is missing")
        return store

    @classmethod
    def existing(cls, where: str | Path, kind: str, writable: bool = False) -> Self | None:
        """Open a group as `open` does, or return None if it does not exist."""
        import zarr

        where = path_or_url(where, f"the path of the {kind}")
        files = Files(where)
        if files.size(METADATA) is None:
            return None
        with storing(f"cannot open {where}/{METADATA}", _replace(where)):
            document = files.document(METADATA, _replace(where))
            require_signed(document, f"{where}/{METADATA}", _replace(where))
            stored = document.get("attributes", {}).get("kind")
            if stored != kind and (stored is not None or not writable or len(files.sizes()) > 1):
                but = f"found {brief(stored)}" if stored else f"and {where}/{METADATA} gives no kind"
                raise StorageError(
                    f"{where} must be a store of kind {kind!r}, {but}; choose another path, or remove {where}"
                )
            store = cls(zarr.open_group(store_at(where), mode="r+" if writable else "r", zarr_format=3), where)
        if stored is None:  # the process was killed before it wrote the kind
            store.set({"kind": kind})
        return store

    @classmethod
    def open_or_create(cls, where: str | Path, kind: str) -> Self:
        """Open a group for writing; create an empty one if it does not exist.

        Raises:
            StorageError: the group cannot be written, is damaged or of another kind, or the path holds something else.
        """
        if (store := cls.existing(where, kind, writable=True)) is not None:
            return store
        where = path_or_url(where, f"the path of the {kind}")
        path = Path(where)
        if not is_url(where) and path.exists():
            if not _is_empty(path):
                raise StorageError(
                    f"{where} holds something else ({where}/{METADATA} is missing); choose another path for the "
                    f"{kind} or, if it was one, remove {where}"
                )
            _remove_unfinished(path)
        import zarr

        with storing(f"cannot write {where}"):
            group = zarr.create_group(store_at(where), zarr_format=3, attributes=signed({"kind": kind}))
            return cls(group, where)

    @classmethod
    @contextmanager
    def writing(cls, where: str | Path, kind: str) -> Iterator[Self]:
        """Open a group as its only writer; create an empty one if it does not exist.

        If the block raises before `claimed` is set, a group that was created here is removed.

        Raises:
            StorageError: see `open_or_create` and `sole_writer`.
        """
        where = path_or_url(where, f"the path of the {kind}")
        with sole_writer(where):
            began = not is_url(where) and not Path(where).exists()
            files = Files(where)
            fresh = files.size(METADATA) is None
            store = cls.open_or_create(where, kind)
            if not is_url(where):
                _remove_unfinished(Path(where))
            try:
                yield store
            except BaseException:
                if fresh and not store.claimed:
                    files.clear()
                    if began:
                        with suppress(OSError):
                            Path(where).rmdir()
                raise

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes, unchecked; see `attribute`."""
        return {key: value for key, value in self.group.attrs.items() if key != ATTRIBUTE}

    def attribute(self, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """Read one attribute and check its type.

        Args:
            key: name of the attribute.
            kind: the type it must have.
            default: the value to use if the attribute is missing; None makes the attribute mandatory.

        Raises:
            StorageError: the attribute is missing or of another type; the message names the file.
        """
        value = self.group.attrs.get(key, default)
        # In Python, True is an int.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            was = "missing" if value is None else f"{brief(value)}, not of type {kind.__name__}"
            raise self.damaged(f"its attribute {key!r} is {was}")
        return value

    def damaged(self, problem: str) -> StorageError:
        """Make the error that reports damaged attributes."""
        return StorageError(f"{self.where}/{METADATA} is damaged: {problem}; {_replace(self.where)}")

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add or replace attributes in one step.

        Raises:
            StorageError: they cannot be written.
        """
        with storing(f"cannot write {self.where}"):
            self.group = self.group.update_attributes(signed({**self.attributes, **attributes}))

    def finish(self, attributes: Mapping[str, Any], arrays: Sequence[str]) -> None:
        """Mark the group as complete.

        Args:
            attributes: attributes to add or replace.
            arrays: names of all arrays; from now on, a missing one counts as damage.

        Raises:
            StorageError: the attributes cannot be written.
        """
        wanted = {**attributes, "finished": True, ARRAYS: sorted(arrays)}
        if any(self.attributes.get(key) != value for key, value in wanted.items()):
            self.set(wanted)

    @property
    def finished(self) -> bool:
        """Whether the group was marked as complete by `finish`.

        Raises:
            StorageError: the attribute is damaged.
        """
        return self.attribute("finished", bool, False)


def _replace(where: str) -> str:
    return f"restore that file, or remove {where} and rerun the same work"


def _is_empty(path: Path) -> bool:
    # What a killed process left of its first write does not count as content.
    return path.is_dir() and all(UNFINISHED.fullmatch(file.name) for file in path.iterdir())


def _remove_unfinished(path: Path) -> None:
    """Remove the partial files that killed writers left."""
    for file in path.rglob("*.partial"):
        if UNFINISHED.fullmatch(file.name):
            file.unlink(missing_ok=True)
