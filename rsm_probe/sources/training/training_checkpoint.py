"""Half-trained networks on disk, from which an interrupted training resumes with bit-identical results."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from rsm_probe.errors import ModelError
from rsm_probe.sources.models.tensor_files import read_tensors, save_tensors


def save_partial(
    path: Path, owner: Mapping[str, str], step: int, module: nn.Module, optimiser: torch.optim.SGD
) -> None:
    """Write parameters, buffers and momentum to one `.safetensors` file, atomically.

    Args:
        path: the file.
        owner: texts that identify the training; `load_partial` compares them.
        step: number of steps done, at least 1.
        module: the network.
        optimiser: the optimiser, which holds the momentum.

    Raises:
        StorageError: the file cannot be written.
    """
    state = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state[f"momentum.{name}"] = optimiser.state[parameter]["momentum_buffer"]
    save_tensors(path, state, {**owner, "step": str(step)})


def load_partial(
    path: Path, owner: Mapping[str, str], module: nn.Module, optimiser: torch.optim.SGD, most: int | None = None
) -> int:
    """Restore network and momentum from what `save_partial` wrote.

    A damaged file, one of another training, or one of more than `most` steps changes nothing and causes a warning.

    Returns:
        The number of steps done; 0 if nothing was restored.
    """
    if not path.is_file():
        return 0
    try:
        state, texts = read_tensors(path)
    except ModelError as error:
        return _start_over(str(error))
    if {key: text for key, text in texts.items() if key != "step"} != dict(owner):
        return _start_over(f"{path} belongs to another recipe, seed or set of images")
    parameters = dict(module.named_parameters())
    expected = {f"network.{name}": tensor for name, tensor in module.state_dict().items()}
    expected |= {f"momentum.{name}": tensor for name, tensor in parameters.items()}
    kinds, wanted = ({n: (t.shape, t.dtype) for n, t in part.items()} for part in (state, expected))
    step = texts.get("step", "")
    if kinds != wanted or not (step.isascii() and step.isdecimal() and len(step) < 16):
        return _start_over(f"{path} does not hold the expected tensors and step")
    if most is not None and int(step) > most:
        return _start_over(f"{path} has done {step} steps, and the checkpoint of step {most} is missing")
    module.load_state_dict({name: state[f"network.{name}"] for name in module.state_dict()})
    for name, parameter in parameters.items():
        # Keep the memory layout of the parameter: in another layout, sums over it could round differently.
        momentum = torch.empty_like(parameter, requires_grad=False).copy_(state[f"momentum.{name}"])
        optimiser.state[parameter]["momentum_buffer"] = momentum
    return int(step)


@contextmanager
def whole_steps() -> Iterator[list[bool]]:
    """Delay Ctrl-C until the end of the block, so that no step is left half done; a second Ctrl-C acts at once.

    Yields:
        A list that is empty until an interruption; once it is not, the block should end after its current step.

    Raises:
        KeyboardInterrupt: at the end of the block, if there was an interruption.
    """
    interrupted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def wait(number: int, frame: FrameType | None) -> None:
        interrupted.append(True)
        signal.signal(signal.SIGINT, before)

    # Signals reach only the main thread, and a handler that the user installed must stay.
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupted
        return
    signal.signal(signal.SIGINT, wait)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _start_over(problem: str) -> int:
    warnings.warn(f"{problem}; training starts over and replaces the file", stacklevel=3)
    return 0
