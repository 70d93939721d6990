"""Images that a function of a Python file returns, which any process can call again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsm_probe.errors import ImageError
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.contents.dataset_items import Key
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.models.user_functions import returned_images, stored_name


def images_in(
    source: str,
    *,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    image_key: Key | None = None,
    label_key: Key | None = None,
    axes: str | None = None,
    clips: int | None = None,
) -> ImageSet | ImageLoader:
    """Call a function of a Python file that returns images; other processes can call it, too.

    Args:
        source: file.py:function; the function takes no arguments and returns what `as_images` takes.
        ids: this and what follows as in `as_images`.
        labels: see there.
        image_key: see there.
        label_key: see there.
        axes: see there.
        clips: see there.

    Raises:
        ImageError: the file or function does not exist, fails, or does not return images.
    """
    file, _, function = source.rpartition(":")
    if Path(file).suffix != ".py" or not function:
        raise ImageError(f"images_in takes file.py:function, found {source!r}")
    options: dict[str, Any] = {"image_key": image_key, "label_key": label_key, "axes": axes, "clips": clips}
    images = as_images(returned_images(file, function), ids=ids, labels=labels, **options)
    if isinstance(images, ImageLoader) or images.origin is not None:
        return images
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    options["ids"] = None if ids is None else tuple(images.ids)
    options["labels"] = None if labels is None else tuple(images.labels)
    stored = stored_name(Path(file), function)
    return images.made_by(_images_again, file=absolute_path(file), function=function, stored=stored, **options)


def _images_again(file: str, function: str, stored: str, **options: Any) -> ImageSet | ImageLoader:
    if stored_name(Path(file), function) != stored:
        raise ImageError(f"{file} has changed since this run began; run it again")
    return as_images(returned_images(file, function), **options)
