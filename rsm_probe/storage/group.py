"""A Zarr group as a whole: found or begun, written by one process at a time, and what is known of it.

Its attributes carry a checksum (those of earlier versions have none), and are read with the type that they must have.
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
# The file that holds the metadata of a group, and of an array.
METADATA = "zarr.json"
# How Zarr calls a file that is being written; of other people's files none is called so.
UNFINISHED = re.compile(r".*\.[0-9a-f]{32}\.partial")


class StoredGroup:
    """A Zarr group (format 3) and its attributes.

    Args:
        group: the open group.
        where: its path or URL, for messages.

    Attributes:
        where: as given.
        claimed: whether something was written that is worth keeping; see `writing`.
    """

    def __init__(self, group: zarr.Group, where: str) -> None:
        self.group = group
        self.where = where
        self.claimed = False
        self.files = Files(where)

    @classmethod
    def open(cls, where: str | Path, kind: str, writable: bool = False) -> Self:
        """Opens a group that is there.

        Args:
            where: path, or URL of a file system that fsspec knows.
            kind: what it must be a store of.
            writable: whether chunks will be written.

        Raises:
            StorageError: there is none, it cannot be read, it is damaged (the message names the file), or it is of
                another kind.
        """
        store = cls.existing(where, kind, writable)
        if store is None:
            raise StorageError(f"no {kind} at {where}: {where}/{METADATA} is missing")
        return store

    @classmethod
    def existing(cls, where: str | Path, kind: str, writable: bool = False) -> Self | None:
        """As `open`; None where there is none."""
        import zarr

        where = path_or_url(where, f"the place of {kind}")
        files = Files(where)
        if files.size(METADATA) is None:
            return None
        with storing(f"cannot open {where}/{METADATA}", _replace(where)):
            document = files.document(METADATA, _replace(where))
            require_signed(document, f"{where}/{METADATA}", _replace(where))
            stored = document.get("attributes", {}).get("kind")
            if stored != kind and (stored is not None or not writable or len(files.sizes()) > 1):
                but = f" but a {brief(stored)}" if stored else f" ({where}/{METADATA} does not say what it is)"
                raise StorageError(f"{where} is no {kind}{but}; choose another place, or remove {where}")
            store = cls(zarr.open_group(store_at(where), mode="r+" if writable else "r"), where)
        if stored is None:  # killed before it knew what it was
            store.set({"kind": kind})
        return store

    @classmethod
    def open_or_create(cls, where: str | Path, kind: str) -> Self:
        """Opens a group for writing; where there is none, it begins empty.

        Raises:
            StorageError: it cannot be written, is damaged or of another kind, or another kind of thing is in its place.
        """
        if (store := cls.existing(where, kind, writable=True)) is not None:
            return store
        where = path_or_url(where, f"the place of {kind}")
        path = Path(where)
        if not is_url(where) and path.exists():
            if not _is_empty(path):
                raise StorageError(
                    f"{where} holds something else ({where}/{METADATA} is missing); choose another place for the "
                    f"{kind}, or, if it was one, remove {where}"
                )
            _remove_unfinished(path)
        import zarr

        with storing(f"cannot write {where}"):
            group = zarr.create_group(store_at(where), zarr_format=3, attributes=signed({"kind": kind}))
            return cls(group, where)

    @classmethod
    @contextmanager
    def writing(cls, where: str | Path, kind: str) -> Iterator[Self]:
        """Opens a group as its only writer; where there is none, it begins empty.

        Nothing is left of a group that began here and ends in an error before it was `claimed`.

        Raises:
            StorageError: as `open_or_create` and `sole_writer`.
        """
        where = path_or_url(where, f"the place of {kind}")
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
        """The attributes as they were stored; see `attribute`."""
        return {key: value for key, value in self.group.attrs.items() if key != ATTRIBUTE}

    def attribute(self, key: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """One of the attributes.

        Args:
            key: its name.
            kind: its type.
            default: what stands for one that is not there; None where it must be.

        Raises:
            StorageError: it is missing or of another type; the message names the file.
        """
        value = self.group.attrs.get(key, default)
        # JSON has one kind of number, and Python takes True for 1.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            was = "missing" if value is None else f"{brief(value)}, not of type {kind.__name__}"
            raise self.damaged(f"its attribute {key!r} is {was}")
        return value

    def damaged(self, problem: str) -> StorageError:
        """The error that says what is wrong with the attributes."""
        return StorageError(f"{self.where}/{METADATA} is damaged: {problem}; {_replace(self.where)}")

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Adds or replaces attributes, in one step.

        Raises:
            StorageError: they cannot be written.
        """
        with storing(f"cannot write {self.where}"):
            self.group = self.group.update_attributes(signed({**self.attributes, **attributes}))

    def finish(self, attributes: Mapping[str, Any], arrays: Sequence[str]) -> None:
        """Says that everything is there.

        Args:
            attributes: to add or replace.
            arrays: those that there are; from now on a missing one is damage.

        Raises:
            StorageError: it cannot be written.
        """
        wanted = {**attributes, "finished": True, ARRAYS: sorted(arrays)}
        if any(self.attributes.get(key) != value for key, value in wanted.items()):
            self.set(wanted)

    @property
    def finished(self) -> bool:
        """Whether `finish` was reached.

        Raises:
            StorageError: the attribute is damaged.
        """
        return self.attribute("finished", bool, False)


def _replace(where: str) -> str:
    return f"restore that file, or remove {where} and run the same work again"


def _is_empty(path: Path) -> bool:
    # The rest of a first write that was killed does not count as content.
    return path.is_dir() and all(UNFINISHED.fullmatch(file.name) for file in path.iterdir())


def _remove_unfinished(path: Path) -> None:
    """Removes what writers that were killed left of single files."""
    for file in path.rglob("*.partial"):
        if UNFINISHED.fullmatch(file.name):
            file.unlink(missing_ok=True)
