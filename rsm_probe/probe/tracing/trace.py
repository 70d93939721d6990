"""Traces through a forward pass which location of which image every value comes from.

A tensor's *origin* is a tensor of the same shape that holds, for every element, a code of image, frame, row and column,
or `NOWHERE` for elements without a location (class tokens, padding). Operations that move data move the origins with
it, arithmetic keeps them, each row of a product inherits the origin of a row of its factor, and convolutions and
poolings produce a new grid. The origin of a layer's output therefore shows, for any model, which axes hold images,
locations and channels, which tokens have no location, and the order of windowed or shuffled tokens. If an operation
joins several locations, the first one represents all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rsm_probe.probe.torch_internals import is_composite, name_of, reads_values, returns_view
from rsm_probe.probe.tracing.conversions import unwatch, watch
from rsm_probe.probe.tracing.dispatch_modes import PassMode
from rsm_probe.probe.tracing.location_codes import EXTENT, NOWHERE, QUERY, channel_axis, codes_of_grid, codes_of_patches
from rsm_probe.probe.tracing.maps import Grids, one_map
from rsm_probe.probe.tracing.operation_log import Operands, OperationLog
from rsm_probe.probe.tracing.operations import (
    ATTENTION,
    FILLS,
    GRIDS,
    INDEXES,
    PRODUCTS,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    WRITES,
    factors,
    is_arithmetic,
    is_move,
    reduced_axes,
    uses_only_shape,
)
from rsm_probe.probe.tracing.origin_map import OriginMap, followable
from rsm_probe.probe.tracing.origins import (
    Elsewhere,
    Lost,
    Origin,
    among_images,
    compact,
    finest,
    held_once,
    move_origins,
    of_reduction,
    same_codes,
)
from rsm_probe.probe.tracing.products import of_product, of_rows


class Trace(PassMode):
    """Traces origins while it is active, without changing what operations compute.

    Args:
        batch: number of images in the forward pass.

    Attributes:
        started: whether the model's input was marked.
        by_index: whether an index tensor selected locations, so that their order may differ between passes.
        blind: an operation whose results depend on the images but have no plain memory, or "".
        read: numbers of the untraced inputs whose values became Python numbers or shapes, and so may steer the model;
            None where any of them may have.
        log: the fingerprint of all operations on the images, where a later pass may be compared with this one.
    """

    supports_higher_order_operators = True

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.read: set[int] | None = set()
        self.log: OperationLog | None = None
        self._quiet = False
        self.batch = batch
        self.started = False
        self.by_index = False
        self.blind = ""
        self._origins = OriginMap()
        self._grids = Grids(batch)

    def start(self, images: Tensor | Sequence[Tensor], grids: Tensor | None = None) -> None:
        """Marks the model's input, if its shape shows the meaning of its axes.

        Args:
            images: maps (N, C, H, W), (N, H, W, C) or (N, H, W), videos (N, C, T, H, W) or (N, T, C, H, W), patches
                (N, L, C), or a list of maps (C, H, W).
            grids: for patches, their rows and columns (N, L, 2), or the height and width of each image's grid (N, 2),
                in which the first H * W patches are the rows in order.
        """
        if not isinstance(images, Tensor):
            for number, image in enumerate(images):
                codes = codes_of_grid(1, image.shape[1:], image.device) + number * EXTENT**3
                self._origins.put(image, codes.expand(image.shape))
        elif images.ndim == 3 and grids is not None:
            self._origins.put(images, codes_of_patches(images, grids).unsqueeze(2).expand(images.shape))
        elif images.ndim == 3:
            self._origins.put(images, self._grids.whole(images.shape[1:], images.device))
        elif (axis := channel_axis(images.shape)) is not None:
            spatial = [size for k, size in enumerate(images.shape) if k not in (0, axis)]
            self._origins.put(images, self._grids.whole(spatial, images.device).unsqueeze(axis).expand(images.shape))
        else:
            return
        self.started = True

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(H, W) of every map that a convolution, pooling or enlargement produced, in order."""
        return self._grids.laid_out

    def pass_by(self, tensor: Tensor, number: int) -> None:
        """Marks an input whose locations are not traced; `number` identifies it."""
        if self.of(tensor) is None:
            self._origins.put(tensor, Elsewhere((number,)))

    def begin(self, watching: bool = False) -> None:
        """Starts tracing; `watching` notes tensors that become lists or arrays too, which slows all of Python."""
        if watching and not watch(self.note_converted):
            self.read = None
        super().begin()

    def end(self) -> None:
        """Stops tracing."""
        super().end()
        unwatch(self.note_converted)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Ignores inside what the probe itself converts."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def note_read(self, origin: Origin) -> None:
        """Notes that values of an origin became Python numbers."""
        if isinstance(origin, Elsewhere):
            self.read = self.read if self.read is None else self.read.union(origin.inputs)
        elif origin is not None and not self._quiet:
            self.read = None

    def note_converted(self, tensor: Tensor) -> None:
        """Notes that a tensor became a list or an array."""
        if not self._quiet:
            self.note_read(self.of(tensor))

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor, in its shape; None if it depends on no marked input."""
        return self._origins.of(tensor)

    def hand_on(self, tensor: Tensor, copied: Tensor) -> None:
        """Gives an unobserved copy the origin of its original."""
        self._origins.forget(copied)
        self._origins.put(copied, self.of(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.ended:
            return func(*args, **kwargs)
        name = name_of(func)
        # In inference mode, composite operations arrive undecomposed.
        if not name.startswith(GRIDS) and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        # Look origins up before the operation, which may modify its operands.
        operands = Operands((args, kwargs))
        known = {id(tensor): self.of(tensor) for tensor in operands.tensors}
        attended = any(self._origins.is_attended(tensor) for tensor in operands.tensors)
        result = func(*args, **kwargs)
        outputs = Operands(result).tensors
        if reads_values(func, args):
            for origin in known.values():
                self.note_read(origin)
        if self.log is not None:
            self.log.note(func, name, operands, outputs)
        if outputs:
            with torch.no_grad():
                self._follow(func, name, args, kwargs, known, outputs)
            if attended or _is_attention(name, args, known):
                for output in outputs:
                    self._origins.note_attended(output)
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
        """Records the origins of an operation's results."""
        in_place = name.endswith("_") and outputs[0] is args[0]
        name = name.rstrip("_") if in_place else name
        # Parts of an unsafe split share memory, although the schema does not declare it.
        is_view = returns_view(func) or name.startswith("unsafe_split")
        if in_place and name in FILLS:
            self._origins.write(outputs[0], None)
            return
        try:
            origins = self._origins_of_results(func, name, is_view, args, kwargs, known, outputs)
        except (AttributeError, AssertionError, IndexError, RuntimeError, TypeError, ValueError):
            lost = next((origin for origin in known.values() if isinstance(origin, Lost)), Lost(name))
            origins = [lost for _ in outputs]
        for output, origin in zip(outputs, origins, strict=True):
            if isinstance(origin, Tensor | Lost) and not followable(output):
                self.blind = self.blind or name
            if not in_place:
                if not is_view:
                    self._origins.forget(output)
                self._origins.put(output, origin)
            elif name in RESHAPES:
                self._origins.put(output, origin)  # another view of the same values
            elif not same_codes(origin, known.get(id(output))):
                self._origins.write(output, origin)

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
        """The origin of each result of an operation."""
        first, others = outputs[0], [None] * (len(outputs) - 1)
        if uses_only_shape(name):
            return [None for _ in outputs]
        # If no input looks like images, tracing starts at the first convolution.
        begins = not self.started and name.startswith(GRIDS)
        if not any(isinstance(origin, Tensor | Lost) for origin in known.values()):
            inputs = {number for origin in known.values() if isinstance(origin, Elsewhere) for number in origin.inputs}
            if inputs or not begins:
                return [Elsewhere(tuple(sorted(inputs))) if inputs else None for _ in outputs]
        if name.startswith(GRIDS):
            maps = among_images(known[id(args[0])], args[0])
            return [self._grids.lay(args[0], maps, first, begins=begins, pools="pool" in name), *others]
        if name == "embedding":
            return [known[id(args[1])].unsqueeze(-1).expand(first.shape)]  # type: ignore[union-attr]
        if name == "index_add" and known[id(args[3])] is None:
            return [known[id(args[0])]]  # adds learned values, such as position embeddings
        if name == "col2im" and list(args[2]) != list(args[5]):
            raise ValueError("overlapping patches are summed")
        if is_view or is_move(name):
            self.by_index |= name in INDEXES
            if name in INDEXES and not isinstance(known[id(args[0])], Tensor | Lost) and name not in WRITES:
                raise ValueError("a table is indexed by values that depend on the images")
            if name == "cat":
                axis = args[1] if len(args) > 1 else 0
                if (joined := one_map([known[id(part)] for part in args[0]], axis)) is not None:
                    return [joined.expand(first.shape)]
            learned = QUERY if name == "cat" and self._joins_queries(*args[:2], known=known) else NOWHERE
            origins = move_origins(func, name, args, kwargs, known, first, learned)
            return [self._grids.enlarged(origins[0], known.get(id(args[0])))] if len(origins) == 1 else origins
        if name == "as_strided" and isinstance(origin := known[id(args[0])], Tensor) and origin.shape == first.shape:
            return [origin]  # changes only the strides of axes of size 1
        followed = [origin for origin in known.values() if isinstance(origin, Tensor)]
        if not followed:
            raise ValueError("no operand has a known origin")
        if name in PRODUCTS:
            left, right = factors(name, args)
            rows = among_images(known[id(left)], left)
            return [of_product(rows, None if name == "linear" else known[id(right)], first, self.batch), *others]
        if name in RECURRENT or "scaled_dot_product" in name:
            return [of_rows(known[id(args[0])], first), *others]
        if name == "copy":
            source = known[id(args[1])]
            return [source.expand(first.shape) if isinstance(source, Tensor) else source]
        if name in REDUCTIONS and first.shape != args[0].shape:
            dims = reduced_axes(name, args, kwargs)
            return [of_reduction(followed[0], dims, output.shape) for output in outputs]
        if name == "glu":
            axis = args[1] if len(args) > 1 else -1
            return [compact(followed[0].narrow(axis, 0, first.shape[axis]))]
        if not is_arithmetic(func, name):
            raise ValueError("unknown effect on locations")
        operands = [origin.expand(first.shape) for origin in followed]
        best = finest(operands)
        for axis in (1, -1) if best is None else ():
            best = one_map(operands, axis) if best is None else best
        if best is None:
            raise ValueError("operands have different locations")
        return [best.expand(first.shape) if output.shape == first.shape else None for output in outputs]

    def _joins_queries(self, parts: Sequence[Tensor], axis: int = 0, *, known: dict[int, Origin]) -> bool:
        """Whether learned tokens that join a sequence are queries rather than class or register tokens.

        Class and register tokens join before attention. Only a class token may come later (CaiT), alone or with one for
        distillation, and only if the sequence does not yet have one. Registers join behind a class token, queries also
        in front of it.
        """
        located = [part for part in parts if isinstance(known[id(part)], Tensor)]
        origins = [held_once(known[id(part)]) for part in located]  # type: ignore[arg-type]
        along = any(origin.shape[axis] > 1 for origin in origins)  # rather than channels
        count = sum(part.shape[axis] for part in parts if known[id(part)] is None)
        in_front = count > 2 and known[id(parts[0])] is None
        if along and in_front and any(bool((origin.select(axis, 0) <= NOWHERE).all()) for origin in origins[:1]):
            return True
        if not along or not any(self._origins.is_attended(part) for part in located):
            return False
        return count > 2 or (count > 0 and any(bool((origin <= NOWHERE).any()) for origin in origins))


def _is_attention(name: str, args: tuple[Any, ...], known: dict[int, Origin]) -> bool:
    """Whether locations exchange information: attention, or a product of two factors that depend on the images."""
    if name in PRODUCTS:
        factors = [known.get(id(factor)) for factor in args if isinstance(factor, Tensor)]
        return sum(isinstance(factor, Tensor) for factor in factors) > 1
    first = known.get(id(args[0])) if args else None
    return ("scaled_dot_product" in name or name in ATTENTION) and isinstance(first, Tensor)
