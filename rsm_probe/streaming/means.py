"""Means over all images, for centring: gathered in a first pass, subtracted in the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite
from rsm_probe.checks import require_texts
from rsm_probe.errors import RepresentationError
from rsm_probe.probe.representation import Representation, require_finite
from rsm_probe.similarity.centering import Centering, check_centering, subtract_mean, token_mean
from rsm_probe.streaming.probed_layers import Probed, TakenPasses, require_one_batch, walk


class LayerSum(NamedTuple):
    """What one batch adds to the mean of a layer: images, the first of them that is not finite, the sum."""

    images: int
    bad: int | None
    total: Tensor


class Means:
    """Means over all images, gathered in a first pass, that `Accumulator` subtracts in the second.

    Args:
        centering: "location-mean" (the paper's) or "channel-mean" (unchanged by permutations of locations).
    """

    def __init__(self, centering: Centering) -> None:
        chosen = check_centering(centering)
        if chosen is None:
            raise RepresentationError("Means needs a centering: 'location-mean' or 'channel-mean'")
        self.centering: Centering = chosen
        self.images = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._taken = TakenPasses()

    def update(self, probed: Probed, ids: Sequence[str] = ()) -> None:
        """Adds what the last forward pass captured. Images count alike, however large their batch.

        Args:
            probed: as for `Accumulator.update`.
            ids: names of the images, for error messages.

        Raises:
            RepresentationError: NaN or infinity in a layer; another number of locations than before, of images than in
                another layer, or other layers than before. Nothing of the batch counts then.
            LayerError: nothing was captured, or a pass that was taken already.
        """
        self._taken.require_new(probed)
        ids = require_texts(ids, "ids", RepresentationError)
        added: dict[tuple[str, str], LayerSum] = {}
        for model, layer, part in walk(probed, LayerSum):
            part = part if isinstance(part, LayerSum) else self.summed(layer, part)
            require_finite(model, layer, part.bad, ids)
            added[model, layer] = part
        count = require_one_batch([(*key, part.images) for key, part in added.items()], ids)
        self._require_as_before(added)
        for key, part in added.items():
            self._sums[key] = self._sums[key] + part.total if key in self._sums else part.total
        self.images += count
        self._taken.take(probed)

    def _require_as_before(self, added: Mapping[tuple[str, str], LayerSum]) -> None:
        """Refuses other layers or other shapes than those of the batches before."""
        changed = [key for key in {**self._sums, **added} if self._sums and (key in self._sums) != (key in added)]
        if changed:
            model, layer = changed[0]
            raise RepresentationError(
                f"layer {layer!r} of model {model!r} is "
                + ("not in this batch and was in" if changed[0] in self._sums else "in this batch and was not in")
                + " the ones before; a mean is over the same images for every layer"
            )
        for (model, layer), part in added.items():
            before = self._sums.get((model, layer))
            if before is not None and before.shape != part.total.shape:
                raise RepresentationError(
                    f"layer {layer!r} had {before.shape[1]} locations of {before.shape[2]} channels and now has "
                    f"{part.total.shape[1]} of {part.total.shape[2]}; bring all images to one size"
                    + (" or use 'channel-mean'" if before.shape[2] == part.total.shape[2] else "")
                )

    def summed(self, layer: str, kept: Representation) -> LayerSum:
        """What a `Probe` can do with every layer as soon as it has run: `Probe(..., reduce=means.summed)`."""
        count = len(kept.tokens)
        return LayerSum(count, first_nonfinite(kept.tokens), token_mean(kept.tokens, self.centering).cpu() * count)

    def subtract(self, model: str, layer: str, tokens: Tensor) -> Tensor:
        """Tokens (N, S, C) without the mean of their layer.

        Raises:
            RepresentationError: the first pass did not see this layer; a difference beyond the range of numbers.
        """
        if (model, layer) not in self._sums:  # the first of several calls, seen before the others
            layer = f"{layer}#0"
        if (model, layer) not in self._sums:
            raise RepresentationError(
                f"the means hold no layer {layer.removesuffix('#0')!r} of model {model!r}; update them in a first pass"
            )
        centred = subtract_mean(tokens, self._sums[model, layer] / self.images)
        # Of finite tokens: the difference of two large numbers may be no number.
        if (bad := first_nonfinite(centred)) is not None and first_nonfinite(tokens) is None:
            raise RepresentationError(
                f"layer {layer!r} of model {model!r}: image {bad} of this batch less the mean leaves the range of "
                f"{tokens.dtype}; scale the outputs of the layer"
            )
        return centred

    def state(self) -> dict[str, np.ndarray]:
        """Plain arrays from which `restore` continues."""
        names = [list(key) for key in self._sums]
        sums = {f"sum{k}": total.numpy() for k, total in enumerate(self._sums.values())}
        return {
            "images": np.array(self.images),
            "names": np.array(names, dtype=np.str_).reshape(-1, 2),
            **sums,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        self.images = int(state["images"])
        self._sums = {
            (str(model), str(layer)): torch.from_numpy(state[f"sum{k}"])
            for k, (model, layer) in enumerate(state["names"])
        }
