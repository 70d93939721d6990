"""Folders and lists of image files, and of arrays and volumes."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.clips import Clip, clip_files, require_clips, sampled, video_advice
from rsm_probe.sources.images.contents.dataset_items import is_pixels
from rsm_probe.sources.images.image_set import UNREADABLE, ImageSet, digest
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES, image_of_array, read_rgb

File = TypeVar("File")
_ARRAYS = (".npy", ".nii", ".nii.gz")


def folder(path: str | Path, strict: bool = False, verify: bool = True, progress: bool = False) -> ImageSet:
    """Read the image files in a folder, at any depth, as RGB; the label of an image is the folder that holds it.

    A folder without image files may hold arrays instead: NIfTI volumes, and NumPy's `.npy`; see `read_array`.

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
    files = _image_files(root)
    if not files:
        looked = ", ".join([*sorted(IMAGE_SUFFIXES), *_ARRAYS])
        raise ImageError(f"no image files in {root} (looked for {looked} at any depth){video_advice(root)}")
    problems = unreadable(files, _read, "checking images", progress) if verify else {}
    good = [file for file in files if file not in problems]
    if problems and (strict or not good):
        file, reason = next(iter(problems.items()))
        raise ImageError(f"{len(problems)} of {len(files)} images in {root} cannot be read, first {file}: {reason}")
    skipped = {as_text(file.relative_to(root).as_posix()): reason for file, reason in problems.items()}
    if skipped:
        names = ", ".join(list(skipped)[:5]) + (", ..." if len(skipped) > 5 else "")
        first = next(iter(skipped.values()))
        warnings.warn(
            f"skipped {len(skipped)} of {len(files)} image files that cannot be read: {names} (the first: {first})",
            stacklevel=2,
        )
    return _images_in(root, as_text(root.name or str(root)), tuple(skipped.items()))


def _images_in(path: str | Path, name: str, broken: tuple[tuple[str, str], ...]) -> ImageSet:
    """The images of a folder whose broken files are known; none is decoded.

    Args:
        path: the folder.
        name: the name of the set.
        broken: the ids of broken files, and what is wrong with each.
    """
    root, skipped = Path(path), dict(broken)
    files = {as_text(file.relative_to(root).as_posix()): file for file in _image_files(root)}
    ids = [text for text in files if text not in skipped]
    good = [files[text] for text in ids]
    return ImageSet(
        name=name,
        ids=ids,
        load=lambda index: _read(good[index]),
        labels=[text.rpartition("/")[0] for text in ids],
        skipped=skipped,
        content=lambda: digest(file.read_bytes() for file in good),
    ).made_by(_images_in, path=absolute_path(root), name=name, broken=broken)


def folder_of_clips(
    path: str | Path,
    clips: int,
    axes: str | None = None,
    strict: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> ImageSet:
    """Read folders of frames as clips; the label of a clip is the folder that holds its folder, at any depth.

    Names are sorted as people count, so that frame2 comes before frame10, and `clips` evenly spaced frames of each clip
    are used, the first and last among them. All frames pass the same preprocessing.

    Args:
        path: the folder that holds the folders of clips.
        clips: number of frames per clip.
        axes: the order in which models take a batch of clips, "NCTHW" or "NTCHW"; by default that of their library.
        strict: raise an error if a frame is broken, instead of leaving out its clip.
        verify: read every frame that is used once now; see `folder`.
        progress: show a progress bar while reading.

    Raises:
        ImageError: the folder is missing or holds no clips, a clip has too few frames (the message names it), or
            (strict) a frame is broken.
    """
    root, axes = Path(path), require_clips(clips, axes)
    if not isdir(root):
        raise ImageError(f"no folder of clips at {root}" + (" (it is a file)" if exists(root) else ""))
    used = {as_text(name): sampled(files, clips, name) for name, files in clip_files(root).items()}
    every = [file for files in used.values() for file in files]
    broken = unreadable(every, _read, "checking images", progress) if verify else {}
    problems = {
        name: f"{file.name}: {broken[file]}" for name, files in used.items() for file in files[::-1] if file in broken
    }
    if problems and (strict or len(problems) == len(used)):
        name, reason = next(iter(problems.items()))
        raise ImageError(f"{len(problems)} of {len(used)} clips in {root} cannot be read, first {name}: {reason}")
    if problems:
        warnings.warn(
            f"skipped {len(problems)} of {len(used)} clips with frames that cannot be read, first "
            f"{next(iter(problems))} ({next(iter(problems.values()))})",
            stacklevel=2,
        )
    return _clips_in(root, as_text(root.name or str(root)), clips, axes, tuple(problems.items()))


def _clips_in(
    path: str | Path, name: str, clips: int, axes: str | None, broken: tuple[tuple[str, str], ...]
) -> ImageSet:
    """The clips of a folder whose broken clips are known; no frame is decoded. See `_images_in`."""
    problems = dict(broken)
    used = {as_text(clip): files for clip, files in clip_files(Path(path)).items()}
    good = {clip: sampled(files, clips, clip) for clip, files in used.items() if clip not in problems}
    frames = list(good.values())
    return ImageSet(
        name=name,
        ids=list(good),
        load=lambda index: Clip([read_rgb(file) for file in frames[index]], axes),
        labels=[clip.rpartition("/")[0] for clip in good],
        skipped=problems,
        content=lambda: f"clips={clips} {digest(file.read_bytes() for files in frames for file in files)}",
        extract=lambda clip: clip,
    ).made_by(_clips_in, path=absolute_path(path), name=name, clips=clips, axes=axes, broken=broken)


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
    return _files(tuple(map(str, files)), tuple(as_text(str(path)) for path in paths))


def _files(paths: tuple[str, ...], ids: tuple[str, ...]) -> ImageSet:
    files = [Path(path) for path in paths]
    return ImageSet(
        "files",
        ids,
        lambda index: _read(files[index]),
        content=lambda: digest(file.read_bytes() for file in files),
    ).made_by(_files, paths=tuple(map(absolute_path, paths)), ids=ids)


def read_labels(file: str | Path) -> dict[str, str]:
    """Read labels from a text file with a line `id,label` for each image; ids with commas are quoted.

    Raises:
        ImageError: the file cannot be read, a line has another number of columns, or an id occurs twice.
    """
    labels: dict[str, str] = {}
    try:
        with Path(file).open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.reader(stream), 1):
                if len(row) not in (0, 2):
                    raise ImageError(f"{file}, line {number}: expected id,label, found {len(row)} columns: {row}")
                if row and row[0] in labels:
                    raise ImageError(f"{file}, line {number}: image {row[0]!r} has a label already")
                if row:
                    labels[row[0]] = row[1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"cannot read the labels {file}: {error}") from error
    return labels


