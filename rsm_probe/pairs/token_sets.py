"""Token sets: the tokens of many images; a captured layer, tokens in memory, or a subset of either."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rsm_probe.arrays import first_nonfinite, real_tensor
from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.checks import brief
from rsm_probe.errors import ComparisonError, RepresentationError, StorageError
from rsm_probe.probe.representation import Representation
from rsm_probe.similarity.centering import Centering, subtract_mean
from rsm_probe.similarity.labelled import image_names


class TokenSet(Protocol):
    """The tokens of N images, S locations and C channels.

    Attributes:
        ids: N names of the images.
        name: of the layer, or of the tokens in messages.
        where: path or URL of the tokens, for messages.
        grid: (H, W) of the locations, where known.
    """

    ids: list[str]
    name: str
    where: str
    grid: tuple[int, ...] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, locations, channels."""

    @property
    def mean(self) -> Tensor:
        """The mean over images (S, C), float64; a subset has that of the whole set."""

    @property
    def images_per_chunk(self) -> int:
        """Number of images that are best read together."""

    def __len__(self) -> int: ...

    def tokens(self, images: slice = ...) -> Tensor:
        """Tokens (n, S, C) of some images."""


class Tokens:
    """Tokens in memory as a token set.

    Args:
        values: tokens (N, S, C), or a representation, which also knows its grid.
        name: of the tokens, in messages.
        ids: N names; numbers by default.
        grid: (H, W) of the locations.

    Raises:
        RepresentationError: wrong shape, NaN or infinity (the message names the image); a grid that differs from that
            of the representation.
        ComparisonError: wrong number of ids.
    """

    def __init__(
        self,
        values: Tensor | np.ndarray | Representation,
        name: str,
        ids: Sequence[str] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        self.grid = grid
        if isinstance(values, Representation):
            if grid is not None and values.grid not in (None, tuple(grid)):
                raise RepresentationError(f"{name} is a representation with the grid {values.grid}; leave grid= out")
            self.grid, values = values.grid or grid, values.tokens
        self._tokens, self.ids = checked_tokens(values, name, ids)
        self.name = self.where = name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, locations, channels."""
        images, locations, channels = self._tokens.shape
        return images, locations, channels

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def images_per_chunk(self) -> int:
        """Number of images that are best read together; here any."""
        return 1

    def tokens(self, images: slice = slice(None)) -> Tensor:
        """Tokens (n, S, C) of some images."""
        return self._tokens[images]

    @cached_property
    def mean(self) -> Tensor:
        """The mean over images (S, C), float64."""
        return self._tokens.mean(dim=0, dtype=torch.float64)

    @cached_property
    def pooled(self) -> Tensor:
        """The mean over locations of every image (N, C), float64."""
        return self._tokens.mean(dim=1, dtype=torch.float64)


class TokenSubset:
    """Some images of a set, in order, with the mean of the whole set.

    Args:
        images: the set.
        numbers: of the images, ascending.
    """

    def __init__(self, images: TokenSet, numbers: np.ndarray) -> None:
        self._images, self._numbers = images, numbers
        self.ids = [images.ids[int(number)] for number in numbers]
        self.name, self.where, self.grid, self.mean = images.name, images.where, images.grid, images.mean
        self.images_per_chunk = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, locations, channels."""
        return len(self), self._images.shape[1], self._images.shape[2]

    def __len__(self) -> int:
        return len(self._numbers)

    def tokens(self, images: slice = slice(None)) -> Tensor:
        """Tokens (n, S, C) of some of the images; those in one chunk are read together."""
        wanted, chunk = self._numbers[images], self._images.images_per_chunk
        parts = np.split(wanted, np.flatnonzero(np.diff(wanted // chunk)) + 1)
        read = [self._images.tokens(slice(int(part[0]), int(part[-1]) + 1))[part - part[0]] for part in parts]
        return torch.cat(read)


def as_set(images: Any, name: str, ids: Sequence[str] | None = None) -> CapturedLayer | Tokens:
    """Return a captured layer unchanged; make tokens (N, S, C) or a representation a token set.

    Raises:
        RepresentationError: a value of a different kind.
        ComparisonError: names for the images of a captured layer.
    """
    if not isinstance(images, CapturedLayer):
        return Tokens(images, name, ids)
    if ids is not None:
        raise ComparisonError(f"{name}_ids: a captured layer knows the names of its images")
    return images


def warn_of_other_layer(x: CapturedLayer, y: CapturedLayer) -> None:
    """Warn of two different layers, whose channels mean different things."""
    if x.name != y.name:
        warnings.warn(
            f"images of layer {x.name!r} are matched with those of layer {y.name!r}, whose channels mean different "
            f"things; compare layers by their RSMs",
            stacklevel=4,
        )


def checked_tokens(values: Any, name: str, ids: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Check tokens (N, S, C), and return them with the names of their images.

    Raises:
        RepresentationError: wrong type or shape, NaN or infinity (the message names the image).
        ComparisonError: wrong number of ids.
    """
    if not isinstance(values, Tensor | np.ndarray):
        raise RepresentationError(
            f"{name} must be an array of tokens (N, S, C), found {type(values).__name__}{_tokens_of(values)}"
        )
    tokens = real_tensor(values, name, RepresentationError)
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise RepresentationError(f"{name} must hold tokens (N, S, C), found shape {tuple(tokens.shape)}")
    names = image_names(ids, len(tokens), "ids" if name == "z" else f"{name}_ids")
    bad = first_nonfinite(tokens)
    if bad is not None:
        raise RepresentationError(f"{name} holds NaN or infinity, first in image {names[bad]}")
    return tokens, names


def _tokens_of(values: Any) -> str:
    """The end of a message: where to find the tokens in the given value."""
    if hasattr(values, "tokens"):
        return f"; give its .tokens{'()' if callable(values.tokens) else ''}"
    if hasattr(values, "representations"):
        return "; give those of one layer, as in probe.representations['layer'].tokens"
    if isinstance(values, Mapping):
        known = ", ".join(brief(key, 40) for key in [*values][:3])
        return f"; give one of its entries ({known})"
    if isinstance(values, list | tuple):
        return "; of one array (S, C) per image, give numpy.stack(...) or torch.stack(...)"
    if hasattr(values, "dataset") and hasattr(values, "ids"):
        return ", which is what tokens become; compare RSMs by rsm_probe.cka or rsm_probe.compare"
    return ""


def centred_tokens(images: TokenSet, numbers: slice, reference: TokenSet, centering: Centering | None) -> Tensor:
    """Tokens (n, S, C) of some images, minus the mean over the images of a reference.

    Raises:
        StorageError: a chunk cannot be read.
        RepresentationError: the shapes of the two layers differ.
    """
    tokens = images.tokens(numbers)
    bad = first_nonfinite(tokens)
    if bad is not None:
        name = images.ids[(numbers.start or 0) + bad]
        raise StorageError(f"{images.where}: tokens of image {name!r} of {images.name!r} are not finite")
    if centering is not None:
        mean = reference.mean[None]
        tokens = subtract_mean(tokens, mean if centering == "location-mean" else mean.mean(dim=1, keepdim=True))
    return tokens
