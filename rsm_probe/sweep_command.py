"""What the options of rsm-probe sweep stand for: the settings of a study, and the name of its run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsm_probe.errors import ConfigError
from rsm_probe.storage.paths import file_name

_RANDOM = ("none", "null")


def sweep_settings(
    models: Sequence[str],
    images: str,
    layers: Sequence[str],
    matchings: Sequence[str],
    kernels: Sequence[str],
    weights: str,
    count: int | None,
) -> dict[str, Any]:
    """The configuration of a sweep, as plain data.

    Args:
        models: sources, such as timm:resnet18.
        images: source of the images.
        layers: names and globs.
        matchings: names of the matchings.
        kernels: names of the kernels.
        weights: "default", "none", or a checkpoint for the only model.
        count: number of images; None for all.

    Raises:
        ConfigError: one checkpoint is given for several models.
    """
    if len(models) > 1 and weights not in ("default", *_RANDOM):
        raise ConfigError(
            f"--weights {weights} is a checkpoint of one model, and there are {len(models)}; for a checkpoint each, "
            "write a configuration: --dry-run prints one to begin with"
        )
    of_model = {} if weights == "default" else {"weights": None if weights in _RANDOM else weights}
    return {
        "study": "sweep",
        "models": [{"source": source, **of_model} for source in models],
        "images": {"source": images, **({} if count is None else {"count": count})},
        "layers": layers[0] if len(layers) == 1 else list(layers),
        "matchings": list(matchings),
        "kernels": list(kernels),
        "centering": "location-mean",
    }


def sweep_name(models: Sequence[str], images: str) -> str:
    """The name of a run folder: the last part of each model and of the images, such as resnet18-photos."""
    parts = [source.rstrip("/").replace(":", "/").rsplit("/", 1)[-1] for source in models]
    return file_name(f"{'+'.join(parts)}-{Path(images).resolve().name}")
