"""Encodes locations as numbers: one code holds image, frame, row and column.

Frames, rows and columns are fractions of their axis, so that maps of any resolution share their codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Frames, rows and columns are counted in 4096ths of their axis. Codes below 2^53 are exact in float64, which, unlike
# integers, passes through every operation that moves data. Codes start at 1, so that zero padding means no location.
# Negative codes distinguish other values without an image location: queries, and values of other inputs of the model.
EXTENT = 4096
NOWHERE = 0.0
QUERY = -1.0
_INPUTS = -2.0


def code_of_input(number: int) -> float:
    """The code of values that depend on an untraced input and on no image."""
    return _INPUTS - number


def input_of_code(code: float) -> int | None:
    """The number of the untraced input that a code stands for, or None."""
    return int(_INPUTS - code) if code <= _INPUTS else None


def channel_axis(shape: Sequence[int]) -> int | None:
    """The axis of a model's input that holds colours or features, or None if its shape is ambiguous.

    For maps (N, C, H, W) or (N, H, W, C) and videos (N, C, T, H, W) or (N, T, C, H, W), this is the axis of size 3, 1
    or 4, unless the other layout gives a more plausible aspect ratio; for other maps, the axis that differs from two
    equal ones.
    """
    candidates = {4: (1, 3), 5: (1, 2)}.get(len(shape), ())
    for colours in (3, 1, 4):
        fitting = [axis for axis in candidates if shape[axis] == colours]
        if len(shape) == 4:
            fitting = [axis for axis in fitting if _may_be_colours(axis, shape)][:1]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    if len(shape) == 4 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return 3 if shape[1] == shape[2] else 1
    return None


def _may_be_colours(axis: int, shape: Sequence[int]) -> bool:
    """Whether a short axis holds colours rather than a side of a tiny feature map."""
    _, first, second, third = shape
    first_form, last_form = (max(sides) / max(1, min(sides)) for sides in ((second, third), (first, second)))
    if axis == 3:
        return last_form <= first_form
    # Images with four channels are rarer than maps of features that are four wide.
    return first_form <= last_form if first == 4 else not first == second < third


def codes_of_grid(batch: int, spatial: Sequence[int], device: torch.device) -> Tensor:
    """Codes (N, *spatial) of whole images, with axes (rows, columns) or (frames, rows, columns)."""
    code = torch.arange(batch, dtype=torch.float64, device=device).view(-1, *(1 for _ in spatial))
    code = code * EXTENT ** (3 - len(spatial))
    for axis, size in enumerate(spatial, start=1):
        fractions = (torch.arange(size, device=device) * EXTENT // size).double()
        code = code * EXTENT + fractions.view(*(-1 if a == axis else 1 for a in range(len(spatial) + 1)))
    return code + 1


def codes_of_patches(patches: Tensor, grids: Tensor) -> Tensor:
    """Codes (N, L) of patches (N, L, C), from their rows and columns (N, L, 2) or grid sizes (N, 2)."""
    count = patches.shape[1]
    if grids.ndim == 3:
        rows, columns = grids.double().unbind(-1)
        heights, widths = rows.amax(1, keepdim=True) + 1, columns.amax(1, keepdim=True) + 1
        inside = torch.ones_like(rows, dtype=torch.bool)
    else:
        number = torch.arange(count, dtype=torch.float64, device=patches.device).expand(len(patches), -1)
        heights, widths = grids.to(number)[:, None].unbind(-1)
        rows, columns = number // widths, number % widths
        inside = number < heights * widths
    image = torch.arange(len(patches), dtype=torch.float64, device=patches.device)[:, None]
    code = image * EXTENT**3 + (rows * EXTENT // heights) * EXTENT + columns * EXTENT // widths + 1
    return torch.where(inside, code, NOWHERE)


def decode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, frame, row and column of codes, as integers; meaningless where a code is `NOWHERE` or less."""
    whole = codes.long() - 1
    return whole // EXTENT**3, whole // EXTENT**2 % EXTENT, whole // EXTENT % EXTENT, whole % EXTENT
