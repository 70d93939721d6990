"""Items of a data set: the image in each, and where it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rsm_probe.arrays import require_dense
from rsm_probe.checks import brief
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.pixels import IMAGE_SUFFIXES, image_of_array, read_rgb

# Names of images and labels in items that are mappings, as in Hugging Face's data sets, MONAI and WebDataset.
IMAGE_KEYS = ("image", "img", "pixel_values", "images", "pixels", "inputs", "input", "x", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label", "class", "category", "y", "cls")
# The name or index of an entry of an item or batch, or several that lead into nested ones; and these as a tuple.
Key = str | int | Sequence[str | int]
Path = tuple[Any, ...]
# At most this many entries of a tuple or keys of a mapping are listed in a message.
LISTED = 6


def image_of(item: Any, key: Key | None = None) -> Image.Image | Tensor:
    """Extract the image from an item of a data set.

    An image is a PIL image, a tensor of at least three axes, an array (see `image_of_array`), or the path of an image
    file. In a tuple or list it is the only one of these, or the first if the others are unlike it (masks); in a mapping
    it is the one under a name such as `image`, `img` or `pixel_values`, or the only one.

    Args:
        item: an image, or a tuple, list or mapping that contains one.
        key: name or index of the image within the item, if it cannot be recognised; several lead into nested items.

    Raises:
        ImageError: the item contains no image, or several; the message describes it and says how to read it.
    """
    if key is not None:
        value = entry(item, key, "image_key")
        if not (is_pixels(value) or isinstance(value, str | PurePath)):
            raise ImageError(f"image_key={key!r} names {described(value)}, which is not an image")
        return _as_image(value)
    paths = paths_in_item(item)
    if not paths:
        raise ImageError(
            f"found {described(item)}, which is neither a PIL image, nor a tensor (C, H, W) that is ready for the "
            f"model, nor a tuple or mapping that contains one; give rsm_probe.sources.ImageSet(name, ids, load), where "
            f"load returns image number k, as in lambda k: {_expression(item, 'data[k]') or '...'}"
        )
    problem, _ = unclear(item, paths, "data")
    if problem:
        raise ImageError(problem)
    return _as_image(entry(item, paths[0], "image_key"))


def entry(content: Any, key: Key, argument: str) -> Any:
    """The entry of an item or batch that a key names; several keys lead into nested ones.

    Args:
        content: the item or batch.
        key: a name or index, or several.
        argument: what the key was given as, for messages.

    Raises:
        ImageError: there is no such entry.
    """
    value = content
    for part in path_of(key):
        try:
            value = value[part]
        except (LookupError, TypeError) as error:
            raise ImageError(f"found {described(value)}, without {argument}={shown_key(path_of(key))}") from error
    return value


def paths_in_item(item: Any) -> list[Path]:
    """Where the image of an item may be: pixels, or else the path of an image file."""

    def either(value: Any) -> bool:
        return is_pixels(value) or is_image_path(value)

    if isinstance(item, Mapping) and (named := [(name,) for name in IMAGE_KEYS if name in item and either(item[name])]):
        return named
    if paths := image_paths(item, is_pixels):
        return paths
    if isinstance(item, tuple | list):
        entries = dict(enumerate(item))
        files: list[Path] = [(key,) for key, value in entries.items() if is_image_path(value)]
        inner = (
            (key, path) for key, value in entries.items() if isinstance(value, Mapping) for path in paths_in_item(value)
        )
        return files or [(key, *path) for key, path in inner]
    return [()] if is_image_path(item) else []


def image_paths(content: Any, holds: Callable[[Any], bool], nested: bool = True) -> list[Path]:
    """Where the images of an item or batch may be: in entries of known names, else in any, else in nested ones.

    Args:
        content: the item or batch; () is the path of itself.
        holds: whether a value may be the image or images.
        nested: look into entries that are tuples, lists or mappings.
    """
    if holds(content):
        return [()]
    entries: Mapping[Any, Any]
    if isinstance(content, Mapping):
        entries = content
        direct: list[Path] = [(name,) for name in IMAGE_KEYS if name in entries and holds(entries[name])]
        direct = direct or [(key,) for key, value in entries.items() if holds(value)]
    elif isinstance(content, tuple | list):
        entries = dict(enumerate(content))
        direct = [(key,) for key, value in entries.items() if holds(value)]
        # Masks are whole numbers, images are not.
        direct = [path for path in direct if not is_whole(entries[path[0]])] or direct
    else:
        return []
    if direct or not nested:
        return direct
    return [(key, *path) for key, value in entries.items() for path in image_paths(value, holds, nested=False)]


def unclear(content: Any, paths: Sequence[Path], what: str) -> tuple[str, str]:
    """Say that several entries may be the images of an item or batch, and how to name one.

    In a mapping, their names would say which. In a tuple, the first holds the images unless another is like it, as two
    views are, and unlike a mask.

    Args:
        content: the item or batch.
        paths: see `image_paths`.
        what: "data", "loader", or "items" of a batch that was not collated.

    Returns:
        Why the images are unclear, "" if the first entry holds them; and a remark on other entries, "" if none is.
    """
    if len(paths) < 2:
        return "", ""
    values = [entry(content, path, "image_key") for path in paths]
    axis = 1 if what == "loader" else 0
    alike = [path for path, value in zip(paths, values, strict=True) if _are_alike(values[0], value, axis)]
    shown = ", ".join(map(shown_key, paths[:LISTED]))
    given = "torch.utils.data.DataLoader(data, batch_size=64) and " if what == "data" else ""
    views = ", ".join(f"batch{''.join(f'[{part!r}]' for part in path)}" for path in paths[:2])
    call = "which gets the list of items" if what == "items" else f"as in forward=lambda model, batch: model({views})"
    calls = f"for a model of several inputs, give {given}forward=, {call}"
    name = f"rsm_probe.sources.as_images({'data' if what == 'data' else 'loader'}, image_key={shown_key(paths[0])})"
    if not isinstance(content, Mapping) and len(alike) < 2:
        first, other = shown_key(paths[0]), shown_key(paths[1])
        remark = f"entry {first} is taken for the images, and entry {other} left out; if this is meant, write {name}; "
        return "", f"of {described(content)}, {remark}{calls}"
    frames = isinstance(content, list) and what == "data" and len(paths) > 2
    clips = "; if they are the frames of a clip, give as_images(data, clips=16)" if frames else ""
    problem = f"found {described(content)}, of which {shown} may be the image{'s' if what == 'loader' else ''}"
    return f"{problem}; name one, as in {name}, in YAML image_key: {_yaml_key(paths[0])}; or {calls}{clips}", ""


def _yaml_key(path: Path) -> str:
    """How a user writes the key of an entry in a configuration."""
    return json.dumps(path[0] if len(path) == 1 else list(path), ensure_ascii=False)


def shown_key(path: Path) -> str:
    """How a user writes the key of an entry."""
    return repr(path[0] if len(path) == 1 else path)


def path_of(key: Key) -> Path:
    """The path that a user's key names."""
    return (key,) if isinstance(key, str | int) else tuple(key)


