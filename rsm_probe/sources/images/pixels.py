"""Pictures of any mode as RGB with 8 bits per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_probe.errors import ImageError

# Modes of one channel and 16 bits, in one byte order or another.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WHITE = 2**16 - 1
# Formats whose 32-bit pictures hold 16-bit values: PNG in older versions of Pillow, and PGM, which Pillow scales.
_SIXTEEN_IN_32 = ("PNG", "PPM")
# Formats whose 16-bit modes are unsigned and begin at black; a picture made in memory has no format.
_UNSIGNED = (None, "PNG", "TIFF", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB with 8 bits per channel; transparency is dropped.

    Grey values of 16 bits are scaled by the depth that the format declares (12 bits in some TIFF files); Pillow itself
    clips everything above 255. Of several frames, the current one counts: of a file just opened, the first.

    Raises:
        ImageError: the mode does not say which value is white (32-bit integers, floating-point numbers), or cannot be
            converted.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_IN_32):
        return _from_16_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(
            f"mode {image.mode!r} holds {kind}, and nothing says which of them is white; scale the values to [0, 255] "
            f"and save 8 bits, as in Image.fromarray(values.round().astype('uint8')), or give tensors"
        )
    tags: Any = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        # Pillow reads -5 as 251.
        raise ImageError("this TIFF file holds signed numbers, and nothing says which of them is white; save it as PNG")
    if image.mode == "La":  # Pillow converts this mode in two steps only
        image = image.convert("LA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"mode {image.mode!r} cannot be converted to RGB ({error}); save it as RGB") from error


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any layout, as bytes."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    elif plain.layout != torch.strided:
        plain = plain.to_dense()
    # NumPy lacks some number formats, so take the bytes alone.
    return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _from_16_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I" and image.format not in _UNSIGNED:
        raise ImageError(
            f"nothing says which 16-bit value of the format {image.format} is white; save it as PNG, or with 8 bits"
        )
    values, white = np.asarray(image).astype(np.float64), _WHITE
    tags: Any = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        white = 2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = white - values
    return Image.fromarray((values * (255.0 / white)).round().clip(0, 255).astype(np.uint8))
