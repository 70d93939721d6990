"""The question, setting and answer of a sweep in words, with numbers from its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsm_probe.report.default import titled
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import kernel_name, semantic_matchings
from rsm_probe.studies.sweep_report.shown import Shown


def names(result: SweepResult, field: str) -> list[str]:
    """The models, layers, matchings or kernels of a result, in its order."""
    return list(dict.fromkeys(str(name) for name in result.cka[f"{field}_a"].values))


class Cell:
    """A cell of the grids, with the numbers that the answer of a page names.

    Args:
        result: the sweep.
        models: models on the page.

    Attributes:
        model: the model of both layers.
        matching: matching of the semantic RSMs.
        kernel: kernel.
        depth_a: depth of the layer of the row.
        depth_b: depth of the layer of the column.
        difference: semantic minus spatio-semantic CKA.
    """

    def __init__(self, result: SweepResult, models: Sequence[str]) -> None:
        matchings = semantic_matchings(result) or names(result, "matching")
        self.kernel, self.matching = names(result, "kernel")[0], matchings[0]
        self.model, self.depth_a, self.depth_b, self.difference = models[0], 0, 0, 0.0
        for model in models if semantic_matchings(result) else ():
            grids = [result.grid(model, model, kind, kernel=self.kernel).values for kind in (self.matching, "identity")]
            difference = grids[0] - grids[1]
            if not np.isfinite(difference).any():
                continue
            a, b = np.unravel_index(np.nanargmax(np.abs(difference)), difference.shape)
            if abs(difference[a, b]) > abs(self.difference):
                self.model, self.depth_a, self.depth_b = model, int(a), int(b)
                self.difference = float(difference[a, b])


def question(result: SweepResult) -> str:
    """What a sweep asks."""
    if not semantic_matchings(result):
        return "How similar are the layers of these models?"
    return "Do layers judge images differently when each location may find its match anywhere in the other image?"


def setting(result: SweepResult, shown: Shown | None = None) -> str:
    """Models, layers, images and methods, in sentences."""
    layers = _joined([f"{model} ({_counted(len(result.layers(model)), 'layer')})" for model in result.models])
    kinds = [
        "spatio-semantic (identity matching)" if name == "identity" else f"semantic ({name} matching)"
        for name in names(result, "matching")
    ]
    attrs = result.dataset.attrs
    batches = f"{attrs['batches']} mini-batches" if attrs["batches"] > 1 else "one mini-batch"
    centering = str(attrs.get("centering", "None"))
    centred = "without centring" if centering == "None" else f"after {centering} centring"
    return (
        f"Models: {layers}. Images: {images_in_words(result, shown)}, in {batches}. RSMs: {_joined(kinds)}, by the "
        f"{_joined([kernel_name(kernel) for kernel in names(result, 'kernel')])}, {centred}. "
        f"RSMs are compared by {attrs['estimator']} CKA."
    )


def images_in_words(result: SweepResult, shown: Shown | None = None) -> str:
    """The number of images, their set, and which of them are parts of one picture."""
    attrs = result.dataset.attrs
    if shown is not None and shown.composition:
        return f"{shown.composition}, of the set {set_name(result)}"
    return f"{attrs['images']} images of the set {set_name(result)}"


def set_name(result: SweepResult) -> str:
    """The name of the image set; of a folder or file, the last part of its path."""
    return str(result.dataset.attrs.get("source", "without a name")).rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def title(result: SweepResult, folder: Path) -> str:
    """The title of a page: models, images, and the name of the run folder."""
    images = f"{result.dataset.attrs['images']} images of {set_name(result)}"
    return titled(f"Layers of {_joined(result.models, 3)} on {images}", folder)


def _joined(names: Sequence[str], most: int = 12) -> str:
    """Names in a sentence; of many, the first."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def answer(result: SweepResult, shown: Shown | None, models: Sequence[str]) -> str:
    """What came out, in two sentences with numbers of the result."""
    if not semantic_matchings(result):
        values = result.cka.values[np.isfinite(result.cka.values)]
        return f"CKA between layers lies between {values.min():.3f} and {values.max():.3f} (no bootstrap intervals)."
    cell = Cell(result, models)
    known = {(one.model, one.layer, one.matching, one.kernel): one for one in (shown.intervals if shown else ())}
    of_layers: list[tuple[float, str, tuple[float, float] | None]] = []
    for model in models:
        values = np.diagonal(result.grid(model, model, cell.matching, "identity", cell.kernel).values)
        for layer, value in zip(result.layers(model), values, strict=True):
            one = known.get((model, layer, cell.matching, cell.kernel))
            interval = None if one is None else (one.low, one.high)
            words = f"{layer} of {model} (CKA {value:.3f}, {interval_words(interval)})"
            if np.isfinite(value):
                of_layers.append((float(value), words, interval))
    layers = result.layers(cell.model)
    first = "CKA between the two RSMs of a layer is undefined."
    if of_layers:
        least, most = min(of_layers), max(of_layers)
        first = f"The semantic and the spatio-semantic RSM of one layer agree least in {least[1]} and most in {most[1]}"
        first += f"{_also_possible(of_layers, least[2], most[2])}."
    ends = None
    if shown is not None and len(shown.differences):
        numbers = [
            shown.numbers.get((cell.model, one, cell.matching, cell.kernel)) for one in (cell.depth_a, cell.depth_b)
        ]
        ends = None if None in numbers else tuple(shown.differences[*numbers].tolist())
    return (
        f"{first} Between two layers, matching locations changes CKA most for {layers[cell.depth_a]} and "
        f"{layers[cell.depth_b]} of {cell.model}: by {cell.difference:+.3f} ({interval_words(ends, '+')}). "
        f"These values are for the {kernel_name(cell.kernel)}{_too_narrow(shown)}."
    )