def _are_alike(value: Any, other: Any, axis: int) -> bool:
    """Whether two values may be views of one image, rather than an image and its mask or depth; `axis` of channels."""
    if isinstance(value, Tensor | np.ndarray) and isinstance(other, Tensor | np.ndarray):
        return (value.ndim, value.dtype, value.shape[axis]) == (other.ndim, other.dtype, other.shape[axis])
    if isinstance(value, Image.Image) and isinstance(other, Image.Image):
        return value.mode == other.mode
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return _are_alike(value[0], other[0], 0)
    return isinstance(value, str | PurePath) and isinstance(other, str | PurePath)


def is_whole(value: Any) -> bool:
    """Whether a value is a tensor of whole numbers, as masks are."""
    return isinstance(value, Tensor) and not value.is_floating_point()


def is_pixels(value: Any) -> bool:
    """Whether a value may be an image: a PIL image, or a tensor or array whose axes can be those of one."""
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, Tensor):
        return value.ndim >= 3 and value.numel() > 0
    if not isinstance(value, np.ndarray) or not value.size:
        return False
    return value.ndim >= 3 if value.dtype.kind == "f" else value.dtype == np.uint8 and value.ndim in (2, 3)


def is_image_path(value: Any) -> bool:
    """Whether a value is the path of an image file, judging by its name."""
    return isinstance(value, str | PurePath) and PurePath(value).suffix.lower() in IMAGE_SUFFIXES


def _as_image(value: Any) -> Image.Image | Tensor:
    if isinstance(value, str | PurePath):
        return read_rgb(value)
    if isinstance(value, np.ndarray):
        return image_of_array(value)
    if isinstance(value, Tensor):
        require_dense(value, "it", ImageError)
        # Subclasses with metadata (MONAI, torchvision) would carry it into the models.
        return value if type(value) is Tensor else value.as_subclass(Tensor)
    return value


def described(item: Any) -> str:
    """Describe an item or a batch in a message."""
    if isinstance(item, Mapping):
        keys = [brief(key, 40) for key in list(item)[:LISTED]]
        return f"a mapping with the keys {', '.join(keys)}{', ...' if len(item) > LISTED else ''}"
    if isinstance(item, tuple | list):
        kinds = [type(part).__name__ for part in item[:LISTED]]
        return f"a {type(item).__name__} ({', '.join(kinds)}{', ...' if len(item) > LISTED else ''})"
    if isinstance(item, Tensor | np.ndarray):
        return f"{type(item).__name__} of shape {tuple(item.shape)} and dtype {item.dtype}"
    if item is None:
        return "None"
    return f"{type(item).__name__} {brief(item, 40)}" if isinstance(item, str | PurePath | int) else type(item).__name__


def _expression(item: Any, data: str) -> str | None:
    """The Python expression that turns the item `data` into an image, or None if there is none."""
    if isinstance(item, Image.Image):
        return data
    if isinstance(item, Mapping | tuple | list):
        # Prefer images to arrays, and arrays to texts and nested items.
        parts = list(item.items() if isinstance(item, Mapping) else enumerate(item))
        kinds = (Image.Image, Tensor | np.ndarray, bytes | str | PurePath | Mapping | tuple | list)
        expressions = (
            _expression(part, f"{data}[{key!r}]") for kind in kinds for key, part in parts if isinstance(part, kind)
        )
        return next(filter(None, expressions), None)
    if isinstance(item, str | PurePath):
        return f"PIL.Image.open({data})"
    if isinstance(item, bytes | bytearray):
        return f"PIL.Image.open(io.BytesIO({data}))"
    if isinstance(item, np.ndarray):
        return f"torch.as_tensor({data})" if item.ndim >= 3 and item.dtype.kind in "fiu" else None
    if isinstance(item, Tensor) and item.ndim >= 2 and item.numel():
        return data if item.ndim >= 3 else f"{data}[None]"
    return None
