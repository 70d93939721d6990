"""One call of an attention layer: takes its facets, which the first call over inputs of a kind shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from rsm_probe.errors import RepresentationError
from rsm_probe.probe.facets.channel_codes import Attention, Channels
from rsm_probe.probe.facets.channel_trace import ChannelTrace, Source
from rsm_probe.probe.facets.facet_names import FACETS, Facet
from rsm_probe.probe.facets.projections import Event, ProjectionLog
from rsm_probe.probe.representation import Representation

# The most submodules to list in a message.
_MOST_NAMES = 4


@dataclass(frozen=True)
class FacetChannels:
    """Where a facet lies in the output of a projection.

    Attributes:
        event: when that output appears.
        size: its number of channels.
        heads: the channels of each head (heads, C), in the order in which the attention takes the heads.
    """

    event: Event
    size: int
    heads: Tensor

    def of_head(self, head: int | None, kind: str) -> Tensor:
        """The channels of one head, or of all in order.

        Raises:
            RepresentationError: the layer has fewer heads.
        """
        if head is None:
            return self.heads.flatten()
        if head >= len(self.heads):
            raise RepresentationError(f"it has {len(self.heads)} heads of [{kind}], counted from 0, and no head {head}")
        return self.heads[head]


# query, key, value -> where it lies, or the reason why nothing shows it.
Facets = Mapping[str, FacetChannels | str]


class AttentionCall:
    """One running call of an attention layer.

    Args:
        layer: the name of the layer.
        learned: the facets of an earlier call over inputs of the same kind; None to learn them in this call.
        depends: whether a tensor depends on an input of the model.
        hold: copies a tensor that must outlive later operations.
        located: whether a tensor has locations of the images.
    """

    def __init__(
        self,
        layer: str,
        learned: Facets | None,
        depends: Callable[[Tensor], bool],
        hold: Callable[[Tensor], Tensor],
        located: Callable[[Tensor], bool],
    ) -> None:
        self._layer = layer
        self._learned = learned
        self._located = located
        self.log: ChannelTrace | ProjectionLog = ChannelTrace(depends, hold)
        if learned is not None:
            self.log = ProjectionLog({f.event for f in learned.values() if isinstance(f, FacetChannels)}, hold)
        self._held: Mapping[Event, Tensor] = {}
        self.log.begin()

    def end(self) -> Facets:
        """Ends the call, and returns its facets."""
        self.log.end()
        if isinstance(self.log, ProjectionLog):
            self._held = self.log.held
            assert self._learned is not None
            return self._learned
        sources = self.log.sources
        self._held = {source.event: source.tensor for source in sources if source.tensor is not None}
        problem = _not_one(self.log, self._layer, self._instead(sources))
        if problem:
            return dict.fromkeys(FACETS, problem)
        facets = {kind: self._facet(kind, self.log.attentions, sources) for kind in FACETS}
        return {kind: self._unless_shared(kind, facets, sources) for kind in FACETS}

    def output(self, event: Event) -> Tensor | None:
        """The output of a projection; None if it did not appear."""
        return self._held.get(event)

    def _facet(self, kind: str, attentions: Sequence[Attention], sources: Sequence[Source]) -> FacetChannels | str:
        heads: dict[Channels, None] = {}
        for attention in attentions:
            channels: list[Channels] | None = getattr(attention, kind)
            if channels is None:
                return f"the projection that its [{kind}] comes from cannot be traced; {self._instead(sources)}"
            heads |= dict.fromkeys(channels)
        by_source: dict[frozenset[int], list[list[int]]] = {}
        for head in heads:
            numbers = frozenset(number for number, _ in head)
            by_source.setdefault(numbers, []).append(sorted(channel for _, channel in head))
        located = {
            number: listed
            for (number, *more), listed in ((tuple(numbers), listed) for numbers, listed in by_source.items())
            if not more and (held := sources[number].tensor) is not None and self._located(held)
        }
        if len(by_source) > 1 and len(located) == 1:  # others are tokens of a text
            ((number, listed),) = located.items()
        elif len(by_source) == 1 and all(len(numbers) == 1 for numbers in by_source):
            ((numbers, listed),) = by_source.items()
            (number,) = numbers
        else:
            return f"its [{kind}] comes from several projections; {self._instead(sources)}"
        every = [channel for head in listed for channel in head]
        if len(set(every)) != len(every) or len({len(head) for head in listed}) != 1:
            return f"the heads of its [{kind}] cannot be told apart; {self._instead(sources)}"
        return FacetChannels(sources[number].event, sources[number].channels, torch.tensor(listed))

    def _unless_shared(self, kind: str, facets: Facets, sources: Sequence[Source]) -> FacetChannels | str:
        """Refuses a facet of which some channels also belong to another: two attentions ran, one on another's."""
        own = facets[kind]
        for other_kind, other in facets.items():
            if isinstance(own, FacetChannels) and isinstance(other, FacetChannels) and own.event == other.event:
                shared = set(own.heads.flatten().tolist()) & set(other.heads.flatten().tolist())
                if shared and not torch.equal(own.heads, other.heads):
                    return f"its [{kind}] and [{other_kind}] share channels; {self._instead(sources)}"
        return own

    def _instead(self, sources: Sequence[Source]) -> str:
        names = list(dict.fromkeys(source.event.module for source in sources if source.event.module))[:_MOST_NAMES]
        full = ", ".join(repr(f"{self._layer}.{name}" if self._layer else name) for name in names)
        return f"probe a projection whole: {full}" if full else "probe a layer before or after it"