def read_array(file: Path) -> Image.Image | Tensor:
    """Read an array that is ready for the models, with its values as stored.

    A NIfTI volume (X, Y, Z) becomes a tensor (1, X, Y, Z), in the order of its file, without resampling. An array of
    NumPy has its channels first, (C, H, W) or (C, D, H, W), or is a picture of bytes; see `image_of_array`.

    Args:
        file: `.nii`, `.nii.gz` or `.npy`.

    Raises:
        ImageError: the volume has other axes, the array holds no image, or nibabel is missing.
    """
    if file.suffix.lower() == ".npy":
        array = np.load(file, allow_pickle=False)
        if not is_pixels(array):
            raise ImageError(
                f"{file.name} holds an array of shape {array.shape} and dtype {array.dtype}; save images as floats "
                f"(C, H, W), clips and volumes as (C, D, H, W), pictures as bytes (H, W, 3)"
            )
        return image_of_array(array)
    try:
        from nibabel import load
        from nibabel.filebasedimages import ImageFileError
    except ImportError as error:
        raise ImageError(f"{file} needs nibabel: pip install 'rsm-probe[volumes]'") from error
    try:
        volume = np.asarray(load(file).get_fdata(dtype=np.float32))
    except ImageFileError as error:
        raise ImageError(f"not a readable NIfTI volume: {error}") from error
    if volume.ndim != 3:
        raise ImageError(
            f"{file.name} has axes of {volume.shape}; volumes have three. Save one volume per file, or give "
            f"rsm_probe.sources.ImageSet(name, ids, load), where load returns a tensor (C, X, Y, Z)"
        )
    return torch.from_numpy(np.ascontiguousarray(volume))[None]


def _image_files(root: Path) -> list[Path]:
    """The image files of a folder at any depth, or its arrays if there are none."""
    listed = sorted(f for f in root.rglob("*") if f.is_file())
    return [f for f in listed if f.suffix.lower() in IMAGE_SUFFIXES] or list(filter(_is_array, listed))


def _is_array(file: Path) -> bool:
    return file.name.lower().endswith(_ARRAYS)


def _read(file: Path) -> Image.Image | Tensor:
    return read_array(file) if _is_array(file) else read_rgb(file)


def as_text(name: str) -> str:
    """Turn a file name, which may hold any bytes on Linux, into text that can be printed and stored."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unreadable(files: Sequence[File], read: Callable[[File], object], title: str, progress: bool) -> dict[File, str]:
    """Read every file once; file -> why it cannot be read.

    Args:
        files: the files.
        read: reads one of them.
        title: title of the progress bar.
        progress: whether to show it.
    """

    def problem(file: File) -> str | None:
        try:
            read(file)
        except UnidentifiedImageError:
            return "not in a readable image format"
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return None

    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(problem, files), title, len(files), disable=not progress, leave=False)
        return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}
