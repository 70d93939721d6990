"""Which location of which image every value of an activation belongs to, followed through a forward pass.

A tensor's *origin* is a tensor of the same shape that holds, for every element, a code of image, frame, row and column,
or `NOWHERE` for elements that stand for no location (class tokens, padding). Operations that move data move the origins
with them; arithmetic keeps them; a product gives every row the origin of the row that it was made of; convolutions and
poolings lay out a new grid. So the origin of a layer's output says which axis holds images, locations and channels,
which tokens belong to no location, and in which order windows or shuffled tokens stand, whatever the model is called.
Where an operation joins several locations, the first of them stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsm_probe.probe.origins import (
    LOST,
    NOWHERE,
    Lost,
    Origin,
    codes_of_grid,
    codes_of_patches,
    compact,
    first_location,
    held_once,
    is_image_order,
    moved,
    nowhere,
    spread,
)

# What operations do to locations, by their names in ATen. Views are known by their schema; an operation that is not
# listed and keeps the shape computes element by element.
_MOVES = {
    *("cat", "stack", "roll", "flip", "rot90", "repeat", "repeat_interleave", "constant_pad_nd", "reflection_pad2d"),
    *("replicate_pad2d", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("_unsafe_view", "slice_scatter", "select_scatter", "view_copy", "permute_copy", "split_with_sizes_copy"),
}
_INDEXES = {
    *("index", "_unsafe_index", "index_select", "gather", "take", "masked_select", "index_put", "index_copy"),
    *("scatter", "masked_scatter", "_index_put_impl"),
}
_NOT_FOLLOWED = {"sort", "as_strided", "_fft_r2c", "_fft_c2r", "_fft_c2c", "cumsum", "view_as_complex", "view_as_real"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul"}
_GRIDS = (
    "convolution",
    "_convolution",
    "max_pool",
    "avg_pool",
    "_adaptive_avg_pool",
    "adaptive_",
    "upsample_",
    "_upsample_",
)
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm"}


class Provenance(TorchDispatchMode):
    """Follows origins while it is active; what the operations compute stays as it is.

    Args:
        batch: number of images in the forward pass.

    Attributes:
        started: whether the model's input was marked.
        grids: (H, W) of every map that a convolution or pooling laid out, in order.
        by_index: whether locations were picked by an index tensor: their order may differ from pass to pass.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.started = False
        self.grids: list[tuple[int, int]] = []
        self.by_index = False
        # By storage and view; the key () stands for other views of a storage that was written to in parts.
        self._origins: dict[int, dict[tuple[Any, ...], Tensor | Lost]] = {}
        self._laid: dict[tuple[int, ...], Tensor] = {}

    def start(self, images: Tensor, grids: Tensor | None = None) -> None:
        """Marks the model's input.

        Args:
            images: maps (N, C, H, W), videos (N, C, T, H, W) or (N, T, C, H, W), or patches (N, L, C).
            grids: of patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2),
                whose first H * W patches are its rows one after the other.
        """
        if images.ndim in (4, 5):
            third = images.ndim == 5 and images.shape[2] in (1, 3) and images.shape[1] not in (1, 3)
            spatial = (images.shape[1], *images.shape[3:]) if third else images.shape[2:]
            codes = self._whole(spatial, images.device).unsqueeze(2 if third else 1)
        elif images.ndim == 3 and grids is not None:
            codes = codes_of_patches(images, grids).unsqueeze(2)
        else:
            return
        self._put(images, codes.expand(images.shape), fresh=True)
        self.started = True

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor, of its shape; None where it does not depend on the images."""
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            return None
        views = self._origins.get(_storage(tensor), {})
        return views.get(_view(tensor), views.get(()))

    def _put(self, tensor: Tensor, origin: Origin, *, fresh: bool) -> None:
        if tensor.layout != torch.strided:
            return
        if fresh:  # the storage may lie where another one was
            self._origins.pop(_storage(tensor), None)
        if origin is not None:
            self._origins.setdefault(_storage(tensor), {})[_view(tensor)] = origin

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode, operations that are made of others arrive whole.
        whole = func._schema.name.removeprefix("aten::").startswith(_GRIDS)
        if not whole and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        # Before the operation, which may change what its operands are.
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(tensor): self.of(tensor) for tensor in inputs}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            with torch.no_grad():
                self._follow(func, args, kwargs, known, outputs)
        return result

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: dict[int, Origin], outputs: list[Tensor]
    ) -> None:
        """Notes the origins of an operation's results."""
        name = func._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and outputs[0] is args[0]
        alias = func._schema.returns[0].alias_info
        is_view = alias is not None and not alias.is_write
        fresh = not (in_place or is_view)
        if all(origin is None for origin in known.values()):
            for output in outputs:
                self._put(output, None, fresh=fresh)
            return
        try:
            origins = self._origins_of_results(func, name.rstrip("_"), is_view, args, kwargs, known, outputs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            origins = [LOST for _ in outputs]
        for output, origin in zip(outputs, origins, strict=True):
            if in_place and origin is not known[id(output)]:  # other views of the storage see the change
                self._origins[_storage(output)] = {(): LOST}
            self._put(output, origin if output.is_floating_point() else None, fresh=fresh)

    def _origins_of_results(
        self,
        func: Any,
        name: str,
        is_view: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[int, Origin],
        outputs: list[Tensor],
    ) -> Sequence[Origin]:
        """One origin for each result of an operation of whose inputs at least one has one."""
        first, others = outputs[0], [None] * (len(outputs) - 1)
        if name.startswith(_GRIDS):
            return [self._on_a_grid(args[0], known[id(args[0])], first), *others]
        if is_view or name in _MOVES or name in _INDEXES:
            self.by_index |= name in _INDEXES
            return moved(func, name, args, kwargs, known, first)
        if name == "as_strided" and isinstance(origin := known[id(args[0])], Tensor) and origin.shape == first.shape:
            return [origin]  # only the strides of axes of size 1 change
        followed = [origin for origin in known.values() if isinstance(origin, Tensor)]
        if not followed or name in _NOT_FOLLOWED:
            return [LOST for _ in outputs]
        if name in _PRODUCTS:
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            return [self._of_product(known[id(left)], None if name == "linear" else known[id(right)], first), *others]
        if "scaled_dot_product" in name:
            return [_of_rows(known[id(args[0])], first), *others]
        if name == "copy":
            return [spread(known[id(args[1])], first.shape)]
        if name in _REDUCTIONS and first.shape != args[0].shape:
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            return [_of_reduction(followed[0], dims, output.shape) for output in outputs]
        # Arithmetic. The operand that tells the most locations apart is the one that the others act upon.
        if torch.broadcast_shapes(*(origin.shape for origin in followed), first.shape) != first.shape:
            return [LOST for _ in outputs]
        best = max((spread(origin, first.shape) for origin in followed), key=lambda o: prod(held_once(o).shape))
        return [best if output.shape == first.shape else None for output in outputs]

    def _whole(self, spatial: Sequence[int], device: torch.device) -> Tensor:
        """Codes of whole images, the same tensor for the same grid."""
        key = tuple(spatial)
        if key not in self._laid or self._laid[key].device != device:
            self._laid[key] = codes_of_grid(self.batch, key, device)
        return self._laid[key]

    def _on_a_grid(self, images: Tensor, origin: Origin, output: Tensor) -> Origin:
        """Convolutions, poolings, resizing: (B, C, ...) -> (B, C', ...)."""
        spatial = output.shape[2:]
        if images.ndim != output.ndim or output.ndim < 3:
            return LOST
        whole = output.shape[0] == self.batch and len(spatial) > 1
        if isinstance(origin, Tensor):
            origin = first_location(origin, 1).squeeze(1)
            laid = self._laid.get(tuple(images.shape[2:]))
            whole = whole and ((laid is not None and _same(laid, origin)) or is_image_order(origin))
        if whole and (origin is not None or not self.started):
            self.grids += [(int(spatial[0]), int(spatial[1]))] if len(spatial) == 2 else []
            return self._whole(spatial, output.device).unsqueeze(1).expand(output.shape)
        if not isinstance(origin, Tensor):
            return origin
        for axis, size in enumerate(spatial, start=1):
            before = origin.shape[axis]
            if before != size:
                nearest = torch.arange(size, device=origin.device) * before // size
                origin = origin.index_select(axis, nearest)
        return compact(origin).unsqueeze(1).expand(output.shape)

    def _of_product(self, left: Origin, right: Origin, output: Tensor) -> Origin:
        """Rows keep the origin of the left factor's rows; where these are no locations, columns that of the right's."""
        if isinstance(left, Lost) or isinstance(right, Lost):
            return LOST
        rows = compact(first_location(left, -1)) if left is not None else None
        if right is not None and (rows is None or self._joins_locations(rows)):
            columns = compact(first_location(right, -2 if right.ndim > 1 else 0))
            rows = columns if rows is None or not self._joins_locations(columns) else rows
        return spread(rows, output.shape)

    def _joins_locations(self, origin: Tensor) -> bool:
        """Whether all locations of an image became one; class tokens, which stand for none, are another matter."""
        codes = held_once(origin)
        return 0 < len(codes[codes > NOWHERE].unique()) <= self.batch


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and _view(one) == _view(other)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _of_rows(origin: Origin, output: Tensor) -> Origin:
    """Each row of the output answers for a row of the first factor (attention: for a query)."""
    if isinstance(origin, Lost):
        return LOST
    if origin is None:  # queries that are learned: the images are in what they pick up, but no location is
        return nowhere(output.shape, output.device)
    return first_location(origin, -1).expand(output.shape)


def _of_reduction(origin: Tensor, dims: Any, shape: Sequence[int]) -> Origin:
    axes = range(origin.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    for axis in axes:
        origin = first_location(origin, axis)
    return origin.reshape(tuple(shape))
