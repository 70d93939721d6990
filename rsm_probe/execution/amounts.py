"""Amounts of memory and time: parsing, formatting, and the memory of this machine."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from numbers import Integral
from pathlib import Path

from rsm_probe.checks import brief
from rsm_probe.errors import CostError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(amount: str | int) -> int:
    """Parse a number of bytes, or text such as "500MB" or "2 GB".

    Raises:
        CostError: the amount is not positive or cannot be parsed.
    """
    if isinstance(amount, Integral) and not isinstance(amount, bool):
        size = int(amount)
    else:
        parts = re.fullmatch(
            r"\s*(\d{1,30}(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", amount if isinstance(amount, str) else "", re.IGNORECASE
        )
        if not parts:
            raise CostError(f"memory must be a number of bytes or text such as '2GB', found {brief(amount)}")
        size = int(float(parts[1]) * (1024 if parts[3] else 1000) ** _POWERS[parts[2].upper()])
    if size <= 0:
        raise CostError(f"memory must be above 0, found {brief(amount)}")
    return size


def format_bytes(amount: float) -> str:
    """Format bytes with a unit, such as 1.5 GB."""
    units = ["B", "KB", "MB", "GB", "TB"]
    # From 999.5 on, three digits would round to 1e+03.
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.3g} {units[0]}"


def as_budget(amount: int) -> str:
    """Format bytes as text that `parse_bytes` takes, rounded up: 1.3GB, 500MB."""
    unit, size = ("GB", 10**9) if amount >= 10**9 else ("MB", 10**6)
    return f"{math.ceil(10 * amount / size) / 10:g}{unit}"


def physical_bytes() -> int | None:
    """Bytes of main memory of this machine, or None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def available_bytes() -> int | None:
    """Bytes of main memory available to new work; all of it if the system reports no more, None if unknown."""
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return physical_bytes()


def format_seconds(seconds: float) -> str:
    """Format a duration with a unit: 0.4 s, 12 s, 3.5 min, 2.1 h."""
    if 0.05 <= seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
