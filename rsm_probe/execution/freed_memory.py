"""Memory that a forward pass frees is kept for the next one, where the C library would return it to the system."""

from __future__ import annotations

import ctypes
import sys

# Numbers of parameters of `mallopt` in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Blocks below this size come from the heap, and so much free memory may stay at its end.
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Lets this process reuse up to 1 GB of memory that it freed, instead of returning it to the system.

    PyTorch allocates new memory for the output of every layer. By default, glibc requests blocks above 32 MB from the
    system each time, and the system clears their pages on first use, which can take longer than the layer itself. Call
    this once, before the program allocates, as `rsm-probe` does. It works on Linux with glibc only.

    Returns:
        Whether the C library does so from now on.

    Example:
        >>> from rsm_probe.execution import keep_freed_memory
        >>> kept = keep_freed_memory()    # True on most kinds of Linux
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    return all(mallopt(parameter, _KEPT_BYTES) == 1 for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
