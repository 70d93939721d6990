"""Folders of image files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import exists, isdir, isfile
from pathlib import Path

from PIL import UnidentifiedImageError
from tqdm import tqdm

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import UNREADABLE, ImageSet, digest
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES, read_rgb


def folder(path: str | Path, strict: bool = False, verify: bool = True, progress: bool = False) -> ImageSet:
    """Read the image files in a folder, at any depth, as RGB; the label of an image is the folder that holds it.

    16-bit grey images are scaled to 8 bits; see `to_rgb`. As in torchvision's `ImageFolder`, transparency is dropped,
    only the first frame is read, and EXIF orientation is ignored. In ids, bytes of file names that are not UTF-8 are
    written as `\\xe9`.

    Args:
        path: the folder.
        strict: raise an error if a file is broken, instead of listing it in `skipped`.
        verify: read every file once now, so that broken ones are left out. Otherwise, a broken file raises an error
            when it is loaded.
        progress: show a progress bar while reading.

    Raises:
        ImageError: the folder is missing, contains no readable image, or (strict) holds a broken one.
    """
    root = Path(path)
    if not isdir(root):
        raise ImageError(f"no image folder at {root}" + (" (it is a file)" if exists(root) else ""))
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ImageError(f"no image files in {root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))} at any depth)")
    problems = _broken_files(files, progress) if verify else {}
    good = [file for file in files if file not in problems]
    if problems and (strict or not good):
        file, reason = next(iter(problems.items()))
        raise ImageError(f"{len(problems)} of {len(files)} images in {root} cannot be read, first {file}: {reason}")
    ids = [_as_text(file.relative_to(root).as_posix()) for file in good]
    skipped = {_as_text(file.relative_to(root).as_posix()): reason for file, reason in problems.items()}
    if skipped:
        names = ", ".join(list(skipped)[:5]) + (", ..." if len(skipped) > 5 else "")
        first = next(iter(skipped.values()))
        warnings.warn(
            f"skipped {len(skipped)} of {len(files)} image files that cannot be read: {names} (the first: {first})",
            stacklevel=2,
        )
    return ImageSet(
        name=_as_text(root.name or str(root)),
        ids=ids,
        load=lambda index: read_rgb(good[index]),
        labels=[name.rpartition("/")[0] for name in ids],
        skipped=skipped,
        content=lambda: digest(file.read_bytes() for file in good),
    )


def from_paths(paths: Sequence[str | Path]) -> ImageSet:
    """Read image files by their paths, in the given order, as RGB; the id of an image is its path as given.

    Args:
        paths: the files.

    Raises:
        ImageError: there is no path, one occurs twice, or a file is missing. A broken file raises it when it is loaded.
    """
    files = [Path(path).expanduser() for path in paths]
    if (absent := next((file for file in files if not isfile(file)), None)) is not None:
        where = "" if absent.is_absolute() else f" (the current folder is {Path.cwd()})"
        raise ImageError(f"no image file at {absent}{where}")
    return ImageSet(
        "files",
        [_as_text(str(path)) for path in paths],
        lambda index: read_rgb(files[index]),
        content=lambda: digest(file.read_bytes() for file in files),
    )


def _as_text(name: str) -> str:
    """Turn a file name, which may hold any bytes on Linux, into text that can be printed and stored."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _broken_files(files: Sequence[Path], progress: bool) -> dict[Path, str]:
    def problem(file: Path) -> str | None:
        try:
            read_rgb(file)
        except UnidentifiedImageError:
            return "not in a readable image format"
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return None

    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(problem, files), "checking images", len(files), disable=not progress, leave=False)
        return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}
