"""Traces within an attention layer which channel of which projection every value comes from.

The *codes* of a tensor have its shape and tell for each value the channels of the last projection (a product with
weights) that it depends on. They follow operations as locations do, see `tracing`. Normalisation keeps them, and sums
of several values, as in rotary embeddings, join them. The operands of the attention operation then show the channels of
queries, keys and values, head by head, in whatever order the model arranges them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from rsm_probe.probe.facets.channel_codes import Attention, ChannelCodes, Scores, varies
from rsm_probe.probe.facets.projections import FUSED_ATTENTION, Event, EventCounter, is_leaf, is_projection
from rsm_probe.probe.torch_internals import name_of
from rsm_probe.probe.tracing.operations import (
    GRIDS,
    INDEXES,
    REDUCTIONS,
    WRITES,
    factors,
    is_arithmetic,
    is_move,
    reduced_axes,
    uses_only_shape,
)
from rsm_probe.probe.tracing.origins import Lost, Origin, compact, held_once, move_origins, of_reduction
from rsm_probe.probe.tracing.trace import Trace


@dataclass
class Source:
    """The output of a projection.

    Attributes:
        event: when it appears.
        tensor: a copy, or None if a copy is not needed.
        axis: the axis of its channels.
        channels: their number.
        holder: the submodule that ran the projection.
    """

    event: Event
    tensor: Tensor | None
    axis: int
    channels: int
    holder: str


class ChannelTrace(Trace):
    """Traces channels while it is active, without changing what operations compute.

    Args:
        depends: whether a tensor depends on an input of the model, and so is not a weight.
        hold: copies a tensor that must outlive later operations.

    Attributes:
        sources: the projections so far.
        attentions: the attention operations so far.
        lost_in: the operations in which channels were lost.
    """

    def __init__(self, depends: Callable[[Tensor], bool], hold: Callable[[Tensor], Tensor]) -> None:
        super().__init__(1)
        self._depends = depends
        self._hold = hold
        self._codes = ChannelCodes()
        self._counter = EventCounter()
        # Running submodules, with the numbers of sources and attentions before each.
        self._holders: list[tuple[str, int, int]] = []
        self.sources: list[Source] = []
        self.attentions: list[Attention] = []
        self.lost_in: list[str] = []

    def enter(self, module: str) -> None:
        """Notes that a submodule begins to run."""
        self._holders.append((module, len(self.sources), len(self.attentions)))

    def leave(self, module: str, output: Any) -> None:
        """Notes that a submodule has run. If it projects, its output is that of the projection."""
        before, attended = len(self.sources), len(self.attentions)
        while self._holders:
            name, before, attended = self._holders.pop()
            if name == module:
                break
        event = self._counter.module(module)
        if not isinstance(output, Tensor) or len(self.sources) == before or output.ndim < 2:
            return
        codes = self.of(output)
        if not isinstance(codes, Tensor) or self._codes.of_attention(codes) is not None:
            return
        axes = [axis for axis, size in enumerate(held_once(codes).shape) if size > 1]
        if len(axes) > 1:
            return
        for source in self.sources[before:] if len(self.attentions) == attended else ():
            source.tensor = None
        self._origins.write(output, self._source(event, output, axes[0] if axes else output.ndim - 1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = name_of(func)
        if not self.ended and is_leaf(func, name):
            self._counter.operation(name)
            if name == FUSED_ATTENTION and args[0] is args[1] is args[2]:
                self._fused(args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _fused(self, args: tuple[Any, ...]) -> None:
        """Notes an operation that projects and attends at once."""
        projected = linear(args[0], args[5], args[6])  # beneath this mode, so that the trace of locations sees it
        codes = self._source(self._counter.event, projected, projected.ndim - 1)
        facets = codes.unflatten(-1, (3, args[4], args[3] // args[4])).unbind(-3)
        query, key, value = (self._codes.heads(facet, -1) for facet in facets)
        self.attentions.append(Attention(query=query, key=key, value=value, holder=self._running()))

    def _running(self) -> str:
        return self._holders[-1][0] if self._holders else ""

    def _source(self, event: Event, output: Tensor, axis: int) -> Tensor:
        """The codes of the output of a projection."""
        number, channels = len(self.sources), output.shape[axis]
        self.sources.append(Source(event, self._hold(output), axis, channels, self._running()))
        contents = [frozenset({(number, channel)}) for channel in range(channels)]
        return self._codes.add(contents, output.shape, axis, output.device)

    def _follow(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[int, Origin],
        outputs: list[Tensor],
    ) -> None:
        super()._follow(func, name, args, kwargs, known, outputs)
        lost_before = any(isinstance(origin, Lost) for origin in known.values())
        if not lost_before and any(isinstance(self.of(output), Lost) for output in outputs):
            self.lost_in.append(name)

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
        first, others = outputs[0], [None] * (len(outputs) - 1)
        none: list[Origin] = [None for _ in outputs]
        if uses_only_shape(name) or name == FUSED_ATTENTION:
            return none
        if is_projection(name):
            return [self._of_product(name, args, known, first), *others]
        if "scaled_dot_product" in name:
            query, key, value = (self._codes.heads(known.get(id(operand)), -1) for operand in args[:3])
            self.attentions.append(Attention(query=query, key=key, value=value, holder=self._running()))
            return none
        coded = [origin for origin in known.values() if isinstance(origin, Tensor)]
        if any(isinstance(origin, Lost) for origin in known.values()):
            raise ValueError("the channels of an operand are lost")
        if not coded:
            return none
        if name.startswith(GRIDS):
            return [_over_grid(known[id(args[0])], first), *others]
        if name == "view_as_complex":
            return [self._codes.join([coded[0][..., 0], coded[0][..., 1]], first.shape)]
        if name == "view_as_real":
            return [coded[0].unsqueeze(-1).expand(first.shape)]
        if is_view or is_move(name):
            if name in INDEXES and not isinstance(known[id(args[0])], Tensor) and name not in WRITES:
                raise ValueError("a table is indexed by values of a projection")
            origins = move_origins(func, name, args, kwargs, known, first)
            if name in ("view", "_unsafe_view"):
                self._note_axes(args[0], known[id(args[0])], first)
            return origins
        if name == "copy":
            return [known[id(args[1])]]
        if "softmax" in name:
            return [self._of_softmax(coded[0], args[1]), *others]
        if name in REDUCTIONS and first.shape != args[0].shape:
            dims = reduced_axes(name, args, kwargs)
            return [_of_statistic(coded[0], dims, output.shape) for output in outputs]
        if not is_arithmetic(func, name):
            raise ValueError("unknown effect on channels")
        if name == "add" and (biased := self._of_bias(args, known, first)) is not None:
            return [biased]
        joined = self._codes.join(coded, first.shape)
        return [joined if output.shape == first.shape else None for output in outputs]

    def _note_axes(self, product: Tensor, codes: Origin, view: Tensor) -> None:
        """A product of rows is seen at once as a view with the axes of its input."""
        source = self._plain_source(codes)
        event = self._counter.event
        if source is None or event.step != 1 or source.event.module or source.event.number != event.number:
            return
        if source.axis == product.ndim - 1 and view.shape[-1] == product.shape[-1]:
            source.event, source.tensor, source.axis = event, self._hold(view), view.ndim - 1

    def _plain_source(self, codes: Origin) -> Source | None:
        """The projection whose channels lie along the last axis in their order, or None."""
        if not isinstance(codes, Tensor) or held_once(codes).numel() != codes.shape[-1] > 0:
            return None
        heads = self._codes.heads(codes, -1)
        numbers = {number for number, _ in heads[0]} if heads else set()
        if len(numbers) != 1:
            return None
        source = self.sources[numbers.pop()]
        flat = held_once(codes).flatten()
        in_order = bool((flat.diff() == 1).all()) and heads is not None and len(heads[0]) == source.channels
        return source if in_order else None

    def _of_bias(self, args: tuple[Any, ...], known: dict[int, Origin], output: Tensor) -> Tensor | None:
        """The codes of a projection after the separate addition of its bias; None if what is added is not a bias."""
        left, right = args[:2]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        coded, bias = (left, right) if known.get(id(right)) is None else (right, left)
        is_bias = known.get(id(bias)) is None and bias.numel() == bias.shape[-1:].numel() == output.shape[-1]
        if not is_bias or self._depends(bias) or self._plain_source(known.get(id(coded))) is None:
            return None
        return self._source(self._counter.event, output, output.ndim - 1)

    def _of_product(self, name: str, args: tuple[Any, ...], known: dict[int, Origin], output: Tensor) -> Origin:
        left, right = factors(name, args)
        one = known.get(id(left))
        two = known.get(id(right)) if isinstance(right, Tensor) else None
        if name == "convolution":
            if self._depends(right):
                raise ValueError("the weights of a convolution depend on the images")
            if isinstance(one, Tensor) and output.shape[1] == left.shape[1] == args[8]:
                return _over_grid(one, output)  # channel by channel
            if isinstance(one, Tensor) and self._codes.of_attention(one) is not None:
                return _heads_mixed(one, 1, output)
            return self._source(self._counter.event, output, 1)
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return self._of_two(one, two, output)
        depends = [origin is not None or _depends(self._depends, x) for origin, x in ((one, left), (two, right))]
        if all(depends):
            raise ValueError("a product of two factors that depend on the images")
        if not any(depends):
            return None
        axis = output.ndim - (1 if depends[0] else 2)
        codes = one if depends[0] else two
        if isinstance(codes, Tensor) and self._codes.of_attention(codes) is not None:
            return _heads_mixed(codes, -1 if depends[0] else -2, output)
        return self._source(self._counter.event, output, axis)

    def _of_two(self, one: Tensor, two: Tensor, output: Tensor) -> Origin:
        """Scores are products of queries and keys; afterwards, weights are multiplied by values."""
        left, right = self._codes.of_attention(one), self._codes.of_attention(two)
        if left is None and right is None:
            rows, columns = self._codes.heads(one, -1), self._codes.heads(two, -2)
            if rows is None or columns is None:
                raise ValueError("a product over locations")
            attention = Attention(rows, columns, holder=self._running())
            contents = [Scores(attention, weights=False)] * output.shape[-1]
            return self._codes.add(contents, output.shape, output.ndim - 1, output.device)
        scores, keys, values, axis = (left, varies(one, -1), two, -1) if left else (right, varies(two, -2), one, -2)
        if scores is None or not scores.weights or not keys or (left and right):
            raise ValueError("a product with scores")
        scores.attention.value = self._codes.heads(values, axis)
        scores.attention.holder = self._running()
        return None

    def _of_softmax(self, codes: Tensor, dim: int) -> Tensor:
        scores = self._codes.of_attention(codes)
        if scores is None or scores.weights:
            return codes
        attention, size = scores.attention, codes.shape[dim]
        axis, columns = dim % codes.ndim, held_once(codes).shape
        if size == 1 or (
            columns[axis] == 1 and {axis, columns.index(max(columns))} != {codes.ndim - 1, codes.ndim - 2}
        ):
            raise ValueError("softmax over an axis that is neither of queries nor of keys")
        pair = attention.rows, attention.columns
        attention.query, attention.key = pair if columns[axis] > 1 else pair[::-1]
        self.attentions.append(attention)
        contents = [Scores(attention, weights=True)] * size
        return self._codes.add(contents, codes.shape, axis, codes.device)


def _depends(depends: Callable[[Tensor], bool], operand: Any) -> bool:
    return isinstance(operand, Tensor) and depends(operand)


def _heads_mixed(codes: Tensor, axis: int, output: Tensor) -> Tensor:
    """The codes of scores or weights whose heads, along an axis, were mixed by learned weights."""
    if held_once(codes).shape[axis] > 1 or (axis == 1 and codes.shape[2:] != output.shape[2:]):
        raise ValueError("scores meet a table of positions")
    return compact(codes.narrow(axis, 0, 1)).expand(output.shape)


def _over_grid(codes: Origin, output: Tensor) -> Tensor:
    """The codes after an operation within each channel (N, C, ...), such as pooling."""
    assert isinstance(codes, Tensor)
    if any(size > 1 for size in held_once(codes).shape[2:]):
        raise ValueError("channels lie along an axis of a map")
    for axis in range(2, codes.ndim):
        codes = codes.narrow(axis, 0, 1)
    return codes.expand(output.shape)


def _of_statistic(codes: Tensor, dims: Any, shape: Sequence[int]) -> Origin:
    """The codes after a reduction; a statistic of several channels, such as a norm, belongs to none of them."""
    axes = range(codes.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    if any(held_once(codes).shape[axis] > 1 for axis in axes):
        return None
    return of_reduction(codes, dims, shape)
