"""Check for free disk space before writing."""

from __future__ import annotations

import shutil
from pathlib import Path

from rsm_probe.errors import StorageError
from rsm_probe.execution.amounts import format_bytes
from rsm_probe.storage.paths import is_url, located


def require_space(where: str | Path, needed: float) -> str:
    """Refuse work whose result does not fit on the disk.

    Args:
        where: the destination, which need not exist yet. URLs are not checked.
        needed: size of the result in bytes.

    Returns:
        Text for a progress line: the space needed and, for local folders, the free space.

    Raises:
        StorageError: the disk has too little free space.
    """
    needs = f"{format_bytes(needed)} of disk"
    if is_url(where):
        return needs
    folder = Path(located(where)).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{where} needs {needs}, but {format_bytes(free)} are free there; choose another folder")
    return f"{needs}, {format_bytes(free)} free"
