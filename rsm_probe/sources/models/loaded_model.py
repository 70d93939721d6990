"""A model that is ready to be probed: a module with its preprocessing and name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.images.origins import Origin
from rsm_probe.sources.images.pixels import tensor_bytes, to_rgb
from rsm_probe.sources.models.fingerprints import add_value, require_weights, without_addresses
from rsm_probe.sources.models.libraries import Preprocess
from rsm_probe.sources.models.reading import Reading

# The preprocessed pixels of this image identify a preprocessing in fingerprints.
_REFERENCE_IMAGE = Image.fromarray((np.arange(96 * 128 * 3) ** 2 % 251).astype(np.uint8).reshape(96, 128, 3))
# Why another process cannot load a model that was not loaded by name.
GIVEN = (
    "it was given as a module, which exists in this process only; give a name (timm:..., torchvision:..., "
    "file.py:function, a .safetensors file), a function that can be imported by name, or what load_model makes of these"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be probed.

    Attributes:
        name: the name of the model in results.
        module: the network, in evaluation mode; modules given by the user keep their mode.
        preprocess: PIL image -> tensor (C, H, W).
        questions: number of questions that the model answers, each by a softmax over an equal share of its outputs.
        default_preprocess: whether the model came without preprocessing and uses `to_tensor`.
        reading: how the model is called, and how its layers are read, where it differs from that of all models.
        incomplete: names of weights that a checkpoint lacked; they hold NaN, and layers that need them are refused.
        origin: how another process loads the model, apart from its name and reading; or text that says why it cannot,
            and what to do about it.
        network: for one of several checkpoints of a training, the name that they share; else "".
        step: the number of training steps, or of epochs, after which the checkpoint was taken.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    questions: int = 1
    default_preprocess: bool = False
    reading: Reading = field(default_factory=Reading)
    incomplete: tuple[str, ...] = ()
    origin: Origin | str = field(default=GIVEN, repr=False, compare=False)
    network: str = ""
    step: int | None = None

    def __repr__(self) -> str:
        # Parameters of lazy modules have no shape yet.
        shaped = [p for p in self.module.parameters() if not is_lazy(p)]
        facts = [f"{type(self.module).__name__} with {sum(p.numel() for p in shaped):,} parameters on {self.device}"]
        facts += ["no preprocessing of its own"] if self.default_preprocess else []
        given = {part.name: getattr(self.reading, part.name) for part in fields(self.reading)}
        facts += [f"{name}={brief(value)}" for name, value in given.items() if value is not None]
        return f"LoadedModel({brief(self.name)}: {', '.join(facts)})"

    @property
    def fingerprint(self) -> str:
        """Hash of structure, preprocessing and weights, by which stored results identify their model.

        Raises:
            ModelError: the preprocessing does not take images, or weights have no values yet (a lazy module before its
                first call, the meta device) or cannot be read.
        """
        require_weights(self.module, self.name)
        digest = hashlib.sha256(without_addresses(repr(self.module)).encode())
        digest.update(tensor_bytes(self._preprocessed(_REFERENCE_IMAGE)))
        for name, value in self.module.state_dict().items():
            try:
                add_value(digest, name, value)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ModelError(
                    f"{self.name}: cannot read the values of {name} ({type(value).__name__}), by which stored results "
                    f"identify their model: {error}"
                ) from error
        return digest.hexdigest()

    def prepares_like(self, other: LoadedModel) -> bool:
        """Whether both make the same tensor of a reference image.

        Raises:
            ModelError: a preprocessing does not take images.
        """
        return torch.equal(self._preprocessed(_REFERENCE_IMAGE), other._preprocessed(_REFERENCE_IMAGE))

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU for models without parameters."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def require_complete(self, layer: str, tokens: Tensor) -> None:
        """Refuse a layer that was computed from weights that a checkpoint lacked.

        Args:
            layer: the name of the layer.
            tokens: its tokens of some images.

        Raises:
            ModelError: there are such weights, and tokens that are not finite.
        """
        if self.incomplete and not bool(torch.isfinite(tokens).all()):
            shown = ", ".join(self.incomplete[:5]) + (" and more" if len(self.incomplete) > 5 else "")
            raise ModelError(
                f"layer {layer!r} of model {self.name!r} needs weights that its checkpoint does not have ({shown}); "
                f"leave this layer out, or give a checkpoint with these weights"
            )

    def blank_input(self) -> Tensor:
        """Make a preprocessed grey image, (1, C, H, W).

        Raises:
            ModelError: the preprocessing does not take images.
        """
        return self._preprocessed(Image.new("RGB", (256, 256), (124, 116, 104))).unsqueeze(0)

    def _preprocessed(self, image: Image.Image) -> Tensor:
        try:
            tensor = self.preprocess(image)
            if isinstance(tensor, Tensor):
                return tensor
            problem = f"got {type(tensor).__name__}"
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            problem = f"it failed: {error}"
        raise ModelError(f"preprocess of {self.name} must return a tensor, {problem}")


def to_tensor(image: Image.Image) -> Tensor:
    """Default preprocessing: RGB in [0, 1], shape (3, H, W)."""
    pixels = np.asarray(to_rgb(image), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
