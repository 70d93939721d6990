"""Representations of a whole set of images on disk, layer by layer.

Begin with `recording.py` (`capture()`), then `captured_layers.py` (`Capture`, and a layer as the rest of the package
reads it).
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.captures.captured_layers import Capture, CapturedLayer
    from rsm_probe.captures.recording import capture
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Capture",
    "CapturedLayer",
    "capture",
]
