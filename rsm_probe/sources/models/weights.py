"""Fetch pretrained weights from the libraries' stores, online or offline."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from urllib.parse import urlsplit

from rsm_probe.errors import ModelError

_NETWORK_SECONDS = 3.0
_T = TypeVar("_T")


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
