"""Find the part of an image that a preprocessing passes on, whatever it is made of, by probing it.

Black, white and stepped images of the size in question pass the preprocessing. Where a step from black to white appears
in its output says which column of the image is which column of the output: two steps give scale and offset of an axis.
The edges of a resized image, or of a crop, are whole numbers of pixels, so what was measured to some hundredths of a
pixel is exact once it is rounded to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rsm_probe.errors import ModelError
from rsm_probe.sources.images.image_set import UNREADABLE
from rsm_probe.sources.models.view.region import Region

# Sides below this number of pixels do not hold two steps and what a filter needs around them.
_SMALLEST = 8
# Pixels, of the image or of the output, that a step keeps from every edge: filters reach no further.
_MARGIN = 3
# By how much an output may depart from one that is scaled evenly, as a share of the side and in pixels.
_UNEVEN, _UNEVEN_PIXELS = 0.02, 0.75
# Shares of the largest response to white: above the first, an output shows the image, and below the second it does not.
_SHOWS, _BLANK = 0.5, 0.02
# What lies this close to a whole number of pixels is one.
_ROUNDED = 0.2


def seen_region(preprocess: Callable[[Image.Image], Any], size: tuple[int, int]) -> Region:
    """The part of an image that a preprocessing passes on, in pixels of the image.

    Of images whose sides have fewer than 32 pixels, and of what is not resized or cropped to whole pixels, it is known
    to a tenth of a pixel.

    Args:
        preprocess: PIL image -> tensor (C, H, W).
        size: width and height of the image.

    Raises:
        ModelError: it cannot be known: the preprocessing is random, does not scale evenly (a distortion, a rotation, a
            mirrored border), adapts to the brightness of an image, or makes something other than one picture; or a side
            of the image has fewer than 8 pixels. The message says which.
    """
    if min(size) < _SMALLEST:
        raise ModelError(f"an image of {size[0]} x {size[1]} pixels is too small to tell which part of it is seen")
    probe = _Probe(preprocess, size)
    left, right = probe.seen(axis=0)
    top, bottom = probe.seen(axis=1)
    return Region(left, top, right, bottom)


class _Probe:
    """A preprocessing with what it makes of a black and of a white image.

    Args:
        preprocess: see `seen_region`.
        size: see `seen_region`.
    """

    def __init__(self, preprocess: Callable[[Image.Image], Any], size: tuple[int, int]) -> None:
        self._preprocess, self._size = preprocess, size
        slope = np.add.outer(np.arange(size[1]), np.arange(size[0])) / sum(size)
        first, second = self._output(slope), self._output(slope)
        if first.shape != second.shape or not np.array_equal(first, second, equal_nan=True):
            raise ModelError("it is random: two calls make different tensors of one image")
        black, white = self._output(np.zeros(size[::-1])), self._output(np.ones(size[::-1]))
        if black.shape != white.shape:
            raise ModelError("the size of its output depends on what the image shows")
        response = white - black
        self._channel = int(np.abs(response).mean(axis=(1, 2)).argmax())
        self._black, self._response = black[self._channel], response[self._channel]
        strength = np.abs(self._response)
        if not np.isfinite(strength).all() or strength.max() == 0:
            raise ModelError("it makes the same of a black and of a white image, so its output adapts to the image")
        shows = strength > _SHOWS * strength.max()
        self._rows, self._columns = shows.any(axis=1), shows.any(axis=0)
        partial = (strength > _BLANK * strength.max()) & ~shows
        one_border = partial.sum() <= 2 * sum(shows.shape)  # an edge between two pixels of the output
        if not (shows == np.outer(self._rows, self._columns)).all() or not one_border:
            raise ModelError("its output does not show the image in one rectangle")

    def _output(self, brightness: np.ndarray) -> np.ndarray:
        """The output for an image of brightness in [0, 1], (H, W): (C, H, W) as float64."""
        grey = np.round(255 * brightness).astype(np.uint8)
        try:
            output = self._preprocess(Image.fromarray(grey).convert("RGB"))
        except UNREADABLE as error:
            raise ModelError(f"it fails on an image of {self._size[0]} x {self._size[1]} pixels: {error}") from error
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim != 3:
            shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
            raise ModelError(f"it makes {type(output).__name__}{shape} of an image, and not one picture (C, H, W)")
        return output.detach().cpu().numpy().astype(np.float64)

    def _along(self, axis: int, values: np.ndarray) -> np.ndarray:
        """What the output shows along an axis of an image whose brightness varies along it; in [0, 1], NaN elsewhere.

        Args:
            axis: 0 for x, 1 for y.
            values: brightness along that axis.
        """
        image = np.broadcast_to(values[None, :] if axis == 0 else values[:, None], self._size[::-1])
        output = self._output(image)
        if output.shape[1:] != self._response.shape:
            raise ModelError("the size of its output depends on what the image shows")
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = (output[self._channel] - self._black) / self._response
        inner = shown[np.ix_(self._rows, self._columns)]
        across = inner.std(axis=axis)
        if not np.isfinite(across).all() or across.max() > _UNEVEN:
            raise ModelError("rows or columns of the image are not rows or columns of its output")
        line = np.full(self._response.shape[1 - axis], np.nan)
        line[self._columns if axis == 0 else self._rows] = inner.mean(axis=axis)
        return line

    def seen(self, axis: int) -> tuple[float, float]:
        """Where the part that is seen begins and ends along an axis, in pixels of the image."""
        length = self._size[axis]
        ramp = (np.arange(length) + 0.5) / length
        line = self._along(axis, ramp)
        rough = _even(line * length, length)
        first, last = rough.seen(length, len(line))
        margin = _MARGIN * max(1.0, abs(rough.scale))
        low, high = int(np.ceil(max(first + margin, _MARGIN))), int(np.floor(min(last - margin, length - _MARGIN)))
        if high <= low:
            return first, last
        shows = np.flatnonzero(~np.isnan(line))
        steps = [self._step(axis, position, shows, rough.scale > 0) for position in (low, high)]
        scale = (high - low) / (steps[1] - steps[0])
        fine = _Scaling(scale, low - scale * steps[0]).rounded(length, len(line))
        if abs(fine.at(steps[0]) - rough.at(steps[0])) > _tolerance(length):
            raise ModelError("its output is not an even scaling of the image")
        return fine.seen(length, len(line))

    def _step(self, axis: int, position: int, shows: np.ndarray, forward: bool) -> float:
        """Where the step from black to white at a position of the image is in the output."""
        line = self._along(axis, (np.arange(self._size[axis]) >= position).astype(np.float64))[shows]
        white = float(line.sum())
        return float(shows[0]) + (len(line) - white if forward else white)


@dataclass(frozen=True)
class _Scaling:
    """Positions of an image, as a function of positions of the output: offset + scale * position."""

    scale: float
    offset: float

    def at(self, position: float) -> float:
        """The position in the image."""
        return self.offset + self.scale * position

    def seen(self, length: int, output: int) -> tuple[float, float]:
        """Where an output of a length begins and ends in an image of a length."""
        ends = sorted((self.at(0), self.at(output)))
        return max(0.0, ends[0]), min(float(length), ends[1])

    def rounded(self, length: int, output: int) -> _Scaling:
        """The scaling by which the resized image, or else the crop of the image, has whole pixels."""
        resized, begin = length / self.scale, -self.offset / self.scale
        if max(abs(value - round(value)) for value in (resized, begin)) < _ROUNDED and round(resized):
            scale = length / round(resized)
            return _Scaling(scale, -scale * round(begin))
        first, last = self.offset, self.at(output)
        if max(abs(value - round(value)) for value in (first, last)) < _ROUNDED and round(first) != round(last):
            return _Scaling((round(last) - round(first)) / output, float(round(first)))
        return self


def _even(positions: np.ndarray, length: int) -> _Scaling:
    """Fit an even scaling to the positions of the image that an output shows.

    Args:
        positions: for every row or column of the output, NaN where it does not show the image.
        length: the side of the image.

    Raises:
        ModelError: it is not even.
    """
    # Beyond the centre of the last pixel, filters repeat it.
    with np.errstate(invalid="ignore"):
        lines = np.flatnonzero((positions > 1.5) & (positions < length - 1.5))
    if len(lines) < 2:
        raise ModelError("its output shows less than two pixels of the image")
    scale, offset = np.polyfit(lines + 0.5, positions[lines], 1)
    beyond = np.abs(offset + scale * (lines + 0.5) - positions[lines]).max()
    if beyond > _tolerance(length) or scale == 0:
        raise ModelError("its output is not an even scaling of the image")
    return _Scaling(float(scale), float(offset))


def _tolerance(length: int) -> float:
    return max(_UNEVEN * length, _UNEVEN_PIXELS)
