"""Means over all images for centring: computed in a first pass, subtracted in the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite
from rsm_probe.errors import RepresentationError
from rsm_probe.forward.layer_consumer import ImageBatch, finished_name
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering, check_centering, subtract_mean, token_mean
from rsm_probe.streaming.batch_consumer import BatchConsumer, TakenLayer


class Means(BatchConsumer[Tensor]):
    """Means over all images, computed in a first pass, that `Accumulator` subtracts in the second.

    `update` adds a batch, as `Accumulator.update` does; all images have the same weight. It also raises
    RepresentationError if layers, locations or channels differ from those of previous batches.

    Args:
        centering: "location-mean" (the paper's) or "channel-mean" (unchanged by permutations of locations).

    Attributes:
        images: number of images so far.
        batches: number of batches so far.

    Raises:
        RepresentationError: an unknown centering, or None.
    """

    def __init__(self, centering: Centering) -> None:
        super().__init__()
        checked = check_centering(centering)
        if checked is None:
            raise RepresentationError("Means needs a centering: 'location-mean' or 'channel-mean'")
        self.centering: Centering = checked
        self.images = self.batches = 0
        self._sums: dict[tuple[str, str], Tensor] = {}

    def __repr__(self) -> str:
        return f"Means({self.centering!r}: {self.batches} batches, {self.images} images, {len(self._sums)} layers)"

    def _work_on(self, model: str, layer: str, representation: Representation) -> Tensor:
        tokens = representation.tokens
        return token_mean(tokens, self.centering).cpu() * len(tokens)

    def _accepts(self, layers: Sequence[tuple[str, str]], images: int) -> bool:
        now = dict.fromkeys(layers)
        changed = [key for key in {**self._sums, **now} if (key in self._sums) != (key in now)]
        if self._sums and changed:
            model, layer = changed[0]
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} is "
                + ("missing from this batch but was in" if changed[0] in self._sums else "in this batch but not in")
                + " previous batches; the means of all layers must cover the same images"
            )
        return True

    def _add(self, batch: ImageBatch, taken: Mapping[tuple[str, str], TakenLayer[Tensor]]) -> None:
        totals = {key: part.work for key, part in taken.items() if part.work is not None}
        for (model, layer), total in totals.items():
            before = self._sums.get((model, layer))
            if before is not None and before.shape != total.shape:
                raise RepresentationError(
                    f"layer {layer!r} had {before.shape[1]} locations of {before.shape[2]} channels and now has "
                    f"{total.shape[1]} of {total.shape[2]}; resize all images to one size"
                    + (" or use 'channel-mean'" if before.shape[2] == total.shape[2] else "")
                )
        self._sums |= {key: self._sums[key] + total if key in self._sums else total for key, total in totals.items()}
        self.images += next(iter(taken.values())).images
        self.batches += 1

    def subtract(self, model: str, layer: str, tokens: Tensor) -> Tensor:
        """Subtract the mean of a layer from its tokens (N, S, C).

        Raises:
            RepresentationError: the first pass did not include this layer, or a difference overflows.
        """
        known = {name: total for (of_model, name), total in self._sums.items() if of_model == model}
        name = finished_name(layer, known)
        if name not in known:
            raise RepresentationError(
                f"there is no mean for layer {layer!r} of model {model!r}; update the means in a first pass"
            )
        centred = subtract_mean(tokens, known[name] / self.images)
        # The difference of two large finite numbers may overflow.
        if (bad := first_nonfinite(centred)) is not None and first_nonfinite(tokens) is None:
            raise RepresentationError(
                f"layer {layer!r} of model {model!r}: image {bad} of this batch minus the mean overflows "
                f"{tokens.dtype}; scale the outputs of the layer"
            )
        return centred

    def state(self) -> dict[str, np.ndarray]:
        """The sums as plain arrays, from which `restore` continues."""
        names = [list(key) for key in self._sums]
        sums = {f"sum{k}": total.numpy() for k, total in enumerate(self._sums.values())}
        return {
            "batches": np.array(self.batches),
            "images": np.array(self.images),
            "names": np.array(names, dtype=np.str_).reshape(-1, 2),
            **sums,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from the arrays of `state`."""
        # States of earlier versions do not include the number of batches.
        self.images, self.batches = int(state["images"]), int(state.get("batches", 0))
        self._sums = {
            (str(model), str(layer)): torch.from_numpy(state[f"sum{k}"])
            for k, (model, layer) in enumerate(state["names"])
        }
