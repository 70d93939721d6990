"""The layer stream: runs batches of images through probed models and passes each layer to a consumer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from copy import copy as shallow_copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.checks import require_text, require_texts
from rsm_probe.errors import ImageError, LayerError, ModelError, RepresentationError, RsmProbeError, did_you_mean
from rsm_probe.execution.devices import find_device
from rsm_probe.forward.example_call import example_call
from rsm_probe.forward.layer_consumer import ImageBatch, LayerConsumer, LayerNames
from rsm_probe.forward.token_kinds import CLASS, has_class_token, kind_name, of_kind, token_kinds
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.options import matching_patterns
from rsm_probe.probe.probe import Probe
from rsm_probe.probe.representation import Representation
from rsm_probe.probe.wrappers import evaluating
from rsm_probe.sources.images.batches import BatchSource, RawBatch
from rsm_probe.sources.images.clips import Clip
from rsm_probe.sources.models.input_dtype import in_dtype_of
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.preprocessing import prepared, takes_frames_first, warn_of_plain_pixels
from rsm_probe.sources.models.reading import Reading

# The number of images that show the shapes of the layers before long work starts. It is a prime that hardly ever
# divides a number of tokens, so that the image axis is clear, even for later batches as long as a sequence.
SAMPLE_IMAGES = 11

# Numbers of channels that pictures have.
_COLOURS = (1, 3)


class LayerStream:
    """Models and their probes: takes batches of images, and passes every layer to a consumer as soon as it has run.

    Each model keeps one probe for all passes, because a probe learns in its first pass how to read the layers.

    Args:
        models: name -> model.
        source: yields the batches.
        readings: model name -> how the model is called and its layers are read; see `readings_of`.
        device: the device to move the models to; None leaves them where they are.

    Raises:
        LayerError: a name matches no layer; no hook has been set in this case.
        ModelError: the device is not available.
        ImageError: the first image cannot be read.

    Warns:
        UserWarning: models without preprocessing will get unprocessed pictures.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        source: BatchSource,
        readings: Mapping[str, Reading],
        device: str | torch.device | None = None,
    ) -> None:
        target = None if device is None else find_device(device, ModelError)
        self.models, self.source, self.readings = models, source, readings
        self._kinds = {name: token_kinds(reading.tokens) for name, reading in readings.items()}
        self._consumer: LayerConsumer
        self._images = 0
        self._remarked = False
        self._probes: dict[str, Probe] = {}
        matched: set[str] = set()
        for name, model in models.items():
            if target is not None:
                model.module.to(target)
            reading = readings[name]
            layers, layouts, method = reading.layers or "blocks", reading.layouts, reading.method or "forward"
            if layouts and model.reading.layouts is None:  # said of all models, of which not all have these layers
                there = matching_patterns(Probe(model.module, layers, method=method).selections, layouts)
                matched.update(there)
                layouts = {pattern: layouts[pattern] for pattern in there}
            self._probes[name] = Probe(
                model.module,
                layers,
                layouts=layouts,
                method=method,
                inputs=reading.inputs,
                reduce=partial(self._hand_over, name),
            )
        for name, model in models.items():
            common = readings[name].layouts if model.reading.layouts is None else None
            if unmatched := {pattern: layout for pattern, layout in (common or {}).items() if pattern not in matched}:
                method = readings[name].method or "forward"
                # says what it has instead
                Probe(model.module, readings[name].layers or "blocks", layouts=unmatched, method=method)
        warn_of_plain_pixels(models.values(), source)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Sets all models to evaluation mode inside, and restores their training flags on exit."""
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(evaluating(model.module))
            yield

    def feed(self, batch: RawBatch, consumer: LayerConsumer, models: Collection[str] | None = None) -> None:
        """Runs all models on one batch.

        Args:
            batch: the images.
            consumer: receives the layers.
            models: names of the models that run; None for all.

        Raises:
            ImageError: image sizes differ after preprocessing, preprocessing fails, or it is not clear which entry of
                the batch of a loader holds the images.
            RsmProbeError: an error of `Probe` or of the consumer.
        """
        ready: dict[tuple[int, bool], Tensor] = {}
        names: dict[tuple[str, str], str] = {}
        self._consumer, self._images = consumer, len(batch.ids)
        consumer.begin(ImageBatch(batch.ids, batch.labels, batch.numbers))
        running = {name: model for name, model in self.models.items() if models is None or name in models}
        for name, model in running.items():
            probe, reading = self._probes[name], self.readings[name]
            content = batch.whole if reading.forward is not None else None
            if content is None:
                if batch.unclear:
                    raise ImageError(batch.unclear)
                if batch.remark and not self._remarked:
                    warnings.warn(batch.remark, stacklevel=2)
                    self._remarked = True
                key = id(model.preprocess), isinstance(batch.images[0], Clip) and takes_frames_first(model.module)
                if key not in ready:
                    ready[key] = prepared(batch, model.preprocess, key[1])
                content = ready[key]
            # Set hooks only while their own model runs, because models may share modules. With several models, copy
            # the batch for each, because a model may modify it in place.
            content = on_device(content, model.device, copy=len(self.models) > 1)
            if isinstance(content, Tensor):
                content = in_dtype_of(model.module, reading, content)
            before = probe.passes
            with torch.no_grad(), probe, _explaining(model, content, reading):
                reading.call(model.module, content)
            if probe.passes == before:
                raise ModelError(
                    f"forward= of model {name!r} makes no call of {reading.method or 'the model itself'}; call "
                    f"{'model(...)' if reading.method is None else f'model.{reading.method}(...)'} in it, name the "
                    f"method that it calls by method=, or give the part that it calls as a model of its own: "
                    f"load_model(model, part=...)"
                )
            names |= {
                (name, kind_name(taken_as, kind)): kind_name(layer, kind)
                for layer, taken_as in probe.representations.items()
                for kind in self._kinds[name]
            }
        consumer.end(names)

    def sample(self) -> LayerSample:
        """Runs all models on the first few images, and copies the layers."""
        layers = LayerSample()
        whole = any(reading.forward is not None for reading in self.readings.values())
        self.feed(self.source.sample(SAMPLE_IMAGES, whole), layers)
        return layers

    def _hand_over(self, model: str, layer: str, representation: Representation) -> str:
        """Passes a layer to the consumer, and returns its name at this moment for `Probe.representations`."""
        for kind in self._kinds[model]:
            try:
                if kind == CLASS and not has_class_token(self.models[model].module):
                    raise LayerError("it has registers, but no class token; use tokens='mean' or 'locations'")
                vectors = of_kind(representation, kind)
            except LayerError as error:
                raise LayerError(f"layer {layer!r} of model {model!r}: {error}") from None
            if len(vectors.tokens) != self._images:
                raise RepresentationError(
                    f"layer {layer!r} of model {model!r} holds {len(vectors.tokens)} rows for a batch of "
                    f"{self._images} images; forward= must pass every image once (of a batch doubled for "
                    f"guidance, pass the half with the condition)"
                )
            self.models[model].require_complete(layer, vectors.tokens)
            self._consumer.take(model, kind_name(layer, kind), vectors)
        return layer


@contextmanager
def _explaining(model: LoadedModel, content: Any, reading: Reading) -> Iterator[None]:
    """Adds to the error of a model what it may lack: other images, or arguments beside them.

    Raises:
        ImageError: a RuntimeError or ValueError was raised in the block, and the images explain it.
        ModelError: an error was raised, and nothing but the images was passed to a model that takes more.
    """
    try:
        yield
    except RsmProbeError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        of_images = isinstance(error, RuntimeError | ValueError) and isinstance(content, Tensor)
        if of_images and (advice := _advice(model.module, content)):
            raise ImageError(f"model {model.name!r} fails on {advice[0]}: {error}; {advice[1]}") from error
        call = None if reading.forward is not None else example_call(model.module, reading.method, str(error))
        if call is None:
            raise
        if isinstance(error, TypeError) and "required" in str(error):
            problem = f"takes more than a batch of images: {error};"
        else:
            problem = f"fails on a batch of images alone: {error}; if it takes more,"
        raise ModelError(f"model {model.name!r} {problem} make the call by forward=, as in {call}") from error


def _advice(module: nn.Module, images: Tensor) -> tuple[str, str] | None:
    """What may be wrong with images on which a model fails, and what to give instead; None if nothing is known."""
    shape = tuple(images.shape)
    if not images.is_floating_point():
        return (
            f"images of {images.dtype}, which it gets as they are",
            "give floats, as in .float() / 255 with the normalisation of the model, or forward=, as in "
            "forward=lambda model, batch: model(batch.float() / 255), where batch is what the loader yields, or "
            "pictures (PIL images, NumPy arrays of bytes), which pass its preprocessing",
        )
    if images.ndim == 4 and shape[3] in _COLOURS and shape[1] not in _COLOURS:
        return (
            f"images of shape {shape}, whose channels seem to be last",
            "if they are, name the axes by rsm_probe.sources.as_images(images, axes='NHWC')",
        )
    if images.ndim == 5:
        return (
            f"clips or volumes of shape {shape}",
            "video models of torchvision take (N, C, T, H, W), those of transformers (N, T, C, H, W): choose by "
            "as_images(folder, clips=16, axes='NTCHW'), in YAML axes: NTCHW beside clips:, or by the order of a tensor",
        )
    if images.ndim == 4 and _takes_clips(module):
        return (
            f"images of shape {shape}",
            "it seems to take clips or volumes: of a folder of clips, each a folder of frames, write "
            "rsm_probe.sources.as_images(folder, clips=16), in YAML clips: 16 beside source:; or give tensors "
            "(N, C, T, H, W)",
        )
    return None


def _takes_clips(module: nn.Module) -> bool:
    """Whether a model may take clips or volumes: it convolves in three dimensions, or declares a number of frames."""
    config = getattr(module, "config", None)
    frames = any(getattr(config, name, None) for name in ("num_frames", "frames_per_clip"))
    return frames or any(isinstance(part, nn.Conv3d) for part in module.modules())


def on_device(content: Any, device: torch.device, copy: bool) -> Any:
    """Moves all tensors of a batch to a device; lists, tuples and mappings keep their types.

    Args:
        content: a tensor, or tuples, lists and mappings that hold tensors.
        device: the device.
        copy: copy tensors that are there already.
    """
    if isinstance(content, Tensor):
        return content.to(device, copy=copy)
    if isinstance(content, tuple | list):
        parts = [on_device(part, device, copy) for part in content]
        # Named tuples take their parts one by one.
        return type(content)(*parts) if hasattr(content, "_fields") else type(content)(parts)
    if isinstance(content, MutableMapping):
        mapping = shallow_copy(content)
        for key, part in content.items():
            mapping[key] = on_device(part, device, copy)
        return mapping
    return content


class LayerSample:
    """A consumer that copies all layers for a few images.

    Attributes:
        representations: model -> layer -> representation, in forward order.
        names: as in `LayerConsumer.end`.
        batch: the images.
    """

    def __init__(self) -> None:
        self.representations: dict[str, dict[str, Representation]] = {}
        self.names: LayerNames = {}
        self.batch = ImageBatch()
        self._taken: dict[tuple[str, str], Representation] = {}

    def begin(self, batch: ImageBatch) -> None:
        """See `LayerConsumer`."""
        self.batch, self._taken = batch, {}

    def take(self, model: str, layer: str, representation: Representation) -> None:
        """See `LayerConsumer`."""
        # A loader's batch may be large, and cannot be cut for a `forward` of one's own.
        tokens, prefix = (part[:SAMPLE_IMAGES].clone() for part in (representation.tokens, representation.prefix))
        self._taken[model, layer] = replace(representation, tokens=tokens, prefix=prefix)

    def end(self, names: LayerNames) -> None:
        """See `LayerConsumer`."""
        self.names, self.representations = names, {}
        for (model, taken_as), layer in names.items():
            self.representations.setdefault(model, {})[layer] = self._taken[model, taken_as]


def layer_names(layers: Any, what: str = "layers") -> str | list[str]:
    """Validates layer names, and returns them as text or as a list of texts.

    Args:
        layers: the user's argument.
        what: the name of the argument, for messages.

    Raises:
        LayerError: `layers` is neither text nor a sequence of texts.
    """
    return (
        require_text(layers, what, LayerError) if isinstance(layers, str) else require_texts(layers, what, LayerError)
    )


def readings_of(
    models: Mapping[str, LoadedModel], common: Reading, layers: Mapping[str, Layers] | None = None
) -> dict[str, Reading]:
    """How each model is read: what is said beside it, else what is said of all.

    Args:
        models: name -> model.
        common: what is said of all models.
        layers: model name -> layers, for all models, before what is said beside them.

    Raises:
        ModelError: `layers` lacks a model, or names an unknown one.
        LayerError: `tokens` are unknown.
    """
    for name in () if layers is None else (*models, *layers):
        if layers is not None and name not in layers and models[name].reading.layers is None:
            raise ModelError(f"layers= has no entry for model {name!r}; it has entries for {', '.join(layers)}")
        if name not in models:
            near = did_you_mean(str(name), models)
            raise ModelError(f"layers= has an entry for unknown model {name!r}{near}; models are: {', '.join(models)}")
    token_kinds(common.tokens)
    readings = {}
    for name, model in models.items():
        named = None if layers is None else layers.get(name)
        readings[name] = model.reading.over(common if named is None else replace(common, layers=named))
    return readings


def reading_settings(models: Mapping[str, LoadedModel], readings: Mapping[str, Reading]) -> dict[str, Any]:
    """What a stored result keeps of how models are read, beside the layers of all; {} where nothing was said."""
    said: dict[str, dict[str, Any]] = {}
    for name, reading in readings.items():
        own = models[name].reading.layers
        if settings := reading.settings() | ({} if own is None else {"layers": own}):
            said[name] = settings
    return {"readings": said} if said else {}
