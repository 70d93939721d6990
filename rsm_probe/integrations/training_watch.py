"""`TrainingWatch`: the RSMs of a model at chosen steps of its training, and CKA between them."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rsm_probe.checks import listed, require_text, require_whole
from rsm_probe.comparison.alignment import Estimator, get_estimator
from rsm_probe.errors import ConfigError, RsmProbeError, look_up
from rsm_probe.execution.amounts import format_seconds
from rsm_probe.execution.execution import Execution
from rsm_probe.forward.layer_stream import LayerStream, layer_names, readings_of
from rsm_probe.integrations.step_rsms import StepRsms
from rsm_probe.integrations.step_store import StepStore, read_rsms
from rsm_probe.integrations.undisturbed import require_unsharded, unchanged_random_states, undisturbed
from rsm_probe.matching.matching import Matching
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.probe.wrappers import plain_model
from rsm_probe.similarity.centering import Centering, check_centering
from rsm_probe.similarity.kernels import Kernel
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.libraries import Preprocess
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing_words import preprocessing
from rsm_probe.sources.models.reading import Forward, Reading
from rsm_probe.storage.paths import local_folder
from rsm_probe.streaming.accumulator import Accumulator
from rsm_probe.streaming.cost import stopwatch
from rsm_probe.streaming.kept_rsms import KeptLayers, RsmKinds
from rsm_probe.streaming.means import gather_means
from rsm_probe.streaming.mini_batches import BATCH_SIZE, batch_source
from rsm_probe.streaming.rsm_store import RsmStore

# What a recording that fails does: warn and let training go on, or raise.
_ON_ERROR = {"warn": False, "raise": True}
# What a model, a loader or a disk may raise in the middle of a training that should go on.
_FAILURES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    RsmProbeError,
)  # fmt: skip


class TrainingWatch:
    """Records the RSMs of a model while it trains, and compares each recording with the first, last and a reference.

    A recording passes the images through the model in evaluation mode. It leaves training as it was: weights,
    gradients, training flags, buffers (statistics of BatchNorm), random states and devices; training with and without
    a watch gives the same bits.

    The callbacks of trainers are watches: `RsmCallback` (Lightning) and `RsmTrainerCallback` (transformers).

    The RSMs of the first and the last recording and of the reference are held in memory: 4 bytes per ordered pair of
    images of a mini-batch for each layer, matching and kernel (10 layers, two matchings, 1000 images: 20 MB each).

    Example:
        >>> import torch
        >>> from rsm_probe.integrations import TrainingWatch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> watch = TrainingWatch(torch.rand(8, 3, 8, 8), layers=["0", "1"], every=2)
        >>> for step in range(3):
        ...     if watch.due(step):
        ...         numbers = watch.record(model, step)    # for the logger of your choice
        ...     model(torch.rand(4, 3, 8, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> "rsm/cka_first/optimal/1" in numbers
        True

    Args:
        images: the images to record, as for `sweep`. A few hundred suffice.
        every: the interval between recordings in steps, or a sequence of steps such as [1, 10, 100]. Callbacks also
            record before the first and after the last step.
        out: a folder for an RSM store, as of `sweep(..., out=)`; each recording is a model NAME@STEP in it, which
            `rsm_probe.RsmStore.open(out)` reads. A training that continues there later is compared with the first step
            in the store. A step that is recorded again replaces the earlier one. None keeps no RSMs on disk.
        reference: a further model to compare with, as for `load_model`: a module or LoadedModel with layers of the
            same names, which is recorded once, beside the first recording; or a model of an earlier run over the same
            images, `rsm_probe.RsmStore.open(folder).select(models="net@900")`.
        on_error: "warn" leaves out a recording that fails, with a warning that names layer and step; training goes on,
            and so do recordings. "raise" raises the error. The first recording always does, as training has hardly
            begun and the settings are likely to be wrong.
        name: the model's name in the store and in messages.
        part: dotted name of the submodule to record, such as the backbone of a LightningModule; "" for the whole.
        layers: layers to record, as for `Probe`.
        matchings: names or method objects; "identity" gives spatio-semantic RSMs, "optimal" semantic RSMs.
        kernels: "linear", "cosine", "rbf", or kernel objects.
        batch_size: maximum number of images per mini-batch. A loader decides on this and the next itself.
        seed: seed of the order of the images.
        centering: None; "location-mean" or "channel-mean", with means recomputed at each recording.
        estimator: "unbiased" or "biased", of CKA.
        preprocess: a function from a PIL image to a tensor (C, H, W), "resize-crop" or "imagenet", as for `load_model`;
            for images that are pictures.
        size: pixels of both sides for these words, or (height, width).
        ids: one name per image, in place of numbers or file names.
        labels: one label per image.
        tokens: "locations", "class", "mean", "max" or "gem", or several of these, as for `sweep`.
        layouts: how to read outputs of layers, as for `Probe`.
        forward: makes the call from the module and a batch, where it takes more than a batch of images.
        method: the method whose calls are forward passes, as for `Probe`.
        inputs: the inputs that hold images, as for `Probe`.
        workers: CPU threads that match; None for all cores. Results do not depend on it.
        memory: memory budget, as bytes or text such as "2GB", for affinities that wait to be matched.

    Attributes:
        steps: the recorded steps, in order.
        seconds: time spent in recordings.

    Raises:
        RsmProbeError: an argument of the wrong type, or an unknown name.
    """

    def __init__(
        self,
        images: Any,
        *,
        every: int | Sequence[int] = 500,
        out: str | Path | None = None,
        reference: nn.Module | LoadedModel | RsmStore | str | None = None,
        on_error: str = "warn",
        name: str = "model",
        part: str = "",
        layers: Layers = "blocks",
        matchings: Sequence[str | Matching] = ("identity", "optimal"),
        kernels: Sequence[str | Kernel] = ("linear",),
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        centering: Centering | None = None,
        estimator: str = "unbiased",
        preprocess: Preprocess | str | None = None,
        size: int | Sequence[int] | None = None,
        ids: Sequence[str] | None = None,
        labels: Any = None,
        tokens: str | Sequence[str] | None = None,
        layouts: Mapping[str, Layout] | None = None,
        forward: Forward | None = None,
        method: str | None = None,
        inputs: str | Sequence[str] | None = None,
        workers: int | None = None,
        memory: str | int = "2GB",
    ) -> None:
        self._every = _schedule(every)
        self._raises = look_up(on_error, _ON_ERROR, "on_error", ConfigError)
        self._name, self._part = require_text(name, "name", ConfigError), require_text(part, "part", ConfigError)
        self._estimator: Estimator = get_estimator(estimator)
        self._centering = check_centering(centering)
        self._preprocess = preprocessing(preprocess, size)
        self._reading = Reading(layer_names(layers), layouts, method, forward, inputs, tokens)
        self._execution = Execution(workers=workers, memory=memory, max_hours=None)
        self._kinds = RsmKinds.of(matchings, kernels, [estimator], ("*",))
        folder = None if out is None else local_folder(out)
        # Looking at the first batch of a loader, or building a model, may draw random numbers.
        with unchanged_random_states():
            image_set = as_images(images, ids=ids, labels=labels)
            self._source = batch_source(image_set, batch_size, seed, [self._estimator.name])
            self._source.repeat("watching a training", needed=True)
            self._reference_model = self._loaded(reference)
        self._store: StepStore | None = None
        if folder is not None:
            own = isinstance(image_set, ImageSet)  # a loader decides on both
            self._store = StepStore(
                folder, image_set, self._source, replace(self._kinds, keep=KeptLayers(())),
                int(batch_size) if own else max(self._source.sizes), int(seed) if own else None, self._centering,
                self._execution,
            )  # fmt: skip
        self._stream: LayerStream | None = None
        self._structure: list[tuple[str, int]] = []
        self._first: StepRsms | None = None
        self._last: StepRsms | None = None
        self._reference: StepRsms | None = None
        self._seen: int | None = None
        self._begun = 0.0
        self.steps: list[int] = []
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source.name}; {self.summary()})"

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a recording at a step, or asked for one at a step that was passed over."""
        if self._seen is None or step < self._seen:
            return True
        if isinstance(self._every, int):
            return step // self._every > self._seen // self._every
        return any(self._seen < scheduled <= step for scheduled in self._every)

    def record(self, module: nn.Module, step: int) -> dict[str, float]:
        """Record a model, and compare it with earlier recordings.

        In distributed training, only the first process records; the others return at once and may wait for it at their
        next exchange. A step before the previous one begins another training, which has a first recording of its own.

        Args:
            module: the model, in training or evaluation mode. Wrappers of `torch.compile` and of data parallelism are
                taken off.
            step: of the training.

        Returns:
            Name -> number. `rsm/cka_first/MATCHING/LAYER` is CKA of a layer with itself in the first recording,
            `rsm/cka_last/...` in the previous one (from the second recording on), and `rsm/cka_reference/...` in the
            reference; NaN where CKA is undefined. With several kernels, names have MATCHING/KERNEL. `rsm/seconds` is
            the time of the recording, `rsm/share_of_time` that of all recordings, divided by the time since the first
            began. {} in other processes, and for a recording that failed under on_error="warn".

        Raises:
            RsmProbeError: a layer is missing, holds NaN, or has other images; the message names step and layer. See
                `on_error`.
            ModelError: the model is sharded over processes.
        """
        require_whole(step, "step", 0, ConfigError)
        require_unsharded(module)  # in all processes, so that none waits for another
        self._seen = step = int(step)
        if not _is_main_process():
            return {}
        if self._last is not None and step < self._last.step:  # another training has begun
            self._first = self._last = None
        module = plain_model(module)
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        started = stopwatch(device)
        self._begun = self._begun or started
        try:
            metrics = self._recorded(module, step, device)
            self.steps.append(step)
        except _FAILURES as error:
            self._report(error, step)
            metrics = {}
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if metrics:
            metrics |= {"rsm/seconds": seconds, "rsm/share_of_time": self.share_of_time}
        return metrics

    @property
    def calls_the_module(self) -> bool:
        """Whether a recording calls the model as a whole by its own `forward`."""
        return not self._part and self._reading.method is None and self._reading.forward is None

    @property
    def share_of_time(self) -> float:
        """Time spent in recordings, divided by the time since the first began, in [0, 1]."""
        return self.seconds / (time.perf_counter() - self._begun) if self._begun else 0.0

    def summary(self) -> str:
        """The number of recordings, their time, and their share of the time since the first began."""
        if not self._begun:
            return "nothing recorded"
        count, passed = len(self.steps), time.perf_counter() - self._begun
        return (
            f"{count} recording{'' if count == 1 else 's'} of RSMs took {format_seconds(self.seconds)}, "
            f"{100 * self.share_of_time:.1f} % of {format_seconds(passed)} of training"
        )

    def close(self) -> None:
        """Let go of the model; a later recording takes hold of it again."""
        self._stream, self._structure = None, []

    def _finish(self) -> None:
        """Print the overhead, beside progress bars, and let go of the model."""
        if self.steps:
            tqdm.write(f"rsm_probe: {self.summary()}", file=sys.stderr)
        self.close()

    def _report(self, error: Exception, step: int) -> None:
        """Raise the error of a recording, or warn of it.

        Raises:
            Exception: the error, with the step.
        """
        problem = f"recording the RSMs of step {step} failed: {error}"
        if self._raises or self._first is None:
            if isinstance(error, RsmProbeError):
                raise type(error)(problem) from error
            error.add_note(f"recording the RSMs of step {step}")
            raise error
        warnings.warn(
            f"{problem} ({type(error).__name__}). This step is left out, earlier ones remain, and training goes on; "
            f"on_error='raise' stops it",
            stacklevel=3,
        )

    def _recorded(self, module: nn.Module, step: int, device: torch.device) -> dict[str, float]:
        with undisturbed(module):
            first, last = self._first, self._last
            if self._store is None:
                rsms = self._rsms(self._stream_of(module), step)
            else:
                if first is None and (earlier := self._store.earlier(self._name, step)):
                    first, last = earlier[0], earlier[-1]
                rsms = self._store.write(self._model_of(module, step), self._reading, step)
            if first is not None:
                rsms.require_same(first, f"step {first.step}")
            if self._reference_model is not None:
                self._reference = self._of_reference(self._reference_model, device)
                rsms.require_same(self._reference, "the reference")
                self._reference_model = None
        compared = {"first": first or rsms, "last": last, "reference": self._reference}
        self._first, self._last = first or rsms, rsms
        # Names have the kernel where it says something.
        short = len({kernel for _, _, kernel in rsms.keys}) == 1
        return {
            f"rsm/cka_{which}/{matching}/{'' if short else f'{kernel}/'}{layer}": float(value)
            for which, other in compared.items()
            if other is not None
            for (layer, matching, kernel), value in zip(rsms.keys, rsms.cka(other), strict=True)
        }

    def _loaded(self, reference: Any) -> LoadedModel | RsmStore | None:
        if reference is None:
            return None
        if not isinstance(reference, RsmStore):
            return load_model(reference, preprocess=self._preprocess)
        if len(reference.models) != 1:
            raise ConfigError(
                f"reference must hold one model, found {listed(reference.models)}; write "
                f"reference=store.select(models={reference.models[-1]!r})"
            )
        return reference

    def _model_of(self, module: nn.Module, step: int) -> LoadedModel:
        model = load_model(module, name=self._name, part=self._part, preprocess=self._preprocess)
        return replace(model, name=f"{self._name}@{step}", network=self._name, step=step)

    def _stream_of(self, module: nn.Module) -> LayerStream:
        """A stream of the model, whose probe learns how to read the layers once, unless the model has changed."""
        structure = [(name, id(part)) for name, part in module.named_modules(remove_duplicate=False)]
        if self._stream is None or structure != self._structure:
            self._stream, self._structure = self._new_stream(self._model_of(module, 0)), structure
        return self._stream

    def _new_stream(self, model: LoadedModel) -> LayerStream:
        models = {model.name: model}
        return LayerStream(models, self._source, readings_of(models, self._reading))

    def _rsms(self, stream: LayerStream, step: int) -> StepRsms:
        """Pass all images through the model of a stream."""
        rsms = StepRsms(step, self._estimator)
        kinds, execution = self._kinds, self._execution
        with Accumulator(
            list(kinds.methods.values()), kinds.kernels, [self._estimator.name], keep=kinds.keep.patterns,
            on_batch=rsms.add, workers=execution.workers, memory=execution.memory,
        ) as accumulator:  # fmt: skip
            if self._centering is not None:
                accumulator.means = gather_means(stream, self._centering, execution)
            for batch in self._source.batches():
                stream.feed(batch, accumulator)
        return rsms

    def _of_reference(self, model: LoadedModel | RsmStore, device: torch.device) -> StepRsms:
        """Pass all images through the reference, on the device of the watched model; or read it from a store."""
        if isinstance(model, RsmStore):
            return read_rsms(model, model.models[0], self._kinds.kernels, self._estimator, 0)
        own = model.device
        with undisturbed(model.module):
            try:
                model.module.to(device)
                return self._rsms(self._new_stream(model), 0)
            finally:
                model.module.to(own)


def _schedule(every: Any) -> int | list[int]:
    """Check the argument `every`.

    Raises:
        ConfigError: neither a whole number from 1 nor a sequence of whole numbers.
    """
    if not isinstance(every, Sequence) or isinstance(every, str | bytes):
        require_whole(every, "every (or a sequence of steps)", 1, ConfigError)
        return int(every)
    for step in every:
        require_whole(step, "every: a step", 0, ConfigError)
    return sorted(int(step) for step in every)


def _is_main_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
