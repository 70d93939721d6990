"""Small captures, and how tests break and watch what is written."""

import hashlib
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import rsm_probe
from rsm_probe.captures.captured_layers import KIND, Capture, CapturedLayer
from rsm_probe.captures.writer import CaptureWriter
from rsm_probe.forward.layer_consumer import ImageBatch
from rsm_probe.probe.representation import Representation
from rsm_probe.storage.chunks import ChunkStore

# Where a GPU is: bits are compared with those of other processes, which compute on the CPU, and forks cannot use it.
all_pairs_on_cpu = partial(rsm_probe.all_pairs, device="cpu")


def tokens(images: int = 20, locations: int = 9, channels: int = 6, seed: int = 0) -> torch.Tensor:
    """Post-ReLU-like tokens with dead locations."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(images, locations, channels, generator=generator) + 0.2).relu()


def captured(
    where: Path,
    values: torch.Tensor,
    prefix: str = "image",
    chunk: int = 4,
    grid: tuple[int, int] | None = None,
    layer: str = "layer",
) -> CapturedLayer:
    """A capture of one layer that holds given tokens."""
    store = ChunkStore.open_or_create(where, KIND)
    names = [f"{prefix}-{k}" for k in range(len(values))]
    writer = CaptureWriter(store, names, [str(k % 3) for k in range(len(values))], chunk, torch.float32)
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    store.set({"settings": {"model": "none", "weights": digest, "images": prefix, "content": digest}})
    writer.declare({layer: Representation(values, values[:, :0], grid)})
    for numbers in torch.arange(len(values)).split(chunk):
        writer.begin(ImageBatch([names[k] for k in numbers], numbers=numbers.numpy()))
        writer.take("none", layer, Representation(values[numbers], values[numbers, :0], grid))
        writer.end({("none", layer): layer})
    assert writer.finish() is None
    return Capture.open(where)[layer]


def chunk_files(where: Path) -> dict[str, tuple[int, int]]:
    """When and where every chunk of a result was written last."""
    found = {}
    for file in where.rglob("c/**/*"):
        if file.is_file() and not file.name.endswith(".partial"):
            found[file.relative_to(where).as_posix()] = (file.stat().st_mtime_ns, file.stat().st_ino)
    return found


def arrays(dataset) -> dict[str, np.ndarray]:
    """All arrays of a result."""
    return {str(name): np.asarray(part.values) for name, part in dataset.variables.items()}


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Two results have the same arrays, to the bit."""
    mine, theirs = arrays(found), arrays(expected)
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.array_equal(mine[name], values), name


class Watching(Executor):
    """Runs tasks at once, and remembers them; may fail at one of them."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.tasks: list = []
        self.fail_at, self.error = fail_at, error

    def submit(self, function, /, *args, **kwargs):
        future: Future = Future()
        if len(self.tasks) == self.fail_at:
            future.set_exception(self.error)
            return future
        self.tasks.append(args[0])
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as executors do
            future.set_exception(error)
        return future
