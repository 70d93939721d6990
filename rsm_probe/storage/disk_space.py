"""Whether the disk holds what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from rsm_probe.errors import StorageError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.storage.paths import is_url, located


def require_space(where: str | Path, needed: float) -> str:
    """Refuses to begin what the disk cannot hold.

    Args:
        where: a folder that need not exist yet; of URLs nothing is known.
        needed: bytes.

    Returns:
        Words for a line about the work: what it needs, and what is free.

    Raises:
        StorageError: the disk is too small.
    """
    needs = f"{format_bytes(needed)} of disk"
    if is_url(where):
        return needs
    folder = Path(located(where)).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{where} would take {needs}, and {format_bytes(free)} are free there; choose another place")
    return f"{needs}, {format_bytes(free)} free"
