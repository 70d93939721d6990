"""The interface of whatever consumes layers as they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rsm_probe.probe.representation import Representation

# (model, layer) as the layer was taken -> the layer's name in the finished pass.
LayerNames = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class ImageBatch:
    """The images that pass through the models together.

    Attributes:
        ids: their names, or none.
        labels: their labels, or none.
        numbers: their indices in the image set, or none.
    """

    ids: Sequence[str] = ()
    labels: Sequence[str] = ()
    numbers: Sequence[int] | np.ndarray = ()


class LayerConsumer(Protocol):
    """Takes the layers of one batch after another, each as soon as it has run.

    A pass that fails is never ended: the next `begin` drops what was taken of it.
    """

    def begin(self, batch: ImageBatch) -> None:
        """A batch starts to pass through the models."""

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """Takes one layer. Its tokens belong to the model: read them now, and copy what has to last.

        Args:
            model: whose layer it is.
            layer: its name; the first call of a module that runs again goes by the name of the module.
            representation: of all images of the batch.
        """

    def end(self, names: LayerNames) -> None:
        """The batch passed through all models.

        Args:
            names: the layers in forward order. Only the end of a pass shows which modules ran again, and that the
                first of several calls is `name#0`.
        """


def finished_name(layer: str, layers: Collection[str]) -> str:
    """The name that a layer has in a finished pass, by the layers of an earlier pass.

    Args:
        layer: as it was taken while the pass runs.
        layers: all names of a finished pass.
    """
    return layer if layer in layers else f"{layer}#0"
