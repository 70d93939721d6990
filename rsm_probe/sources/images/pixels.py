"""Convert pictures of any mode to RGB with 8 bits per channel, arrays to images by their axes, and pixels to bytes."""

from __future__ import annotations

import warnings
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_probe.checks import brief, require_text
from rsm_probe.errors import ImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# One-channel 16-bit modes, in different byte orders.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WHITE = 2**16 - 1
# Formats whose 32-bit pictures hold 16-bit values: PNG in older versions of Pillow, and PGM, which Pillow scales.
_SIXTEEN_IN_32 = ("PNG", "PPM")
# Formats whose 16-bit values are unsigned, with 0 as black; None: a picture made in memory.
_UNSIGNED = (None, "PNG", "TIFF", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
# Letters of `axes=`: images, colours or channels, then depth, time, frequency, height and width.
_LETTERS = "NCDTFHW"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB with 8 bits per channel, dropping transparency.

    16-bit grey values are scaled by the depth that the format declares (12 bits in some TIFF files); Pillow itself
    would clip all values above 255. Only the current frame is converted, which is the first in a newly opened file.

    Raises:
        ImageError: the mode does not define which value is white (32-bit integers, floating-point numbers), or cannot
            be converted.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_IN_32):
        return _from_16_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(
            f"mode {image.mode!r} holds {kind} and does not define which value is white; scale the values to [0, 255] "
            f"and save 8 bits, as in Image.fromarray(values.round().astype('uint8')), or give tensors"
        )
    tags: Any = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        # Pillow would read -5 as 251.
        raise ImageError("this TIFF file holds signed numbers and does not define which value is white; save it as PNG")
    if image.mode == "La":  # Pillow converts this mode only in two steps
        image = image.convert("LA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"mode {image.mode!r} cannot be converted to RGB ({error}); save it as RGB") from error


def read_rgb(file: str | PurePath) -> Image.Image:
    """Read an image file as RGB; see `to_rgb`."""
    with Image.open(file) as image:
        return to_rgb(image)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any layout, as bytes, without a copy where they lie in main memory."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    elif plain.layout != torch.strided:
        plain = plain.to_dense()
    # View the values as bytes, because NumPy lacks some number formats of PyTorch.
    return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _from_16_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I" and image.format not in _UNSIGNED:
        raise ImageError(
            f"the format {image.format} does not define which 16-bit value is white; save it as PNG, or with 8 bits"
        )
    values, white = np.asarray(image).astype(np.float64), _WHITE
    tags: Any = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        white = 2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = white - values
    return Image.fromarray((values * (255.0 / white)).round().clip(0, 255).astype(np.uint8))


def colour_axis(shape: tuple[int, ...]) -> int | None:
    """Which axis of an image has the size of colours (1, 3, or for transparency 4): 0 for the first, -1 for the last.

    None if neither has, or both have, so that colours may be first or last.
    """
    for sizes in ((1, 3), (1, 3, 4)):
        first, last = shape[0] in sizes, shape[-1] in sizes
        if first != last:
            return 0 if first else -1
        if first:
            return None
    return None


def image_of_array(array: np.ndarray) -> Image.Image | Tensor:
    """Make a picture of bytes (H, W), (H, W, C) or (C, H, W), or a tensor that is ready for models of other numbers.

    Colours of numbers that are last, (H, W, C), come first in the tensor.

    Raises:
        ImageError: bytes that may have their colours first or last, or have none.
    """
    axis = colour_axis(array.shape)
    if array.dtype == np.uint8:
        if array.ndim == 3 and axis is None:
            raise ImageError(
                f"an array of shape {array.shape} and dtype uint8 may not be read as a picture: neither its first nor "
                f"its last axis alone holds 1, 3 or 4 colours; give PIL images, or float tensors (C, H, W)"
            )
        return picture(array if array.ndim == 2 or axis == -1 else array.transpose(1, 2, 0))
    if array.ndim == 3 and axis == -1:
        array = array.transpose(2, 0, 1)
    return as_float_tensor(array)


def picture(array: np.ndarray) -> Image.Image:
    """Make a picture of bytes (H, W) or (H, W, C) with 1, 3 or 4 colours."""
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def as_float_tensor(array: np.ndarray) -> Tensor:
    """Make a tensor of an array; float64, NumPy's default, becomes float32, which models take."""
    # Contiguous and in native byte order, because PyTorch supports nothing else.
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def in_order(axes: str, shape: tuple[int, ...]) -> list[int]:
    """The order of axes in which images come first, then channels, then all others as they are.

    Args:
        axes: one letter per axis: N for images, C for channels, and D, T, F, H, W, as in "NHWC" or "NTHWC".
        shape: of the array.

    Raises:
        ImageError: `axes` has an unknown or repeated letter, no N, or a different number of axes.
    """
    letters = require_text(axes, "axes", ImageError).upper()
    if set(letters) - set(_LETTERS) or len(set(letters)) < len(letters) or "N" not in letters:
        raise ImageError(
            f"axes must name each axis by one of {', '.join(_LETTERS)}, and N among them, as in 'NHWC'; found "
            f"{brief(axes)}"
        )
    if len(letters) != len(shape):
        raise ImageError(f"axes={axes!r} names {len(letters)} axes, but the images have shape {shape}")
    rank = {"N": 0, "C": 1}
    return sorted(range(len(letters)), key=lambda k: rank.get(letters[k], 2))  # sorting keeps the others in their order


def recognised_axes(array: np.ndarray) -> str:
    """The axes of an array of images, judging by their sizes, with a warning where they are not (N, C, H, W).

    Raises:
        ImageError: the axes cannot be told; the message says how to name them.

    Warns:
        UserWarning: what the array is read as.
    """
    shape, pictures = array.shape, array.dtype == np.uint8
    axis = colour_axis(shape[1:]) if len(shape) > 2 else None
    axes = {(3, None): "NHW", (4, 0): "NCHW", (4, -1): "NHWC"}.get((len(shape), axis)) if pictures else None
    if not pictures:
        both = len(shape) == 4 and axis is None and shape[1] in (1, 3, 4)
        axes = {4: "NHWC" if axis == -1 else None if both else "NCHW", 5: None if axis == -1 else "NCTHW"}.get(
            len(shape)
        )
    if axes is None or (axes == "NHW" and shape[0] in (1, 3, 4)):
        raise ImageError(
            f"cannot tell the axes of an array of shape {shape} and dtype {array.dtype}; name them, as in "
            f"rsm_probe.sources.as_images(array, axes={example(array)!r}), which takes N for images, C for channels, "
            f"and D, T, F, H, W"
        )
    if pictures or axes == "NHWC":
        kind = "pictures, which pass each model's own preprocessing" if pictures else "images that are ready for models"
        warnings.warn(
            f"the array of shape {shape} and dtype {array.dtype} is read as ({', '.join(axes)}): {shape[0]} {kind}; "
            f"if this is not meant, name its axes by rsm_probe.sources.as_images(array, axes=...), or give a float "
            f"tensor (N, C, H, W) that is ready for the models",
            stacklevel=5,  # above this function, `from_tensor`, and both functions of `as_images`
        )
    return axes


def example(array: np.ndarray | Tensor) -> str:
    """Axes that an array of images of this number of axes may have."""
    return {3: "NFT", 4: "NHWC", 5: "NTHWC"}.get(array.ndim, "NCHW")
