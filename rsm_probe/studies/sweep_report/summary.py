"""The question, setting and answer of a sweep in words, with numbers from its result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsm_probe.checks import listed
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.panels import conditions, kernel_name, semantic_matchings
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


def setting(result: SweepResult) -> str:
    """Models, layers, images and methods, in two sentences."""
    layers = listed([f"{model} ({len(result.layers(model))} layers)" for model in result.models])
    kinds = [
        "spatio-semantic (identity)" if name == "identity" else f"semantic ({name})"
        for name in names(result, "matching")
    ]
    kernels = " and ".join(kernel_name(kernel) for kernel in names(result, "kernel"))
    source = result.dataset.attrs.get("source", "images")
    return f"Models: {layers}. RSMs: {' and '.join(kinds)}, {kernels}, of {source}: {conditions({'': result})}."


def answer(result: SweepResult, shown: Shown | None, models: Sequence[str]) -> str:
    """What came out, in two sentences with numbers of the result."""
    if not semantic_matchings(result):
        values = result.cka.values[np.isfinite(result.cka.values)]
        return f"CKA between layers lies between {values.min():.3f} and {values.max():.3f}."
    cell = Cell(result, models)
    known = {(one.model, one.layer, one.matching, one.kernel): one for one in (shown.intervals if shown else ())}
    least: tuple[float, str] = (np.inf, "")
    most: tuple[float, str] = (-np.inf, "")
    for model in models:
        values = np.diagonal(result.grid(model, model, cell.matching, "identity", cell.kernel).values)
        for layer, value in zip(result.layers(model), values, strict=True):
            one = known.get((model, layer, cell.matching, cell.kernel))
            interval = "" if one is None else f", 95% interval {one.low:.3f} to {one.high:.3f}"
            words = f"{layer} of {model} (CKA {value:.3f}{interval})"
            least, most = min(least, (value, words)), max(most, (value, words))
    layers = result.layers(cell.model)
    first = (
        f"The semantic and the spatio-semantic RSM of a layer agree least in {least[1]} and most in {most[1]}."
        if least[1]
        else "CKA between the two RSMs of a layer is undefined."
    )
    return (
        f"{first} Between layers, matching locations changes CKA most between {layers[cell.depth_a]} and "
        f"{layers[cell.depth_b]} of {cell.model}: by {cell.difference:+.3f} ({kernel_name(cell.kernel)} throughout)."
    )


def certificate(result: SweepResult) -> str:
    """How far approximate matchings can be from exact ones."""
    if (proven := result.proven) is None:
        return "no matching is an approximation, or the result is of a version that proved nothing"
    low, high, value = (proven[name].values for name in ("low", "high", "value"))
    known = np.isfinite(value) & ~((low == -1) & (high == 1))
    if not known.any():
        return "nothing is proven on CKA of exact matching"
    most = float(np.maximum(high - value, value - low)[known].max())
    cells = "every cell" if known.all() else f"{known.sum():,} of {known.size:,} cells"
    return f"CKA of exact matching is proven to lie within ±{most:.2g} of the value, in {cells}"


def pairs_matched(result: SweepResult) -> str:
    """How many pairs of images were matched."""
    images, batches = (int(result.dataset.attrs[name]) for name in ("images", "batches"))
    larger = images % batches
    sizes = [images // batches + 1] * larger + [images // batches] * (batches - larger)
    pairs = sum(size * (size - 1) // 2 for size in sizes)
    layers = sum(len(result.layers(model)) for model in result.models)
    return f"{pairs:,} pairs of images in each of {layers} layers, by each matching"
