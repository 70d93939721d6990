"""Addresses: plain data by which a worker in another process loads the models and images of this one.

An address travels as a message from the process of the user to its workers. It is never stored: loading one runs
whatever the user allowed to run when the model or the images were loaded first.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from rsm_probe.errors import ImageError, ModelError, RsmProbeError
from rsm_probe.probe.torch_internals import hooks_of
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.images.origins import OR_STAY, Origin
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.sources.models.reading import Reading
from rsm_probe.sources.models.user_functions import function_origin

# What loading makes; whatever else a model holds is plain data.
_MADE = {"module", "preprocess", "reading", "origin"}
# Loading draws from PyTorch's global generator and silences warnings of the whole process: one thread at a time.
_loading = threading.Lock()
# What each thread loaded last.
_latest = threading.local()


@dataclass(frozen=True)
class ModelAddress:
    """How a worker loads a model.

    Attributes:
        name: the name of the model in results.
        origin: how it was loaded.
        reading: how it is called and read.
        facts: the other attributes of the model that are plain data.
        fingerprint: see `LoadedModel.fingerprint`.
        state: a hash of hooks, training flags and replaced methods of its layers, which the fingerprint leaves out.
    """

    name: str
    origin: Origin
    reading: Origin
    facts: tuple[tuple[str, Any], ...]
    fingerprint: str
    state: str

    def load(self) -> LoadedModel:
        """Load the model, on the CPU. The warnings of the first loading are not repeated.

        Raises:
            ModelError: it cannot be loaded here, or is not the same model; the message names it.
        """
        try:
            with _loading, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                loaded: LoadedModel = replace(self.origin.make(), reading=self.reading.make(), **dict(self.facts))
                fingerprint = loaded.fingerprint
        except (RsmProbeError, OSError) as error:
            raise ModelError(f"a worker process cannot load model {self.name!r}: {error}; {OR_STAY}") from error
        if fingerprint != self.fingerprint:
            raise ModelError(
                f"a worker process loaded a different model for {self.name!r}: its weights, structure or preprocessing "
                f"were changed after it was loaded, its file or library was changed since, or it draws random weights, "
                f"for which seed= must be given; give the model as it is loaded, {OR_STAY}"
            )
        if _state(loaded.module) != self.state:
            raise ModelError(
                f"hooks, training flags or methods of model {self.name!r} were changed after it was loaded, which a "
                f"worker process cannot know; make the change in a function that builds the model (file.py:function), "
                f"{OR_STAY}"
            )
        return loaded

    def load_once(self) -> LoadedModel:
        """The model that this thread loaded last, if it was this one; otherwise load it.

        No two threads share a module, because a probe watches whatever passes through it.

        Raises:
            ModelError: see `load`.
        """
        if getattr(_latest, "model", (None, None))[0] != self:
            _latest.model = None, None  # before loading, so that memory never holds both
            _latest.model = self, self.load()
        loaded: LoadedModel = _latest.model[1]
        return loaded


@dataclass(frozen=True)
class ImagesAddress:
    """How a worker loads images.

    Attributes:
        name: the name of the image set.
        origin: how it was made.
        fingerprint: see `ImageSet.fingerprint`.
    """

    name: str
    origin: Origin
    fingerprint: str

    def load(self) -> ImageSet:
        """Load the images. Files are read once for their fingerprint, and none is decoded for it.

        Raises:
            ImageError: they cannot be loaded here, or are not the same images; the message names them.
        """
        try:
            with _loading, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                images: ImageSet = self.origin.make()
                fingerprint = images.fingerprint()
        except (RsmProbeError, OSError) as error:
            raise ImageError(f"a worker process cannot load the images {self.name!r}: {error}; {OR_STAY}") from error
        if fingerprint != self.fingerprint:
            raise ImageError(
                f"a worker process found different images for {self.name!r}: files were added, removed or changed "
                f"since this run began, or the function that returns them is not repeatable; run it again, {OR_STAY}"
            )
        return images

    def load_once(self) -> ImageSet:
        """The images that this thread loaded last, if it were these; otherwise load them.

        Raises:
            ImageError: see `load`.
        """
        if getattr(_latest, "images", (None, None))[0] != self:
            _latest.images = self, self.load()
        images: ImageSet = _latest.images[1]
        return images


def model_address(model: LoadedModel) -> ModelAddress:
    """Describe a model to workers in other processes.

    Args:
        model: what `load_model` or `train_or_load` returned. Weights are hashed.

    Raises:
        ModelError: no other process can load it; the message says why, and what to do.
    """
    if isinstance(model.origin, str):
        raise ModelError(f"no other process can load model {model.name!r}: {model.origin}; {OR_STAY}")
    facts = tuple((part.name, getattr(model, part.name)) for part in fields(model) if part.name not in _MADE)
    return ModelAddress(model.name, model.origin, _reading(model), facts, model.fingerprint, _state(model.module))


def images_address(images: ImageSet | ImageLoader) -> ImagesAddress:
    """Describe images to workers in other processes.

    Args:
        images: an embedded set, a folder, a `.npy` file, a list of paths, what a configuration names, or a part of it.

    Raises:
        ImageError: no other process can load them; the message says what to do.
    """
    origin = images.origin if isinstance(images, ImageSet) else None
    if origin is None:
        what = "come from a loader" if isinstance(images, ImageLoader) else "exist in this process only"
        raise ImageError(
            f"no other process can load the images {images.name!r}, which {what}; give a folder, a .npy file, a list "
            f"of paths, the name of an embedded set, or rsm_probe.sources.images_in('data.py:function') with a "
            f"function that returns a data set, {OR_STAY}"
        )
    return ImagesAddress(images.name, origin, images.fingerprint())


def _reading(model: LoadedModel) -> Origin:
    parts: dict[str, Any] = {part.name: getattr(model.reading, part.name) for part in fields(Reading)}
    if parts["forward"] is not None and (forward := function_origin(parts["forward"])) is None:
        raise ModelError(
            f"no other process can call model {model.name!r}: its forward= is a function without a name that can be "
            f"imported (a lambda, a function within a function or of a notebook); move it to a module, {OR_STAY}"
        )
    if parts["forward"] is not None:
        parts["forward"] = forward
    if parts["layouts"] is not None:
        parts["layouts"] = Origin.of(dict, **parts["layouts"])
    return Origin.of(Reading, **{name: tuple(v) if isinstance(v, list) else v for name, v in parts.items()})


def _state(module: nn.Module) -> str:
    """Hash what decides a forward pass beside structure and weights: hooks, training flags, replaced methods."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        facts = name, hooks_of(part), part.training, "forward" in vars(part)
        digest.update(repr(facts).encode())
    return digest.hexdigest()
