"""Your own annotated images: COCO JSON, as most annotation tools write it."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageOps
from tqdm import tqdm

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError, repeated
from rsm_probe.sources.images.image_set import UNREADABLE, ImageSet, digest
from rsm_probe.sources.images.objects.annotation import Located, annotation
from rsm_probe.sources.images.objects.masks import box_of_segmentation
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.images.pixels import read_rgb, to_rgb

_EXPECTED = (
    "expected a mapping with images (id, file_name, width, height), annotations (id, image_id, category_id, bbox) and "
    "categories (id, name)"
)
# Names under which tools keep what an image belongs to, best first.
_FACTS = {"scene": ("scene", "scene_id", "group_id"), "video": ("video", "video_id")}
# The tag of a picture's orientation, and those values that exchange its sides.
_ORIENTATION, _UPRIGHT, _TURNED = 0x0112, 1, (5, 6, 7, 8)


@dataclass(frozen=True)
class _Listing:
    """The content of an annotation file.

    Attributes:
        images: the entries of images.
        objects: id of an image -> class and box of each object in it.
        notices: what to tell the user.
    """

    images: list[Mapping[str, Any]]
    objects: Mapping[Hashable, Sequence[Located]]
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Picture:
    """The file of an image.

    Attributes:
        path: the file.
        size: width and height of the loaded image.
        turned: whether the image is turned as its EXIF orientation says, because its boxes are.
        oriented: whether it has an orientation, which is ignored, although its boxes may belong to the turned picture.
    """

    path: Path
    size: tuple[int, int]
    turned: bool = False
    oriented: bool = False

    def load(self) -> Image.Image:
        """Read the image as RGB."""
        if not self.turned:
            return read_rgb(self.path)
        with Image.open(self.path) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def coco(root: str | Path, annotations: str | Path, crowds: bool = False, progress: bool = False) -> ImageSet:
    """Read images with annotated objects in the format of COCO (instances), LVIS, or panoptic COCO.

    Each annotation holds `counts` (class -> number of objects) and `boxes` (class, left, top, right, bottom, in pixels
    of the loaded image), and, where the entry of the image gives them, `scene` (or `scene_id`, `group_id`) and `video`
    (or `video_id`). A box that is not given is taken from the segmentation; an object with neither is counted without
    a box. Images without objects belong to the set. Ids and names may be numbers or texts; categories of one name are
    one class. The label of an image is its entry `label`, if it has one.

    EXIF orientation is ignored, as in all image files, unless width and height in the annotations are those of the
    turned picture.

    Args:
        root: the folder to which the names of files (`file_name`, or the end of `coco_url`) are relative.
        annotations: the JSON file: its path, which may be relative to `root`.
        crowds: count a crowd (`iscrowd: 1`, a region with many objects) as one object, instead of leaving it out.
        progress: show a progress bar while the headers of images are read.

    Raises:
        ImageError: a file is missing, cannot be read or differs in size from its entry, ids repeat, or an annotation
            refers to what is not listed; the message names it.

    Warns:
        UserWarning: what was left out (crowds, objects outside of their image), and what may be misread (images that
            are not annotated exhaustively, or whose orientation is ambiguous).
    """
    folder = Path(root).expanduser()
    file = _annotation_file(folder, Path(annotations).expanduser())
    listing = _read(file, crowds)
    names = [_name(file, folder, entry) for entry in listing.images]
    if (twice := repeated(names)) is not None:
        raise ImageError(f"{file} lists the file {brief(twice)} twice; list each file once")
    pictures = _pictures(file, folder, names, listing, progress)
    notes = [_note(entry, listing.objects.get(entry["id"], ())) for entry in listing.images]
    for remark in (*listing.notices, *_outside(names, notes, pictures), *_oriented(names, pictures)):
        warnings.warn(f"{file}: {remark}", stacklevel=2)
    return ImageSet(
        file.stem,
        names,
        lambda index: pictures[index].load(),
        labels=[str(entry.get("label", "")) for entry in listing.images],
        annotations=notes,
        sizes=[picture.size for picture in pictures],
        content=lambda: digest([json.dumps(notes).encode(), *(picture.path.read_bytes() for picture in pictures)]),
    ).made_by(coco, root=absolute_path(folder), annotations=absolute_path(file), crowds=crowds)


def _annotation_file(root: Path, written: Path) -> Path:
    candidates = [written] if written.is_absolute() else [root / written, written]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ImageError(f"no annotation file at {' or '.join(map(str, candidates))}; give the JSON file as annotations=")


def _read(file: Path, crowds: bool) -> _Listing:
    """Read an annotation file.

    Raises:
        ImageError: it is damaged, incomplete or contradicts itself.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(data, Mapping):
            raise ImageError(f"{file} holds a {type(data).__name__}; {_EXPECTED}")
        classes = _classes(file, data["categories"])
        images = list(data["images"])
        known = {entry["id"] for entry in images}
        if len(known) < len(images):
            twice = repeated([brief(entry["id"]) for entry in images])
            raise ImageError(f"{file} gives the id {twice} to two images; give each image its own id")
        entries = list(_objects(data["annotations"]))
        ids = [entry["id"] for entry in entries if entry.get("id") is not None]
        if (again := repeated(ids)) is not None:
            raise ImageError(
                f"{file} gives the id {brief(again)} to two annotations; give each its own id, or none an id, if they "
                f"are different objects"
            )
        objects: dict[Hashable, list[Located]] = defaultdict(list)
        crowded = []
        for number, entry in enumerate(entries):
            what = f"{file}: annotation {brief(entry.get('id', f'number {number}'))}"
            if entry["image_id"] not in known:
                raise ImageError(f"{what} refers to image {brief(entry['image_id'])}, which is not listed")
            if entry.get("category_id") not in classes:
                raise ImageError(f"{what} has the category_id {brief(entry.get('category_id'))}, which is not listed")
            if entry.get("iscrowd") and not crowds:
                crowded.append(entry)
                continue
            objects[entry["image_id"]].append((classes[entry["category_id"]], _box(what, entry)))
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ImageError):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ImageError(f"cannot read the annotations {file}: {reason}; {_EXPECTED}") from error
    if not images:
        raise ImageError(f"{file} lists no image")
    return _Listing(images, objects, _notices(images, crowded, list(data["categories"])))


