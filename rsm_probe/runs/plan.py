"""What a study would do, and what it would cost: its models run on a few images, nothing is trained or written."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rsm_probe.arrays import first_nonfinite
from rsm_probe.checks import listed
from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores
from rsm_probe.forward.layer_stream import LayerStream, readings_of
from rsm_probe.matching.matching import Matching
from rsm_probe.pairs.compute import rsm
from rsm_probe.probe.representation import require_finite
from rsm_probe.runs.model_config import DILATED, ModelConfig
from rsm_probe.sources import ImageLoader, ImageSet, LoadedModel, build_network
from rsm_probe.sources.images.batches import SetBatches
from rsm_probe.sources.models.reading import Reading
from rsm_probe.sources.training.trained_network import normalise
from rsm_probe.streaming.batch_consumer import walk
from rsm_probe.streaming.cost import LayerCost, measure, stopwatch

# States of a run folder.
TO_BEGIN, TO_CONTINUE, FINISHED = "to begin", "to continue", "finished: nothing is left"
# Further layers are counted.
_MOST_LAYERS = 6


@dataclass(frozen=True)
class ModelLeft:
    """What an earlier run left to do of a model.

    Attributes:
        pairs: "model/layer" -> name of the method -> pairs that are left to match.
        images: images that still pass through the model, counted once for each pass.
        words: text that says so, where "{pairs}" stands for the pairs of all layers and matchings.
    """

    pairs: Mapping[str, Mapping[str, int]]
    images: int
    words: str

    @property
    def pairs_of_all(self) -> int:
        """Pairs that are left, of all layers and matchings."""
        return sum(sum(matchings.values()) for matchings in self.pairs.values())

    def __str__(self) -> str:
        return self.words.format(pairs=f"{self.pairs_of_all:,}")


@dataclass(frozen=True)
class ModelPlan:
    """What a study does with a model.

    Attributes:
        title: name of the model in results.
        origin: where its weights come from.
        layers: the layers that it probes, with their costs.
        matched: names of those whose pairs are matched.
        images: name of an image set -> the images that the model sees.
        image_seconds: seconds per image of a forward pass.
        pairs: pairs of images per layer and matching.
        passes: forward passes per image.
        left: what an earlier run left to do; None without one.
        disk_seconds: layer -> seconds per matching for writing the pairs, if they are written.
    """

    title: str
    origin: str
    layers: Sequence[LayerCost]
    matched: Sequence[str]
    images: Mapping[str, int]
    image_seconds: float
    pairs: int
    passes: int = 1
    left: ModelLeft | None = None
    disk_seconds: Mapping[str, float] = field(default_factory=dict)

    def pairs_left(self, layer: LayerCost, matching: str) -> int:
        """Pairs of a layer that are to be matched by a method."""
        return self.pairs if self.left is None else self.left.pairs[layer.name][matching]

    def matching_seconds(self, layer: LayerCost, matching: str, workers: int) -> float:
        """Estimated seconds of the pairs of a layer by one matching, of those that are left."""
        writing = self.disk_seconds.get(layer.name, 0.0) / max(1, self.pairs)
        return self.pairs_left(layer, matching) * (layer.pair_seconds[matching] / workers + writing)

    def seconds(self, workers: int) -> float:
        """Estimated seconds of forward passes and matching, of the work that is left."""
        matched = [layer for layer in self.layers if layer.name in self.matched]
        images = sum(self.images.values()) * self.passes if self.left is None else self.left.images
        return self.image_seconds * images + sum(
            self.matching_seconds(layer, matching, workers) for layer in matched for matching in layer.pair_seconds
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens of all images and layers, where they are captured."""
        return sum(self.images.values()) * sum(layer.token_bytes for layer in self.layers)

    def __str__(self) -> str:
        shapes = [f"{layer.name.partition('/')[2]} (S={layer.locations})" for layer in self.layers]
        names = [name.partition("/")[2] for name in self.matched]
        counts = ", ".join(f"{count:,} {name}" for name, count in self.images.items())
        return (
            f"{self.title} ({self.origin}): layers {listed(shapes, _MOST_LAYERS)}; {counts}; {self.pairs:,} pairs per "
            f"layer"
            + ("" if len(self.matched) == len(self.layers) else f", of layers {listed(names)}")
            + ("" if self.left is None else f"; {self.left}")
        )


