"""Layer outputs of one forward pass, call by call, and what becomes of them when the pass ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsm_probe.errors import LayerError
from rsm_probe.probe.layers import Selection
from rsm_probe.probe.module_calls import Called

# Stands for a call of which nothing is kept; None may be what a user's own function made of it.
NOTHING = object()


@dataclass(frozen=True)
class _Call:
    order: int
    representation: Any
    problem: str


class Calls:
    """The outputs of one forward pass.

    Args:
        selections: the layers that are wanted.
        called: for messages that name what can be probed instead.
    """

    def __init__(self, selections: Sequence[Selection], called: Called) -> None:
        self._selections = selections
        self._called = called
        self._calls: dict[str, list[_Call]] = {selection.label: [] for selection in selections}
        self._order = 0

    def count(self, label: str) -> int:
        """How often a layer ran so far."""
        return len(self._calls[label])

    def add(self, label: str, representation: Any, problem: str = "") -> None:
        """Notes a call of a layer: what is kept of it, or `NOTHING` if it is not wanted or there was a problem."""
        self._order += 1
        self._calls[label].append(_Call(self._order, representation, problem))

    def collect(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What is kept in forward order, and the layers of a pattern that gave none, each with the reason.

        Raises:
            LayerError: a named layer never ran, or ran more than once; or no layer gave a representation.
        """
        captured: list[tuple[int, str, Any]] = []
        skipped: dict[str, str] = {}
        for selection in self._selections:
            try:
                captured += self._chosen(selection)
                calls = enumerate(self._calls[selection.label])
                skipped |= {f"{selection.label}#{k}": call.problem for k, call in calls if call.problem}
            except LayerError as error:
                if selection.strict:
                    raise
                skipped[selection.label] = str(error)
        if not captured:
            label, reason = next(iter(skipped.items()))
            raise LayerError(f"none of {len(skipped)} layers could be captured; {label!r}: {reason}")
        return {label: kept for _, label, kept in sorted(captured, key=lambda item: item[0])}, skipped

    def _chosen(self, selection: Selection) -> list[tuple[int, str, Any]]:
        label, calls = selection.label, self._calls[selection.label]
        if not calls:
            instead = self._called.instead(selection.module_name)
            raise LayerError(f"layer {label!r} never ran in this forward pass{instead}")
        if selection.call is not None:
            if selection.call >= len(calls):
                raise LayerError(
                    f"layer {label!r} was called {len(calls)} times in this forward pass; calls count from #0"
                )
            calls = [calls[selection.call]]
        elif len(calls) > 1:
            if selection.strict:
                choices = ", ".join(repr(f"{label}#{k}") for k in range(min(len(calls), 4)))
                raise LayerError(
                    f"layer {label!r} ran {len(calls)} times in one forward pass; choose a call: {choices}"
                )
            if any(call.representation is not NOTHING for call in calls):
                return [
                    (call.order, f"{label}#{k}", call.representation)
                    for k, call in enumerate(calls)
                    if call.representation is not NOTHING
                ]
        call = calls[0]
        if call.representation is NOTHING:
            raise LayerError(call.problem)
        return [(call.order, label, call.representation)]
