"""CKA of semantic against spatio-semantic RSMs by depth (the paper's Figure 15), with intervals where RSMs are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsm_probe.evidence.words import listed_in_words
from rsm_probe.runs.tables import Row, escaped, markdown, with_interval
from rsm_probe.streaming.result import SweepResult

_NAN = math.nan


def depth_rows(name: str, result: SweepResult, repeats: int = 300) -> list[Row]:
    """The CKA of the two RSMs of every layer of a sweep.

    Args:
        name: name of the sweep.
        result: its result; layers whose RSMs are kept have intervals.
        repeats: bootstrap samples.

    Returns:
        Rows with the sweep, model, kernel, layer, its number, `cka`, `low` and `high`; none without both matchings.
    """
    known = {str(matching) for matching in result.cka["matching_a"].values}
    if not {"identity", "optimal"} <= known:
        return []
    intervals = _intervals(result, repeats)
    rows: list[Row] = []
    for model in result.models:
        for kernel in dict.fromkeys(str(value) for value in result.cka["kernel_a"].values):
            grid = result.grid(model, model, "optimal", "identity", kernel)
            for number, layer in enumerate(result.layers(model)):
                low, high = intervals.get((model, kernel, layer), (_NAN, _NAN))
                rows.append(
                    {
                        "sweep": name, "model": model, "kernel": kernel, "layer": layer, "number": number,
                        "cka": float(grid.sel(layer_a=layer, layer_b=layer)), "low": low, "high": high,
                    }
                )  # fmt: skip
    return rows


def depth_section(sweeps: Mapping[str, SweepResult]) -> list[str]:
    """Lines of Markdown: a table of all sweeps, and what the ends of each network say."""
    rows = [row for name, result in sweeps.items() for row in depth_rows(name, result)]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["sweep"], row["model"], row["kernel"]), []).append(row)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    cells = []
    for key, line in lines.items():
        by_layer = {row["layer"]: with_interval(row, "cka", digits=2) for row in line}
        cells.append([*key, *(by_layer.get(layer, "-") for layer in layers)])
    said = [sentence for (sweep, *of), line in lines.items() if (sentence := _ends(line, f"{sweep}, {', '.join(of)}"))]
    return [
        "CKA between the semantic and the spatio-semantic RSM of each layer (Figure 15), with intervals over images "
        "where RSMs are kept:\n",
        markdown(["images", "model", "kernel", *layers], cells),
        *said,
        "",
    ]


def _ends(line: Sequence[Row], title: str) -> str:
    """Say whether CKA rises or falls from the first layer with an interval to the last; "" without two of them."""
    known = [row for row in line if not math.isnan(row["low"])]
    if len(known) < 2:
        return ""
    first, last = known[0], known[-1]
    said = "rises" if last["low"] > first["high"] else "falls" if last["high"] < first["low"] else ""
    values = listed_in_words([f"{with_interval(r, 'cka', digits=2)} at {escaped(r['layer'])}" for r in (first, last)])
    change = f"it {said} with depth" if said else "the intervals overlap: neither a rise nor a fall is shown"
    return f"- {escaped(title)}: {values}; {change}."


def _intervals(result: SweepResult, repeats: int) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(model, kernel, layer) -> interval over images, of layers whose RSMs are kept."""
    if result.rsms is None:
        return {}
    drawn, keys = result.bootstrap(repeats), ("model", "kernel", "layer", "matching")
    sides: dict[str, list[tuple[Any, ...]]] = {
        side: list(zip(*(map(str, drawn[f"{key}_{side}"].values) for key in keys), strict=True)) for side in "ab"
    }
    position = {key: number for number, key in enumerate(sides["b"])}
    intervals = {}
    for number, (*key, matching) in enumerate(sides["a"]):
        if matching == "optimal" and (other := position.get((*key, "identity"))) is not None:
            low, high = (float(np.asarray(drawn[end].values)[number, other]) for end in ("low", "high"))
            intervals[tuple(key)] = low, high
    return intervals
