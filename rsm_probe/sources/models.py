"""Models by name or as they are -> a module in evaluation mode and its preprocessing."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rsm_probe.errors import ModelError, RsmProbeError, nearest
from rsm_probe.sources.libraries import LIBRARIES, Preprocess
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
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    questions: int = 1

    @property
    def fingerprint(self) -> str:
        """A hash of structure, preprocessing and weights, by which a stored result knows its model again.

        Raises:
            ModelError: weights that are not there yet: of lazy modules, or on the meta device.
        """
        digest = hashlib.sha256(repr(self.module).encode())
        digest.update(_bytes(self._preprocessed(_KNOWN_IMAGE)))
        for name, value in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(_state(name, value))
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
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
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
            fit.
    """
    if isinstance(source, LoadedModel):
        return source
    own_weights = None if weights in (None, "default") else Path(str(weights))
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        loaded = _loaded(source, weights == "default", weights is not None, trust_remote_code)
    if own_weights is not None:
        load_weights(loaded.module, own_weights, allow_pickle)
    return replace(loaded, name=name or loaded.name, module=_part(loaded.module, part))


def _loaded(
    source: str | Path | nn.Module | Callable[[], nn.Module], pretrained: bool, trained: bool, trust_remote_code: bool
) -> LoadedModel:
    if isinstance(source, nn.Module):
        return LoadedModel(type(source).__name__, source, to_tensor)
    if callable(source):
        module = _built(source)
        return LoadedModel(type(module).__name__, module, to_tensor)
    if not isinstance(source, str | Path):
        raise ModelError(f"a model is a name, a path, a module or a function, found {type(source).__name__}")
    library, _, title = str(source).partition(":")
    if Path(library).suffix == ".py":
        module = _built(_function(Path(library), title))
        return LoadedModel(title, module, to_tensor)
    if Path(source).suffix == ".safetensors":
        from rsm_probe.sources.training import load_trained

        return load_trained(source, pretrained=trained)
    if library not in LIBRARIES or not title:
        known = ", ".join(f"'{key}:...'" for key in LIBRARIES)
        raise ModelError(
            f"cannot tell where to take model {source!r} from; write {known}, 'file.py:function', or the path of a "
            f".safetensors file"
        )
    module, preprocess = LIBRARIES[library](title, pretrained, trust_remote_code)
    return LoadedModel(title.rstrip("/").rsplit("/", 1)[-1], module.eval(), preprocess)


def _function(file: Path, name: str) -> Callable[[], nn.Module]:
    """A function in a file of the user's."""
    if not file.is_file():
        raise ModelError(f"no file at {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in functions:
        raise ModelError(f"{file} has no function {name!r}{nearest(name, functions)}")
    function: Callable[[], nn.Module] = getattr(module, name)
    return function


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        module = factory()
    except RsmProbeError:
        raise
    except Exception as error:
        title = getattr(factory, "__name__", type(factory).__name__)
        raise ModelError(f"{title}() builds no model: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{factory!r} must return a torch.nn.Module, found {type(module).__name__}")
    return module.eval()


def _part(module: nn.Module, name: str) -> nn.Module:
    if not name:  # scripted modules have no get_submodule
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [key for key, _ in module.named_modules() if key]
        raise ModelError(f"{type(module).__name__} has no part {name!r}{nearest(name, names)}") from None


def _state(name: str, value: Any) -> bytes:
    """What a model holds under a name, as bytes; quantised modules hold more than tensors."""
    if isinstance(value, tuple | list):
        return b"".join(_state(f"{name}.{place}", part) for place, part in enumerate(value))
    if not isinstance(value, Tensor):
        return repr(value).encode()
    if is_lazy(value) or value.is_meta:
        raise ModelError(
            f"{name!r} of the model has no values yet; call the model on images first (lazy modules), or load its "
            f"weights (the meta device)"
        )
    if value.is_quantized:
        scales = value.q_scale() if value.qscheme() == torch.per_tensor_affine else value.q_per_channel_scales()
        return repr(scales).encode() + _bytes(value.int_repr())
    dense = value if value.layout == torch.strided else value.to_dense()
    return f"{tuple(value.shape)}{value.dtype}".encode() + _bytes(dense)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_tensor(image: Image.Image) -> Tensor:
    """The preprocessing of models that bring none: RGB in [0, 1], shape (3, H, W)."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
