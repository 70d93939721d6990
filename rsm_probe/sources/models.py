"""Models by name or as they are -> a module in evaluation mode and its preprocessing.

Each library is imported when one of its models is asked for. Weights come through the library's own way.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.errors import ModelError, nearest

Preprocess = Callable[[Image.Image], Tensor]
# What a preprocessing makes of this tells it from others.
_KNOWN_IMAGE = Image.fromarray((np.arange(96 * 128 * 3) ** 2 % 251).astype(np.uint8).reshape(96, 128, 3))


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be probed.

    Attributes:
        name: what the model is called in results.
        module: the network, in evaluation mode; a module of one's own keeps the mode that it came in.
        preprocess: PIL image -> tensor (C, H, W).
    """

    name: str
    module: nn.Module
    preprocess: Preprocess

    @property
    def fingerprint(self) -> str:
        """A hash of structure, preprocessing and weights, by which a stored result knows its model again."""
        digest = hashlib.sha256(repr(self.module).encode())
        digest.update(_bytes(self._preprocessed(_KNOWN_IMAGE)))
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def blank_input(self) -> Tensor:
        """A grey image as the model takes it, (1, C, H, W).

        Raises:
            ModelError: the preprocessing does not take images.
        """
        return self._preprocessed(Image.new("RGB", (256, 256), (124, 116, 104))).unsqueeze(0)

    def _preprocessed(self, image: Image.Image) -> Tensor:
        try:
            tensor = self.preprocess(image)
            if isinstance(tensor, Tensor):
                return tensor
            problem = f"gives {type(tensor).__name__}"
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            problem = f"fails: {error}"
        raise ModelError(f"the preprocessing of {self.name} makes no tensor of an image, but {problem}")


def load_model(
    source: str | Path | nn.Module | LoadedModel | Callable[[], nn.Module],
    weights: str | Path | None = "default",
    name: str = "",
    seed: int | None = None,
) -> LoadedModel:
    """Loads a model with its preprocessing, in evaluation mode.

    Args:
        source: "torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:organisation/name" or "hf:" and a local
            folder, a `.safetensors` file that `rsm-probe train` wrote, a module of one's own, or a function that
            builds one.
        weights: "default" for the library's pretrained weights (of a file or a module: its own), None for random ones
            (a module keeps its own), or the path of a `.safetensors` file with a state dict.
        name: what to call the model in results; derived from the source where left out.
        seed: of random weights; None draws them from PyTorch's global state.

    Raises:
        ModelError: unknown library or model (the message holds the nearest names), weights that cannot be had or do not
            fit.
    """
    if isinstance(source, LoadedModel):
        return source
    if callable(source) and not isinstance(source, nn.Module):
        source = _built(source)
    if isinstance(source, nn.Module):
        if weights not in (None, "default"):
            _load_state(source, Path(str(weights)))
        return LoadedModel(name or type(source).__name__, source, to_tensor)
    if Path(source).suffix == ".safetensors":
        from rsm_probe.sources.training import load_trained

        loaded = load_trained(source, pretrained=weights is not None)
        if weights not in (None, "default"):
            _load_state(loaded.module, Path(str(weights)))
        return LoadedModel(name or loaded.name, loaded.module, loaded.preprocess)
    library, _, title = str(source).partition(":")
    if library not in _LIBRARIES or not title:
        known = ", ".join(f"'{key}:...'" for key in _LIBRARIES)
        raise ModelError(
            f"cannot tell where to take model {source!r} from; write {known}, or the path of a .safetensors file"
        )
    pretrained = weights == "default"
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        module, preprocess = _LIBRARIES[library](title, pretrained)
    if weights is not None and not pretrained:
        _load_state(module, Path(weights))
    return LoadedModel(name or title.rstrip("/").rsplit("/", 1)[-1], module.eval(), preprocess)


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    module = factory()
    if not isinstance(module, nn.Module):
        raise ModelError(f"{factory!r} must return a torch.nn.Module, found {type(module).__name__}")
    return module.eval()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_tensor(image: Image.Image) -> Tensor:
    """The preprocessing of models that bring none: RGB in [0, 1], shape (3, H, W)."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _torchvision(title: str, pretrained: bool) -> tuple[nn.Module, Preprocess]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(title).DEFAULT
    except ValueError:
        names = torchvision.models.list_models()
        raise ModelError(f"torchvision has no model {title!r}{nearest(title, names)}") from None
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    # Detectors and segmenters fetch a pretrained backbone unless told not to.
    if (
        not pretrained
        and "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(title)).parameters
    ):
        options["weights_backbone"] = None
    module = _download(f"torchvision:{title}", lambda: torchvision.models.get_model(title, **options))
    return module, weights.transforms()


def _timm(title: str, pretrained: bool) -> tuple[nn.Module, Preprocess]:
    import timm

    if not timm.is_model(title):
        raise ModelError(f"timm has no model {title!r}{nearest(title, timm.list_models())}")
    module = _download(f"timm:{title}", lambda: timm.create_model(title, pretrained=pretrained))
    return module, timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)


def _huggingface(title: str, pretrained: bool) -> tuple[nn.Module, Preprocess]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    def build() -> nn.Module:
        if pretrained:
            return AutoModel.from_pretrained(title, trust_remote_code=False, use_safetensors=True)
        return AutoModel.from_config(
            AutoConfig.from_pretrained(title, trust_remote_code=False), trust_remote_code=False
        )

    module = _download(f"hf:{title}", build)
    processor = _download(f"hf:{title}", lambda: AutoImageProcessor.from_pretrained(title, trust_remote_code=False))

    def preprocess(image: Image.Image) -> Tensor:
        return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return module, preprocess


_LIBRARIES: dict[str, Callable[[str, bool], tuple[nn.Module, Preprocess]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _huggingface,
}


def _download(what: str, build: Callable[[], Any]) -> Any:
    """Builds something that may have to be fetched; a library's failure becomes one line that says what to do."""
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load {what}: {reason}; check the network, put the weights into the library's cache on a machine "
            f"that has one, or use weights=None for random weights"
        ) from error


def _load_state(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ModelError(f"weights must be 'default', None or a .safetensors file, found {str(path)!r}")
    if not path.is_file():
        raise ModelError(f"no weights at {path}")
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"the weights in {path} do not fit {type(module).__name__}: {error}") from error
