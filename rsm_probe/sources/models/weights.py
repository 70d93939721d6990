"""Load weights from files, and fetch pretrained weights from the libraries' stores, online or offline."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from os.path import isfile
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from rsm_probe.errors import ModelError
from rsm_probe.sources.models.fingerprints import require_weights
from rsm_probe.sources.models.tensor_files import read_unchecked

_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")
_NETWORK_SECONDS = 3.0
_T = TypeVar("_T")


def load_weights(module: nn.Module, path: Path, allow_pickle: bool = False) -> None:
    """Load a state dict from a file into a module.

    Args:
        module: the network.
        path: a `.safetensors` file, or a PyTorch checkpoint that holds only tensors, either directly or under
            "state_dict", "model" or "model_state_dict".
        allow_pickle: also read checkpoints that hold other objects; reading them can run any code.

    Raises:
        ModelError: the file does not exist, has another format or holds more than tensors, or the weights do not fit.
    """
    if path.suffix not in (".safetensors", *_CHECKPOINTS):
        raise ModelError(
            f"weights must be 'default', None, a .safetensors file or a checkpoint ({', '.join(_CHECKPOINTS)}), "
            f"found {str(path)!r}"
        )
    if not isfile(path):
        raise ModelError(f"no weights at {path}")
    state = _checkpoint(path, allow_pickle) if path.suffix in _CHECKPOINTS else read_unchecked(path)[0]
    if state and all(str(name).startswith("module.") for name in state):  # saved from DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    require_weights(module, type(module).__name__)
    own = module.state_dict()
    missing, surplus = [n for n in own if n not in state], [n for n in state if n not in own]
    other = [n for n in own if n in state and getattr(state[n], "shape", None) != getattr(own[n], "shape", None)]
    # Integers in place of floats are quantised weights without their scale.
    kinds = [n for n in own if n in state and n not in other and _is_whole(state[n]) and not _is_whole(own[n])]
    problems = [("missing", missing), ("unknown", surplus), ("of a different shape", other), ("whole numbers", kinds)]
    if any(names for _, names in problems):  # checked before the module changes
        listed = "; ".join(f"{what}: {', '.join(map(str, names[:5]))}" for what, names in problems if names)
        raise ModelError(f"the weights in {path} do not fit {type(module).__name__} ({listed})")
    try:
        module.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the weights in {path} do not fit {type(module).__name__}: {error}") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _checkpoint(path: Path, allow_pickle: bool) -> dict[str, Any]:
    from pickle import UnpicklingError

    try:
        content = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except UnpicklingError as error:
        if allow_pickle:
            raise ModelError(f"cannot read {path}: {error}") from error
        raise ModelError(
            f"{path} holds more than tensors, and reading it could run any code; convert it to .safetensors or, if you "
            f"trust its source, set allow_pickle=True (--allow-pickle)"
        ) from None
    except (EOFError, KeyError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    state = content.state_dict() if isinstance(content, nn.Module) else content
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ModelError(f"{path} must hold a state dict, found {type(state).__name__}")
    return state


def fetched(
    what: str,
    build: Callable[[], _T],
    instructions: str = "",
    random_weights: bool = True,
    local: bool = False,
    hub: bool = False,
) -> _T:
    """Load something that may have to be fetched; on failure, raise one error that says what to do.

    Args:
        what: the model as the user wrote it, for error messages.
        build: loads and returns it.
        instructions: what to fetch, and where to put it.
        random_weights: whether random weights would work without it.
        local: whether it comes entirely from a local folder.
        hub: whether it may come from the Hugging Face hub, so that the hub's library must know if there is no network.

    Returns:
        What `build` returns.

    Raises:
        ModelError: it cannot be loaded, or comes with code that the user has not allowed to run.
    """
    from safetensors import SafetensorError

    with _offline_where_unreachable() if hub else nullcontext():
        try:
            return build()
        # Files of a model may be damaged in any way, or need packages that are not installed.
        except (
            AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError
        ) as error:  # fmt: skip
            problem = error
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    otherwise = ", or use weights=None for random weights" if random_weights else ""
    if "trust_remote_code" in str(problem):
        raise ModelError(
            f"cannot load {what}: it comes with its own Python code, which can do anything and is not run by default; "
            f"if you trust its source, set trust_remote_code=True in load_model, or give --trust-remote-code to "
            f"`rsm-probe layers` (configurations never run such code)"
        ) from problem
    if local:
        todo = "check the files in that folder"
    elif isinstance(problem, OSError | RuntimeError | ValueError):
        where = f" ({instructions})" if instructions else ""
        todo = f"check the network, or copy the files into the library's cache from a machine with network{where}"
    else:
        reason, todo = f"{type(problem).__name__}: {reason}", "the error comes from the model's library"
    raise ModelError(f"cannot load {what}: {reason}; {todo}{otherwise}") from problem


@contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """Put the hub's library into offline mode if there is no network; otherwise, it would retry for half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the library connects through the proxy
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout=_NETWORK_SECONDS).close()
    except OSError:
        return False
    return True
