"""Read the tensors of a checkpoint, in whatever form a program saved it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.models.tensor_files import read_unchecked

_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pyth", ".th")
_INDEX = ".index.json"
# What libraries call the weights in a folder, in order of preference.
_IN_A_FOLDER = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
)  # fmt: skip
# Real checkpoints nest a few levels; a hostile one could contain itself.
_DEEPEST = 8


@dataclass(frozen=True)
class Entry:
    """A value of a checkpoint, usually a tensor.

    Attributes:
        keys: the keys of the nested mappings that lead to it, outermost first.
        name: its name in the innermost mapping, such as "module.layer1.0.conv1.weight".
        value: the value.
    """

    keys: tuple[str, ...]
    name: str
    value: Any

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys, and the dotted name in parts."""
        return (*self.keys, *self.name.split("."))


def read_checkpoint(path: Path, allow_pickle: bool = False) -> list[Entry]:
    """Read all values of a checkpoint.

    Objects of other classes than PyTorch's, such as options and callbacks, are neither imported nor built.

    Args:
        path: a `.safetensors` file, a PyTorch checkpoint, the `.index.json` of shards of either, or a folder with one
            of these under the name that libraries give it.
        allow_pickle: also build those objects, such as a whole pickled module; reading them can run any code.

    Raises:
        ModelError: there is no such file, it is damaged, has another format, or holds no tensors that can be read
            without running code.
    """
    path = _in_folder(path) if isdir(path) else path
    known = path.name.endswith(_INDEX) or path.suffix in (".safetensors", *_CHECKPOINTS)
    if not known:
        raise ModelError(
            f"weights must be 'default', None, a .safetensors file or a checkpoint ({', '.join(_CHECKPOINTS)}, "
            f"{_INDEX} of shards, or a folder with one of these), found {str(path)!r}"
        )
    if not isfile(path):
        raise ModelError(f"no weights at {path}")
    if path.name.endswith(_INDEX):
        shards = _shards(path)
        return [entry for shard in shards for entry in read_checkpoint(shard, allow_pickle)]
    if path.suffix == ".safetensors":
        return [Entry((), name, tensor) for name, tensor in read_unchecked(path)[0].items()]
    content, refused = _unpickled(path, allow_pickle)
    if not isinstance(content, Mapping | nn.Module):
        if refused:
            raise _runs_code(path)
        raise ModelError(f"{path} must hold a state dict, found {type(content).__name__}")
    entries = list(entries_of(content))
    if refused and not any(isinstance(entry.value, Tensor) for entry in entries):
        raise _runs_code(path)
    return entries


def entries_of(content: Any, keys: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The values of nested mappings; modules count as their state dicts, and whole numbers are not names of weights."""
    for name, value in (content.state_dict() if isinstance(content, nn.Module) else content).items():
        if not isinstance(name, str):
            continue
        # Modules store what they like under this name.
        own_state = name.rpartition(".")[2] == "_extra_state"
        if isinstance(value, Mapping | nn.Module) and not own_state and len(keys) < _DEEPEST:
            yield from entries_of(value, (*keys, name))
        else:
            yield Entry(keys, name, value)


def _in_folder(folder: Path) -> Path:
    for name in _IN_A_FOLDER:
        if isfile(folder / name):
            return folder / name
    if isfile(folder / ".metadata"):
        raise ModelError(
            f"{folder} is a distributed checkpoint; turn it into one file with torch.distributed.checkpoint."
            f"format_utils.dcp_to_torch_save({str(folder)!r}, 'weights.pt'), and give weights='weights.pt'"
        )
    raise ModelError(f"{folder} is a folder without {', '.join(_IN_A_FOLDER[:4])}; name the file with the weights")


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of shards: it must map names of weights to files") from error
    for name in names:
        # An index from elsewhere must not lead out of its folder, nor to another index.
        if not isinstance(name, str) or Path(name).name != name or name.endswith(_INDEX):
            raise ModelError(f"{index} names {brief(name)}, which is not a file in its folder")
        if not isfile(index.parent / name):
            raise ModelError(f"{index} names {name}, which is missing: put all shards into {index.parent}")
    return [index.parent / name for name in sorted(names)]


class _Inert:
    """Stands for an object that is not built, whatever its pickle says."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path, allow_pickle: bool) -> tuple[Any, bool]:
    """The content of a checkpoint, and whether it holds objects that were not built."""
    from pickle import UnpicklingError

    try:
        if allow_pickle:
            return torch.load(path, map_location="cpu", weights_only=False), False
        try:
            return torch.load(path, map_location="cpu", weights_only=True), False
        except UnpicklingError:
            with torch.serialization.safe_globals(_foreign(path)):
                return torch.load(path, map_location="cpu", weights_only=True), True
    except UnpicklingError as error:
        if allow_pickle:
            raise ModelError(f"cannot read {path}: {error}") from error
        raise _runs_code(path) from None
    # Damaged pickles may fail in any way.
    except (EOFError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def _foreign(path: Path) -> list[Any]:
    """Inert stand-ins for all classes and functions that a checkpoint names and PyTorch does not trust."""
    from pickle import UnpicklingError

    try:
        names: Iterable[str] = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError as error:  # the format before PyTorch 1.6, which cannot be searched
        raise UnpicklingError(str(error)) from error
    return [(_Inert, name) for name in names]


def _runs_code(path: Path) -> ModelError:
    return ModelError(
        f"{path} holds more than tensors, and reading it could run any code; convert it to .safetensors or, if you "
        f"trust its source, set allow_pickle=True (--allow-pickle)"
    )
