"""Look at a model in the middle of its training, and leave everything that training depends on as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from rsm_probe.errors import ModelError
from rsm_probe.probe.wrappers import evaluating


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside, without gradients or autocast, and restore the state of training on exit.

    Restored are the training flag of every submodule, all buffers (statistics of BatchNorm), the random states of
    Python, NumPy and PyTorch (on the CPU and on the model's devices). Gradients, autocast and devices are not touched.

    Raises:
        LayerError: the model runs no hooks; see `rsm_probe.probe.wrappers.plain_model`.
    """
    devices = {parameter.device.type for parameter in module.parameters()} - {"meta"} | {"cpu"}
    with ExitStack() as stack:
        for context in (evaluating(module), unchanged_random_states(module), _buffers(module), torch.no_grad()):
            stack.enter_context(context)
        for device in sorted(devices):  # compute in the model's own precision, even within a loop's autocast
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def require_unsharded(module: nn.Module) -> None:
    """Refuse a model of which each process holds a part: one process alone cannot call it.

    Raises:
        ModelError: parameters are sharded.
    """
    # A library that was never imported has sharded nothing.
    fsdp, tensors = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    wrapper, sharded = getattr(fsdp, "FullyShardedDataParallel", ()), getattr(tensors, "DTensor", ())
    by = ""
    if any(isinstance(part, wrapper) for part in module.modules()):
        by = "FSDP"
    elif any(isinstance(parameter, sharded) for parameter in module.parameters()):
        by = "FSDP2 or tensor parallelism (DTensor)"
    elif any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        by = "DeepSpeed ZeRO-3"
    if by:
        raise ModelError(
            f"{type(module).__name__} is sharded over processes by {by}, and recording takes place in one process, "
            f"which holds only a part of the weights; save checkpoints at these steps and compare them afterwards by "
            f"rsm_probe.sweep"
        )


@contextmanager
def _buffers(module: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers, and the tensors that hold them."""
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, values in before:
            if getattr(part, name) is not buffer:
                setattr(part, name, buffer)
            # Writing values that are the same would invalidate a graph that awaits its backward pass.
            if buffer.layout != torch.strided or not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


@contextmanager
def unchanged_random_states(module: nn.Module | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy, and PyTorch on the CPU and on the devices of a model."""
    parameters = [] if module is None else module.parameters()
    accelerators = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002 - of code that draws from it
    states = [(device, _device_state(device)) for device in accelerators]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in states:
            arguments = () if device.type == "mps" else (device,)  # which is one device
            torch.get_device_module(device).set_rng_state(state, *arguments)


def _device_state(device: torch.device) -> torch.Tensor:
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state
