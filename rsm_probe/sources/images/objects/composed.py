"""Scenes composed of cut-outs on backgrounds, with the class and box of every object.

Images are drawn when they are loaded. They depend only on the files, the options and the index of the image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from rsm_probe.checks import brief, listed, require_whole
from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.image_set import ImageSet, digest
from rsm_probe.sources.images.limits import require_drawn
from rsm_probe.sources.images.objects.cut_outs import CutOut, classes_of
from rsm_probe.sources.images.objects.layouts import Draw, LayoutOptions, Placed, both_ends, laid_out, objects_of
from rsm_probe.sources.images.objects.pictures import PictureFile, picture_files, read_background, usable
from rsm_probe.sources.images.origins import absolute_path

_BACKGROUNDS = ("random", "shared", "grey")
# Every fifth file is held out for testing.
_HELD_OUT = 5
_GREY = (128, 128, 128)
# Smallest crop of a background, as a share of its short side.
_SMALLEST_CROP = 0.5
# A fragment shows half of the height and width of an object, at least this share of it visible pixels.
_FRAGMENT_VISIBLE = 0.25


def composed(
    cutouts: str | Path,
    backgrounds: str | Path | None = None,
    *,
    split: str = "all",
    size: int = 224,
    count: int = 1000,
    seed: int = 0,
    frames: int = 1,
    objects: int | Sequence[int] = (3, 6),
    classes: int | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    scale: float | Sequence[float] = (0.2, 0.4),
    overlap: float = 0.1,
    jitter: float = 1.0,
    margin: float = 0.0625,
    background: str = "random",
    clutter: int = 0,
    strict: bool = False,
    progress: bool = False,
) -> ImageSet:
    """Compose scenes of cut-out objects at random positions and scales on random crops of backgrounds.

    Each annotation holds `counts` (class -> number of objects), `boxes` (class, left, top, right, bottom of the pixels
    with alpha above 0, whether or not a later object hides some of them) and `scene`, which is the same for all frames
    of a scene. The label is the class with the most objects and, among equals, the one with the most visible pixels.

    Each option has random numbers of its own: changing one leaves what the others draw as it was, as far as it fits.

    Args:
        cutouts: a folder of class folders, nested or not, with one object per file and transparency around it (PNG,
            WebP, ...). The class is the path of the folder, such as "animals/birds".
        backgrounds: a folder of pictures, at any depth; not needed with `background="grey"`.
        split: "train" (four fifths of the cut-outs of each class, and of the backgrounds), "test" (the rest) or "all".
            A class with a single cut-out is in neither "train" nor "test".
        size: edge of the images in pixels.
        count: number of images.
        seed: seed of the images; image k of a seed does not depend on `count`.
        frames: number of successive images that show the same objects and background, like frames of a video of one
            place: at other positions and scales, in other crops of the background, among other fragments.
        objects: number of objects per image, or its smallest and largest value.
        classes: use only this many classes, those with the most cut-outs; by default all.
        include: globs of the classes to use, such as "animals/*", where `*` stands for `/`, too; by default all.
        exclude: globs of the classes to leave out, such as "*cartoon*".
        scale: longer side of an object as a share of `size`, or its smallest and largest value. An object that does not
            fit beside the others is drawn smaller, within this range.
        overlap: largest share of the smaller of two boxes that the other covers, and of the visible pixels of an object
            that all later objects hide; 0 to 1.
        jitter: 0 places objects at the points of a regular grid, the same for equal objects in all images, 1 anywhere;
            between them, they are shifted from the grid by this share.
        margin: share of `size` at each edge that objects leave free; the default is what a crop to 7/8 cuts away.
        background: "random" backgrounds, one that is "shared" by all images, in the same crop, or plain "grey".
        clutter: number of fragments of cut-outs beneath the objects, which are not counted.
        strict: raise an error for a file that cannot be used (unreadable, without transparency or without a visible
            pixel), instead of listing it in `skipped`.
        progress: show a progress bar while files are read.

    Raises:
        ImageError: an option is out of range, a folder is missing or holds no usable file, a cut-out is not in a class
            folder, a glob fits no class, or objects do not fit; the message names the option or the file.
    """
    require_drawn(count)
    layout = LayoutOptions(
        size=size, seed=seed, frames=frames, objects=both_ends(objects, "objects"), scale=both_ends(scale, "scale"),
        overlap=overlap, jitter=jitter, margin=margin, clutter=clutter,
    )  # fmt: skip
    look_up(background, dict.fromkeys(_BACKGROUNDS), "background", ImageError)
    selected = _globs(include, "include"), _globs(exclude, "exclude")
    cut_outs, skipped = _cut_outs(Path(cutouts).expanduser(), split, size, classes, selected, strict, progress)
    pictures: list[PictureFile] = []
    if background != "grey":
        if backgrounds is None:
            raise ImageError("backgrounds: name a folder of pictures, or give background='grey'")
        pictures, broken = _backgrounds(Path(backgrounds).expanduser(), split, size, strict, progress)
        skipped |= broken
    scenes = _Scenes(layout, cut_outs, pictures, background)
    placed = [scenes.lay_out(number) for number in range(count)]
    return ImageSet(
        "composed",
        [f"composed-{seed}-{k:05d}" for k in range(count)],
        lambda index: scenes.draw(index, placed[index]),
        labels=[scenes.main_class(of_image) for of_image in placed],
        annotations=[scenes.annotation(number, of_image) for number, of_image in enumerate(placed)],
        skipped=skipped,
        sizes=[(size, size)] * count,
        content=scenes.content,
    ).made_by(
        composed, cutouts=absolute_path(Path(cutouts).expanduser()),
        backgrounds=absolute_path(Path(backgrounds).expanduser()) if pictures and backgrounds is not None else None,
        split=split, size=size, count=count, seed=seed, frames=frames, objects=layout.objects, classes=classes,
        include=selected[0], exclude=selected[1], scale=layout.scale, overlap=overlap, jitter=jitter, margin=margin,
        background=background, clutter=clutter,
    )  # fmt: skip


def _globs(globs: str | Sequence[str], name: str) -> tuple[str, ...]:
    several = (globs,) if isinstance(globs, str) else tuple(globs)
    if not all(isinstance(glob, str) and glob for glob in several):
        raise ImageError(f"{name} must hold globs of classes, such as 'animals/*', found {brief(globs)}")
    return several


def _cut_outs(
    root: Path,
    split: str,
    size: int,
    classes: int | None,
    selected: tuple[Sequence[str], Sequence[str]],
    strict: bool,
    progress: bool,
) -> tuple[list[CutOut], dict[str, str]]:
    """The cut-outs of a split, in the order of their classes, and the files that cannot be used."""
    if classes is not None:
        require_whole(classes, "classes", 1, ImageError)
    by_class = classes_of(picture_files(root, "cutouts"), root, *selected)
    label_of = {file: label for label, files in by_class.items() for file in files}
    good, reasons = usable(
        list(label_of), lambda file: CutOut(file, label_of[file], size).picture(), "cutouts", strict, progress
    )
    left: dict[str, list[PictureFile]] = {}
    for file in good:
        left.setdefault(label_of[file], []).append(file)
    if split != "all":
        left = {label: files for label, files in left.items() if len(files) > 1}
        if not left:
            raise ImageError(f"cutouts: no class of {root} has two cut-outs, to divide into train and test")
    if classes is not None:
        if len(left) < classes:
            raise ImageError(f"classes: {classes} are more than the {len(left)} of {root} ({listed(left)})")
        left = dict(sorted(sorted(left.items(), key=lambda item: -len(item[1]))[:classes]))
    cut_outs = [CutOut(file, label, size) for label, files in left.items() for file in _of_split(files, split)]
    return cut_outs, {f"cutouts/{name}": reason for name, reason in reasons.items()}


def _backgrounds(
    root: Path, split: str, size: int, strict: bool, progress: bool
) -> tuple[list[PictureFile], dict[str, str]]:
    """The backgrounds of a split, and the files that cannot be used."""
    files = picture_files(root, "backgrounds")
    good, reasons = usable(files, lambda file: read_background(file, size), "backgrounds", strict, progress)
    if split != "all" and len(good) < 2:
        raise ImageError(f"backgrounds: {root} has one background, which cannot be divided into train and test")
    return _of_split(good, split), {f"backgrounds/{name}": reason for name, reason in reasons.items()}


def _of_split(files: Sequence[PictureFile], split: str) -> list[PictureFile]:
    """Every fifth file from the first on for testing; "all" keeps the order."""
    held_out = list(files[::_HELD_OUT])
    rest = [file for number, file in enumerate(files) if number % _HELD_OUT]
    return look_up(split, {"all": list(files), "train": rest, "test": held_out}, "split", ImageError)


class _Scenes:
    """Lays out and draws the images of a set.

    Args:
        options: how scenes are composed.
        cut_outs: all cut-outs, class by class.
        backgrounds: all backgrounds; none for grey ones.
        background: see `composed`.
    """

    def __init__(
        self, options: LayoutOptions, cut_outs: Sequence[CutOut], backgrounds: Sequence[PictureFile], background: str
    ) -> None:
        self._options, self._cut_outs, self._backgrounds = options, cut_outs, backgrounds
        self._background = background
        numbers: dict[str, list[int]] = {}
        for number, cut_out in enumerate(cut_outs):
            numbers.setdefault(cut_out.label, []).append(number)
        self._classes = list(numbers.values())

    def lay_out(self, image: int) -> list[Placed]:
        """See `laid_out`."""
        shown = objects_of(self._options, image // self._options.frames, self._classes)
        return laid_out(self._options, image, shown, self._cut_outs)

    def main_class(self, placed: Sequence[Placed]) -> str:
        """The class with the most objects and, among equals, the most visible pixels, or else the first by name."""
        counts, areas = Counter[str](), Counter[str]()
        for item in placed:
            label = self._cut_outs[item.number].label
            counts[label] += 1
            areas[label] += item.area
        return min(counts, key=lambda label: (-counts[label], -areas[label], label))

    def annotation(self, image: int, placed: Sequence[Placed]) -> dict[str, Any]:
        """The class counts, boxes and scene of an image."""
        labels = [self._cut_outs[item.number].label for item in placed]
        return {
            "counts": dict(sorted(Counter(labels).items())),
            "boxes": [[label, *item.box] for label, item in zip(labels, placed, strict=True)],
            "scene": str(image // self._options.frames),
        }

    def draw(self, image: int, placed: Sequence[Placed]) -> Image.Image:
        """Draw the background of an image, then its fragments, then its objects in their order."""
        canvas = self._cropped_background(image)
        shares = self._options.draws(Draw.FRAGMENTS, image).random((self._options.clutter, 7))
        for numbers in shares:
            self._draw_fragment(canvas, *map(float, numbers))
        for item in placed:
            picture = self._cut_outs[item.number].sized(item.edge)
            canvas.paste(picture, (item.left, item.top), picture)
        return canvas

    def _cropped_background(self, image: int) -> Image.Image:
        size = self._options.size
        if not self._backgrounds:
            return Image.new("RGB", (size, size), _GREY)
        if self._background == "shared":
            which, *crop = self._options.draws(Draw.SHARED_BACKGROUND, 0).random(4)
        else:
            which = self._options.draws(Draw.BACKGROUND, image // self._options.frames).random()
            crop = list(self._options.draws(Draw.CROP, image).random(3))
        picture = read_background(self._backgrounds[int(which * len(self._backgrounds))], size)
        edge = min(picture.size) * (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * crop[0])
        left, top = crop[1] * (picture.width - edge), crop[2] * (picture.height - edge)
        return picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))

    def _draw_fragment(self, canvas: Image.Image, kind: float, which: float, scale: float, *corners: float) -> None:
        """Draw half of the height and width of a cut-out.

        Args:
            canvas: what to draw on.
            kind: which class, in [0, 1) like all others.
            which: which cut-out of the class.
            scale: size of the whole cut-out.
            corners: where the fragment begins in the cut-out, x and y, and in the image, x and y.
        """
        numbers = self._classes[int(kind * len(self._classes))]
        cut_out = self._cut_outs[numbers[int(which * len(numbers))]]
        smallest, largest = self._options.edges
        edge = smallest + round(scale * (largest - smallest))
        picture, visible = cut_out.sized(edge), cut_out.visible(edge)
        width, height = ((length + 1) // 2 for length in picture.size)
        begins = [(int(corners[0] * (picture.width - width + 1)), int(corners[1] * (picture.height - height + 1)))]
        # A corner of a cut-out may be empty; then the fullest quarter is drawn.
        begins += [(x, y) for x in (0, picture.width - width) for y in (0, picture.height - height)]
        shown = [float(visible[y : y + height, x : x + width].mean()) for x, y in begins]
        x, y = begins[0 if shown[0] >= _FRAGMENT_VISIBLE else max(range(len(begins)), key=shown.__getitem__)]
        fragment = picture.crop((x, y, x + width, y + height))
        room = self._options.size - width + 1, self._options.size - height + 1
        canvas.paste(fragment, (int(corners[2] * room[0]), int(corners[3] * room[1])), fragment)

    def content(self) -> str:
        """What decides the images: the options, and the names and bytes of all files that can be drawn."""
        files = [cut_out.file for cut_out in self._cut_outs], list(self._backgrounds)
        parts = ((file.name.encode(), file.path.read_bytes()) for several in files for file in several)
        counts = [len(several) for several in files]
        told = {**asdict(self._options), "background": self._background, "files": counts}
        return f"{json.dumps(told, sort_keys=True)} {digest(chain.from_iterable(parts))}"
