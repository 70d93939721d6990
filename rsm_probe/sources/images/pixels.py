"""Convert pictures of any mode to RGB with 8 bits per channel, and pixels to bytes."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
