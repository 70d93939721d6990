"""The estimated cost of a sweep before it starts: pairs, memory, and time from a timed sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rsm_probe.arrays import first_nonfinite
from rsm_probe.errors import CostError
from rsm_probe.execution.amounts import format_bytes, format_seconds
from rsm_probe.execution.execution import Execution
from rsm_probe.execution.executors import available_cores
from rsm_probe.forward.layer_stream import LayerSample, LayerStream
from rsm_probe.matching.cpu_or_gpu import Workload
from rsm_probe.matching.matching import Matching
from rsm_probe.matching.registry import cheap_matchings
from rsm_probe.pairs.matcher import queue_bytes
from rsm_probe.pairs.timing import core_seconds_per_pair, seconds_per_pair, timing_matcher
from rsm_probe.probe.representation import Representation, require_finite
from rsm_probe.streaming.batch_consumer import naming, walk
from rsm_probe.streaming.kept_rsms import RsmKinds

# Seconds per entry of an RSM for its kernel and the sums of CKA, on one core.
_ENTRY_SECONDS = 1e-7
# Part of the time of other work that all matching may take before it is timed with care.
_NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer of one model.

    Attributes:
        name: "model/layer".
        locations: number of locations, S.
        token_bytes: bytes of the tokens of one image.
        pair_seconds: matching -> seconds per pair on one core.
        queue_bytes: bytes of the memory budget that its affinities fill.
    """

    name: str
    locations: int
    token_bytes: int
    pair_seconds: Mapping[str, float]
    queue_bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of a sweep.

    Attributes:
        layers: cost of each layer.
        image_seconds: seconds per image for the forward passes of all models.
        images: number of images.
        batch_sizes: number of images in each mini-batch.
        workers: CPU threads that match.
        passes: forward passes per image and model.
        kernels: number of kernels.
        kept_rsms: number of RSMs kept per mini-batch.
        open_ended: whether a loader may yield more batches than these, so that the time is that of one batch.
        batch_seconds: seconds per mini-batch and pass for all layers, whatever the number of its images.
        start_seconds: seconds spent before the estimate: loading, compilation, the timed sample.
        end_seconds: seconds for the result.
        rsms_at_once: number of RSMs in memory at a time, where these are not all of a mini-batch.
        disk: text that says how much disk space the RSMs take; "" where none are kept.
    """

    layers: Sequence[LayerCost]
    image_seconds: float
    images: int
    batch_sizes: Sequence[int]
    workers: int
    passes: int
    kernels: int
    kept_rsms: int
    open_ended: bool = False
    batch_seconds: float = 0.0
    start_seconds: float = 0.0
    end_seconds: float = 0.0
    rsms_at_once: int | None = None
    disk: str = ""

    @property
    def pairs(self) -> int:
        """Number of pairs of images over all layers and models; each pair is matched by every matching."""
        return len(self.layers) * self.pairs_per_layer

    @property
    def pairs_per_layer(self) -> int:
        """Number of pairs of images within mini-batches."""
        return sum(size * (size - 1) // 2 for size in self.batch_sizes)

    @property
    def matching_seconds(self) -> float:
        """Seconds of all matchings on one core."""
        return self.pairs_per_layer * sum(sum(layer.pair_seconds.values()) for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Estimated seconds that are left: forward passes, matching divided among the workers, and fixed work."""
        rsms = sum(len(layer.pair_seconds) for layer in self.layers) * self.kernels
        sums = _ENTRY_SECONDS * rsms * sum(size**2 for size in self.batch_sizes)
        fixed = self.batch_seconds * len(self.batch_sizes) * self.passes + self.end_seconds + sums
        return self.image_seconds * self.images * self.passes + self.matching_seconds / self.workers + fixed

    @property
    def all_seconds(self) -> float:
        """Estimated seconds of the whole sweep, from its call to its result."""
        return self.start_seconds + self.seconds

    @property
    def bytes(self) -> int:
        """Estimated bytes of memory besides the models: two batches of the largest tokens, queued affinities, RSMs."""
        batch = max(self.batch_sizes)
        rsms = sum(len(layer.pair_seconds) for layer in self.layers) * self.kernels
        rsms = min(rsms, self.rsms_at_once or rsms)
        tokens = 2 * batch * max((layer.token_bytes for layer in self.layers), default=0)
        queue = max((layer.queue_bytes for layer in self.layers), default=0)
        return tokens + queue + 4 * rsms * batch**2 * 8 + self.kept_rsms * sum(size**2 for size in self.batch_sizes) * 8

    def started(self, since: float, rehearsal: Callable[[], object], end_seconds: float = 0.0) -> Cost:
        """Add the time that has passed, and that of one mini-batch of pairs, which is tried.

        Args:
            since: when the sweep started, by `time.perf_counter`.
            rehearsal: matches a pair of every layer.
            end_seconds: see the class.
        """
        before = time.perf_counter()
        rehearsal()
        now = time.perf_counter()
        return replace(self, batch_seconds=now - before, start_seconds=now - since, end_seconds=end_seconds)

    def __str__(self) -> str:
        if self.open_ended:
            return (
                f"an unknown number of batches of {max(self.batch_sizes)} images, {len(self.layers)} layers, "
                f"{self.pairs:,} pairs and about {format_seconds(self.seconds)} per batch with {self.workers} workers, "
                f"{format_bytes(self.bytes)} of memory"
            )
        so_far = f" (of which {format_seconds(self.start_seconds)} have passed)" if self.start_seconds >= 1 else ""
        count = len(self.batch_sizes)
        batches = "one batch" if count == 1 else f"{count} batches of {max(self.batch_sizes)}"
        return (
            f"{self.images} images in {batches}, {len(self.layers)} layers, {self.pairs:,} pairs; about "
            f"{format_seconds(self.all_seconds)}{so_far} with {self.workers} workers, {format_bytes(self.bytes)} of "
            f"memory{self.disk and f', {self.disk}'}"
        )

    def require(self, execution: Execution, max_bytes: int | None) -> None:
        """Refuse work that exceeds a limit, and suggest cheaper alternatives.

        Raises:
            CostError: the estimate exceeds `max_hours` or `max_bytes`; the message names cheaper settings.
        """
        words = "one batch of this sweep" if self.open_ended else "this sweep"
        execution.require_time(self.seconds, words, lambda limit: f"cheaper: {self._cheaper(limit)}")
        if max_bytes is not None and self.bytes > max_bytes:
            raise CostError(
                f"this sweep would take about {format_bytes(self.bytes)} of memory, above {format_bytes(max_bytes)}; "
                f"cheaper: a smaller batch_size, fewer layers, fewer kept RSMs, or a smaller memory= for affinities"
            )

    def _cheaper(self, limit: float) -> str:
        dearest = max(self.layers, key=lambda layer: sum(layer.pair_seconds.values()))
        share = sum(dearest.pair_seconds.values()) * self.pairs_per_layer / max(self.matching_seconds, 1e-12)
        forward = self.image_seconds * self.images * self.passes
        options = []
        if self.matching_seconds > 0 and limit > forward:
            # The number of pairs within batches is proportional to the size of a batch.
            fitting = int(max(self.batch_sizes) * (limit - forward) * self.workers / self.matching_seconds)
            options.append(f"batch_size={max(4, fitting)}")
        if share > 0:
            options.append(f"leaving out {dearest.name} ({dearest.locations} locations, {share:.0%} of the matching)")
            options.append(
                f"one of the matchings {', '.join(cheap_matchings())}, whose time is linear in the locations"
            )
        options.append(f"fewer images than {self.images}")
        return ", ".join(options)


