"""Write images with annotated objects as COCO JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from rsm_probe.errors import ImageError, StorageError
from rsm_probe.sources.images.image_set import ImageSet

_ANNOTATIONS, _IMAGES = "annotations.json", "images"
# Annotations of an image that its entry holds under the same name.
_OF_IMAGE = ("scene", "video")


def write_coco(images: ImageSet, folder: str | Path, *, progress: bool = False) -> Path:
    """Write images and their boxes as COCO JSON: `annotations.json`, and `images/<id>.png`, as its `file_name` says.

    Boxes are `bbox` (left, top, width, height), in pixels of the written images; `scene` and `video` are entries of
    each image, where they are known, as is its `label`. Ids of images that hold folders become folders.
    `rsm_probe.sources.coco(folder, "annotations.json")` reads all of it.

    Args:
        images: images whose annotations hold `boxes`, such as `composed`, `scenes` or `egoobjects`.
        folder: a folder that is new or empty.
        progress: show a progress bar.

    Returns:
        The path of `annotations.json`, which is written last.

    Raises:
        ImageError: the images have no boxes, or are not pictures; or an id cannot name a file in the folder.
        StorageError: the folder holds files, or cannot be written.
    """
    root = Path(folder)
    for note, name in zip(images.annotations, images.ids, strict=False):
        if sum(note.get("counts", {}).values()) != len(note.get("boxes", ())):
            raise ImageError(f"{images.name}: the annotation of {name!r} holds objects without a box")
    if not any("boxes" in note for note in images.annotations):
        raise ImageError(f"{images.name} has no boxes to write; give images with annotated objects, such as composed")
    files = [_file_name(name) for name in images.ids]
    if len({file.casefold() for file in files}) < len(files):
        raise ImageError(f"{images.name}: some ids differ only in the ending or in capitals, and would be one file")
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise StorageError(f"{root} is not an empty folder; give a new one")
        root.mkdir(parents=True, exist_ok=True)
        listed = []
        for number, file in enumerate(tqdm(files, "writing images", disable=not progress, leave=False)):
            size = _save(images, number, root / file)
            listed.append({"id": number + 1, "file_name": file, "width": size[0], "height": size[1]})
        data = _coco(images, listed)
        part = root / f".{_ANNOTATIONS}"
        part.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        part.replace(root / _ANNOTATIONS)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write images to {root}: {error}") from error
    return root / _ANNOTATIONS


def _file_name(name: str) -> str:
    """The file of an image relative to the folder, with `/` between folders.

    Raises:
        ImageError: it would lie outside of the folder.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
        raise ImageError(f"id {name!r} cannot name a file; give other ids by rsm_probe.sources.as_images(images, ids=)")
    return f"{_IMAGES}/{name}" if name.endswith(".png") else f"{_IMAGES}/{name}.png"


def _save(images: ImageSet, number: int, file: Path) -> tuple[int, int]:
    """Write one image, and return its width and height."""
    image = images[number]
    if not isinstance(image, Image.Image):
        raise ImageError(f"{images.name}: {images.ids[number]!r} is a {type(image).__name__}, not a picture")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return image.size


def _coco(images: ImageSet, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """The data of `annotations.json`."""
    names = sorted({str(box[0]) for note in images.annotations for box in note.get("boxes", ())})
    category = {name: number for number, name in enumerate(names, 1)}
    objects: list[dict[str, Any]] = []
    for entry, note, label in zip(listed, images.annotations, images.labels, strict=True):
        entry |= {key: note[key] for key in _OF_IMAGE if key in note} | ({"label": label} if label else {})
        for name, left, top, right, bottom in note.get("boxes", ()):
            width, height = right - left, bottom - top
            objects.append(
                {
                    "id": len(objects) + 1, "image_id": entry["id"], "category_id": category[str(name)],
                    "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0,
                }
            )  # fmt: skip
    return {
        "info": {"description": images.name},
        "images": listed,
        "annotations": objects,
        "categories": [{"id": number, "name": name} for name, number in category.items()],
    }
