"""Cut-outs: pictures of one object each, with transparency, in one folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from PIL import Image

from rsm_probe.checks import listed
from rsm_probe.errors import ImageError, did_you_mean
from rsm_probe.sources.images.objects.pictures import CACHE, PictureFile

# The class of files that no class folder holds.
_FLAT = "."


@dataclass(frozen=True)
class CutOut:
    """A cut-out and its class.

    Attributes:
        file: the picture.
        label: its class: the folder that holds it, relative to the folder of all cut-outs.
        largest: edge in pixels to which larger pictures are reduced when they are read.
    """

    file: PictureFile
    label: str
    largest: int

    def picture(self) -> Image.Image:
        """The object as RGBA, cut to its visible pixels (alpha above 0), with edges of at most `largest` pixels.

        Raises:
            ImageError: no pixel is transparent, or none is visible.
        """
        return CACHE.get(("cut-out", self.file, self.largest), self._read)

    def _read(self) -> Image.Image:
        with Image.open(self.file.path) as opened:
            alike = "it would be a rectangle; save it with an alpha channel (PNG, WebP), or leave it out"
            if not opened.has_transparency_data:
                raise ImageError(f"no transparency (mode {opened.mode}): {alike}")
            image = (opened.convert("LA") if opened.mode == "La" else opened).convert("RGBA")
        lowest, highest = image.getchannel("A").getextrema()
        if highest == 0:
            raise ImageError("every pixel is transparent")
        if lowest == 255:
            raise ImageError(f"no pixel is transparent: {alike}")
        image = image.crop(image.getchannel("A").getbbox())
        return image if max(image.size) <= self.largest else scaled(image, self.largest)

    def sized(self, edge: int) -> Image.Image:
        """The object as RGBA whose longer side has `edge` pixels."""
        return CACHE.get(("sized", self.file, self.largest, edge), lambda: scaled(self.picture(), edge))

    def visible(self, edge: int) -> np.ndarray:
        """Which pixels of `sized` are visible, alpha above 0, as bool of shape (height, width).

        Raises:
            ImageError: none is, because the object is too faint to be as small.
        """
        mask: np.ndarray = np.asarray(self.sized(edge).getchannel("A")) > 0
        if not mask.any():
            raise ImageError(
                f"cutouts: nothing of {self.file.name} is visible at {edge} pixels; raise scale:, or leave out its "
                f"class by exclude={self.label!r}"
            )
        return mask


def scaled(image: Image.Image, edge: int) -> Image.Image:
    """Scale a picture to a longer side of `edge` pixels; transparent pixels lend no colour to visible ones."""
    share = edge / max(image.size)
    # Pillow multiplies RGBA by its alpha before it interpolates.
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def classes_of(
    files: Sequence[PictureFile], root: Path, include: Sequence[str], exclude: Sequence[str]
) -> Mapping[str, list[PictureFile]]:
    """Sort the files of cut-outs by class.

    Args:
        files: all files of the folder.
        root: the folder, for messages.
        include: globs of the classes to take, where `*` stands for `/`, too; all if there is none.
        exclude: globs of the classes to leave out.

    Returns:
        Class -> files, in the order of names.

    Raises:
        ImageError: a glob fits no class, no class is left, or a file lies outside of class folders.
    """
    classes: dict[str, list[PictureFile]] = {}
    for file in files:
        classes.setdefault(file.name.rpartition("/")[0] or _FLAT, []).append(file)
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in classes):
                raise ImageError(
                    f"{option}: {glob!r} fits no class of {root}{did_you_mean(glob, classes)} "
                    f"(classes: {listed(sorted(classes))}); * stands for any characters"
                )
    taken = {
        name: classes[name]
        for name in sorted(classes)
        if (not include or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude)
    }
    if not taken:
        raise ImageError(f"include and exclude leave no class of {root} (classes: {listed(sorted(classes))})")
    if _FLAT in taken:
        name = taken[_FLAT][0].name
        raise ImageError(
            f"cutouts: {root / name} has no class, which is the folder that holds a cut-out; move it into one, such as "
            f"{root / 'cup' / name}, or leave such files out by exclude={_FLAT!r}"
        )
    return taken
