"""The interface for consuming layers as they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rsm_probe.forward.token_kinds import SEPARATOR
from rsm_probe.probe.representation import Representation

# (model, layer) as the layer was taken -> the layer's name in the finished pass.
LayerNames = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images that passes through the models.

    Attributes:
        ids: names of the images, or empty.
        labels: labels of the images, or empty.
        numbers: indices in the image set, or empty.
    """

    ids: Sequence[str] = ()
    labels: Sequence[str] = ()
    numbers: Sequence[int] | np.ndarray = ()


class LayerConsumer(Protocol):
    """Receives the layers of each batch as soon as they have run.

    A failed pass has no `end`: the next `begin` discards what was taken from it.
    """

    def begin(self, batch: ImageBatch) -> None:
        """Begins a batch."""

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """Takes one layer. Its tokens belong to the model: read them now, and copy what must last.

        Args:
            model: name of the model.
            layer: name of the layer. The first of several calls of a module has the module's name.
            representation: the layer's representation of the batch.
        """

    def end(self, names: LayerNames) -> None:
        """Ends a batch that has passed through all models.

        Args:
            names: the layers in forward order. Only the end of a pass shows which modules ran several times, so that
                their first call becomes `name#0`.
        """


def finished_name(layer: str, layers: Collection[str]) -> str:
    """The name that a layer will have when its pass ends, judging by an earlier pass.

    Args:
        layer: its name while the pass runs.
        layers: all layer names of a finished pass.
    """
    module, separator, kind = layer.rpartition(SEPARATOR)
    return layer if layer in layers else f"{module}#0{separator}{kind}" if separator else f"{layer}#0"
