"""How a model is called, and how its layers are read: what is said beside a model or for all models at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from rsm_probe.checks import brief, require_text, require_texts
from rsm_probe.errors import ModelError, StorageError
from rsm_probe.probe.layers import Layers
from rsm_probe.probe.representation import Layout
from rsm_probe.sources.models.user_functions import importable_name

# Makes the call of a model: (module, batch) -> anything.
Forward = Callable[[nn.Module, Any], Any]
# Stands for a function that no other process can import, in the settings of stored results.
_UNNAMED = "a function that cannot be imported by name"


@dataclass(frozen=True)
class Reading:
    """How a model is called, and how its layers are read. None where nothing was said.

    Attributes:
        layers: the layers to probe, as in `Probe`.
        layouts: layer name or glob -> layout, as in `Probe`.
        method: the method whose calls are forward passes, as in `Probe`.
        forward: makes the call from the module and a batch: several inputs, prompts, timesteps.
        inputs: the names of the inputs that hold images, as in `Probe`.
        tokens: which vectors of a layer are compared; see `rsm_probe.forward.token_kinds`.

    Raises:
        ModelError: an entry has the wrong type.
    """

    layers: Layers | None = None
    layouts: Mapping[str, Layout] | None = None
    method: str | None = None
    forward: Forward | None = None
    inputs: str | Sequence[str] | None = None
    tokens: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            require_text(self.method, "method", ModelError)
        if self.forward is not None and not callable(self.forward):
            raise ModelError(f"forward must be a function of a model and a batch, found {brief(self.forward)}")
        for name in ("layers", "inputs", "tokens"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, require_texts(value, name, ModelError))

    def over(self, common: Reading) -> Reading:
        """What is said of one model, completed by what is said of all."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(common, **{name: value for name, value in said.items() if value is not None})

    def call(self, module: nn.Module, batch: Any) -> Any:
        """Call a model on a batch."""
        if self.forward is not None:
            return self.forward(module, batch)
        return (module if self.method is None else getattr(module, self.method))(batch)

    def settings(self) -> dict[str, Any]:
        """What was said, apart from the layers, as a stored result keeps it; functions by their importable names."""
        said = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "layers" and getattr(self, field.name) is not None
        }
        if self.forward is not None:
            said["forward"] = importable_name(self.forward) or _UNNAMED
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in said.items()}


def require_continuable(where: object, readings: Mapping[str, Reading]) -> None:
    """Refuse to continue stored work by a call whose `forward` cannot be told from another.

    Args:
        where: the folder of the stored work, for the message.
        readings: name of the model -> its reading.

    Raises:
        StorageError: a `forward` has no name that can be imported.
    """
    for model, reading in readings.items():
        if reading.forward is not None and importable_name(reading.forward) is None:
            raise StorageError(
                f"{where} was begun with forward= of model {model!r} given as a function that cannot be imported by "
                f"name (a lambda, a function within a function or of a notebook), so that nobody can tell whether it "
                f"is the same; move it to a module, from which it is imported as module:function, and start again in "
                f"another folder"
            )