def _classes(file: Path, categories: Sequence[Mapping[str, Any]]) -> dict[Hashable, str]:
    """The name of each category."""
    classes = {entry["id"]: str(entry.get("name", entry["id"])) for entry in categories}
    if len(classes) < len(categories):
        twice = repeated([brief(entry["id"]) for entry in categories])
        raise ImageError(f"{file} gives the id {twice} to two categories; give each category its own id")
    return classes


def _objects(annotations: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The objects of annotations; in panoptic COCO, an annotation holds all segments of an image."""
    for entry in annotations:
        if "segments_info" not in entry:
            yield entry
            continue
        for segment in entry["segments_info"]:
            # Ids of segments are colours, and repeat from image to image.
            yield {**segment, "id": None, "image_id": entry["image_id"]}


def _box(what: str, entry: Mapping[str, Any]) -> Sequence[float] | None:
    """The box of an object; None if it has none."""
    box = entry.get("bbox")
    if not box:
        if not entry.get("segmentation"):
            return None
        try:
            return box_of_segmentation(entry["segmentation"])
        except (ValueError, TypeError) as error:
            raise ImageError(f"{what} has a segmentation that cannot be read: {error}") from error
    numbers = len(box) == 4 and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    if not numbers or box[2] < 0 or box[3] < 0:
        raise ImageError(
            f"{what} has the bbox {brief(box)}; a bbox is [left, top, width, height] in pixels, finite, with a width "
            f"and a height of at least 0"
        )
    left, top, width, height = box
    return left, top, left + width, top + height


def _notices(
    images: Sequence[Mapping[str, Any]], crowded: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> list[str]:
    notices = []
    if crowded:
        notices.append(
            f"{len(crowded)} crowds (iscrowd: 1, regions with many objects) in "
            f"{len({entry['image_id'] for entry in crowded})} images are left out; crowds=True (in YAML crowds: true) "
            f"counts each as one object"
        )
    if partial_images := sum(bool(entry.get("not_exhaustive_category_ids")) for entry in images):
        notices.append(
            f"{partial_images} images are not annotated exhaustively (not_exhaustive_category_ids); their counts are "
            f"too small for these classes; score: iou compares only which classes are present"
        )
    if (name := repeated([str(entry.get("name", entry["id"])) for entry in categories])) is not None:
        notices.append(f"several categories are called {brief(name)}, and count as one class")
    return notices


def _name(file: Path, root: Path, entry: Mapping[str, Any]) -> str:
    """The name of an image's file relative to the folder of images.

    Raises:
        ImageError: the entry names none.
    """
    if name := entry.get("file_name"):
        return str(name)
    for key in ("coco_url", "url"):
        if url := entry.get(key):
            parts = PurePosixPath(urlsplit(str(url)).path).parts
            split = "/".join(parts[-2:])  # such as val2017/000000397133.jpg
            return split if (root / split).is_file() else parts[-1]
    raise ImageError(f"{file}: image {brief(entry['id'])} has no file_name; {_EXPECTED}")


def _pictures(file: Path, root: Path, names: Sequence[str], listing: _Listing, progress: bool) -> list[_Picture]:
    """Find the file of each image, and compare its size with that of its entry."""
    paths = [_path(root, name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        listed = ", ".join(brief(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ImageError(
            f"{file} lists {len(missing)} of {len(names)} images that are not in {root}: {listed}; give the folder to "
            f"which these names are relative as root=, or remove the images from the file"
        )
    look: Callable[[int], _Picture] = partial(_picture, file, paths, listing)
    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(look, range(len(paths))), "reading headers", len(paths), disable=not progress, leave=False)
        return list(bar)


def _path(root: Path, name: str) -> Path:
    """The file of a name; tools for Windows separate folders by backslashes."""
    path = root / name
    return path if "\\" not in name or path.is_file() else root / name.replace("\\", "/")


def _picture(file: Path, paths: Sequence[Path], listing: _Listing, number: int) -> _Picture:
    path, entry = paths[number], listing.images[number]
    stated, orientation = _stated(entry), _UPRIGHT
    try:
        with Image.open(path) as image:
            size = image.size
            exchanged = stated == size[::-1] != size
            # Of a PNG, reading the orientation decodes the whole image.
            if exchanged or image.format in ("JPEG", "MPO"):
                orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except UNREADABLE as error:
        raise ImageError(f"cannot read {path}, which {file} lists: {error}") from error
    if not any(box is not None for _, box in listing.objects.get(entry["id"], ())):
        return _Picture(path, size)
    if exchanged and orientation in _TURNED:
        return _Picture(path, size[::-1], turned=True)
    if stated not in (None, size):
        raise ImageError(
            f"{path} has {size[0]} x {size[1]} pixels, but {file} says {stated[0]} x {stated[1]}, so that its boxes "
            f"would be in the wrong places; give the images for which the boxes were drawn, or correct the file"
        )
    unturned = stated == size != size[::-1] and orientation in _TURNED
    return _Picture(path, size, oriented=orientation != _UPRIGHT and not unturned)


def _stated(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of an image as its entry says."""
    width, height = entry.get("width"), entry.get("height")
    return (int(width), int(height)) if width and height else None


def _note(entry: Mapping[str, Any], objects: Sequence[Located]) -> dict[str, Any]:
    facts = {
        fact: str(next((entry[key] for key in keys if entry.get(key) is not None), "")) for fact, keys in _FACTS.items()
    }
    if "video" not in entry and all(facts.values()):  # videos are numbered within their scene
        facts["video"] = f"{facts['scene']}/{facts['video']}"
    return annotation(objects, {fact: value for fact, value in facts.items() if value})


def _outside(names: Sequence[str], notes: Sequence[dict[str, Any]], pictures: Sequence[_Picture]) -> Iterator[str]:
    """Leave out objects whose boxes lie entirely outside of their image, and say so."""
    first, count = "", 0
    for name, note, picture in zip(names, notes, pictures, strict=True):
        width, height = picture.size
        beyond = [box for box in note["boxes"] if box[1] > width or box[2] > height or box[3] < 0 or box[4] < 0]
        for box in beyond:
            note["boxes"].remove(box)
            note["counts"][box[0]] -= 1
        note["counts"] = {key: number for key, number in note["counts"].items() if number}
        first, count = first or (f"{brief(name)} at {beyond[0][1:]}" if beyond else ""), count + len(beyond)
    if count:
        yield f"{count} objects whose boxes lie outside of their image are left out, first in {first}"


def _oriented(names: Sequence[str], pictures: Sequence[_Picture]) -> Iterator[str]:
    oriented = [name for name, picture in zip(names, pictures, strict=True) if picture.oriented]
    if oriented:
        yield (
            f"{len(oriented)} images have an EXIF orientation, first {brief(oriented[0])}, and width and height do not "
            f"say whether their boxes belong to the turned picture; they are read unturned; if that is wrong, save "
            f"them upright"
        )
