"""A rectangle of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """A rectangle in pixels of an image, whose upper-left corner is (0, 0).

    Attributes:
        left: where it begins, from the left; positions between pixels are fractions.
        top: where it begins, from the top.
        right: where it ends, from the left.
        bottom: where it ends, from the top.
    """

    left: float
    top: float
    right: float
    bottom: float

    @staticmethod
    def of(width: int, height: int) -> Region:
        """The whole of an image."""
        return Region(0.0, 0.0, float(width), float(height))

    @property
    def width(self) -> float:
        """Its width in pixels."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Its height in pixels."""
        return self.bottom - self.top

    def share(self, box: Sequence[float]) -> float:
        """The share of a box that lies within, in [0, 1].

        A side of length 0 counts as inside where it lies within.

        Args:
            box: left, top, right, bottom.
        """
        left, top, right, bottom = box
        return _share(left, right, self.left, self.right) * _share(top, bottom, self.top, self.bottom)

    def cut(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """The part of a box that lies within; one that lies outside is moved to the nearest edge."""
        left, top, right, bottom = box
        return (
            min(max(left, self.left), self.right),
            min(max(top, self.top), self.bottom),
            min(max(right, self.left), self.right),
            min(max(bottom, self.top), self.bottom),
        )


def _share(begin: float, end: float, first: float, last: float) -> float:
    if begin == end:
        return float(first <= begin <= last)
    return max(0.0, min(end, last) - max(begin, first)) / (end - begin)
