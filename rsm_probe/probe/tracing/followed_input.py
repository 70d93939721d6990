"""An input that holds images, beside others, with a trace of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rsm_probe.probe.tracing.inputs import Inputs, OtherInput, other_inputs, shown
from rsm_probe.probe.tracing.location_codes import NOWHERE
from rsm_probe.probe.tracing.origins import Lost
from rsm_probe.probe.tracing.trace import Trace


@dataclass(frozen=True)
class FollowedInput:
    """One input with images, and the trace of its locations.

    Attributes:
        trace: its trace.
        batch: number of its images.
        others: the other inputs.
        name: as in `Representation.input`.
        images: the tensors that hold its images.
    """

    trace: Trace
    batch: int
    others: list[OtherInput]
    name: str
    images: list[Tensor]

    def locates(self, output: Tensor) -> Tensor | None:
        """Where values of an output have locations of this input; None if nowhere."""
        origin = self.trace.of(output)
        located = origin > NOWHERE if isinstance(origin, Tensor) else None
        return located if located is not None and bool(located.any()) else None

    def holds(self, output: Tensor) -> bool:
        """Whether an output belongs to this input, be it without locations."""
        origin = self.trace.of(output)
        return isinstance(origin, Lost) or (isinstance(origin, Tensor) and bool((origin >= NOWHERE).any()))


def images_of(inputs: Inputs) -> list[Tensor]:
    """The tensors that hold the images of an input."""
    return inputs.images if isinstance(inputs.images, list) else [] if inputs.images is None else [inputs.images]


def follow(args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Inputs) -> FollowedInput:
    """Begins to trace a further input with images."""
    trace, others = Trace(inputs.batch), other_inputs(args, kwargs, inputs)
    trace.start(images_of(inputs) if isinstance(inputs.images, list) else images_of(inputs)[0], inputs.grids)
    for number, other in enumerate(others):
        trace.pass_by(other.tensor, number)
    trace.begin()
    return FollowedInput(trace, inputs.batch, others, shown(inputs.name), images_of(inputs))