def estimate(
    stream: LayerStream,
    sample: LayerSample,
    methods_of: Callable[[str, str], Mapping[str, Matching]],
    kinds: RsmKinds,
    passes: int,
    execution: Execution,
    sizes: Sequence[int] | None = None,
) -> Cost:
    """Check the outputs of the models for a few images, and run these again to estimate the cost of a sweep.

    Args:
        stream: the models and images.
        sample: its layers for a few images.
        methods_of: (model, layer) -> the matchings of a layer by label; {} where there is nothing to match.
        kinds: which RSMs are compared.
        passes: forward passes per image.
        execution: its workers and memory budget.
        sizes: number of images in each mini-batch; by default those of the stream.

    Raises:
        RepresentationError: a layer holds NaN or infinity.
    """
    layers = walk(sample.representations)
    for model, layer, representation in layers:
        if methods_of(model, layer):
            require_finite(model, layer, first_nonfinite(representation.tokens), sample.batch.ids)
    start = _synchronised(stream)
    stream.sample()
    seconds = (_synchronised(stream) - start) / len(sample.batch.ids)
    sizes = stream.source.sizes if sizes is None else sizes
    cores, pairs = min(execution.worker_count, available_cores()), [size * (size - 1) // 2 for size in sizes]
    costs = measure(
        sample.representations,
        methods_of,
        execution,
        cores,
        at_once=max(pairs),
        images=max(sizes),
        pairs=sum(pairs),
        other_seconds=seconds * sum(sizes) * passes,
    )
    rsms = sum(len(methods_of(model, layer)) for model, layer, _ in layers if layer in kinds.keep)
    return Cost(
        costs,
        seconds,
        sum(sizes),
        sizes,
        cores,
        passes=passes,
        kernels=len(kinds.kernels),
        kept_rsms=rsms * len(kinds.kernels),
        open_ended=stream.source.count is None,
    )


def measure(
    representations: Mapping[str, Mapping[str, Representation]],
    methods_of: Callable[[str, str], Mapping[str, Matching]],
    execution: Execution,
    cores: int,
    at_once: int,
    images: int,
    pairs: int,
    other_seconds: float,
) -> list[LayerCost]:
    """Time the matchings on the representations of a few images, layer by layer.

    Args:
        representations: model -> layer -> representation of at least 2 images.
        methods_of: (model, layer) -> label -> matching; layers with none are passed over.
        execution: its memory budget limits the queued affinities.
        cores: number of cores that match in parallel.
        at_once: number of pairs in a mini-batch.
        images: number of images that are matched with each other.
        pairs: number of pairs in all mini-batches.
        other_seconds: seconds of all other work; matching that takes little of it is timed roughly.
    """
    costs = []
    timings = sum(len(methods_of(model, layer)) for model, layers in representations.items() for layer in layers)
    with timing_matcher(execution) as matcher:
        for model, layer, representation in walk(representations):
            tokens, methods = representation.tokens, methods_of(model, layer)
            if not methods:
                continue
            with naming(model, layer):
                _, locations, channels = tokens.shape
                seconds = {}
                for label, method in methods.items():
                    if Workload(at_once, locations).on_device(method, tokens.device, tokens.dtype):
                        # A GPU matches alone, so nothing is divided among workers.
                        seconds[label] = seconds_per_pair(tokens, method, 3, at_once) * cores
                    else:
                        seconds[label] = core_seconds_per_pair(
                            tokens,
                            method,
                            matcher,
                            images,
                            pairs,
                            negligible=_NEGLIGIBLE * other_seconds / timings,
                            grid=representation.grid,
                        )
            costs.append(
                LayerCost(
                    f"{model}/{layer}",
                    locations,
                    locations * channels * tokens.element_size(),
                    seconds,
                    queue_bytes(tokens, execution.memory_bytes, at_once),
                )
            )
    return costs


def stopwatch(device: torch.device) -> float:
    """Read a clock, in seconds, after the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _synchronised(stream: LayerStream) -> float:
    """Read the clock after all devices have finished."""
    return max(stopwatch(model.device) for model in stream.models.values())
