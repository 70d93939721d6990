"""The features that the benchmarks of matching run on, and how they time."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rsm_probe
from rsm_probe.config import read_yaml
from rsm_probe.sources import TrainingConfig, normalise, photos, train_or_load

ROOT = Path(__file__).parent.parent


def trained_network(device: str | torch.device = "cpu") -> torch.nn.Module:
    """A full-width ResNet-18 with a stem for small images, trained at the first call."""
    config = TrainingConfig.parse(read_yaml(ROOT / "configs" / "train_photos.yaml"), "the recipe")
    file = ROOT / "runs" / "models" / "train_photos-0.safetensors"
    return train_or_load(config, 0, file, device, progress=True)[0].module


def features(module: torch.nn.Module, size: int, layers: list[str], count: int) -> dict[str, torch.Tensor]:
    """Tokens (N, S, C) of each layer, of crops of photographs of `size` pixels."""
    crops = photos("test" if size == 64 else "all", size=size, count=count, seed=1)
    batch = torch.stack([normalise(crops[k]) for k in range(count)])
    with torch.no_grad(), rsm_probe.Probe(module, layers) as probe:
        module(batch)
    return {layer: probe.representations[layer].tokens.contiguous() for layer in layers}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median of so many calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def machine() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, one core, PyTorch {torch.__version__.split('+')[0]}"
