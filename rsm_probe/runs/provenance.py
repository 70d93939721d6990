"""Versions and machine of a result, so that it can be reproduced."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = (
    "rsm-probe",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "numpy",
    "scipy",
    "lap",
    "numba",
    "xarray",
    "zarr",
)


def provenance() -> dict[str, Any]:
    """Collect package versions, machine and time."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }
