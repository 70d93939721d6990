"""Where objects stand in composed scenes.

Every kind of choice (how many objects, which, how large, where, ...) has random numbers of its own, and object k of an
image always takes the k-th of them. So an option that changes leaves all other choices as they were, up to what has to
fit beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from rsm_probe.checks import brief, require_number, require_seed, require_whole
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.limits import require_edge
from rsm_probe.sources.images.objects.cut_outs import CutOut

# Smallest longer side of an object in pixels.
_SMALLEST = 4
# Objects of a scene; time grows with their square.
_MOST_OBJECTS = 100
_MOST_FRAGMENTS = 1000
# Positions drawn for an object at each of these sizes, as shares of the range from its drawn size to the smallest.
_SIZES = (0.0, 0.0, 1 / 3, 2 / 3, 1.0)
_POSITIONS = 25
# Attempts at a whole scene.
_ATTEMPTS = 40


class Draw(IntEnum):
    """What a random generator is for."""

    NUMBER = 0
    OBJECTS = 1
    SCALES = 2
    POSITIONS = 3
    BACKGROUND = 4
    CROP = 5
    FRAGMENTS = 6
    SHARED_BACKGROUND = 7


@dataclass(frozen=True)
class LayoutOptions:
    """How scenes are composed; see `composed`.

    Raises:
        ImageError: an option is out of range, or does not suit another.
    """

    size: int
    seed: int
    frames: int
    objects: tuple[int, int]
    scale: tuple[float, float]
    overlap: float
    jitter: float
    margin: float
    clutter: int

    def __post_init__(self) -> None:
        require_edge(self.size)
        require_seed(self.seed, "seed", ImageError)
        require_whole(self.frames, "frames", 1, ImageError)
        require_whole(self.clutter, "clutter", 0, ImageError, most=_MOST_FRAGMENTS)
        for name in ("overlap", "jitter"):
            require_number(getattr(self, name), name, ImageError, least=0, most=1)
        require_number(self.margin, "margin", ImageError, least=0, most=0.4)
        for number in self.objects:
            require_whole(number, "objects", 1, ImageError, most=_MOST_OBJECTS)
        for share in self.scale:
            require_number(share, "scale", ImageError, above=0, most=1)
        for name, ends in (("objects", self.objects), ("scale", self.scale)):
            if ends[0] > ends[1]:
                raise ImageError(f"{name} must name its smaller end first, found {brief(ends)}")
        if self.edges[0] < _SMALLEST:
            raise ImageError(
                f"scale: {self.scale[0]} of size={self.size} is {self.edges[0]} pixels; objects need {_SMALLEST}"
            )
        if self.edges[1] > self.free:
            raise ImageError(
                f"scale: {self.scale[1]} of size={self.size} is {self.edges[1]} pixels, but margin={self.margin} "
                f"leaves {self.free}; lower scale or margin"
            )

    @property
    def edges(self) -> tuple[int, int]:
        """Smallest and largest longer side of an object, in pixels."""
        return round(self.scale[0] * self.size), round(self.scale[1] * self.size)

    @property
    def border(self) -> int:
        """Pixels at each edge that objects leave free."""
        return math.ceil(self.margin * self.size)

    @property
    def free(self) -> int:
        """Edge of the square in which objects stand, in pixels."""
        return self.size - 2 * self.border

    def draws(self, purpose: Draw, number: int, *more: int) -> np.random.Generator:
        """The generator of one purpose for an image, or for a scene of several frames."""
        return np.random.default_rng([self.seed, int(purpose), number, *more])


def both_ends(value: Any, name: str) -> tuple[Any, Any]:
    """A range given by its two ends, or by one number that is both.

    Raises:
        ImageError: it is a list of another length.
    """
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ImageError(f"{name} must be a number, or two for a range, found {brief(value)}")
    return value[0], value[1]


class Placed(NamedTuple):
    """An object of a scene.

    Attributes:
        number: index of its cut-out.
        edge: its longer side in pixels.
        left: where its picture begins, pixels from the left.
        top: where its picture begins, pixels from above.
        box: left, top, right and bottom of its visible pixels.
        area: number of its visible pixels.
    """

    number: int
    edge: int
    left: int
    top: int
    box: tuple[int, int, int, int]
    area: int


def objects_of(options: LayoutOptions, scene: int, classes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Choose the objects of a scene.

    Args:
        options: how scenes are composed.
        scene: number of the scene.
        classes: the indices of the cut-outs of each class.

    Returns:
        The class and the cut-out of each object, as indices.
    """
    fewest, most = options.objects
    number = fewest + int(options.draws(Draw.NUMBER, scene).random() * (most - fewest + 1))
    shares = options.draws(Draw.OBJECTS, scene).random((number, 2))
    kinds = [int(share * len(classes)) for share in shares[:, 0]]
    return [
        (kind, classes[kind][int(share * len(classes[kind]))])
        for kind, share in zip(kinds, shares[:, 1], strict=True)
    ]  # fmt: skip


