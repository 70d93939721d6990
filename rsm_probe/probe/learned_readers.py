"""What traced passes taught about reading outputs, and which later passes it applies to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rsm_probe.probe.facets.attention_calls import Facets
from rsm_probe.probe.representation import Grid, Layout
from rsm_probe.probe.tracing.inputs import Signature
from rsm_probe.probe.tracing.traced_layout import TracedLayout

# How to read the output of one call of a layer, or the reason why it cannot be read.
Reader = TracedLayout | tuple[Layout, list[Grid], str] | str
Readers = dict[tuple[str, int], Reader]
# The kind of a pass's inputs: shapes and those values that may steer the model; see `LearnedReaders.kind`.
Kind = tuple[Any, ...]
# (layer, call) -> fingerprint of the operations before it.
Fingerprints = dict[tuple[str, int], int]
# The most combinations of numbers and texts to remember.
_MOST_SCALARS = 100_000


@dataclass
class Checked:
    """What passes that differ only in numbers and texts have in common.

    Attributes:
        kind: the first traced pass of them.
        fingerprints: of its operations.
        agree: whether a second traced pass, with other numbers, agreed with it; None before that pass.
    """

    kind: Kind
    fingerprints: Fingerprints
    agree: bool | None = None


@dataclass
class LearnedReaders:
    """How to read outputs: learned in traced passes, applied in all later passes over inputs of the same kind.

    Attributes:
        readers: kind of inputs -> (layer, call) -> reader.
        calls: kind of inputs -> number of calls of probed layers in a pass.
        parts: (kind, layer, call) -> index of the tensor within a tuple or dict that holds the representation.
        locations: (kind, layer, call) -> location codes of the tokens when they were first selected by index.
        notes: layer -> what a user should know about its reading.
        prefixes: layer -> number of prefix tokens, for layers that return token sequences.
        read: shapes -> names of the integer tensors whose values became Python numbers or shapes in a traced pass. The
            values of others steer nothing: they do not make a pass of another kind. Until a pass has ended, all count.
        checked: (kind without numbers and texts, modes of PyTorch) -> what its passes have in common. Python shows no
            use of a number, so two passes are traced; if they agree, later ones are read alike while their operations
            do.
        alike: kind -> the traced kind that passes of it agreed with.
        facets: kind of inputs -> (attention layer, call) -> its facets.
    """

    readers: dict[Kind, Readers] = field(default_factory=dict)
    calls: dict[Kind, int] = field(default_factory=dict)
    parts: dict[tuple[Kind, str, int], int | None] = field(default_factory=dict)
    locations: dict[tuple[Kind, str, int], Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)
    read: dict[Kind, frozenset[str]] = field(default_factory=dict)
    checked: dict[tuple[Kind, tuple[bool, ...]], Checked] = field(default_factory=dict)
    alike: dict[Kind, Kind] = field(default_factory=dict)
    facets: dict[Kind, dict[tuple[str, int], Facets]] = field(default_factory=dict)

    def kind(self, signature: Signature) -> Kind:
        """The kind of a pass, apart from numbers and texts."""
        read = self.read.get(signature.shapes, frozenset())
        return signature.shapes, tuple(values for values in signature.wholes if values[0] in read)

    def remember(self, kind: Kind, traced: Kind) -> None:
        """Remembers that a pass whose numbers or texts are new agreed with a traced one."""
        if len(self.alike) < _MOST_SCALARS:
            self.alike[kind] = traced
