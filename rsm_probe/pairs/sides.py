"""One side of the pairs: a set of images, prepared once for all their pairs."""

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
    """Images in memory, each scaled by a unit of its own so that no affinity overflows.

    Attributes:
        locations: their scaled concept vectors (N, S, C), and their grid.
        units: (N,); scaled tokens times this are the tokens of the representation.
        squared_norms: |x|^2 of whole images (N,), float64, without scaling.
        prepared: label of a method -> what it prepared for these images.
    """

    locations: Locations
    units: np.ndarray
    squared_norms: np.ndarray
    prepared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Tensor, grid: tuple[int, ...] | None = None) -> Side:
        """Scale finite tokens (N, S, C).

        Raises:
            MatchingError: the squares of the tokens of an image do not fit into 64 bits.
        """
        # Reducers may run under autocast; scale in full precision.
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
        """Have methods prepare these images, once; several threads may then solve their pairs."""
        for label, method in methods.items():
            if label not in self.prepared:
                self.prepared[label] = method.prepare(self.locations)
        return self

    @cached_property
    def half(self) -> tuple[Tensor, np.ndarray]:
        """The tokens rounded to half precision, and the units (N,) of the rounded images."""
        return in_half_precision(self.tokens)
