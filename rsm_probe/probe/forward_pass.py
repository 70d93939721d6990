"""One forward pass: reads layer outputs call by call as the layers run, and returns them when the pass ends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.arrays import require_dense
from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.calls.module_calls import ModuleCalls
from rsm_probe.probe.facets.attention_calls import AttentionCall, FacetChannels, Facets, select
from rsm_probe.probe.facets.facet_names import Facet
from rsm_probe.probe.layers import Selection
from rsm_probe.probe.learned_readers import LearnedReaders
from rsm_probe.probe.options import Options
from rsm_probe.probe.readers import OutputReader
from rsm_probe.probe.representation import has_part
from rsm_probe.probe.torch_internals import unobserved
from rsm_probe.probe.tracing.inputs import NestingError

_PART_OF_LAYER = re.compile(r"<layer>\[([^\]]+)\]")
# Marks a call without a representation; None may be the return value of the user's `reduce`.
_NOTHING = object()


@dataclass(frozen=True)
class _Call:
    order: int
    representation: Any
    problem: str


class ForwardPass:
    """The state of one forward pass, from the start of the model's forward to its end.

    Args:
        selections: the layers to capture.
        module_calls: names alternatives to layers that never run, for messages.
        learned: how to read outputs, learned in earlier passes; a pass over inputs of a new kind adds to it.
        options: the user's options.
        args: positional arguments of the model.
        kwargs: its keyword arguments.
        parameters: names of its positional parameters.

    Raises:
        RepresentationError: the inputs contain themselves or are nested too deeply, or lack one that the user named.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        module_calls: ModuleCalls,
        learned: LearnedReaders,
        options: Options,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parameters: Sequence[str] = (),
    ) -> None:
        self._selections = {selection.label: selection for selection in selections}
        self._labels = frozenset(self._selections)
        self._module_calls = module_calls
        self._options = options
        self._reader = OutputReader(learned, args, kwargs, options.inputs, parameters)
        self._calls: dict[str, list[_Call]] = {selection.label: [] for selection in selections}
        self._taken = self._ran = 0
        self._attention_calls: Counter[str] = Counter()
        self._attentions: dict[str, AttentionCall] = {}
        self._facets: dict[str, Facets] = {}

    @property
    def traced(self) -> bool:
        """Whether the pass is traced, so that later passes can be read by it."""
        return self._reader.tracing

    def begin_attention(self, layer: str) -> None:
        """Notes that a layer with facets to capture begins to run."""
        self._attentions[layer] = self._reader.begin_attention(layer, self._attention_calls[layer])

    def in_attention(self, layer: str) -> AttentionCall | None:
        """The running call of a layer with facets to capture."""
        return self._attentions.get(layer)

    @contextmanager
    def ended_attention(self, layer: str) -> Iterator[None]:
        """Notes that it has run, and holds its facets inside."""
        if (attention := self._attentions.get(layer)) is None:
            yield
            return
        self._facets[layer] = self._reader.end_attention(layer, self._attention_calls[layer], attention)
        self._attention_calls[layer] += 1
        try:
            yield
        finally:
            self._attentions.pop(layer, None)

    def take(self, selection: Selection, module: nn.Module, kind: str, args: tuple[Any, ...], output: Any) -> None:
        """Reads one output of a layer.

        Raises:
            RepresentationError: the output of an explicitly named layer cannot be read.
        """
        if (heads := self._heads(selection, output)) is not None:
            for head in heads:
                self.take(head, module, kind, args, output)
            return
        label, index = selection.label, len(self._calls[selection.label])
        representation: Any = _NOTHING
        problem = ""
        if selection.call in (None, index):
            try:
                representation = self._read(selection, index, module, args, output)
            except RepresentationError as error:
                problem = _named(str(error), selection, index)
                # Where several calls are an error in any case, the end of the pass names those that can be read.
                if selection.strict and (index == 0 or selection.call is not None):
                    raise RepresentationError(f"layer {label!r} ({kind}): {problem}") from None
        reduce = self._options.reduce
        if reduce is not None and representation is not _NOTHING:
            with torch.no_grad(), unobserved():
                name = label if selection.call is not None or not index else f"{label}#{index}"
                representation = reduce(name, representation)
        self._taken += 1
        self._calls[label].append(_Call(self._taken, representation, problem))

    def _heads(self, selection: Selection, output: Any) -> list[Selection] | None:
        """The layers that a facet of each head stands for; None for other layers, or where heads are unknown."""
        facet = selection.facet
        if facet is None or not facet.each or has_part(output, selection.key):
            return None
        channels = self._facets.get(selection.module_name, {}).get(facet.kind)
        if not isinstance(channels, FacetChannels):
            return None
        heads: list[Selection] = []
        for head in range(len(channels.heads)):
            label = selection.label.replace("*]", f"{head}]")
            if label not in self._labels:  # unless it was named beside
                heads.append(replace(selection, label=label, key=f"{facet.kind}.{head}"))
                self._calls.setdefault(label, [])
        self._selections.pop(selection.label, None)
        self._selections |= {layer.label: layer for layer in heads}
        return heads

    def is_last_call(self) -> bool:
        """Counts a call of a probed module, and returns whether it is the last, judging by an earlier traced pass."""
        self._ran += 1
        return self._ran == self._reader.calls

    def _read(self, selection: Selection, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        facet = None if selection.facet is None or has_part(output, selection.key) else selection.facet
        channels = None
        if facet is None:
            tensor = self._tensor(selection, index, output)
        else:
            tensor, channels = self._projection(selection.module_name, facet)
        dtype = self._options.dtype or torch.promote_types(tensor.dtype, torch.float32)
        layout, copy = self._options.layout(selection, index), self._options.reduce is None
        if facet is None or channels is None:
            return self._reader.read(selection.label, index, tensor, dtype, args, module, layout, copy)
        read = self._reader.read(selection.label, index, tensor, dtype, (), module, layout, copy=False)
        return select(read, channels, facet, copy)

    def _projection(self, layer: str, facet: Facet) -> tuple[Tensor, FacetChannels]:
        """The output of the projection that holds a facet, and the facet's channels in it."""
        channels = self._facets.get(layer, {}).get(facet.kind)
        if isinstance(channels, str):
            raise RepresentationError(channels)
        tensor = None if channels is None else self._attentions[layer].output(channels.event)
        if channels is None or tensor is None:
            raise self._reader.unknown("its attention ran unlike in the first forward pass over such inputs")
        return tensor, channels

    def _tensor(self, selection: Selection, index: int, output: Any) -> Tensor:
        try:
            tensor = self._reader.choose(selection.label, index, selection.key, output)
        except NestingError as error:
            raise RepresentationError(f"in its output, {error}; choose a part with '<layer>[<part>]'") from None
        try:
            require_dense(tensor, "its output", RepresentationError)
        except RepresentationError as error:
            raise RepresentationError(f"{error} in the model, or probe a layer before or after it") from None
        if not tensor.numel():
            raise RepresentationError(
                f"its output has shape {tuple(tensor.shape)} and is empty; give at least one image, give larger "
                f"images, or probe another layer"
            )
        return tensor

    def abandon(self) -> None:
        """Ends a pass that failed or was interrupted, without learning from it."""
        for attention in reversed(self._attentions.values()):
            attention.log.end()
        self._reader.end(None)

    def end(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Ends the pass.

        Returns:
            Layer -> representation, or the return value of `reduce`, in forward order; and the layers matched by a
            pattern that yielded none, each with the reason.

        Raises:
            LayerError: a named layer never ran or ran more than once, or no layer yielded a representation.
        """
        self._reader.end(self._ran)
        captured: dict[str, _Call] = {}
        skipped: dict[str, str] = {}
        for selection in self._selections.values():
            try:
                captured |= self._captured(selection)
                calls = enumerate(self._calls[selection.label])
                skipped |= {f"{selection.label}#{k}": call.problem for k, call in calls if call.problem}
            except LayerError as error:
                if selection.strict:
                    raise
                skipped[selection.label] = str(error)
        if not captured:
            label, reason = next(iter(skipped.items()))
            raise LayerError(f"none of {len(skipped)} layers could be captured; {label!r}: {reason}")
        in_order = sorted(captured.items(), key=lambda item: item[1].order)
        return {name: call.representation for name, call in in_order}, skipped

    def _captured(self, selection: Selection) -> dict[str, _Call]:
        """The selected calls of a layer, by name."""
        label, calls = selection.label, self._calls[selection.label]
        if not calls:
            instead = self._module_calls.instead(selection.module_name)
            raise LayerError(f"layer {label!r} never ran in this forward pass{instead}")
        if selection.call is not None:
            if selection.call >= len(calls):
                raise LayerError(
                    f"layer {label!r} was called {len(calls)} times in this forward pass; calls are numbered from #0"
                )
            calls = [calls[selection.call]]
        elif len(calls) > 1 and selection.strict:
            readable = [k for k, call in enumerate(calls) if call.representation is not _NOTHING]
            choices = ", ".join(repr(f"{label}#{k}") for k in readable[:4])
            others = {f"#{k}": call.problem for k, call in enumerate(calls) if call.representation is _NOTHING}
            because = f"; {next(iter(others))} cannot be read: {next(iter(others.values()))}" if others else ""
            raise LayerError(
                f"layer {label!r} ran {len(calls)} times in one forward pass; choose a call: {choices}{because}"
            )
        named = {label: calls[0]} if len(calls) == 1 else {f"{label}#{k}": call for k, call in enumerate(calls)}
        captured = {name: call for name, call in named.items() if call.representation is not _NOTHING}
        if not captured:
            raise LayerError(calls[0].problem)
        return captured


def _named(problem: str, selection: Selection, index: int) -> str:
    """Fills in `<layer>` in a message, so that its parts and calls can be passed to a probe as they are."""
    call = f"#{selection.call or index}" if selection.call is not None or index else ""
    holder = "" if selection.key is None else f"{selection.key}."
    problem = _PART_OF_LAYER.sub(lambda part: f"{selection.module_name}[{holder}{part[1]}]{call}", problem)
    return problem.replace("<layer>", selection.label if selection.call is not None else f"{selection.label}{call}")
