"""Data sets whose images come with the objects in them, for retrieval: EgoObjects and Cityscapes, read from disk."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.folders import is_there
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.pixels import to_rgb

_EGOOBJECTS = "https://github.com/facebookresearch/EgoObjects"
# Frames of 16:9, and the size to which all of them are brought (paper, appendix D.1, which says 1028 for 1080).
_FRAME = (1920, 1080)
_ASPECT_TOLERANCE = 0.01
_CITYSCAPES = "https://www.cityscapes-dataset.com"


def egoobjects(root: str | Path, split: str = "all", annotations: str = "EgoObjectsV1_unified_eval.json") -> ImageSet:
    """Frames of EgoObjects in 16:9, each with the number of objects of every class in it, and its video.

    Each image's annotation holds `counts` (class -> objects), `boxes` (class, left, top, right, bottom, in pixels of
    the frame as it is loaded), `video` and `scene` (the videos of one place), as far as the file tells. Frames of other
    shapes are left out, as in the paper (appendix D.1), and counted in `skipped`.

    Args:
        root: the folder that holds `images/` and the annotations.
        split: "all", or the `subset` of the frames in the file: the published one for evaluation holds "test", of which
            the paper takes its images, and "val".
        annotations: the file of annotations (JSON in the manner of LVIS) within `root`.

    Raises:
        ImageError: files are missing (the message says where to get them and how they must lie), annotations that are
            damaged, or that are of images which they do not list or which are not there.
    """
    place = Path(root).expanduser()
    file = place / annotations
    layout = (
        f"download images and annotations of EgoObjects ({_EGOOBJECTS}) and place them as {file} and "
        f"{place / 'images'}/<name as in the annotations>"
    )
    listed_there = is_there(file) and file.is_file()
    if not listed_there or not (place / "images").is_dir():
        missing = place / "images" if listed_there else file
        raise ImageError(f"there is no {missing}: {layout}")
    listed, frames = _annotated_frames(file)
    if split != "all":
        subsets = {str(frame.get("subset", "")) for frame in listed}
        listed = [frame for frame in listed if frame.get("subset") == split]
        if not listed:
            raise ImageError(f"{file} lists no image of subset {split!r} (it has: {', '.join(sorted(subsets))})")
    skipped = {str(frame["name"]): "not in 16:9" for frame in listed if not _is_wide(frame)}
    kept = [frame for frame in listed if _is_wide(frame)]
    if not kept:
        raise ImageError(f"{file} lists no image in 16:9")
    absent = [frame["name"] for frame in kept if not (place / "images" / frame["name"]).is_file()]
    if absent:
        raise ImageError(f"{file} names {len(absent)} images that are not there, first {absent[0]!r}: {layout}")

    def load(index: int) -> Image.Image:
        with Image.open(place / "images" / kept[index]["name"]) as image:
            frame = to_rgb(image)
        return frame if frame.size == _FRAME else frame.resize(_FRAME, Image.Resampling.BICUBIC)

    notes = [_note(frame, frames[frame["id"]]) for frame in kept]
    return ImageSet(
        "egoobjects",
        [frame["name"] for frame in kept],
        load,
        labels=[str(frame.get("main_category", "")) for frame in kept],
        annotations=notes,
        skipped=skipped,
        content=lambda: f"split={split} {json.dumps(notes, sort_keys=True)}",
    )


def _annotated_frames(file: Path) -> tuple[list[dict[str, Any]], Mapping[Any, list[tuple[str, Sequence[float]]]]]:
    """Images of an annotation file, and by their number the class and the box of every object.

    Raises:
        ImageError: it cannot be read, lacks a part, or annotates an image or a class that it does not list.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        classes = {entry["id"]: str(entry["name"]) for entry in data["categories"]}
        images = [
            {**entry, "name": str(entry.get("file_name") or entry["url"] or "").rpartition("images/")[2]}
            for entry in data["images"]
        ]
        known = {entry["id"] for entry in images}
        for what, count in (("ids", len(known)), ("names", len({entry["name"] for entry in images}))):
            if count < len(images):
                raise ImageError(f"{file} lists {len(images)} images of {count} different {what}")
        objects: dict[Any, list[tuple[str, Sequence[float]]]] = defaultdict(list)
        for entry in data["annotations"]:
            if entry["image_id"] not in known:
                raise ImageError(
                    f"{file}: annotation {entry.get('id')} is of image {entry['image_id']}, which is not listed there"
                )
            # Some objects of EgoObjects have an instance and no class: the F1 of classes cannot count them.
            if (number := entry.get("category_id")) is not None:
                if number not in classes:
                    raise ImageError(f"{file}: annotation {entry.get('id')} is of an unknown class {number}")
                box = [float(value) for value in entry.get("bbox") or (0, 0, 0, 0)]
                if len(box) != 4:
                    raise ImageError(f"{file}: bbox of annotation {entry.get('id')} holds {len(box)} numbers, not 4")
                objects[entry["image_id"]].append((classes[number], box))
        for entry in images:
            entry["width"], entry["height"] = int(entry["width"]), int(entry["height"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ImageError):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ImageError(
            f"cannot read the annotations {file}: {reason}; expected are images (id, url, width, height, video_id), "
            "annotations (image_id, category_id, bbox) and categories (id, name)"
        ) from error
    return images, objects


def _is_wide(frame: Mapping[str, Any]) -> bool:
    aspect = _FRAME[0] / _FRAME[1]
    return abs(frame["width"] / max(frame["height"], 1) / aspect - 1) <= _ASPECT_TOLERANCE


def _note(frame: Mapping[str, Any], objects: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    scale = _FRAME[0] / frame["width"], _FRAME[1] / frame["height"]
    boxes = [
        [name, *(round(v * scale[k % 2], 1) for k, v in enumerate((left, top, left + width, top + height)))]
        for name, (left, top, width, height) in objects
    ]
    note: dict[str, Any] = {"counts": dict(Counter(name for name, _ in objects)), "boxes": boxes}
    # Videos are numbered within the group of one place.
    scene, video = frame.get("group_id"), frame.get("video_id")
    if video is not None:
        note["video"] = str(video) if scene is None else f"{scene}/{video}"
    return note if scene is None else note | {"scene": str(scene)}


def cityscapes(root: str | Path, split: str, progress: bool = False) -> ImageSet:
    """Images of Cityscapes with the classes that their fine annotation shows, those of the 19 that are evaluated.

    Each image's annotation holds `counts`: class -> 1 where it is present, since there are no instances of most. The
    label is the city.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: "train" (2 975 images) or "test", which stands for the 500 of its validation set.
        progress: show a bar while annotations are read.

    Raises:
        ImageError: unknown split; files are missing (the message says where to get them and how they must lie) or
            cannot be read.
    """
    from torchvision.datasets import Cityscapes
    from tqdm import tqdm

    place = Path(root).expanduser()
    folders = {"train": "train", "test": "val"}
    if split not in folders:
        raise ImageError(f"unknown split {split!r} of Cityscapes (known: {', '.join(folders)})")
    where = folders[split]
    layout = (
        f"download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from {_CITYSCAPES} (free, after "
        f"registration) and unpack both in {place}, so that {place / 'leftImg8bit' / where}/<city>/*_leftImg8bit.png "
        f"and {place / 'gtFine' / where}/<city>/*_gtFine_labelIds.png exist"
    )
    try:
        data = Cityscapes(str(place), split=where, mode="fine", target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise ImageError(f"{place} holds no Cityscapes: {layout}") from error
    files, masks = [Path(name) for name in data.images], [Path(targets[0]) for targets in data.targets]
    absent = [file for file in (*files, *masks) if not file.is_file()]
    if absent or not files:
        found = f"first missing file {absent[0]}" if absent else "the folders are empty"
        raise ImageError(f"{place} holds no complete {where} part of Cityscapes, {found}: {layout}")
    names = {entry.id: entry.name for entry in Cityscapes.classes if not entry.ignore_in_eval}

    def present(mask: Path) -> dict[str, int]:
        try:
            with Image.open(mask) as image:
                numbers = np.flatnonzero(np.bincount(np.asarray(image).ravel()))
        except (OSError, ValueError, TypeError, SyntaxError) as error:
            raise ImageError(f"cannot read the annotation {mask}: {error}") from error
        return {names[int(number)]: 1 for number in numbers if int(number) in names}

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(present, masks), "reading annotations", len(masks), disable=not progress, leave=False)
        counts = list(bar)

    def load(index: int) -> Image.Image:
        with Image.open(files[index]) as image:
            return to_rgb(image)

    return ImageSet(
        "cityscapes",
        [f"{file.parent.name}/{file.stem.removesuffix('_leftImg8bit')}" for file in files],
        load,
        labels=[file.parent.name for file in files],
        annotations=[{"counts": found} for found in counts],
        content=lambda: f"split={split} {json.dumps(counts, sort_keys=True)}",
    )