@dataclass(frozen=True)
class StudyPlan:
    """What a study would do: `str` gives it as lines of text.

    Attributes:
        study: its name.
        models: the models, in order.
        matchings: names of the matchings.
        workers: CPU threads that match.
        memory_bytes: most bytes of memory besides the models.
        disk_bytes: bytes that the run folder takes, apart from figures.
        to_train: titles of networks that the run would train, whose time is not estimated.
        max_hours: the limit of the study; None if it has none.
        refusal: the error with which `run` would refuse the estimate; None if it would not.
        begun: whether the run folder holds results.
        finished: whether nothing is left to do.
        reuse: lines of text that say what an earlier run computed; none without one.
        pairs: pairs per matching that are left over all models and layers; None for all of them.
    """

    study: str
    models: Sequence[ModelPlan]
    matchings: Sequence[str]
    workers: int
    memory_bytes: float
    disk_bytes: float
    to_train: Sequence[str]
    max_hours: float | None = None
    refusal: str | None = None
    begun: bool = False
    finished: bool = False
    reuse: Sequence[str] = ()
    pairs: int | None = None

    @property
    def state(self) -> str:
        """Whether the run is to begin, to continue, or finished."""
        return FINISHED if self.finished else TO_CONTINUE if self.begun else TO_BEGIN

    @property
    def seconds(self) -> float:
        """Estimated seconds of the run, without training."""
        return sum(model.seconds(self.workers) for model in self.models)

    def __str__(self) -> str:
        lines = [f"study: {self.study}, matchings {', '.join(self.matchings)}"]
        lines += [f"  {model}" for model in self.models]
        lines += self.reuse
        pairs = sum(model.pairs * len(model.matched) for model in self.models) if self.pairs is None else self.pairs
        lines.append(
            f"estimate: {pairs:,} pairs per matching, about {format_seconds(self.seconds)} with {self.workers} "
            f"workers, {format_bytes(self.memory_bytes)} of memory besides the models, "
            f"{format_bytes(self.disk_bytes)} of disk"
        )
        if self.to_train:
            lines.append(f"not estimated: training {listed(self.to_train)}")
        if self.refusal is not None:
            lines.append(f"run would refuse this: {self.refusal}")
        elif self.max_hours is not None:
            lines.append(f"within the limit of max_hours: {self.max_hours:g}")
        return "\n".join(lines)


def models_to_plan(
    entries: Sequence[ModelConfig], loaded: Mapping[str, LoadedModel], networks: Path
) -> dict[str, tuple[ModelConfig, LoadedModel]]:
    """The models of a study by title; networks that are to be trained are built with random weights.

    Args:
        entries: the models of the study.
        loaded: those that need no training.
        networks: the folder of trained networks.

    Raises:
        StorageError: a file holds the network of another recipe or seed.
    """
    models: dict[str, tuple[ModelConfig, LoadedModel]] = {}
    for entry in entries:
        trained = {} if entry.recipe is None else {title: m for title, m, _ in entry.load(networks, train=False)}
        of_entry = trained if entry.recipe else loaded
        for title in entry.titles():
            if title in of_entry:
                models[title] = entry, of_entry[title]
                continue
            assert entry.recipe is not None
            stages = next((d for d in entry.dilated if d and title.endswith(f"{DILATED}{d}")), 0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(title.encode()))  # no two are alike, as those that are trained
                module = build_network(entry.recipe.network, entry.recipe.questions, stages).eval()
            untrained = LoadedModel(title, module, normalise, entry.recipe.questions, reading=entry.reading)
            models[title] = entry, untrained
    return models


def measured_layers(
    title: str,
    model: LoadedModel,
    images: ImageSet | ImageLoader,
    reading: Reading,
    methods: Mapping[str, Matching],
    execution: Execution,
    at_once: int,
    together: int,
) -> tuple[list[LayerCost], float]:
    """Run a model on a few images, and time it and the matchings.

    Args:
        title: name of the model.
        model: the model.
        images: the images, of which the first few are used.
        reading: how the study reads models, with its layers.
        methods: label -> matching.
        execution: where the model runs.
        at_once: pairs of a layer.
        together: images that are matched with each other.

    Returns:
        The cost of each layer, and seconds per image of a forward pass.

    Raises:
        RsmProbeError: the model or a matching cannot be used on these images.
    """
    models = {title: model}
    source = SetBatches(images, [np.arange(len(images))]) if isinstance(images, ImageSet) else images.fresh()
    stream = LayerStream(models, source, readings_of(models, reading), execution.device)
    with stream.evaluating():
        sample = stream.sample()
        for name, layer, representation in walk(sample.representations):
            require_finite(name, layer, first_nonfinite(representation.tokens), sample.batch.ids)
        start = stopwatch(model.device)
        stream.sample()
        seconds = (stopwatch(model.device) - start) / len(sample.batch.ids)
    cores = min(execution.worker_count, available_cores())
    layers = measure(
        sample.representations,
        lambda *_: methods,
        execution,
        cores,
        at_once,
        together,
        at_once,
        seconds * sum(source.sizes),
    )
    return layers, seconds


def require_usable(methods: Iterable[Matching]) -> None:
    """Try the methods on two tiny images, so that a missing package is reported before any long computation.

    Raises:
        MatchingError: a method is not available.
    """
    tokens = torch.eye(4)[None].repeat(2, 1, 1)
    for method in methods:
        rsm(tokens, None, method, "linear", grid=(2, 2), workers=1)