def _not_one(log: ChannelTrace, layer: str, instead: str) -> str:
    """Why a layer is not one attention layer, or ""."""
    if not log.attentions and log.lost_in:
        return (
            f"no softmax over products of projected queries and keys was seen in it, since channels were lost in the "
            f"operation {log.lost_in[0]!r} (attention over channels, or without a softmax?); {instead}"
        )
    if not log.attentions:
        return (
            "no attention ran in it (a softmax over products of projected queries and keys); name an attention layer, "
            "or a block with one (`rsm-probe layers` lists them)"
        )
    holders = dict.fromkeys(holder_of(attention, log.sources) for attention in log.attentions)
    if len(holders) > 1:
        names = [".".join(part for part in (layer, holder) if part) for holder in holders]
        listed = ", ".join(repr(name) for name in names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        return f"{len(names)} attention layers ran in it; name one of them: {listed}"
    return ""


def holder_of(attention: Attention, sources: Sequence[Source]) -> str:
    """The innermost submodule that ran an attention with its projections; "" for the layer itself."""
    numbers = {number for head in attention.query or attention.key or [] for number, _ in head}
    paths = [path.split(".") for path in (attention.holder, *(sources[number].holder for number in numbers))]
    shared = paths[0]
    for path in paths[1:]:
        shared = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(shared, path, strict=False))]
    return ".".join(shared)


def select(representation: Representation, channels: FacetChannels, facet: Facet, copy: bool) -> Representation:
    """The facet in the representation of its projection, of whose memory a copy is independent.

    Raises:
        RepresentationError: the layer has fewer heads, or its projection has another number of channels.
    """
    indices = channels.of_head(facet.head, facet.kind)
    if representation.tokens.shape[-1] != channels.size:
        raise RepresentationError(
            f"the vectors of its projection have {representation.tokens.shape[-1]} channels of {channels.size}"
        )
    tokens, prefix = (_of_channels(vectors, indices) for vectors in (representation.tokens, representation.prefix))
    if copy:
        tokens, prefix = tokens.clone(), prefix.clone()
    return replace(representation, tokens=tokens, prefix=prefix)


def _of_channels(vectors: Tensor, indices: Tensor) -> Tensor:
    """Some channels of vectors; a view if they are contiguous."""
    first = int(indices[0])
    if torch.equal(indices, torch.arange(first, first + len(indices))):
        return vectors[..., first : first + len(indices)]
    return vectors[..., indices.to(vectors.device)]


def leave_all(calls: Mapping[Any, AttentionCall]) -> None:
    """Ends calls that failed or were interrupted."""
    for call in reversed(list(calls.values())):
        call.log.end()
