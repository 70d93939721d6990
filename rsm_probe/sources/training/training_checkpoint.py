"""A half-trained network on disk, from which an interrupted training continues as if nothing had happened."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from rsm_probe.errors import ModelError
from rsm_probe.sources.models.tensor_files import read_tensors, save_tensors


def save_partial(
    path: Path, owner: Mapping[str, str], step: int, module: nn.Module, optimiser: torch.optim.SGD
) -> None:
    """Writes parameters, buffers and momentum after a step as one `.safetensors` file, atomically.

    Args:
        path: the file.
        owner: what the network is, by which `load_partial` knows it again.
        step: how many steps it was trained for, at least 1.
        module: the network.
        optimiser: holds the momentum.

    Raises:
        StorageError: the file cannot be written.
    """
    save_tensors(path, _state(module, optimiser), {**owner, "step": str(step)})


def load_partial(path: Path, owner: Mapping[str, str], module: nn.Module, optimiser: torch.optim.SGD) -> int:
    """Continues where `save_partial` stopped: fills network and momentum and says how many steps are done.

    Without a file, that is 0. A file that is damaged (a checksum tells) or of another network changes nothing, gives 0
    and a warning.
    """
    if not path.is_file():
        return 0
    try:
        state, texts = read_tensors(path)
    except ModelError as error:
        return _start_over(f"{error}")
    if {key: text for key, text in texts.items() if key != "step"} != dict(owner):
        return _start_over(f"{path} is of another recipe, seed or set of images")
    parameters = dict(module.named_parameters())
    expected = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    expected |= {f"momentum.{name}": tensor for name, tensor in parameters.items()}
    kinds, wanted = ({n: (t.shape, t.dtype) for n, t in part.items()} for part in (state, expected))
    if kinds != wanted or not _is_step(texts.get("step", "")):
        return _start_over(f"{path} does not hold what it should")
    module.load_state_dict({name: state[f"network.{name}"] for name in module.state_dict()})
    for name, parameter in parameters.items():
        # A copy into the layout of the parameter: in another, sums over it could be rounded otherwise.
        momentum = torch.empty_like(parameter, requires_grad=False).copy_(state[f"momentum.{name}"])
        optimiser.state[parameter]["momentum_buffer"] = momentum
    return int(texts["step"])


@contextmanager
def whole_steps() -> Iterator[list[bool]]:
    """Holds Ctrl-C back until the end of the block, so that no step is left half done; a second one acts at once.

    Yields:
        A list that is no longer empty once an interruption was asked for: the block then ends after its step.

    Raises:
        KeyboardInterrupt: at the end of the block, if it was asked for.
    """
    asked: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def wait(number: int, frame: FrameType | None) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, before)

    # Only the main thread is interrupted, and whoever has a handler of his own keeps it.
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield asked
        return
    signal.signal(signal.SIGINT, wait)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _state(module: nn.Module, optimiser: torch.optim.SGD) -> dict[str, Tensor]:
    state = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state[f"momentum.{name}"] = optimiser.state[parameter]["momentum_buffer"]
    return state


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16


def _start_over(problem: str) -> int:
    warnings.warn(f"{problem}; training starts anew and replaces it", stacklevel=3)
    return 0