def _too_narrow(shown: Shown | None) -> str:
    """A warning where images are parts of one picture, and draws take them for independent; "" elsewhere."""
    if shown is None or not shown.repeats or not shown.composition:
        return ""
    return f"; their intervals are likely too narrow, for the images are {shown.composition}"


def _also_possible(
    of_layers: Sequence[tuple[float, str, tuple[float, float] | None]],
    least: tuple[float, float] | None,
    most: tuple[float, float] | None,
) -> str:
    """How many layers cannot be told apart from the lowest and the highest; "" where nothing has an interval."""
    if least is None or most is None:
        return ""
    ends = [interval for *_, interval in of_layers if interval is not None]
    low, high = (sum(one[0] <= extreme[1] and one[1] >= extreme[0] for one in ends) - 1 for extreme in (least, most))
    return f"; the intervals of {low} other layers overlap that of the lowest, and of {high} that of the highest"


def interval_words(ends: tuple[float, float] | None, sign: str = "") -> str:
    """A bootstrap interval in words."""
    if ends is None or not np.isfinite(ends).all():
        return "no bootstrap interval"
    low, high = (f"{end:{sign}.3f}" for end in ends)
    return f"95% bootstrap interval {low} to {high}"


def certificate(result: SweepResult) -> str:
    """How far approximate matchings can be from exact ones."""
    if (proven := result.proven) is None:
        return "no certificate: every matching is exact, or the result is of an earlier version, which proved nothing"
    low, high, value = (proven[name].values for name in ("low", "high", "value"))
    known = np.isfinite(value) & ~((low == -1) & (high == 1))
    if not known.any():
        return "nothing is proven about CKA by the best possible matchings"
    most = float(np.maximum(high - value, value - low)[known].max())
    cells = "every cell" if known.all() else f"{known.sum():,} of {known.size:,} cells"
    size = np.format_float_positional(float(f"{max(most, 1e-9):.2g}"), trim="-")
    return f"with the best possible matchings, CKA is proven to lie within ±{size} of the value shown, in {cells}"


def certainty(result: SweepResult, shown: Shown | None) -> str:
    """The two kinds of uncertainty of the values of CKA, each by its name."""
    words = [f"Matching error (certificate): {certificate(result)}. It says nothing about different images."]
    if shown is None or not shown.repeats:
        return f"{words[0]}\n\nSampling error: no bootstrap intervals."
    where = (
        "Point at a cell, or tap it, for its interval"
        if len(shown.cells)
        else "Only the comparison of both RSMs of a layer has intervals (next section); cells have none"
    )
    words.append(
        f"Sampling error (95% bootstrap interval): how much a value depends on which images were taken, from "
        f"{shown.repeats} random draws of these images (seed 0). {where}. An interval does not allow for the choice of "
        "the lowest or highest among many values."
    )
    if shown.composition:
        words.append(
            f"The images are {shown.composition}. The draws treat them as independent, but images of the same "
            f"{shown.picture} are alike, so these intervals are likely too narrow."
        )
    return "\n\n".join(words)


def pairs_matched(result: SweepResult) -> str:
    """How many pairs of images were matched."""
    images, batches = (int(result.dataset.attrs[name]) for name in ("images", "batches"))
    larger = images % batches
    sizes = [images // batches + 1] * larger + [images // batches] * (batches - larger)
    pairs = sum(size * (size - 1) // 2 for size in sizes)
    layers = sum(len(result.layers(model)) for model in result.models)
    return f"{pairs:,} pairs of images matched in each of {layers} layers, once by each matching"
