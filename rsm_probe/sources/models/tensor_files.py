"""Store tensors and texts in one `.safetensors` file, with a checksum over both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rsm_probe.errors import ModelError
from rsm_probe.sources.images.pixels import tensor_bytes
from rsm_probe.storage.replacing import replacing

_CHECKSUM = "sha256"


def save_tensors(path: Path, state: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and texts to one `.safetensors` file, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as fresh:
        try:
            save_file(dense, fresh, metadata={**texts, _CHECKSUM: _checksum(dense, texts)})
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error


def read_tensors(path: Path, hint: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and texts that `save_tensors` wrote.

    Files without a checksum, as older versions wrote them, are read unchecked.

    Args:
        path: the file.
        hint: what to do about a damaged file; ends the error message.

    Raises:
        ModelError: the file is damaged or not a readable `.safetensors` file; the message says why.
    """
    state, texts = read_unchecked(path, hint)
    written = texts.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(state, texts):
        raise ModelError(f"{path} is damaged: its checksum differs from the stored one{hint}")
    return state, texts


def read_unchecked(path: Path, hint: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and texts of any `.safetensors` file.

    Raises:
        ModelError: the file cannot be read; see `read_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a .safetensors file: {error}{hint}") from error


def _checksum(state: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
