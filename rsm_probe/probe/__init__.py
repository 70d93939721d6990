"""Hooks inside a network: captures named layers and reads their outputs as tokens `(N, S, C)`.

Begin with `probe.py`, then `forward_pass.py` (one pass of the model) and `readers.py`, which applies to each output the
reading that was found for its layer. `tracing` finds it by following values through one pass: `traced_layout.py`
decides which axis holds channels and which hold locations. `representation.py` holds the tokens, and guesses the axes
of outputs that were not traced. This package imports only errors, checks and arrays from the rest of the project.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.probe.describe import LayerInfo, describe_layers
    from rsm_probe.probe.probe import Probe
    from rsm_probe.probe.representation import Grid, Layout, Representation
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "Grid",
    "LayerInfo",
    "Layout",
    "Probe",
    "Representation",
    "describe_layers",
]
