"""Models and images that Python gives to a study, in place of those that its configuration names."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import PrivateAttr

from rsm_probe.config import Config
from rsm_probe.runs.fields import IN_PYTHON
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.sources.images.any_images import as_images
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.loaders import ImageLoader
from rsm_probe.sources.models.loaded_model import LoadedModel
from rsm_probe.streaming.layer_sweep import name_models


class GivenModel(ModelConfig):
    """The entry of a model that Python gave; a stored configuration knows it by its fingerprint."""

    _model: LoadedModel = PrivateAttr()

    def load_source(
        self, weights: str | None, seed: int = 0, *, allow_pickle: bool = False, trust_remote_code: bool = False
    ) -> LoadedModel:
        """The model itself."""
        return self._model


class GivenImages(ImagesConfig):
    """Images that Python gave; a stored configuration knows them by their fingerprint."""

    _images: ImageSet | ImageLoader = PrivateAttr()

    def _load(self, progress: bool) -> ImageSet | ImageLoader:
        return self._images


_Study = TypeVar("_Study", bound=Config)


def with_given(study: _Study, models: Any, images: Any, kind: type[GivenModel] = GivenModel) -> _Study:
    """A study with models and images that Python gives; None leaves those of its configuration.

    Args:
        study: the study.
        models: as `sweep` takes them.
        images: as `sweep` takes them.
        kind: the class of the study's entries for such models.

    Raises:
        RsmProbeError: they are not models or images.
    """
    changes: dict[str, Any] = {}
    if models is not None:
        changes["models"] = given_models(models, kind)
    if images is not None:
        changes["images"] = given_images(images)
    return study.model_copy(update=changes) if changes else study


def given_models(models: Any, kind: type[GivenModel] = GivenModel) -> tuple[ModelConfig, ...]:
    """Entries of a study for models as `sweep` takes them.

    Args:
        models: the models.
        kind: the class of entries of the study.

    Raises:
        ModelError: no model is given, or a model cannot be loaded.
    """
    return tuple(_entry(kind, name, model) for name, model in name_models(models).items())


def given_images(images: Any) -> ImagesConfig:
    """The images of a study, as `sweep` takes them.

    Raises:
        ImageError: they are not images.
    """
    source = as_images(images)
    config = GivenImages(source=f"{IN_PYTHON}:{source.fingerprint()}")
    config._images = source
    return config


def _entry(kind: type[GivenModel], name: str, model: LoadedModel) -> ModelConfig:
    reading = model.reading
    plain = {
        "layers": reading.layers, "layouts": reading.layouts and dict(reading.layouts), "method": reading.method,
        "inputs": reading.inputs, "tokens": reading.tokens,
    }  # fmt: skip
    entry = kind.parse({"name": name, "source": f"{IN_PYTHON}:{model.fingerprint}", **plain}, f"model {name!r}")
    entry._model = model
    return entry
