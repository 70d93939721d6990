"""Make image sets from folders, files, tensors, arrays, data sets, or the names of embedded sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os.path import exists, isfile
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rsm_probe.arrays import real_array, require_dense
from rsm_probe.checks import brief, require_texts
from rsm_probe.errors import ImageError, did_you_mean
from rsm_probe.sources.images.clips import Clip, clip_reader, require_clips
from rsm_probe.sources.images.contents.dataset_items import Key, image_of
from rsm_probe.sources.images.contents.item_labels import ItemLabels, as_texts, first_and_last, label_reader, labels_of
from rsm_probe.sources.images.folders import folder, folder_of_clips, from_paths
from rsm_probe.sources.images.image_set import ImageSet, digest, pixel_bytes
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.images.objects.item_objects import item_objects
from rsm_probe.sources.images.origins import absolute_path
from rsm_probe.sources.images.pixels import as_float_tensor, in_order, picture, recognised_axes

# Number of images of a data set that are read for its fingerprint.
_FINGERPRINTED = 256
# Ids take about 70 bytes each.
_MOST_IMAGES = 10**8


@overload
def as_images(
    images: DataLoader[Any] | ImageLoader,
    *,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    image_key: Key | None = None,
    label_key: Key | None = None,
    axes: str | None = None,
    clips: int | None = None,
) -> ImageLoader: ...


@overload
def as_images(
    images: Any,
    *,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    image_key: Key | None = None,
    label_key: Key | None = None,
    axes: str | None = None,
    clips: int | None = None,
) -> ImageSet: ...


def as_images(
    images: Any,
    *,
    ids: Sequence[str] | None = None,
    labels: Any = None,
    image_key: Key | None = None,
    label_key: Key | None = None,
    axes: str | None = None,
    clips: int | None = None,
) -> ImageSet | ImageLoader:
    """Turn anything that holds images into an `ImageSet`, or a `DataLoader` into an `ImageLoader`.

    Tensors are ready for the models; pictures (files, PIL images, arrays of bytes) pass each model's own preprocessing.

    Args:
        images: an `ImageSet` or `ImageLoader`; a `DataLoader`; the name of an embedded set ("digits", "scenes",
            "cluttered", "photos"); the path of a folder, or of a `.npy` file with all images, or a list of paths of
            images; a tensor (N, C, H, W),
            (N, C, T, H, W) or (N, C, D, H, W); a NumPy array of bytes (pictures) or numbers (ready), whose axes are
            recognised with a warning; a list of images; or a data set with `__len__` and `__getitem__`, like those of
            torchvision, Hugging Face and MONAI. Its items are images, tuples that contain one in any order, or mappings
            with a name such as `image`.
        ids: one name per image, as text; numbers or file names by default.
        labels: one label per image, as text or whole numbers, in place of those that are known; in the order of the
            images, or id -> label; [] for none.
        image_key: name or index of the image within the items of a data set or the batches of a loader, if it cannot
            be recognised; several, as in (0, "image"), lead into nested items.
        label_key: the same of the label, if the entry that is recognised holds something else.
        axes: the axes of a tensor or array, or of the images of a loader's batches, one letter each: N for images, C
            for channels, D, T, F, H and W, as in "NHWC"; the images are then (N, C, ...), or (N, ...) without C, as in
            "NFT" for spectrograms. With `clips`, the order in which the models take a batch, "NCTHW" or "NTCHW"; by
            default the second for models of transformers, and the first for all others.
        clips: read clips of this many evenly spaced frames: each folder of frames below a folder, as in
            CLASS/CLIP/0001.png, or each item of a data set that is a list of frames.

    Raises:
        ImageError: the value is none of these; the message says what to give instead.

    Warns:
        UserWarning: what the axes of an array are read as, or which entry is taken for the labels, if this is unclear.
    """
    if isinstance(images, DataLoader | ImageLoader):
        if clips is not None:
            raise ImageError(
                f"clips= samples the frames of a folder or of the items of a data set; of {type(images).__name__}, "
                f"give its data set, or batches of clips (N, C, T, H, W)"
            )
        own = ImageLoader(images) if isinstance(images, DataLoader) else images
        ids = own.ids if ids is None else ids
        labels = own.labels if labels is None else as_texts(labels)
        image_key = own.image_key if image_key is None else image_key
        label_key = own.label_key if label_key is None else label_key
        axes = own.axes if axes is None else axes
        return own.read_as(ids, labels, image_key, label_key, axes)
    image_set = _image_set(images, image_key, label_key if labels is None else (), axes, clips)
    for name, key in (("image", image_key), ("label", label_key)):
        if key is not None and not is_data_set(images):
            raise ImageError(f"{name}_key= names the {name} within items of a data set, not of {type(images).__name__}")
    array = isinstance(images, Tensor | np.ndarray) or (isinstance(images, str | Path) and _is_array_file(Path(images)))
    if axes is not None and clips is None and not array:
        raise ImageError(f"axes= names the axes of a tensor or an array, not of {type(images).__name__}")
    return named(image_set, ids, labels)


def require_image_set(images: ImageSet | ImageLoader) -> ImageSet:
    """Refuse a loader, for work that divides images into batches itself.

    Raises:
        ImageError: the images come from a loader.
    """
    if isinstance(images, ImageSet):
        return images
    raise ImageError(
        f"this study divides its images itself, but {images.name} comes from a loader; give the loader's data set "
        f"(studies sweep and pairs take loaders)"
    )


def named(images: ImageSet, ids: Sequence[str] | None, labels: Any) -> ImageSet:
    """Give images other ids and labels.

    Args:
        images: the image set.
        ids: one name per image; None leaves them.
        labels: one label per image, as text or whole numbers, in the order of the images or by id; None leaves them.

    Raises:
        ImageError: they are not text that can be stored, repeat ids, or differ in number from the images.
    """
    if ids is not None and len(ids := require_texts(ids, "ids", ImageError)) != len(images):
        raise ImageError(f"{len(ids)} ids for {len(images)} images")
    parts: dict[str, Any] = {} if ids is None else {"ids": ids}
    if isinstance(labels, Mapping):
        labels = _labels_by_id(labels, images.ids if ids is None else ids)
    if labels is not None:
        parts["labels"] = require_texts(as_texts(labels), "labels", ImageError)
    if not parts:
        return images
    told = {"ids": None, "labels": None} | {name: tuple(texts) for name, texts in parts.items()}
    return replace(images, **parts).made_by(named, images=images, **told)


def _labels_by_id(labels: Mapping[Any, Any], ids: Sequence[str]) -> list[Any]:
    absent = [name for name in ids if name not in labels]
    if absent:
        near = did_you_mean(absent[0], [str(name) for name in labels])
        raise ImageError(f"labels lack {len(absent)} of {len(ids)} images, first {brief(absent[0])}{near}")
    return [labels[name] for name in ids]


def warn_of_folder(name: str, path: str | Path) -> None:
    """Warn if the name of an embedded set is also that of a folder, which is then not read."""
    if Path(path).is_dir():
        warnings.warn(
            f"{name!r} is the embedded image set of that name, and not the folder {str(path)!r}; for the folder, write "
            f"{'./' + name!r}",
            stacklevel=4,
        )


def is_data_set(images: Any) -> bool:
    """Whether a value is read item by item, by index."""
    sequence = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    return sequence and not isinstance(images, Mapping | str | bytes | bytearray | Tensor | np.ndarray | ImageSet)


def _image_set(
    images: Any, image_key: Key | None, label_key: Key | None, axes: str | None, clips: int | None = None
) -> ImageSet:
    from rsm_probe.sources.images.registry import EMBEDDED

    embedded = isinstance(images, str) and images in EMBEDDED
    if clips is not None and (embedded or not (isinstance(images, str | Path) or is_data_set(images))):
        raise ImageError(
            f"clips= samples the frames of a folder or of the items of a data set, not of "
            f"{f'the embedded set {images!r}' if embedded else type(images).__name__}"
        )
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str) and images in EMBEDDED:
        warn_of_folder(images, images)
        return EMBEDDED[images]()
    if isinstance(images, str | Path):
        path = Path(images)
        # pathlib turns an empty name into the working folder.
        if images == "" or (len(path.parts) == 1 and not exists(path)):
            hint = did_you_mean(str(images), EMBEDDED)
            raise ImageError(
                f"no folder or embedded image set {brief(str(images))}{hint} (embedded: {', '.join(EMBEDDED)})"
            )
        if _is_array_file(path):
            return from_array_file(path, axes)
        return folder(path) if clips is None else folder_of_clips(path, clips, axes)
    if isinstance(images, Tensor | np.ndarray):
        return from_tensor(images, axes=axes)
    if (
        clips is None
        and isinstance(images, list | tuple)
        and images
        and all(isinstance(item, str | Path) for item in images)
    ):
        return from_paths(images)
    if is_data_set(images):
        return from_dataset(images, image_key=image_key, label_key=label_key, clips=clips, axes=axes)
    raise ImageError(f"cannot take images from {type(images).__name__}; {_instead_of(images)}")


def _is_array_file(path: Path) -> bool:
    return path.suffix.lower() in (".npy", ".npz", ".pt", ".pth", ".pkl", ".pickle") and isfile(path)


def _instead_of(images: Any) -> str:
    """Suggest what to give instead of a value that is not a sequence of images."""
    if isinstance(images, IterableDataset):
        return "wrap it, as in torch.utils.data.DataLoader(data, batch_size=64)"
    if isinstance(images, Mapping):
        return "give one of its values, or list(images.values()) if the values are images"
    if isinstance(images, str | bytes | bytearray | int | float) or not isinstance(images, Iterable):
        return "give a folder, a tensor or a data set"
    return (
        "images are read by index, and more than once; give a list, or a data set with a length, or for batches "
        "rsm_probe.sources.ImageLoader(list(batches))"
    )


def from_tensor(
    tensor: Tensor | np.ndarray,
    ids: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    *,
    axes: str | None = None,
) -> ImageSet:
    """Make an image set from a tensor or array of images: (N, C, H, W), (N, C, T, H, W), or as `axes` says.

    Tensors and arrays of a floating-point type are ready for the models; float64, NumPy's default, becomes float32.
    Arrays of bytes are pictures, which pass each model's own preprocessing. Axes of arrays are recognised by the number
    of colours.

    Args:
        tensor: the images.
        ids: one name per image; numbers by default.
        labels: one label per image, if known.
        axes: one letter per axis; see `as_images`.

    Raises:
        ImageError: the tensor has another number of axes, is empty, holds integers, or has no plain values (a sparse
            one, for example); the axes of an array cannot be told; ids or labels are not text, repeat ids, or differ in
            number from the images.

    Warns:
        UserWarning: what the axes of an array are read as.
    """
    pictures = isinstance(tensor, np.ndarray) and tensor.dtype == np.uint8
    if isinstance(tensor, Tensor):
        require_dense(tensor, "the tensor of images", ImageError)
    else:
        tensor = real_array(tensor, "the array of images", ImageError)
    spectrograms = " (name the axes of spectrograms: axes='NFT')" if tensor.ndim == 3 and not pictures else ""
    if 0 in tensor.shape or not (tensor.ndim in (4, 5) or (tensor.ndim == 3 and (pictures or axes is not None))):
        raise ImageError(
            f"a tensor of images must have shape (N, C, H, W), found {tuple(tensor.shape)}; clips and volumes have "
            f"(N, C, T, H, W){spectrograms}"
        )
    if isinstance(tensor, Tensor):
        order = list(range(tensor.ndim)) if axes is None else in_order(axes, tuple(tensor.shape))
        tensor = tensor.detach().permute(order)
    else:
        if axes is None and (pictures or tensor.dtype.kind == "f"):
            axes = recognised_axes(tensor)
        tensor = tensor if axes is None else tensor.transpose(in_order(axes, tensor.shape))
    names = [str(k) for k in range(len(tensor))] if ids is None else require_texts(ids, "ids", ImageError)
    if len(names) != len(tensor):
        raise ImageError(f"{len(names)} ids for {len(tensor)} images")
    if pictures:
        return _pictures(np.asarray(tensor), names, labels, clips=axes is not None and "T" in axes.upper())
    pixels = tensor if isinstance(tensor, Tensor) else as_float_tensor(tensor)
    if not pixels.is_floating_point():
        raise ImageError(
            f"a tensor of images must hold floating-point values that are ready for the models, found {pixels.dtype}; "
            f"give `.float()`, scaled and normalised as in the models' training, or pictures as an array of bytes, "
            f"numpy.uint8"
        )
    pixels = pixels.to(torch.float32 if pixels.dtype == torch.float64 else pixels.dtype)
    return ImageSet(
        "tensor",
        names,
        lambda index: pixels[index],
        labels=labels,
        content=lambda: digest(map(pixel_bytes, pixels)),
        extract=lambda pixels: pixels,  # these are images whatever their axes
    )


def from_array_file(path: Path, axes: str | None) -> ImageSet:
    """Read a file that holds an array of all images; see `from_tensor`.

    Raises:
        ImageError: the file cannot be read, or is of a format that can run code.
    """
    if path.suffix.lower() != ".npy":
        raise ImageError(
            f"{path} may hold objects that run code, and is not read as images; give its tensor, as in "
            f"as_images(torch.load({str(path)!r}, weights_only=True)), or save it by numpy.save('images.npy', "
            f"tensor.numpy()) and give this file"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read the array {path}: {error}") from error
    images = from_tensor(array, axes=axes).changed(name=path.stem)
    return images.made_by(_from_array_file, path=absolute_path(path), axes=axes)


def _from_array_file(path: str, axes: str | None) -> ImageSet:
    return from_array_file(Path(path), axes)


def _pictures(array: np.ndarray, ids: Sequence[str], labels: Sequence[str], clips: bool) -> ImageSet:
    """Make an image set from bytes (N, H, W), or (N, C, H, W) with 1, 3 or 4 colours, or clips (N, C, T, H, W)."""
    if clips and array.ndim == 5 and array.shape[1] in (1, 3, 4):
        frames = array.transpose(0, 2, 3, 4, 1)
        return ImageSet(
            "array", ids, lambda index: Clip([picture(frame) for frame in frames[index]]), labels=labels,
            content=lambda: digest(np.ascontiguousarray(clip).data for clip in frames), extract=lambda clip: clip,
        )  # fmt: skip
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[1] not in (1, 3, 4)):
        raise ImageError(
            f"pictures must have 1, 3 or 4 colours of bytes and two further axes, found the array of shape "
            f"{array.shape} in the order (N, C, ...); give numbers that are ready for the models, as in "
            f"torch.from_numpy(array).float() / 255"
        )
    array = array if array.ndim == 3 else array.transpose(0, 2, 3, 1)
    return ImageSet(
        "array",
        ids,
        lambda index: picture(array[index]),
        labels=labels,
        content=lambda: digest(np.ascontiguousarray(image).data for image in array),
    )


def from_dataset(
    dataset: Any,
    name: str | None = None,
    *,
    image_key: Key | None = None,
    label_key: Key | None = None,
    clips: int | None = None,
    axes: str | None = None,
) -> ImageSet:
    """Make an image set from any sequence of images, or of tuples or mappings that contain one; see `image_of`.

    Labels that can be known without reading items are used (see `labels_of`), so that no image is decoded twice.
    Others are read with the images, from the entry that holds them in the first and last item. So are the objects of
    object detection (see `from_detections`), which become annotations.

    Args:
        dataset: the data set, with `__len__` and `__getitem__`.
        name: the name of the image set; the class of the data set by default.
        image_key: name or index of the image within an item, if it cannot be recognised; several lead into nested
            items.
        label_key: the same of the label, if the entry that is recognised holds something else; () for no labels.
        clips: number of frames that are taken of each item, which is a list of frames; see `as_images`.
        axes: the order of axes in which models take clips.

    Raises:
        ImageError: the data set is empty or has no length, or `label_key` names no label. Items that are not images
            raise it when they are loaded; the message names the item and says what to write instead.

    Warns:
        UserWarning: which entry is taken for the labels, if this is unclear.
    """
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError, ValueError, OverflowError) as error:
        raise ImageError(f"{type(dataset).__name__} does not give its number of images: {error}") from error
    if not count:
        raise ImageError(f"{type(dataset).__name__} contains no images")
    if count > _MOST_IMAGES:
        raise ImageError(
            f"{type(dataset).__name__} holds {count} images, above the limit of {_MOST_IMAGES} (each id takes 70 "
            f"bytes); give parts of it, such as torch.utils.data.Subset"
        )
    order = axes if clips is None else require_clips(clips, axes)
    # Hashing all images would cost a whole decoding pass, so hash an evenly spaced sample.
    some = np.unique(np.linspace(0, count - 1, _FINGERPRINTED).astype(int))
    labels = labels_of(dataset) if label_key is None else []
    known = bool(labels) and all(labels)
    items = [] if known and not isinstance(dataset, list | tuple) else first_and_last(dataset)
    reader = None if known else label_reader(dataset, items, image_key, label_key)

    def label(index: int, item: Any) -> str:
        return (labels[index] if labels else "") or ("" if reader is None else reader(item))

    texts = None if reader is None else ItemLabels(count, lambda index: label(index, dataset[index]))

    def load(index: int) -> Any:
        item = dataset[index]
        if texts is not None:
            texts.see(index, label(index, item))
        return item

    images: ImageSet = ImageSet(
        name or type(dataset).__name__,
        [str(k) for k in range(count)],
        load,
        labels=labels if texts is None else texts,
        annotations=item_objects(dataset, items) or (),
        content=lambda: digest(pixel_bytes(images[int(index)]) for index in some),
        extract=(lambda item: image_of(item, image_key)) if clips is None else clip_reader(clips, order, image_key),
    )
    return images
