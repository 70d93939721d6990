"""The time of a study, estimated without its weights and images: for one GPU, and for this machine.

Rates of the GPU were measured on one NVIDIA H100 (PyTorch 2.11, Triton 3.6) with 16 CPU cores beside it. Rates of this
machine are timed on random tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsm_probe.execution.amounts import format_seconds
from rsm_probe.execution.executors import available_cores
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.pairs.timing import seconds_per_pair
from rsm_probe.runs.missing.architectures import ModelSizes, architecture_of
from rsm_probe.runs.missing.requirement import table
from rsm_probe.runs.several import SeveralStudies
from rsm_probe.runs.study import ModelStudy, Study

GPU, _GPU_CORES = "one NVIDIA H100 with 16 CPU cores", 16
# Locations -> optimal matchings a second on that GPU, in large batches.
_MATCHINGS = {64: 3.23e6, 256: 306e3, 1024: 12e3}
# Locations up to which it matches; operations a second of products and, at half of that, of networks.
_MOST_LOCATIONS, _PRODUCTS, _NETWORKS = 4096, 51e12, 25e12
# What reading, copies and sums add: a retrieval of 2 000 x 5 000 images took 70 s where these rates give 53.
_OVERHEAD = 1.3
# Edge of the matrices whose product tells how fast a core of this machine is, and the share that networks reach.
_MATRIX, _NETWORK_SHARE = 768, 0.5


@dataclass(frozen=True)
class ModelOnPaper:
    """A model of a study.

    Attributes:
        title: name of the model.
        networks: how many networks it stands for, such as seeds; they take as long as each other.
        architecture: its sizes; None where unknown.
        pairs: pairs per layer and matching; None where the number of images is unknown.
        gpu_seconds: estimated seconds with the GPU, of all networks.
        seconds: estimated seconds on this machine, of all networks.
    """

    title: str
    networks: int
    architecture: ModelSizes | None
    pairs: int | None
    gpu_seconds: float
    seconds: float

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of a table."""
        title = self.title if self.networks == 1 else f"{self.title}, {self.networks} networks"
        if self.architecture is None or self.pairs is None:
            pairs = "unknown" if self.pairs is None else f"{self.pairs:,}"
            return title, "unknown", pairs, "unknown", "unknown"
        sizes = sorted({layer.locations for layer in self.architecture.layers}, reverse=True)
        count = len(self.architecture.layers)
        locations = f"{count} of {', '.join(map(str, sizes))}"
        return title, locations, f"{self.pairs:,}", format_seconds(self.gpu_seconds), format_seconds(self.seconds)


def on_paper(study: Study, out: Path, recipes: Path | None = None) -> list[ModelOnPaper]:
    """Estimate every model of a study.

    Args:
        study: the study.
        out: its run folder.
        recipes: the folder of its configuration.
    """
    if isinstance(study, SeveralStudies):
        named = {name: on_paper(part, out / name, recipes) for name, part in study.parts(out).items()}
        return [replace(one, title=f"{name}: {one.title}") for name, models in named.items() for one in models]
    return list(_models(study, out, recipes)) if isinstance(study, ModelStudy) else []


def lines_of(models: Sequence[ModelOnPaper]) -> list[str]:
    """The estimates as lines of text, with their sum."""
    if not models:
        return []
    cores = available_cores()
    header = ("on paper", "layers of locations", "pairs per layer", GPU, f"this machine, {cores} cores")
    known = [model for model in models if model.architecture is not None and model.pairs is not None]
    rows = [header, *(model.row for model in models)]
    if len(models) > 1 and known:
        total = sum(model.gpu_seconds for model in known), sum(model.seconds for model in known)
        words = "all" if len(known) == len(models) else f"the {len(known)} that are known"
        rows.append((words, "", "", *map(format_seconds, total)))
    return [
        *table(rows),
        "(from sizes of layers and random tokens, without training; once nothing is missing, models are timed)",
    ]


def _models(study: ModelStudy, out: Path, recipes: Path | None) -> Iterator[ModelOnPaper]:
    runner = study.runner(out)
    images = expected_images(study)
    pairs = None if images is None else _pairs(study, runner, images)
    methods = list({method.name: method for method in runner.timed_methods()}.values())
    for entry in study.models:
        known, titles = architecture_of(entry, study.layers, recipes), entry.titles()
        title = titles[0] if len(titles) == 1 else entry.name or titles[0]
        if known is None or pairs is None or images is None or not known.layers:
            yield ModelOnPaper(title, len(titles), None, pairs, math.nan, math.nan)
            continue
        matched = runner.choose_layers({layer.name: layer for layer in known.layers}).values()
        forward = known.operations * sum(images.values()) * runner.passes
        sizes = [(layer.locations, layer.channels) for layer in matched]
        gpu = forward / _NETWORKS + sum(_gpu_seconds(m, *size, pairs) for m in methods for size in sizes)
        here = forward / (_NETWORK_SHARE * core_rate())
        here += sum(pairs * core_seconds(m, *size) for m in methods for size in sizes)
        here /= available_cores()
        count = len(titles)
        yield ModelOnPaper(title, count, known, pairs, count * _OVERHEAD * gpu, count * here)


def expected_images(study: Any) -> dict[str, int] | None:
    """Name of an image set -> number of images, from the configuration alone; None where it does not say."""
    if hasattr(study, "database_sizes"):
        return {"queries": study.queries, "database": max(study.database_sizes)}
    if hasattr(study, "batches") and hasattr(study, "crop"):
        return {"crops": 2 * study.batch * study.batches}
    return None if study.images.count is None else {"images": study.images.count}


def _pairs(study: Any, runner: Any, images: dict[str, int]) -> int:
    if study.study == "sweep":
        count = images["images"]
        runner.batch_sizes = [len(part) for part in np.array_split(np.arange(count), -(-count // study.batch_size))]
    return int(runner.pairs_of(images))


def _gpu_seconds(method: Matching, locations: int, channels: int, pairs: int) -> float:
    products = 2.0 * locations**2 * channels * pairs / _PRODUCTS if method.needs_affinity else 0.0
    if isinstance(method, Auction) and locations <= _MOST_LOCATIONS:
        return products + pairs / matchings_per_second(locations)
    return products + pairs * core_seconds(method, locations, channels) / _GPU_CORES


def matchings_per_second(locations: int) -> float:
    """Optimal matchings a second on the GPU, between and beyond the sizes that were measured."""
    sizes, rates = (np.log(list(values)) for values in (_MATCHINGS.keys(), _MATCHINGS.values()))
    size = math.log(max(1, locations))
    if size <= sizes[-1]:
        return float(np.exp(np.interp(size, sizes, rates)))
    slope = (rates[-1] - rates[-2]) / (sizes[-1] - sizes[-2])
    return float(np.exp(rates[-1] + slope * (size - sizes[-1])))


@cache
def core_seconds(method: Matching, locations: int, channels: int) -> float:
    """Seconds per pair of random tokens on one core of this machine."""
    tokens = torch.randn(4, locations, channels, generator=torch.Generator().manual_seed(0))
    return min(seconds_per_pair(tokens, method, samples=2) for _ in range(3))  # other work may delay one


@cache
def core_rate() -> float:
    """Operations a second of matrix products on one core of this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix, seconds = torch.ones(_MATRIX, _MATRIX), math.inf
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            seconds = min(seconds, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2.0 * _MATRIX**3 / seconds
