"""The annotation of an image: its objects by class, the boxes around them, and what it belongs to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rsm_probe.checks import brief
from rsm_probe.errors import ImageError

# A class, and the box around the object (left, top, right, bottom), if it is known.
Located = tuple[str, Sequence[float] | None]


def annotation(objects: Iterable[Located], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make the annotation of an image.

    Args:
        objects: class and box of each object.
        facts: what else is known, such as `scene` and `video`.
    """
    objects = list(objects)
    return {
        "counts": dict(Counter(name for name, _ in objects)),
        "boxes": [[name, *box] for name, box in objects if box is not None],
        **(facts or {}),
    }


def require_box(where: str, box: Any) -> None:
    """Refuse a box that is not (class, left, top, right, bottom).

    Raises:
        ImageError: it has other entries, numbers that are not finite, or its ends in the wrong order.
    """
    try:
        name, left, top, right, bottom = box
        right_order = float(left) <= float(right) and float(top) <= float(bottom)
        fine = isinstance(name, str | int) and right_order and all(math.isfinite(v) for v in (left, top, right, bottom))
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ImageError(f"{where} has the box {brief(box)}; a box is (class, left, top, right, bottom) in pixels")
