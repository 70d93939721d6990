"""How good and how fast matchings are on a model's own layers (paper, section 4.4 and appendix F)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import draw_weights, interval
from rsm_probe.errors import ImageError
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching.matching import Locations, Matching, Pairs, solve_both_ways
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.affinities import pair_affinities
from rsm_probe.pairs.token_sets import Picked, centred_tokens
from rsm_probe.paper.approximation.report import approximation_figures, approximation_report
from rsm_probe.paper.experiment import ExperimentConfig, Subject
from rsm_probe.paper.published_numbers import TABLE5
from rsm_probe.runs.entries import ImagesConfig
from rsm_probe.runs.fields import Count, Distinct, Images, Matchings, Ways
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row, TableResult
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.storage.files import Arrays


class ApproximationConfig(ExperimentConfig):
    """Matchings of random pairs of images, layer by layer: what share of the optimum they reach, in what time."""

    study: Literal["approximation"] = "approximation"
    matchings: Ways = Field(
        default=("identity", "topk-greedy", "greedy", "rewindowed"),
        min_length=1,
        description="methods beside the optimum",
    )
    windows: Annotated[tuple[Count, ...], Distinct] = Field(
        default=(128, 256, 512, 1024), description="of Batch-Optimal"
    )
    solvers: Matchings = Field(
        default=("scipy", "lap"), description="exact ones of others, timed beside ours, such as ortools"
    )
    pairs: Images = Field(default=1000, description="random pairs of images of each layer")
    solver_pairs: Count = Field(default=10, description="of these, how many other exact solvers are timed on")
    centering: Literal["channel-mean"] | None = Field(
        default=None, description="a share of the optimum means something only where the mean is not taken per location"
    )
    paper: str | None = Field(
        default=None, description="the name of the model that is the paper's of Table 5, for its numbers beside its own"
    )

    @field_validator("centering", mode="before")
    @classmethod
    def _ratio_has_a_meaning(cls, centering: Any) -> Any:
        if centering == "location-mean":
            raise ValueError(
                "without the mean of each location, products lie about 0, and shares of the optimum mean nothing; "
                "leave centering: out, or take channel-mean"
            )
        return centering

    @model_validator(mode="after")
    def _one_to_one(self) -> ApproximationConfig:
        names = ["optimal", *self.matchings, *self.solvers]
        if len(set(names)) < len(names):
            raise ValueError("solvers: optimal is always there, and no method may be named twice")
        for name in names:
            if name == "pooled" or not get_matching(name)[1].one_to_one:
                raise ValueError(
                    f"matchings: {name} pairs no locations one to one, so that it has no share of the optimum"
                )
        return self

    @property
    def methods(self) -> dict[str, Matching]:
        """Label -> method: first the optimum, then all others."""
        named = {name: get_matching(name)[1] for name in self.matchings}
        windows: dict[str, Matching] = {f"batch-optimal-{b}": BatchOptimal(window=b) for b in self.windows}
        solvers = {name: get_matching(name)[1] for name in self.solvers}
        return {"optimal": get_matching("optimal")[1], **named, **windows, **solvers}

    def image_sets(self, source: ImagesConfig, progress: bool) -> dict[str, ImageSet]:
        """The images that pairs are drawn of.

        Raises:
            ImageError: fewer than two.
        """
        images = source.load(progress)
        if len(images) < 2:
            raise ImageError(f"pairs need at least 2 images, and {images.name} has {len(images)}")
        return {"images": images}

    def matching_methods(self) -> list[Matching]:
        """All methods that are compared."""
        return list(self.methods.values())

    def compare(self, subject: Subject, progress: bool) -> list[Row]:
        """One row for each layer and method."""
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["images"].values()):
            values, seconds = self.measured(subject, number, layer, progress)
            for label in values:
                row: Row = {"model": subject.title, "layer": layer.name, "locations": layer.shape[1]}
                row |= {"channels": layer.shape[2], "method": label, **self._share(values, label)}
                timed = seconds[label][~np.isnan(seconds[label])]
                row |= {"milliseconds": 1000 * float(np.median(timed)), "timed": len(timed)}
                stated = TABLE5.get(label, {}).get(layer.shape[1]) if subject.title == self.paper else None
                row["paper_share"], row["paper_milliseconds"] = (
                    (np.nan, np.nan) if stated is None else (stated[0] / 100, stated[1])
                )
                rows.append(row)
        return rows

    def measured(
        self, subject: Subject, number: int, layer: CapturedLayer, progress: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Products and seconds of every pair by method, (pairs,) each; NaN where other solvers were not tried.

        Args:
            subject: the model.
            number: of the layer.
            layer: what it answers to the images.
            progress: show a bar.
        """
        pairs = self._drawn(len(layer))
        self._solved(torch.randn(2, 9, layer.shape[2]), (3, 3), True)  # what is compiled once does not count
        file = subject.folder / f"{number:03d}.npz"
        with (
            tqdm(desc=layer.name, total=len(pairs), unit="pair", disable=not progress, leave=False) as bar,
            one_thread(),
        ):
            one = lambda k: self._pair(layer, pairs[k], k < self.solver_pairs)  # noqa: E731
            found = stacked(file, subject.owner, len(pairs), one, bar.update)
        labels = list(self.methods)
        return (
            {label: found["values"][:, k] for k, label in enumerate(labels)},
            {label: found["seconds"][:, k] for k, label in enumerate(labels)},
        )

    def _drawn(self, images: int) -> list[tuple[int, int]]:
        """Random pairs of different images, without repetition."""
        rng = np.random.default_rng(self.seed)
        wanted = min(self.pairs, images * (images - 1) // 2)
        chosen: dict[tuple[int, int], None] = {}
        while len(chosen) < wanted:
            first, second = (int(k) for k in rng.integers(images, size=2))
            if first != second:
                chosen[min(first, second), max(first, second)] = None
        return list(chosen)

    def _pair(self, layer: CapturedLayer, pair: tuple[int, int], all_solvers: bool) -> Arrays:
        """All methods on one pair, on one core. The affinity product is not timed, as in the paper's Table 5."""
        tokens = centred_tokens(Picked(layer, np.array(pair)), slice(0, 2), layer, self.centering)
        return self._solved(tokens.contiguous(), layer.grid, all_solvers)

    def _solved(self, tokens: torch.Tensor, grid: tuple[int, ...] | None, all_solvers: bool) -> Arrays:
        """Products and seconds of all methods on a pair of images, tokens (2, S, C)."""
        zero, one = np.array([0]), np.array([1])
        affinity = pair_affinities(tokens, tokens, zero, one).numpy()
        values, seconds = np.full(len(self.methods), np.nan), np.full(len(self.methods), np.nan)
        for number, (label, method) in enumerate(self.methods.items()):
            if label in self.solvers and not all_solvers:
                continue
            images = Locations(tokens, grid)
            problem = Pairs(zero, one, images, images, affinity if method.needs_affinity else None)
            method.prepare(images)
            start = time.perf_counter()
            values[number] = solve_both_ways(method, problem).values[0]
            seconds[number] = time.perf_counter() - start
        return {"values": values, "seconds": seconds}

    def _share(self, values: Mapping[str, np.ndarray], label: str) -> Row:
        """The share of the optimum as a ratio of sums, its interval over pairs, and its spread from pair to pair.

        Of what does not exceed 0 there is no share: NaN. Where the optimum is negative, a worse value has a larger one.
        """
        best, mine = values["optimal"], values[label]
        known = ~np.isnan(mine)
        best, mine = best[known], mine[known]
        drawn = draw_weights(len(best), self.repeats, self.seed)
        low, high = interval(_ratio(drawn @ mine, drawn @ best), self.level) if len(best) > 1 else (np.nan, np.nan)
        each = _ratio(mine, best)
        smallest, middle, largest = np.quantile(each[best > 0], [0.05, 0.5, 0.95]) if (best > 0).any() else [np.nan] * 3
        return {
            "share": float(_ratio(mine.sum(keepdims=True), best.sum(keepdims=True))[0]), "low": low, "high": high,
            "share_5": float(smallest), "share_median": float(middle), "share_95": float(largest), "pairs": len(best),
        }  # fmt: skip

    def report(self, result: TableResult, accuracies: Mapping[str, float]) -> str:
        """Table 5 of the paper, as measured."""
        return approximation_report(self, result, accuracies)

    def figures(self, out: Path) -> dict[str, Figure]:
        """Figures 5 and 6 of the paper for every model."""
        return approximation_figures(self, self.open(out), out)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
