"""Read the tensors of a checkpoint, in whatever form a program saved it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsm_probe.checks import brief
from rsm_probe.errors import ModelError
from rsm_probe.sources.models.tensor_files import read_unchecked

_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pyth", ".th", ".t7")
_INDEX = ".index.json"
# What libraries call the weights in a folder, in order of preference.
_IN_A_FOLDER = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
)  # fmt: skip
# The most files of a folder to list in a message.
_SHOWN = 6
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
        arrays = {".npz": "numpy.load", ".pkl": "pickle.load", ".npy": "numpy.load"}.get(path.suffix)
        todo = f"; store what {arrays} reads by torch.save(dict(...), 'weights.pt')" if arrays and isfile(path) else ""
        raise ModelError(
            f"weights must be 'default', None, a .safetensors file or a checkpoint ({', '.join(_CHECKPOINTS)}, "
            f"{_INDEX} of shards, or a folder with one of these), found {str(path)!r}{todo}"
        )
    if not isfile(path):
        raise ModelError(f"no weights at {path}")
    if path.name.endswith(_INDEX):
        shards = _shards(path)
        return [entry for shard in shards for entry in read_checkpoint(shard, allow_pickle)]
    if path.suffix == ".safetensors":
        return [Entry((), name, tensor) for name, tensor in read_unchecked(path)[0].items()]
    content, refused = _unpickled(path, allow_pickle)
    if not isinstance(content, Mapping | nn.Module | list | tuple):
        if refused:
            raise _runs_code(path)
        raise ModelError(f"{path} must hold a state dict, found {type(content).__name__}")
    entries = list(entries_of(content)) if isinstance(content, Mapping | nn.Module) else []
    if not any(isinstance(entry.value, Tensor) for entry in entries):
        entries = list(entries_of({} if isinstance(content, nn.Module) else content, in_lists=True))
    if any(isinstance(entry.value, Tensor) for entry in entries):
        return entries
    if refused:
        raise _runs_code(path)
    if isinstance(content, list | tuple):
        raise ModelError(
            f"{path} holds a {type(content).__name__} without names of weights; if it holds those of "
            f"model.state_dict() in their order, give them their names: "
            f"torch.save(dict(zip(model.state_dict(), torch.load({str(path)!r}))), 'weights.pt')"
        )
    return entries


def entries_of(content: Any, keys: tuple[str, ...] = (), in_lists: bool = False) -> Iterator[Entry]:
    """The values of nested mappings; modules count as their state dicts, and whole numbers are not names of weights.

    Args:
        content: a mapping or a module; with `in_lists`, also a list or tuple of these.
        keys: the keys that lead to it.
        in_lists: whether mappings may lie in lists and tuples, whose positions are keys.
    """
    if isinstance(content, list | tuple):
        holders = Mapping | nn.Module | list | tuple
        content = {str(k): value for k, value in enumerate(content) if isinstance(value, holders)}
    within = Mapping | nn.Module | list | tuple if in_lists else Mapping | nn.Module
    for name, value in (content.state_dict() if isinstance(content, nn.Module) else content).items():
        if not isinstance(name, str):
            continue
        # Modules store what they like under this name.
        own_state = name.rpartition(".")[2] == "_extra_state"
        if isinstance(value, within) and not own_state and len(keys) < _DEEPEST:
            yield from entries_of(value, (*keys, name), in_lists)
        else:
            yield Entry(keys, name, _as_tensor(value))


def _as_tensor(value: Any) -> Any:
    """A NumPy array of numbers as a tensor; other values as they are."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value)
    return value


def _in_folder(folder: Path) -> Path:
    for name in _IN_A_FOLDER:
        if isfile(folder / name):
            return folder / name
    if isfile(folder / ".metadata"):
        raise ModelError(
            f"{folder} is a distributed checkpoint; turn it into one file with torch.distributed.checkpoint."
            f"format_utils.dcp_to_torch_save({str(folder)!r}, 'weights.pt'), and give weights='weights.pt'"
        )
    # Such as a variant, or a part of a pipeline.
    files = sorted(
        file.relative_to(folder) for depth in ("*", "*/*") for file in folder.glob(depth) if _is_of_weights(file)
    )
    there = f"; it has {', '.join(map(str, files[:_SHOWN]))}" if files else ""
    raise ModelError(
        f"{folder} is a folder without {', '.join(_IN_A_FOLDER[:4])}; name the file with the weights{there}"
    )


def _is_of_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", *_CHECKPOINTS) and isfile(file)


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


# What builds NumPy's arrays and numbers when they are read, by the name in checkpoints.
_OF_NUMPY: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy.core.multiarray.scalar": np.float32(0).__reduce__()[0],
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in the pickles of torch.save
}
_KINDS_OF_NUMPY = {type(np.dtype(letter)) for letter in "efdbhilqBHILQ?"}


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
            foreign = _foreign(path)
            with torch.serialization.safe_globals(foreign):
                content = torch.load(path, map_location="cpu", weights_only=True)
            return content, any(stand_in is _Inert for stand_in, _ in foreign)
    except UnpicklingError as error:
        if allow_pickle:
            raise ModelError(f"cannot read {path}: {error}") from error
        raise _runs_code(path) from None
    # Damaged pickles may fail in any way.
    except (EOFError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if not allow_pickle and "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript archive, which holds code beside tensors; if you trust its source, set "
                f"allow_pickle=True (--allow-pickle)"
            ) from None
        raise ModelError(f"cannot read {path}: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether a file has the name of a PyTorch checkpoint."""
    return path.suffix in _CHECKPOINTS


def pickled_module(path: Path, allow_pickle: bool) -> nn.Module:
    """Read a module that was pickled as a whole.

    Raises:
        ModelError: the file does not hold one, or `allow_pickle` is not set.
    """
    if not isfile(path):
        raise ModelError(f"no model at {path}")
    with_source = f"load_model(SOURCE, weights={str(path)!r}), with 'torchvision:resnet18' or your own module as SOURCE"
    if not allow_pickle:
        raise ModelError(
            f"{path} is named as a model, but checkpoints hold weights; name the architecture, and give the file as "
            f"its weights: {with_source}; if it holds a whole pickled module, and you trust its source, set "
            f"allow_pickle=True (--allow-pickle)"
        )
    module, _ = _unpickled(path, allow_pickle)
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{path} holds a scripted or traced module, whose layers cannot be probed; its weights can be used in the "
            f"module that it was made from: {with_source}"
        )
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{path} holds a {type(module).__name__} rather than a module; give it as weights: {with_source}"
        )
    return module


def _foreign(path: Path) -> list[Any]:
    """What stands for the classes and functions that a checkpoint names and PyTorch does not trust.

    These are NumPy's arrays and numbers themselves, which hold only what can be read like a tensor, and inert objects
    for all else.
    """
    from pickle import UnpicklingError

    try:
        names: Iterable[str] = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError as error:  # the format before PyTorch 1.6, which cannot be searched
        raise UnpicklingError(str(error)) from error
    foreign = [(_OF_NUMPY.get(name.replace("numpy._core.", "numpy.core."), _Inert), name) for name in names]
    # The classes of types, which checkpoints use and do not name.
    kinds = [(kind, f"numpy.dtypes.{kind.__name__}") for kind in _KINDS_OF_NUMPY]
    return foreign + (kinds if any(stand_in is not _Inert for stand_in, _ in foreign) else [])


def _runs_code(path: Path) -> ModelError:
    return ModelError(
        f"{path} holds more than tensors, and reading it could run any code; convert it to .safetensors or, if you "
        f"trust its source, set allow_pickle=True (--allow-pickle)"
    )
