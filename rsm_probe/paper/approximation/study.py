"""Measure how good and how fast matchings are on the layers of a model (paper, section 4.4 and appendix F)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from rsm_probe.captures.captured_layers import CapturedLayer
from rsm_probe.comparison.intervals import draw_weights, interval
from rsm_probe.errors import ImageError
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import one_thread
from rsm_probe.matching import BatchOptimal, Matching, get_matching
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.pairs.timing import time_methods
from rsm_probe.pairs.token_sets import TokenSubset, centred_tokens
from rsm_probe.paper.approximation.figures import PicturedShares, approximation_figures
from rsm_probe.paper.approximation.page import approximation_page, shown_shares
from rsm_probe.paper.approximation.report import approximation_report
from rsm_probe.paper.experiment import Experiment, ExperimentConfig, Rules, Subject
from rsm_probe.paper.published_numbers import TABLE5
from rsm_probe.paper.shown import ShownModel
from rsm_probe.paper.similarity_rules import VECTORS
from rsm_probe.runs.fields import Count, Distinct, Images, Matchings
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.pieces import stacked
from rsm_probe.runs.tables import Row
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.storage.files import Arrays


class ApproximationConfig(ExperimentConfig):
    """Matchings of random pairs of images, layer by layer: the share of the optimum that they reach, and their time."""

    study: Literal["approximation"] = "approximation"
    matchings: Rules = Field(
        default=("identity", "topk-greedy", "greedy", "rewindowed"),
        min_length=1,
        description="methods to compare with the optimum",
    )
    windows: Annotated[tuple[Count, ...], Distinct] = Field(
        default=(128, 256, 512, 1024), description="window sizes of Batch-Optimal"
    )
    solvers: Matchings = Field(
        default=("scipy", "lap"), description="exact solvers of other libraries to time, such as ortools"
    )
    pairs: Images = Field(default=1000, description="random pairs of images per layer")
    solver_pairs: Count = Field(default=10, description="how many of these the exact solvers are timed on")
    centering: Literal["channel-mean"] | None = Field(
        default=None, description="with location-mean, shares of the optimum would be meaningless"
    )
    paper: str | None = Field(
        default=None, description="name of the model that is that of the paper's Table 5, to show the paper's numbers"
    )

    @field_validator("centering", mode="before")
    @classmethod
    def _ratio_has_a_meaning(cls, centering: Any) -> Any:
        if centering == "location-mean":
            raise ValueError(
                "location-mean centres products around 0, which makes shares of the optimum meaningless; leave "
                "centering: out, or use channel-mean"
            )
        return centering

    @model_validator(mode="after")
    def _one_to_one(self) -> ApproximationConfig:
        names = ["optimal", *self.matchings, *self.solvers]
        if len(set(names)) < len(names):
            raise ValueError("solvers: optimal is always included, and no method may be named twice")
        for name in names:
            if name in VECTORS or not get_matching(name)[1].one_to_one:
                raise ValueError(
                    f"matchings: {name} does not match locations one to one, so it has no share of the optimum"
                )
        return self

    def methods(self) -> dict[str, Matching]:
        """All methods by label, the optimum first."""
        named = {name: get_matching(name)[1] for name in self.matchings}
        windows: dict[str, Matching] = {f"batch-optimal-{b}": BatchOptimal(window=b) for b in self.windows}
        solvers = {name: get_matching(name)[1] for name in self.solvers}
        return {"optimal": get_matching("optimal")[1], **named, **windows, **solvers}

    def matching_methods(self) -> list[Matching]:
        """All methods to compare."""
        return list(self.methods().values())

    def why_no_figures(self, out: Path) -> str:
        """See `Study.why_no_figures`."""
        return f"figures show identity and semantic matchings, and this run has matchings: {', '.join(self.matchings)}"

    def runner(self, out: Path, execution: Execution | None = None) -> ApproximationRunner:
        """See `ModelStudy.runner`."""
        return ApproximationRunner(self, out, execution)


class ApproximationRunner(Experiment[ApproximationConfig]):
    """Solves random pairs of images with every method, on one core."""

    report = staticmethod(approximation_report)
    draw = staticmethod(approximation_figures)
    content = staticmethod(approximation_page)

    def __init__(self, study: ApproximationConfig, out: Path, execution: Execution | None = None) -> None:
        super().__init__(study, out, execution)
        self.methods = study.methods()
        # Figures show every model, whatever the methods are.
        self.shown = list(self.methods)

    def image_sets(self, source: ImagesConfig) -> dict[str, ImageSet]:
        """Load the images from which pairs are drawn.

        Raises:
            ImageError: there are fewer than two.
        """
        images = source.load(self.execution.progress)
        if len(images) < 2:
            raise ImageError(f"pairs need at least 2 images, but {images.name} has {len(images)}")
        return {"images": images}

    def pairs_of(self, counts: Mapping[str, int]) -> int:
        """The random pairs that are drawn."""
        return self.study.pairs

    def compare(self, subject: Subject) -> list[Row]:
        """Make one row per layer and method."""
        rows: list[Row] = []
        for number, layer in enumerate(subject.layers["images"].values()):
            values, seconds = self.measured(subject, number, layer)
            for label in values:
                timed = seconds[label][~np.isnan(seconds[label])]
                stated = TABLE5.get(label, {}).get(layer.shape[1]) if subject.title == self.study.paper else None
                share, milliseconds = (np.nan, np.nan) if stated is None else (stated[0] / 100, stated[1])
                rows.append(
                    {
                        "model": subject.title, "layer": layer.name, "locations": layer.shape[1],
                        "channels": layer.shape[2], "method": label, **self.share(values, label),
                        "milliseconds": 1000 * float(np.median(timed)), "timed": len(timed),
                        "paper_share": share, "paper_milliseconds": milliseconds,
                    }
                )  # fmt: skip
        return rows

    def measured(
        self, subject: Subject, number: int, layer: CapturedLayer
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Measure matched products and seconds of every pair.

        Args:
            subject: the model.
            number: number of the layer.
            layer: the representations of the images.

        Returns:
            Method -> products, and method -> seconds, of shape (pairs,) each; NaN where a solver was not run.
        """
        pairs = self._drawn(layer)
        # The first call compiles, which must not count.
        warm_up = cache(lambda: self._solved(torch.randn(2, 9, layer.shape[2]), (3, 3), True))

        def one_pair(k: int) -> Arrays:
            warm_up()
            return self._pair(layer, pairs[k], k < self.study.solver_pairs)

        file = subject.folder / f"{number:03d}.npz"
        with (
            self.execution.bar(layer.name, len(pairs), "pair", leave=False) as bar,
            one_thread(),
        ):
            arrays = stacked(file, subject.owner, len(pairs), one_pair, bar.update)
        values, seconds = (dict(zip(self.methods, arrays[key].T, strict=True)) for key in ("values", "seconds"))
        return values, seconds

    def _drawn(self, layer: CapturedLayer) -> list[tuple[int, int]]:
        """Draw random pairs of different images, without repetition."""
        rng = np.random.default_rng(self.study.seed)
        count = min(self.study.pairs, Workload.of(layer.shape).pairs)
        pairs: dict[tuple[int, int], None] = {}
        while len(pairs) < count:
            first, second = (int(k) for k in rng.integers(len(layer), size=2))
            if first != second:
                pairs[min(first, second), max(first, second)] = None
        return list(pairs)

    def _pair(self, layer: CapturedLayer, pair: tuple[int, int], all_solvers: bool) -> Arrays:
        """Run all methods on one pair. As in the paper's Table 5, computing the affinities is not timed."""
        tokens = centred_tokens(TokenSubset(layer, np.array(pair)), slice(0, 2), layer, self.study.centering)
        return self._solved(tokens.contiguous(), layer.grid, all_solvers)

    def _solved(self, tokens: torch.Tensor, grid: tuple[int, ...] | None, all_solvers: bool) -> Arrays:
        """Run the methods on a pair of images, tokens (2, S, C); return their products and seconds."""
        asked = {k: method for k, method in self.methods.items() if all_solvers or k not in self.study.solvers}
        timed = time_methods(tokens, grid, asked)
        both = np.array([timed.get(label, (np.nan, np.nan)) for label in self.methods])
        return {"values": both[:, 0], "seconds": both[:, 1]}

    def share(self, values: Mapping[str, np.ndarray], label: str) -> Row:
        """The share of the optimum as a ratio of sums, its interval over pairs, and its quantiles over pairs.

        Shares are NaN where the optimum is not positive: for a negative optimum, a worse value would have a larger
        share.
        """
        best, mine = values["optimal"], values[label]
        known = ~np.isnan(mine)
        best, mine = best[known], mine[known]
        drawn = draw_weights(len(best), self.study.repeats, self.study.seed)
        low, high = np.nan, np.nan
        if len(best) > 1:
            low, high = interval(_ratio(drawn @ mine, drawn @ best), self.study.level)
        each = _ratio(mine, best)
        smallest, middle, largest = np.quantile(each[best > 0], [0.05, 0.5, 0.95]) if (best > 0).any() else [np.nan] * 3
        return {
            "share": float(_ratio(mine.sum(keepdims=True), best.sum(keepdims=True))[0]), "low": low, "high": high,
            "share_5": float(smallest), "share_median": float(middle), "share_95": float(largest), "pairs": len(best),
        }  # fmt: skip

    def show(self, subject: Subject) -> ShownModel:
        """Count pairs by their products."""
        return shown_shares(self.picture(subject))

    def picture(self, subject: Subject) -> PicturedShares:
        """Collect the products of all pairs by layer."""
        layers = subject.layers["images"].values()
        products = {layer.name: self.measured(subject, k, layer)[0] for k, layer in enumerate(layers)}
        return PicturedShares(subject.title, products)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
