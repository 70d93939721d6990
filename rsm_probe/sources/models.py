"""Models by name or as they are -> a module in evaluation mode and its preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rsm_probe.checks import brief, require_seed, require_text
from rsm_probe.errors import ModelError, nearest
from rsm_probe.sources.fingerprints import add_value, require_weights, tensor_bytes, without_addresses
from rsm_probe.sources.functions import built, function_in
from rsm_probe.sources.libraries import LIBRARIES, Preprocess
from rsm_probe.sources.pixels import to_rgb
from rsm_probe.sources.weights import load_weights

# What a preprocessing makes of this tells it from others.
_KNOWN_IMAGE = Image.fromarray((np.arange(96 * 128 * 3) ** 2 % 251).astype(np.uint8).reshape(96, 128, 3))


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be probed.

    Attributes:
        name: what the model is called in results.
        module: the network, in evaluation mode; a module of one's own keeps the mode that it came in.
        preprocess: PIL image -> tensor (C, H, W).
        questions: how many questions it answers, each by a softmax over its share of the output.
        default_preprocess: whether the model brought no preprocessing, and takes what `to_tensor` gives.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    questions: int = 1
    default_preprocess: bool = False

    @property
    def fingerprint(self) -> str:
        """A hash of structure, preprocessing and weights, by which a stored result knows its model again.

        Raises:
            ModelError: the preprocessing does not take images, or a weight has no values (of lazy modules before their
                first call, or on the meta device), or none that can be read.
        """
        require_weights(self.module, self.name)
        digest = hashlib.sha256(without_addresses(repr(self.module)).encode())
        digest.update(tensor_bytes(self._preprocessed(_KNOWN_IMAGE)))
        for name, value in self.module.state_dict().items():
            try:
                add_value(digest, name, value)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ModelError(
                    f"{self.name}: the values of {name} ({type(value).__name__}) cannot be read, and a stored result "
                    f"could not know its model by them: {error}"
                ) from error
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the first parameter is; the CPU for models without any."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

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
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            problem = f"fails: {error}"
        raise ModelError(f"the preprocessing of {self.name} makes no tensor of an image, but {problem}")


def load_model(
    source: str | Path | nn.Module | LoadedModel | Callable[[], nn.Module],
    weights: str | Path | None = "default",
    name: str = "",
    seed: int | None = None,
    *,
    part: str = "",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a model with its preprocessing, in evaluation mode.

    Args:
        source: "torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:organisation/name" or "hf:" and a local
            folder ("hf-classifier:" for the model with its classification head), a `.safetensors` file that
            `rsm-probe train` wrote, "file.py:function" for a function of one's own that builds a module, that function,
            or a module.
        weights: "default" for the library's pretrained weights (of a file or a module: its own), None for random ones
            (a module keeps its own), or the path of a file with a state dict: `.safetensors`, or a checkpoint of
            PyTorch that holds tensors only.
        name: what to call the model in results; derived from the source where left out.
        seed: of random weights; None draws them from PyTorch's global state.
        part: dotted name of the submodule to use in place of the whole, such as the image tower of a model that also
            takes text.
        allow_pickle: read checkpoints that hold more than tensors; reading them can run any code.
        trust_remote_code: let transformers run code that comes with a model.

    Raises:
        ModelError: unknown library or model (the message holds the nearest names), weights that cannot be had or do not
            fit, or a function that builds no module.
    """
    if isinstance(source, LoadedModel):
        return source
    for text, argument in ((name, "name"), (part, "part")):
        require_text(text, argument, ModelError)
    if seed is not None:
        require_seed(seed, "seed", ModelError)
    own_weights = None if weights is None or str(weights) == "default" else Path(str(weights))
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        loaded = _loaded(source, str(weights) == "default", weights is not None, trust_remote_code)
    if own_weights is not None:
        load_weights(loaded.module, own_weights, allow_pickle)
    return replace(loaded, name=name or loaded.name, module=_part(loaded.module, part))


def _loaded(
    source: str | Path | nn.Module | Callable[[], nn.Module], pretrained: bool, trained: bool, trust_remote_code: bool
) -> LoadedModel:
    if isinstance(source, nn.Module):
        return LoadedModel(type(source).__name__, source, to_tensor, default_preprocess=True)
    if callable(source):
        module = built(source, getattr(source, "__name__", type(source).__name__))
        return LoadedModel(type(module).__name__, module, to_tensor, default_preprocess=True)
    if not isinstance(source, str | Path):
        raise ModelError(f"a model is a name, a path, a module or a function, found {brief(source)}")
    library, _, title = str(source).partition(":")
    if Path(library).suffix == ".py":
        module = built(function_in(Path(library), title), f"{title} in {library}")
        return LoadedModel(title, module, to_tensor, default_preprocess=True)
    if Path(source).suffix == ".safetensors":
        from rsm_probe.sources.training import load_trained

        return load_trained(source, pretrained=trained)
    if library not in LIBRARIES or not title:
        known = ", ".join(f"'{key}:...'" for key in LIBRARIES)
        raise ModelError(
            f"cannot tell where to take model {brief(str(source))} from; write {known}, 'file.py:function', or the "
            f"path of a .safetensors file"
        )
    module, preprocess = LIBRARIES[library](title, pretrained, trust_remote_code)
    return LoadedModel(title.rstrip("/").rsplit("/", 1)[-1], module.eval(), preprocess)


def _part(module: nn.Module, name: str) -> nn.Module:
    if not name:  # scripted modules have no get_submodule
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [key for key, _ in module.named_modules() if key]
        raise ModelError(f"{type(module).__name__} has no part {name!r}{nearest(name, names)}") from None


def to_tensor(image: Image.Image) -> Tensor:
    """The preprocessing of models that bring none: RGB in [0, 1], shape (3, H, W)."""
    pixels = np.asarray(to_rgb(image), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
