"""Published data sets with annotated objects, for retrieval: EgoObjects and Cityscapes, read from disk."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsm_probe.errors import ImageError, look_up
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.images.pixels import read_rgb

_EGOOBJECTS = "https://github.com/facebookresearch/EgoObjects"
# Frames are resized to this 16:9 size (paper, appendix D.1, where 1080 is misprinted as 1028).
_FRAME = (1920, 1080)
_ASPECT_TOLERANCE = 0.01
_CITYSCAPES = "https://www.cityscapes-dataset.com"


def egoobjects(root: str | Path, split: str = "all", annotations: str = "EgoObjectsV1_unified_eval.json") -> ImageSet:
    """Read the 16:9 frames of EgoObjects with their object counts and videos.

    Each annotation holds `counts` (class -> number of objects) and `boxes` (class, left, top, right, bottom, in pixels
    of the loaded frame), and, if the file gives them, `video` and `scene` (a group of videos). Frames of other shapes
    are skipped, as in the paper (appendix D.1), and listed in `skipped`.

    Args:
        root: the folder that holds `images/` and the annotation file.
        split: "all", or a `subset` of the annotation file. The published evaluation file has "test", from which the
            paper takes its images, and "val".
        annotations: name of the annotation file within `root`, JSON in the format of LVIS.

    Raises:
        ImageError: files are missing (the message says where to get them and where to put them), or the annotations
            are damaged or refer to images that they do not list.
    """
    folder = Path(root).expanduser()
    file = folder / annotations
    instructions = (
        f"download images and annotations of EgoObjects ({_EGOOBJECTS}) and place them as {file} and "
        f"{folder / 'images'}/<name as in the annotations>"
    )
    for path, is_right in ((file, isfile), (folder / "images", isdir)):
        if not is_right(path):
            raise ImageError(f"{path} does not exist: {instructions}")
    listed, objects = _annotated_frames(file)
    if split != "all":
        subsets = {str(frame.get("subset", "")) for frame in listed}
        listed = [frame for frame in listed if frame.get("subset") == split]
        if not listed:
            raise ImageError(f"{file} lists no image of subset {split!r} (it has: {', '.join(sorted(subsets))})")
    skipped = {str(frame["name"]): "not 16:9" for frame in listed if not _is_wide(frame)}
    frames = [frame for frame in listed if _is_wide(frame)]
    if not frames:
        raise ImageError(f"{file} lists no image in 16:9")
    absent = [frame["name"] for frame in frames if not (folder / "images" / frame["name"]).is_file()]
    if absent:
        raise ImageError(f"{file} lists {len(absent)} images that do not exist, first {absent[0]!r}: {instructions}")

    def load(index: int) -> Image.Image:
        frame = read_rgb(folder / "images" / frames[index]["name"])
        return frame if frame.size == _FRAME else frame.resize(_FRAME, Image.Resampling.BICUBIC)

    notes = [_annotation(frame, objects[frame["id"]]) for frame in frames]
    return ImageSet(
        "egoobjects",
        [frame["name"] for frame in frames],
        load,
        labels=[str(frame.get("main_category", "")) for frame in frames],
        annotations=notes,
        skipped=skipped,
        sizes=[_FRAME] * len(frames),
        content=lambda: f"split={split} {json.dumps(notes, sort_keys=True)}",
    ).made_by(egoobjects, root=absolute_path(folder), split=split, annotations=annotations)


def _annotated_frames(file: Path) -> tuple[list[dict[str, Any]], Mapping[Any, list[tuple[str, Sequence[float]]]]]:
    """Read the images of an annotation file, and a map from image id to the class and box of each object.

    Raises:
        ImageError: the file cannot be read, is incomplete, or annotates an image or a class that it does not list.
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
                raise ImageError(f"{file} lists {len(images)} images with only {count} different {what}")
        objects: dict[Any, list[tuple[str, Sequence[float]]]] = defaultdict(list)
        for entry in data["annotations"]:
            if entry["image_id"] not in known:
                raise ImageError(
                    f"{file}: annotation {entry.get('id')} refers to image {entry['image_id']}, which is not listed"
                )
            # Some objects of EgoObjects have an instance but no class; the F1 over classes cannot count them.
            if (number := entry.get("category_id")) is not None:
                if number not in classes:
                    raise ImageError(f"{file}: annotation {entry.get('id')} has the unknown class {number}")
                box = [float(value) for value in entry.get("bbox") or (0, 0, 0, 0)]
                if len(box) != 4:
                    raise ImageError(f"{file}: bbox of annotation {entry.get('id')} has {len(box)} numbers, not 4")
                objects[entry["image_id"]].append((classes[number], box))
        for entry in images:
            entry["width"], entry["height"] = int(entry["width"]), int(entry["height"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ImageError):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ImageError(
            f"cannot read the annotations {file}: {reason}; expected images (id, url, width, height, video_id), "
            "annotations (image_id, category_id, bbox) and categories (id, name)"
        ) from error
    return images, objects


def _is_wide(frame: Mapping[str, Any]) -> bool:
    aspect = _FRAME[0] / _FRAME[1]
    return abs(frame["width"] / max(frame["height"], 1) / aspect - 1) <= _ASPECT_TOLERANCE


def _annotation(frame: Mapping[str, Any], objects: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    scale = _FRAME[0] / frame["width"], _FRAME[1] / frame["height"]
    boxes = [
        [name, *(round(v * scale[k % 2], 1) for k, v in enumerate((left, top, left + width, top + height)))]
        for name, (left, top, width, height) in objects
    ]
    annotation: dict[str, Any] = {"counts": dict(Counter(name for name, _ in objects)), "boxes": boxes}
    # Videos are numbered within their scene.
    scene, video = frame.get("group_id"), frame.get("video_id")
    if video is not None:
        annotation["video"] = str(video) if scene is None else f"{scene}/{video}"
    return annotation if scene is None else annotation | {"scene": str(scene)}


def cityscapes(root: str | Path, split: str, progress: bool = False) -> ImageSet:
    """Read the images of Cityscapes, each with the evaluated classes (of 19) that its fine annotation shows.

    Each image's annotation holds `counts`: class -> 1 where it is present, since most classes have no instances. The
    label is the city.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: "train" (2 975 images), or "test" for the validation set (500 images).
        progress: show a progress bar while reading annotations.

    Raises:
        ImageError: the split is unknown, or files are missing (the message says where to get them and where to put
            them) or cannot be read.
    """
    from torchvision.datasets import Cityscapes
    from tqdm import tqdm

    folder = Path(root).expanduser()
    part = look_up(split, {"train": "train", "test": "val"}, "split of Cityscapes", ImageError)
    instructions = (
        f"download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from {_CITYSCAPES} (free, after "
        f"registration) and unpack both in {folder}, so that {folder / 'leftImg8bit' / part}/<city>/*_leftImg8bit.png "
        f"and {folder / 'gtFine' / part}/<city>/*_gtFine_labelIds.png exist"
    )
    try:
        data = Cityscapes(str(folder), split=part, mode="fine", target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise ImageError(f"no Cityscapes in {folder}: {instructions}") from error
    files, masks = [Path(name) for name in data.images], [Path(targets[0]) for targets in data.targets]
    absent = [file for file in (*files, *masks) if not file.is_file()]
    if absent or not files:
        problem = f"first missing file {absent[0]}" if absent else "the folders are empty"
        raise ImageError(f"the {part} part of Cityscapes in {folder} is incomplete, {problem}: {instructions}")
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

    return ImageSet(
        "cityscapes",
        [f"{file.parent.name}/{file.stem.removesuffix('_leftImg8bit')}" for file in files],
        lambda index: read_rgb(files[index]),
        labels=[file.parent.name for file in files],
        annotations=[{"counts": classes} for classes in counts],
        content=lambda: f"split={split} {json.dumps(counts, sort_keys=True)}",
    ).made_by(cityscapes, root=absolute_path(folder), split=split)
