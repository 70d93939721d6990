"""What a sweep is told by name: things to compare, layers to keep."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rsm_probe.checks import require_text, require_texts
from rsm_probe.comparison.grid import RsmKey
from rsm_probe.errors import ComparisonError, LayerError, nearest, repeated


def kept_names(keep: Any) -> list[str]:
    """What `keep` names, as a list.

    Raises:
        LayerError: neither text nor several texts.
    """
    return (
        [require_text(keep, "keep", LayerError)] if isinstance(keep, str) else require_texts(keep, "keep", LayerError)
    )


def check_layers(layers: Any) -> str | list[str] | dict[str, str | list[str]]:
    """Layers for all models, or model name -> layers, as plain text and lists.

    Raises:
        LayerError: neither.
    """
    if isinstance(layers, Mapping):
        return {
            require_text(model, "layers=: the name of a model", LayerError): _layers(own, f"layers[{model!r}]")
            for model, own in layers.items()
        }
    return _layers(layers, "layers")


def _layers(layers: Any, what: str) -> str | list[str]:
    return (
        require_text(layers, what, LayerError) if isinstance(layers, str) else require_texts(layers, what, LayerError)
    )


def is_kept(layer: str, keep: Sequence[str]) -> bool:
    """Whether a layer is among the names and globs of those to keep."""
    return any(layer == pattern or fnmatch.fnmatchcase(layer, pattern) for pattern in keep)


def check_kept(keep: Sequence[str], layers: Collection[str]) -> None:
    """Refuses names and globs that match none of the layers.

    Raises:
        LayerError: holds the nearest names.
    """
    for pattern in keep:
        if not any(is_kept(layer, [pattern]) for layer in layers):
            raise LayerError(f"keep names no layer of this sweep: {pattern!r}{nearest(pattern, layers)}")


def require_distinct(what: str, names: list[str]) -> None:
    """Refuses two of one name.

    Raises:
        ComparisonError: names it.
    """
    if (twice := repeated(names)) is not None:
        raise ComparisonError(f"{what} holds {twice!r} more than once, and results are told apart by name")


def several(values: Any, what: str) -> list[Any]:
    """One thing or a sequence of things, as a list.

    Raises:
        ComparisonError: an empty sequence.
    """
    found = [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)
    if not found:
        raise ComparisonError(f"{what} is empty; name at least one")
    return found


def rsm_keys(layers: Sequence[tuple[str, str]], matchings: Sequence[str], kernels: Sequence[str]) -> list[RsmKey]:
    """What the RSMs of a batch are, in the order in which they are made.

    Args:
        layers: (model, layer) in forward order within a model.
        matchings: labels.
        kernels: names.
    """
    keys, depths = [], dict.fromkeys((model for model, _ in layers), 0)
    for model, layer in layers:
        keys += [RsmKey(model, layer, depths[model], matching, kernel) for matching in matchings for kernel in kernels]
        depths[model] += 1
    return keys


def require_same(before: list[RsmKey], now: list[RsmKey]) -> None:
    """Refuses a batch of other RSMs than the ones before.

    Raises:
        ComparisonError: names the first that differs.
    """
    if before != now:
        differing = [f"{a.label()} became {b.label()}" for a, b in zip(before, now, strict=False) if a != b]
        counts = f"{len(before)} RSMs became {len(now)}"
        raise ComparisonError(f"this batch has other layers than the ones before: {(differing or [counts])[0]}")