def laid_out(
    options: LayoutOptions, image: int, shown: Sequence[tuple[int, int]], cut_outs: Sequence[CutOut]
) -> list[Placed]:
    """Place the objects of an image.

    Args:
        options: how scenes are composed.
        image: number of the image.
        shown: class and cut-out of each object; see `objects_of`.
        cut_outs: all cut-outs.

    Returns:
        The objects in the order in which they are drawn.

    Raises:
        ImageError: they do not fit.
    """
    smallest, largest = options.edges
    shares = options.draws(Draw.SCALES, image).random(len(shown))
    edges = [smallest + round(share * (largest - smallest)) for share in shares]
    homes = _homes(options, [kind for kind, _ in shown])
    for attempt in range(_ATTEMPTS):
        # Large objects may leave no room for others; the last attempt has the smallest.
        shrunk = [edge - round(attempt / (_ATTEMPTS - 1) * (edge - smallest)) for edge in edges]
        points = options.draws(Draw.POSITIONS, image, attempt).random((len(shown), len(_SIZES), _POSITIONS, 2))
        canvas = _Canvas(options)
        for (_, number), edge, home, drawn in zip(shown, shrunk, homes, points, strict=True):
            if not canvas.place(number, cut_outs[number], edge, home, drawn):
                break
        else:
            return canvas.placed
    raise ImageError(
        f"image {image}: {len(shown)} objects of scale {' to '.join(map(str, options.scale))} do not fit "
        f"with overlap={options.overlap}, jitter={options.jitter} and margin={options.margin}; lower objects or "
        f"scale, or raise overlap"
    )


def _homes(options: LayoutOptions, kinds: Sequence[int]) -> list[tuple[float, float]]:
    """The point of a regular grid at which each object stands without jitter.

    The first object of a class stands at the cell of its class, if that is free, and all others at the next free cell:
    the same objects in any two images stand at the same points.
    """
    side = math.ceil(math.sqrt(options.objects[1]))
    cells: dict[int, int] = {}  # cell -> object
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    for number in sorted(range(len(kinds)), key=lambda k: (first[kinds[k]] != k, kinds[k])):
        cell = kinds[number] % side**2
        while cell in cells:
            cell = (cell + 1) % side**2
        cells[cell] = number
    pitch = options.free / side
    by_object = {number: cell for cell, number in cells.items()}
    centres = [options.border + (k + 0.5) * pitch for k in range(side)]
    return [(centres[by_object[k] % side], centres[by_object[k] // side]) for k in range(len(kinds))]


class _Canvas:
    """The objects that are placed so far, and which of their pixels others hide."""

    def __init__(self, options: LayoutOptions) -> None:
        self._options, self._border, self._free = options, options.border, options.free
        self.placed: list[Placed] = []
        self._visible: list[np.ndarray] = []

    def place(self, number: int, cut_out: CutOut, edge: int, home: tuple[float, float], points: np.ndarray) -> bool:
        """Place an object at the first position where it fits, at its size or, if there is none, at a smaller one.

        Args:
            number: index of the cut-out.
            cut_out: the cut-out.
            edge: longer side in pixels.
            home: where its centre stands without jitter, in pixels.
            points: uniform numbers in [0, 1), (sizes, positions, 2).

        Returns:
            Whether it fits.
        """
        options = self._options
        tried = set()
        for share, of_size in zip(_SIZES, points, strict=True):
            smaller = edge - round(share * (edge - options.edges[0]))
            visible = cut_out.visible(smaller)
            inner = _box_of(visible)
            for point in of_size:
                left, top = (
                    self._begin(first, last, centre, float(u))
                    for first, last, centre, u in zip(inner[:2], inner[2:], home, point, strict=True)
                )
                if (smaller, left, top) in tried:
                    continue
                tried.add((smaller, left, top))
                box = (inner[0] + left, inner[1] + top, inner[2] + left, inner[3] + top)
                if self._add(Placed(number, smaller, left, top, box, int(visible.sum())), visible):
                    return True
        return False

    def _begin(self, first: int, last: int, home: float, share: float) -> int:
        """Where a picture begins along an axis, whose visible pixels begin at `first` and end before `last`."""
        border, jitter, length = self._border, self._options.jitter, last - first
        room = self._free - length
        anywhere = border + share * (room + 1)
        begin = math.floor(jitter * anywhere + (1 - jitter) * (home - length / 2 + 0.5))
        return min(max(begin, border), border + room) - first

    def _add(self, new: Placed, visible: np.ndarray) -> bool:
        """Add an object unless it would overlap others too much."""
        most, left_visible = self._options.overlap, {}
        for number, old in enumerate(self.placed):
            shared = _intersection(old.box, new.box)
            if shared is None:
                continue
            area = (shared[2] - shared[0]) * (shared[3] - shared[1])
            if area > most * min(_area(old.box), _area(new.box)):
                return False
            hidden = self._visible[number].copy()
            covers = visible[shared[1] - new.top : shared[3] - new.top, shared[0] - new.left : shared[2] - new.left]
            hidden[shared[1] - old.top : shared[3] - old.top, shared[0] - old.left : shared[2] - old.left] &= ~covers
            if old.area - int(hidden.sum()) > most * old.area:
                return False
            left_visible[number] = hidden
        for number, hidden in left_visible.items():
            self._visible[number] = hidden
        self.placed.append(new)
        self._visible.append(visible)
        return True


def _box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the true values of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    """The box that two boxes share; None if there is none."""
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[2], other[2]), min(box[3], other[3])
    return (left, top, right, bottom) if left < right and top < bottom else None
