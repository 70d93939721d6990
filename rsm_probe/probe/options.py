"""The options of a probe, validated before any hook is set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from rsm_probe.checks import brief, require_flag, require_text
from rsm_probe.errors import LayerError, RepresentationError, did_you_mean
from rsm_probe.probe.facets.facet_names import matches
from rsm_probe.probe.layers import Selection
from rsm_probe.probe.representation import Layout, Representation
from rsm_probe.probe.tracing.inputs import leaves

Reduce = Callable[[str, Representation], Any]
_OF_A_CALL = re.compile(r"#\d+$")


@dataclass(frozen=True)
class Options:
    """How to read outputs and when to end a pass; see `Probe` for each option."""

    layouts: Mapping[str, Layout]
    dtype: torch.dtype | None
    stop_early: bool
    example: Any
    reduce: Reduce | None
    inputs: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls,
        selections: Sequence[Selection],
        layouts: Mapping[str, Layout] | None,
        dtype: torch.dtype | None,
        stop_early: bool,
        example: Any,
        reduce: Reduce | None,
        inputs: str | int | Sequence[str | int] | None = None,
    ) -> Options:
        """Validates options against the layers.

        Raises:
            LayerError: `layouts` is not a mapping, or names a layer that is not probed.
            RepresentationError: an option has the wrong type or value.
        """
        _require_layouts(layouts or {}, selections)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            near = f"; write torch.{dtype}" if isinstance(getattr(torch, str(dtype), None), torch.dtype) else ""
            raise RepresentationError(f"dtype must be a torch.dtype, found {brief(dtype)}{near}")
        if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise RepresentationError(
                f"dtype must be a floating-point type of at least 16 bits, found {dtype}; write torch.float32 or "
                f"torch.float16"
            )
        require_flag(stop_early, "stop_early", RepresentationError)
        if example is not None:
            _require_example(example)
        if reduce is not None and not callable(reduce):
            raise RepresentationError(
                f"reduce must be a function of a layer name and its Representation, found {brief(reduce)}"
            )
        if not isinstance(inputs, str | int | Iterable | None):
            raise RepresentationError(f"inputs must be names or positions of arguments, found {brief(inputs)}")
        given: list[Any] = [inputs] if isinstance(inputs, str | int) else list(inputs or ())
        names = [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in given]
        named = tuple(require_text(name, "an input's name in inputs", RepresentationError) for name in names)
        return cls(dict(layouts or {}), dtype, stop_early, example, reduce, named)

    def layout(self, selection: Selection, call: int) -> Layout | None:
        """The layout that the user gave for a call of a layer, or None."""
        return next((layout for pattern, layout in self.layouts.items() if _is_named(selection, call, pattern)), None)


def matching_patterns(selections: Sequence[Selection], patterns: Iterable[str]) -> list[str]:
    """Those of some names and globs, as `layouts` takes them, that match a layer."""
    return [
        pattern
        for pattern in patterns
        if any(
            _is_named(s, None, pattern) or (s.call is None and matches(s.label, _OF_A_CALL.sub("", pattern)))
            for s in selections
        )
    ]


def _require_layouts(layouts: Mapping[str, Layout], selections: Sequence[Selection]) -> None:
    if not isinstance(layouts, Mapping):
        raise LayerError(
            f"layouts must map layer names or globs to layouts, found {brief(layouts)}; write "
            f"layouts={{'<layer>': 'NTC'}}"
        )
    for pattern, layout in layouts.items():
        require_text(pattern, "a layer's name in layouts", LayerError)
        if not matching_patterns(selections, [pattern]):
            near = did_you_mean(pattern, [selection.label for selection in selections])
            raise LayerError(f"layouts: no probed layer matches {pattern!r}{near}")
        if not isinstance(layout, str) or layout not in get_args(Layout):
            raise RepresentationError(
                f"layouts: layer {pattern!r} has the unknown layout {brief(layout)}; layouts are: "
                f"{', '.join(get_args(Layout))}"
            )


def _require_example(example: Any) -> None:
    if isinstance(example, Mapping) and not all(isinstance(name, str) for name in example):
        raise RepresentationError(f"example must map argument names to values, found {brief(example)}")
    if not any(isinstance(leaf, Tensor) for leaf in leaves(example)):
        raise RepresentationError(
            f"example must contain a tensor of images (N, C, H, W), found {brief(example)} ({type(example).__name__})"
        )


def _is_named(selection: Selection, call: int | None, pattern: str) -> bool:
    """Whether a name or glob matches a layer, its module, or the given call of it."""
    names = [selection.label, selection.label.partition("#")[0]]
    if selection.call is None and call is not None:
        names.append(f"{selection.label}#{call}")
    return any(matches(name, pattern) for name in names)
