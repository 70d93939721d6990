"""Clips: folders of frames, and items of data sets that hold several frames."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rsm_probe.checks import brief, require_whole
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.contents.dataset_items import Key, described, entry, image_of
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES

# Orders of the axes of a batch of clips: colours first for torchvision, frames first for transformers.
ORDERS = ("NCTHW", "NTCHW")
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})


@dataclass(frozen=True)
class Clip:
    """Frames that a model takes as one clip; each passes the model's preprocessing by itself.

    Attributes:
        frames: T pictures, or tensors (C, H, W) that are ready for the models.
        axes: the order of the axes of a batch of clips, one of `ORDERS`; None for that of the model's library.
    """

    frames: Sequence[Image.Image | Tensor]
    axes: str | None = None


def require_clips(count: Any, axes: str | None) -> str | None:
    """Check the number of frames of clips, and return the order of their axes in capitals.

    Raises:
        ImageError: the number is not a whole number of at least 1, or the order is unknown.
    """
    require_whole(count, "clips", 1, ImageError)
    order = axes.upper() if isinstance(axes, str) else axes
    if order not in (None, *ORDERS):
        raise ImageError(
            f"axes of clips must be {' or '.join(ORDERS)}, the order in which a model takes a batch of them; found "
            f"{brief(axes)}"
        )
    return order


def sampled(frames: Sequence[Any], count: int, clip: str) -> list[Any]:
    """Take evenly spaced frames, the first and last among them.

    Args:
        frames: all frames in their order.
        count: number of frames to take.
        clip: the name of the clip, for the message.

    Raises:
        ImageError: there are fewer frames.
    """
    if len(frames) < count:
        raise ImageError(
            f"clip {clip!r} has {len(frames)} frames, fewer than clips={count}; ask for fewer, or leave the clip out"
        )
    return [frames[k] for k in np.linspace(0, len(frames) - 1, count).astype(int)]


def clip_files(root: Path) -> dict[str, list[Path]]:
    """The frames of all clips below a folder: each folder that holds image files is a clip, and names it.

    Clips and frames are sorted as people count: frame2 comes before frame10.

    Raises:
        ImageError: the folder holds frames itself, or no folder below it does.
    """
    clips: dict[str, list[Path]] = {}
    for file in sorted(
        (f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()), key=_counting
    ):
        clips.setdefault(file.parent.relative_to(root).as_posix(), []).append(file)
    if "." in clips:
        raise ImageError(
            f"{root} holds image files itself ({clips['.'][0].name}), but clips= reads one folder of frames per clip, "
            f"as in CLASS/CLIP/0001.png; give the folder that holds the folders of clips"
        )
    if not clips:
        raise ImageError(f"no folders of frames in {root} (looked for image files at any depth){video_advice(root)}")
    return clips


def video_advice(root: Path) -> str:
    """What to do with video files in a folder, which are not read; "" if there are none."""
    video = next((f for f in sorted(root.rglob("*")) if f.suffix.lower() in VIDEO_SUFFIXES), None)
    if video is None:
        return ""
    return (
        f"; video files such as {video.name} are not decoded: write the frames of each into a folder of its own, as in "
        f"ffmpeg -i {video.name} {video.stem}/%04d.png, and give rsm_probe.sources.as_images(folder, clips=16)"
    )


def clip_reader(count: int, axes: str | None, image_key: Key | None) -> Callable[[Any], Clip]:
    """How to read clips from the items of a data set: lists of frames, as items or in the entry that a key names.

    Args:
        count: number of frames of a clip.
        axes: see `Clip`.
        image_key: name or index of the frames within an item, if they are not the item or its only list of images.
    """

    def read(item: Any) -> Clip:
        frames = _frames(item) if image_key is None else entry(item, image_key, "image_key")
        if not isinstance(frames, list | tuple) or not frames:
            raise ImageError(f"found {described(item)}, where clips= needs a list of frames; name it by image_key=")
        return Clip([image_of(frame) for frame in sampled(frames, count, "of this item")], axes)

    return read


def _frames(item: Any) -> Any:
    """The frames of an item: the item itself, or its only entry that is a list of several images."""
    parts = list(item.values()) if hasattr(item, "values") else item
    lists = (
        [part for part in parts if isinstance(part, list | tuple) and len(part) > 1]
        if isinstance(parts, list | tuple)
        else []
    )
    return lists[0] if len(lists) == 1 else item


def _counting(file: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by their value; files of one folder stay together."""
    parts = [part for name in file.parts for part in (*re.split(r"(\d+)", name), "/")]
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]
