"""Files of pictures from which scenes are composed: listed, checked once, and cached in the size that scenes need."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from threading import Lock

from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.folders import as_text, unreadable
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES, read_rgb

# Bytes of pictures that all sets of this process share: sets over the same files decode them once.
_CACHED = 384 * 2**20
# Backgrounds are cached with a short side of this many edges of a scene, so that small crops of them stay sharp.
_BACKGROUND_EDGES = 2


class PictureCache:
    """Pictures by key, the least recently used dropped first, within a number of bytes; safe with threads.

    Args:
        most_bytes: bytes of all pictures; one that is larger by itself is not cached.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._pictures: OrderedDict[Hashable, Image.Image] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Image.Image]) -> Image.Image:
        """Return the picture of a key, made if it is not cached. Nobody may change it in place."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        picture = make()
        with self._lock:
            if key not in self._pictures and _bytes_of(picture) <= self._most:
                self._pictures[key] = picture
                self._bytes += _bytes_of(picture)
            while self._bytes > self._most:
                self._bytes -= _bytes_of(self._pictures.popitem(last=False)[1])
        return picture


def _bytes_of(picture: Image.Image) -> int:
    return picture.width * picture.height * len(picture.getbands())


CACHE = PictureCache(_CACHED)


@dataclass(frozen=True)
class PictureFile:
    """A file, and what tells whether it is still the one that was listed.

    Attributes:
        path: the file.
        name: its path relative to the folder that was listed, as text.
        stamp: its size in bytes and time of modification.
    """

    path: Path
    name: str
    stamp: tuple[int, int]


def picture_files(root: Path, option: str) -> list[PictureFile]:
    """List the image files of a folder at any depth, in the order of their names.

    Args:
        root: the folder.
        option: what names the folder, for messages.

    Raises:
        ImageError: there is no such folder, or it holds no image file.
    """
    if not isdir(root):
        raise ImageError(f"{option}: no folder at {root}" + (" (it is a file)" if exists(root) else ""))
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ImageError(
            f"{option}: no image files in {root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))} at any depth)"
        )
    stats = [(file, file.stat()) for file in files]
    return [
        PictureFile(file, as_text(file.relative_to(root).as_posix()), (stat.st_size, stat.st_mtime_ns))
        for file, stat in stats
    ]


def usable(
    files: Sequence[PictureFile], read: Callable[[PictureFile], Image.Image], option: str, strict: bool, progress: bool
) -> tuple[list[PictureFile], Mapping[str, str]]:
    """Read every file once, and leave out those that cannot serve.

    Args:
        files: the files, at least one.
        read: reads and caches the picture of a file.
        option: what names their folder, for messages.
        strict: raise an error if a file cannot serve, instead of leaving it out with a warning.
        progress: show a progress bar.

    Returns:
        The usable files, and name -> reason of all others.

    Raises:
        ImageError: none is usable, or (strict) one is not.
    """
    reasons = {file.name: reason for file, reason in unreadable(files, read, f"reading {option}", progress).items()}
    if not reasons:
        return list(files), {}
    first, reason = next(iter(reasons.items()))
    if strict or len(reasons) == len(files):
        raise ImageError(f"{option}: {len(reasons)} of {len(files)} files cannot be used, first {first}: {reason}")
    warnings.warn(
        f"{option}: skipped {len(reasons)} of {len(files)} files that cannot be used, first {first}: {reason}",
        stacklevel=4,  # above this function, those of each folder, and `composed`
    )
    return [file for file in files if file.name not in reasons], reasons


def read_background(file: PictureFile, size: int) -> Image.Image:
    """Read a background as RGB, reduced to a short side of twice the edge of a scene if it is larger."""

    def read() -> Image.Image:
        image = read_rgb(file.path)
        share = _BACKGROUND_EDGES * size / min(image.size)
        if share >= 1:
            return image
        return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)

    return CACHE.get(("background", file, size), read)
