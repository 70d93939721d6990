"""Whether an affinity, and what solving it takes, fits into memory: asked before anything is allocated."""

from __future__ import annotations

from rsm_probe.execution.devices import require_memory
from rsm_probe.matching.matching import Matching


def require_room(method: Matching, rows: int, columns: int, itemsize: int, copies: int = 1) -> None:
    """Refuse a pair whose affinity does not fit into memory, for methods that need one.

    Args:
        method: any matching.
        rows: locations S of one image.
        columns: locations T of the other.
        itemsize: bytes of an entry.
        copies: of the affinity that are still to be made; 0 where it is there.

    Raises:
        CostError: the message says what it takes, what is free, and which method needs no affinity.
    """
    if not method.needs_affinity:
        return
    entries = rows * columns
    # The other side of an asymmetric method reads a copy.
    size = entries * itemsize * (copies + (not method.symmetric)) + method.scratch_bytes(rows, columns, itemsize)
    require_memory(
        size,
        f"matching {rows} x {columns} locations by {method.name!r}, which needs their affinity,",
        "match(x, y, 'rewindowed') takes the tokens of two images and needs no affinity",
    )
