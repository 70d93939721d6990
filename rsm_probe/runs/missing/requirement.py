"""One thing that a study reads from this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsm_probe.execution.amounts import format_bytes


@dataclass(frozen=True)
class Requirement:
    """Weights, images, a file or a package.

    Attributes:
        what: what it is, such as "weights of timm:resnet18".
        there: whether it is on this machine.
        get: a command, or the address of a download, which may serve several requirements.
        put: where to put what it gives; "" where a command does that.
        size: bytes of the download; None if unknown.
        of_library: whether a library downloads it itself where it has a network.
    """

    what: str
    there: bool
    get: str
    put: str = ""
    size: float | None = None
    of_library: bool = False

    @property
    def way(self) -> str:
        """How to get it and where to put it."""
        return f"{self.get}{self.put and f', {self.put}'}"

    @property
    def size_text(self) -> str:
        """The size in words."""
        return "unknown" if self.size is None else format_bytes(self.size)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of aligned columns; the last one is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
