"""One side of a piece of work over pairs: a set of images, made ready once for all pairs that they are part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_probe.matching.matching import Locations, Matching
from rsm_probe.matching.methods.identity import squared_norms
from rsm_probe.matching.scaling import each_rescaled, in_half_precision


@dataclass(frozen=True, eq=False)
class Side:
    """Images in memory, each in a unit of its own, in which no affinity overflows.

    Attributes:
        locations: their concept vectors (N, S, C), scaled, and their grid.
        units: (N,), what the tokens of each image are to be multiplied with.
        squared_norms: |x|^2 of whole images (N,), float64, in the unit of the representations.
        prepared: label of a method -> what it prepared for these images.
    """

    locations: Locations
    units: np.ndarray
    squared_norms: np.ndarray
    prepared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Tensor, grid: tuple[int, ...] | None = None) -> Side:
        """Images by their finite tokens (N, S, C).

        Raises:
            MatchingError: the squares of the tokens of an image do not fit into 64 bits.
        """
        # A layer may be read within the forward pass of a model that runs in half precision.
        with torch.autocast(tokens.device.type, enabled=False):
            scaled, units = each_rescaled(tokens)
            return cls(Locations(scaled, grid), units, squared_norms(scaled) * units**2)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tokens(self) -> Tensor:
        """The scaled tokens, (N, S, C)."""
        return self.locations.tokens

    def contiguous(self) -> Side:
        """The same images, with every image's tokens in one piece of memory."""
        if self.tokens.is_contiguous():
            return self
        return replace(self, locations=Locations(self.tokens.contiguous(), self.locations.grid), prepared={})

    def prepare(self, methods: Mapping[str, Matching]) -> Side:
        """Have methods prepare these images, unless they did already; then several threads may solve pairs of them."""
        for label, method in methods.items():
            if label not in self.prepared:
                self.prepared[label] = method.prepare(self.locations)
        return self

    @cached_property
    def half(self) -> tuple[Tensor, np.ndarray]:
        """The tokens rounded to half precision, and the units (N,) of the rounded images."""
        return in_half_precision(self.tokens)
