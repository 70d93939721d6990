"""Maps: codes of whole images in rows and columns, and how convolutions, pooling and resizing change them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsm_probe.probe.tracing.location_codes import EXTENT, NOWHERE, codes_of_grid, decode
from rsm_probe.probe.tracing.origins import Lost, Origin, compact, first_location, held_once, same_codes


def is_image_order(codes: Tensor) -> bool:
    """Whether codes (N, *spatial) are those of images row by row, apart from padding and cropping."""
    inside = codes > NOWHERE
    parts = decode(codes)
    for axis, coordinates in enumerate([parts[0], *parts[4 - (codes.ndim - 1) :]]):
        others = [a for a in range(codes.ndim) if a != axis]
        lowest = torch.where(inside, coordinates, EXTENT**4).amin(others)
        highest = torch.where(inside, coordinates, -1).amax(others)
        present = highest >= 0
        if not torch.equal(lowest[present], highest[present]) or (lowest[present].diff() < 0).any():
            return False
        if axis == 0 and not torch.equal(lowest, torch.arange(len(lowest), device=lowest.device)):
            return False
    return True


def frames_of(codes: Tensor) -> Tensor | None:
    """The offset of codes (N, H, W) from those of the first frame; None for the first frame itself.

    Raises:
        ValueError: a map holds several frames side by side.
    """
    frames = decode(codes)[1][codes > NOWHERE].unique()
    if len(frames) > 1:
        raise ValueError("several frames side by side")
    return frames.double() * EXTENT**2 if len(frames) and int(frames) else None


def without_border(codes: Tensor, spatial: Sequence[int]) -> Tensor:
    """Codes (B, ...) without the padding (mirrored, repeated) that lets a convolution return the given size."""
    for axis, size in enumerate(spatial, start=1):
        before = codes.shape[axis]
        surplus = before % size if before > size else 0  # a map that grows has no border to remove
        codes = codes.narrow(axis, surplus // 2, before - surplus)
    return codes


def resized(codes: Tensor, spatial: Sequence[int]) -> Tensor | None:
    """Codes (B, *spatial) of B maps (B, ...) after resizing, if each map covers one whole image or frame.

    This holds for images resized one by one and for frames folded into the batch. For windows, the result is None.
    """
    first = codes.flatten(1)[:, :1]
    base = (first - 1).view(-1, *(1 for _ in spatial))
    empty = (codes <= NOWHERE).flatten(1).all(1).view(base.shape)
    begins = (base % EXTENT ** len(spatial) == 0) | empty
    whole = (codes == codes_of_grid(1, codes.shape[1:], codes.device) + base) | empty
    if not bool(begins.all()) or not bool(whole.all()):
        return None
    return torch.where(empty, base + 1, codes_of_grid(1, spatial, codes.device) + base)


def one_map(origins: Sequence[Origin], axis: int) -> Tensor | None:
    """The common origin, with one channel, of stacked maps that were cropped or padded to one size.

    A U-Net joins a map with one that was enlarged and padded, or cropped from a larger one. Their fractions of the
    image differ slightly, but the next convolution treats them as the same locations. So do we if all maps are images
    row by row; the map that covers most of its image represents all.

    Args:
        origins: origins of the maps.
        axis: the channel axis.

    Returns:
        The origin, or None if the maps are not of this kind.
    """
    maps = [origin for origin in origins if isinstance(origin, Tensor)]
    if not maps or any(isinstance(origin, Lost) for origin in origins) or maps[0].ndim not in (4, 5):
        return None
    axis %= maps[0].ndim
    if axis not in (1, maps[0].ndim - 1) or any(held_once(origin).shape[axis] > 1 for origin in maps):
        return None
    maps = [origin.narrow(axis, 0, 1) for origin in maps]
    maps = [origin for origin in maps if bool((held_once(origin) > NOWHERE).any())]
    if not maps or any(origin.shape != maps[0].shape for origin in maps):
        return None
    if all(same_codes(origin, maps[0]) for origin in maps):
        return maps[0]
    codes = [origin.squeeze(axis) for origin in maps]
    frames = [decode(code)[1][code > NOWHERE].unique() for code in codes]
    still = all(len(numbers) == 1 for numbers in frames)
    if (still and len(torch.cat(frames).unique()) > 1) or not all(map(is_image_order, codes)):
        return None
    whole = codes_of_grid(len(codes[0]), codes[0].shape[1:], codes[0].device)
    return maps[max(range(len(maps)), key=lambda k: int((codes[k] == whole).sum()))]


def repeated(codes: Tensor) -> bool:
    """Whether codes (N, *spatial) are whole maps with rows, columns or frames each repeated equally often."""
    sizes = [len(part[codes > NOWHERE].unique()) for part in decode(codes)[4 - (codes.ndim - 1) :]]
    uneven = any(size % max(1, coarse) for size, coarse in zip(codes.shape[1:], sizes, strict=True))
    if uneven or list(codes.shape[1:]) == sizes or bool((codes <= NOWHERE).any()):
        return False
    coarse = codes_of_grid(len(codes), sizes, codes.device)
    for axis, size in enumerate(codes.shape[1:], start=1):
        coarse = coarse.repeat_interleave(size // coarse.shape[axis], axis)
    return torch.equal(codes, coarse)


class Grids:
    """The grids that the convolutions, poolings and enlargements of one forward pass produce.

    Args:
        batch: number of images in the forward pass.

    Attributes:
        laid_out: (H, W) of every map produced, in order.
    """

    def __init__(self, batch: int) -> None:
        self.laid_out: list[tuple[int, int]] = []
        self._batch = batch
        self._laid: dict[tuple[int, ...], Tensor] = {}

    def whole(self, spatial: Sequence[int], device: torch.device) -> Tensor:
        """Codes of whole images; the same tensor for the same grid."""
        key = tuple(spatial)
        if key not in self._laid or self._laid[key].device != device:
            self._laid[key] = codes_of_grid(self._batch, key, device)
        return self._laid[key]

    def lay(self, images: Tensor, origin: Origin, output: Tensor, *, begins: bool, pools: bool) -> Origin:
        """The origin after a convolution, pooling or resizing (B, C, ...) -> (B, C', ...)."""
        spatial = output.shape[2:]
        if images.ndim != output.ndim or output.ndim < 3:
            raise ValueError("images without a batch")
        whole, frames = output.shape[0] == self._batch and len(spatial) > 1, None
        if isinstance(origin, Tensor):
            origin = first_location(origin, 1).squeeze(1)
            if not same_codes(self._laid.get(tuple(images.shape[2:])), origin):
                inside = without_border(origin, spatial)
                whole = whole and (is_image_order(origin) or is_image_order(inside))
                # A single window may hold a map and padding that is removed later: its locations stay in place.
                whole = whole and not (pools and bool((inside <= NOWHERE).any()))
                frames = frames_of(origin) if whole and len(spatial) == 2 else None
        if whole and (isinstance(origin, Tensor) or (origin is None and begins)):
            self.laid_out += [(int(spatial[0]), int(spatial[1]))] if len(spatial) == 2 else []
            codes = self.whole(spatial, output.device)
            return (codes if frames is None else codes + frames).unsqueeze(1).expand(output.shape)
        if not isinstance(origin, Tensor):
            return origin
        if len(spatial) > 1 and (larger := resized(origin, spatial)) is not None:
            return larger.unsqueeze(1).expand(output.shape)
        for axis, size in enumerate(spatial, start=1):
            if origin.shape[axis] != size:
                nearest = torch.arange(size, device=origin.device) * origin.shape[axis] // size
                origin = origin.index_select(axis, nearest)
        return compact(origin).unsqueeze(1).expand(output.shape)

    def enlarged(self, codes: Origin, before: Origin) -> Origin:
        """Gives each entry of an enlarged map (repeated rows and columns, or pixel shuffle) its own location."""
        if not isinstance(codes, Tensor) or not isinstance(before, Tensor) or codes.ndim not in (4, 5):
            return codes
        if len(codes) != self._batch or held_once(codes).numel() <= held_once(before).numel():
            return codes
        for axis in (1, codes.ndim - 1):
            one = codes.narrow(axis, 0, 1).squeeze(axis)
            if held_once(codes).shape[axis] == 1 and repeated(one):
                return self.whole(one.shape[1:], codes.device).unsqueeze(axis).expand(codes.shape)
        return codes
