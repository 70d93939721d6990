"""Mini-batches on their way through the workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsm_probe.pairs.matcher import PendingProducts


@dataclass(frozen=True)
class Submitted:
    """One layer of a mini-batch, whose pairs may still be in the hands of the workers.

    Attributes:
        owner: the accumulator that took it up.
        model: whose layer it is.
        layer: its name.
        count: number of images.
        bad: the first image that holds NaN or infinity, of which nothing was submitted.
        ahead: whether a device of its own goes on while workers match.
        products: of all pairs.
    """

    owner: object
    model: str
    layer: str
    count: int
    bad: int | None
    ahead: bool
    products: PendingProducts | None


@dataclass
class Batch:
    """All layers of a mini-batch."""

    layers: list[Submitted]
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
