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
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsm_probe.probe.codes import (
    EXTENT,
    NOWHERE,
    channel_axis,
    codes_of_grid,
    codes_of_patches,
    frames_of,
    is_image_order,
    without_border,
)
from rsm_probe.probe.ledger import Ledger, followable
from rsm_probe.probe.operations import (
    FILLS,
    GRIDS,
    INDEXES,
    MOVES,
    PRODUCTS,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    WRITES,
    is_arithmetic,
)
from rsm_probe.probe.origins import (
    Lost,
    Origin,
    compact,
    finest,
    first_location,
    held_once,
    mixes_one_axis,
    moved,
    of_reduction,
    of_rows,
    same_codes,
    spread,
)


class Provenance(TorchDispatchMode):
    """Follows origins while it is active; what the operations compute stays as it is.

    Args:
        batch: number of images in the forward pass.

    Attributes:
        started: whether the model's input was marked.
        grids: (H, W) of every map that a convolution or pooling laid out, in order.
        by_index: whether locations were picked by an index tensor: their order may differ from pass to pass.
        blind: an operation whose results depend on the images and have no plain memory, or "".
    """

    supports_higher_order_operators = True

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.started = False
        self.grids: list[tuple[int, int]] = []
        self.by_index = False
        self.blind = ""
        self._ledger = Ledger()
        self._laid: dict[tuple[int, ...], Tensor] = {}

    def start(self, images: Tensor | Sequence[Tensor], grids: Tensor | None = None) -> None:
        """Marks the model's input, if it says which of its axes is which.

        Args:
            images: maps (N, C, H, W) or (N, H, W, C), videos (N, C, T, H, W) or (N, T, C, H, W), patches (N, L, C), or
                a list of maps (C, H, W).
            grids: of patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2),
                whose first H * W patches are its rows one after the other.
        """
        if not isinstance(images, Tensor):
            for number, image in enumerate(images):
                codes = codes_of_grid(1, image.shape[1:], image.device) + number * EXTENT**3
                self._ledger.put(image, codes.expand(image.shape))
        elif images.ndim == 3 and grids is not None:
            self._ledger.put(images, codes_of_patches(images, grids).unsqueeze(2).expand(images.shape))
        elif (axis := channel_axis(images.shape)) is not None:
            spatial = [size for k, size in enumerate(images.shape) if k not in (0, axis)]
            self._ledger.put(images, self._whole(spatial, images.device).unsqueeze(axis).expand(images.shape))
        else:
            return
        self.started = True

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor, of its shape; None where it does not depend on the images."""
        return self._ledger.of(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::") if isinstance(func, OpOverload) else func.name()
        # In inference mode, operations that are made of others arrive whole.
        composite = isinstance(func, OpOverload) and not name.startswith(GRIDS)
        if composite and func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        # Before the operation, which may change what its operands are.
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(tensor): self.of(tensor) for tensor in inputs}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            with torch.no_grad():
                self._follow(func, name, args, kwargs, known, outputs)
        return result

    def _follow(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[int, Origin],
        outputs: list[Tensor],
    ) -> None:
        """Notes the origins of an operation's results."""
        in_place = name.endswith("_") and outputs[0] is args[0]
        name = name.rstrip("_") if in_place else name
        alias = func._schema.returns[0].alias_info if isinstance(func, OpOverload) else None
        # Parts of an unsafe split share their memory, though the schema does not say so.
        is_view = (alias is not None and not alias.is_write) or name.startswith("unsafe_split")
        if in_place and name in FILLS:
            self._ledger.write(outputs[0], None)
            return
        # Inputs that are no images by their shape are followed from the first convolution on.
        begins = not self.started and name.startswith(GRIDS)
        if all(origin is None for origin in known.values()) and not begins:
            for output in [] if in_place or is_view else outputs:
                self._ledger.forget(output)
            return
        try:
            origins = self._origins_of_results(func, name, is_view, args, kwargs, known, outputs)
        except (AttributeError, AssertionError, IndexError, RuntimeError, TypeError, ValueError):
            origins = [_lost(name, known) for _ in outputs]
        for output, origin in zip(outputs, origins, strict=True):
            if origin is not None and not followable(output):
                self.blind = self.blind or name
            if not in_place:
                if not is_view:
                    self._ledger.forget(output)
                self._ledger.put(output, origin)
            elif name in RESHAPES:
                self._ledger.put(output, origin)  # another view of the same values
            elif not same_codes(origin, known[id(output)]):
                self._ledger.write(output, origin)

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
        if name.startswith("new_") or name.endswith("_like"):
            return [None for _ in outputs]
        if name.startswith(GRIDS):
            return [self._on_a_grid(args[0], known[id(args[0])], first, "pool" in name), *others]
        if name == "embedding":
            return [known[id(args[1])].unsqueeze(-1).expand(first.shape)]  # type: ignore[union-attr]
        if name == "index_add" and known[id(args[3])] is None:
            return [known[id(args[0])]]  # positions, say, are added to what is already there
        if name == "col2im" and list(args[2]) != list(args[5]):
            raise ValueError("patches that overlap are summed")
        if is_view or name in MOVES or name in INDEXES or (name in RESHAPES and name != "as_strided"):
            self.by_index |= name in INDEXES
            if name in INDEXES and known[id(args[0])] is None and name not in WRITES:
                raise ValueError("a table is looked up at places that depend on the images")
            return moved(func, name, args, kwargs, known, first)
        if name == "as_strided" and isinstance(origin := known[id(args[0])], Tensor) and origin.shape == first.shape:
            return [origin]  # only the strides of axes of size 1 change
        followed = [origin for origin in known.values() if isinstance(origin, Tensor)]
        if not followed:
            raise ValueError("nothing is known of what this depends on")
        if name in PRODUCTS:
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            return [self._of_product(known[id(left)], None if name == "linear" else known[id(right)], first), *others]
        if name in RECURRENT or "scaled_dot_product" in name:
            return [of_rows(known[id(args[0])], first), *others]
        if name == "copy":
            return [spread(known[id(args[1])], first.shape)]
        if name in REDUCTIONS and first.shape != args[0].shape:
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            return [of_reduction(followed[0], dims, output.shape) for output in outputs]
        if name == "glu":
            axis = args[1] if len(args) > 1 else -1
            return [compact(followed[0].narrow(axis, 0, first.shape[axis]))]
        if not is_arithmetic(func, name):
            raise ValueError("what this does to locations is not known")
        best = finest([spread(origin, first.shape) for origin in followed])
        return [best if output.shape == first.shape else None for output in outputs]

    def _whole(self, spatial: Sequence[int], device: torch.device) -> Tensor:
        """Codes of whole images, the same tensor for the same grid."""
        key = tuple(spatial)
        if key not in self._laid or self._laid[key].device != device:
            self._laid[key] = codes_of_grid(self.batch, key, device)
        return self._laid[key]

    def _on_a_grid(self, images: Tensor, origin: Origin, output: Tensor, pools: bool) -> Origin:
        """Convolutions, poolings, resizing: (B, C, ...) -> (B, C', ...)."""
        spatial = output.shape[2:]
        if images.ndim != output.ndim or output.ndim < 3:
            raise ValueError("images without a batch")
        whole, frames = output.shape[0] == self.batch and len(spatial) > 1, None
        if isinstance(origin, Tensor):
            origin = first_location(origin, 1).squeeze(1)
            laid = self._laid.get(tuple(images.shape[2:]))
            if not (laid is not None and _same(laid, origin)):
                inside = without_border(origin, spatial)
                whole = whole and (is_image_order(origin) or is_image_order(inside))
                # One window may hold a map and its padding, which goes again: its locations stay where they are.
                whole = whole and not (pools and bool((inside <= NOWHERE).any()))
                frames = frames_of(origin) if whole and len(spatial) == 2 else None
        if whole and (isinstance(origin, Tensor) or (origin is None and not self.started)):
            self.grids += [(int(spatial[0]), int(spatial[1]))] if len(spatial) == 2 else []
            codes = self._whole(spatial, output.device)
            return (codes if frames is None else codes + frames).unsqueeze(1).expand(output.shape)
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
        for factor in (left, right):
            if isinstance(factor, Lost):
                return factor
        assert not isinstance(left, Lost)
        assert not isinstance(right, Lost)
        if right is None or left is None:
            factor, axis = (left, -1) if right is None else (right, -2 if right.ndim > 1 else 0)
            assert factor is not None
            if mixes_one_axis(factor, axis) and not self._joins_locations(first_location(factor, axis)):
                if factor.shape == output.shape:
                    return factor  # mixed, but as many as before
                raise ValueError("locations along one axis became another number of mixtures")
            return spread(compact(first_location(factor, axis)), output.shape)
        across = -2 if right.ndim > 1 else 0
        rows, columns = compact(first_location(left, -1)), compact(first_location(right, across))
        # What is summed over many locations belongs to none of them.
        mixed = held_once(left).shape[-1] > 1, held_once(right).shape[across] > 1
        by_columns = mixed == (True, False) or (self._joins_locations(rows) and not self._joins_locations(columns))
        return spread(columns if by_columns else rows, output.shape)

    def _joins_locations(self, origin: Tensor) -> bool:
        """Whether all locations of an image became one; class tokens, which stand for none, are another matter."""
        codes = held_once(origin)
        return 0 < len(codes[codes > NOWHERE].unique()) <= self.batch


def _lost(name: str, known: dict[int, Origin]) -> Lost:
    return next((origin for origin in known.values() if isinstance(origin, Lost)), Lost(name))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
