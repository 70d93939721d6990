"""What a probe costs: forward passes with and without it, beside other ways to the same layers, shuffled in one run.

    python benchmarks/probe.py [--model vit_base_patch16_224] [--images 8] [--rounds 15] [--threads 2]

Prints the median of each way, its overhead over the bare pass, and by how much its peak of memory exceeds the bare
pass's (Linux). The first pass of a probe, which is followed operation by operation, is timed apart. On a machine that
does other work, single passes scatter by more than the overhead: take many rounds.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from rsm_probe import Probe


def hidden_states(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A ViT of the same size in transformers, bare and with all hidden states."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(image_size=options.size)).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    probe = Probe(model, "blocks")

    def probed() -> object:
        with probe:
            return model(images)

    return {
        "transformers, bare": lambda: model(images),
        "transformers, output_hidden_states": lambda: model(images, output_hidden_states=True),
        "transformers, probe": probed,
    }


class Conditioned(nn.Module):
    """A model that takes timesteps and labels beside the images, as diffusion transformers do."""

    def __init__(self, model: nn.Module, width: int = 256) -> None:
        super().__init__()
        self.model, self.width = model, width
        self.labels, self.shift = nn.Embedding(1000, width), nn.Linear(width, 3)

    def forward(self, images: Tensor, timestep: Tensor | int, labels: Tensor) -> Tensor:
        times = torch.as_tensor(timestep, device=images.device).expand(len(images))
        angles = times[:, None] / 10_000 ** (torch.arange(self.width // 2, device=images.device) * 2 / self.width)
        condition = torch.cat([angles.sin(), angles.cos()], dim=1) + self.labels(labels)
        return self.model(images + self.shift(condition)[:, :, None, None])


def conditioned(model: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """Calls with labels, and with timesteps that are new in every pass."""
    model = Conditioned(model).eval()
    probes = {kind: Probe(model, "blocks") for kind in (Tensor, int)}
    timesteps = itertools.count()

    def probed(kind: type) -> object:
        timestep = next(timesteps)
        with probes[kind]:
            return model(images, torch.full((len(images),), timestep) if kind is Tensor else timestep, labels())

    def labels() -> Tensor:
        return torch.randint(1000, (len(images),))

    return {
        "conditioned, bare": lambda: model(images, torch.full((len(images),), next(timesteps)), labels()),
        "conditioned, probe": lambda: probed(Tensor),
        "conditioned, probe, timestep a number": lambda: probed(int),
    }


def all_ways(options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], Probe]:
    """Every way to run the model once, and the probe of the second."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    probe, early = Probe(model, "blocks"), Probe(model, "blocks", stop_early=True)
    extractor = create_feature_extractor(model, [selection.label for selection in probe.selections])

    def probed() -> object:
        with probe:
            return model(images)

    def probed_early() -> object:
        with early:
            return model(images)

    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: model(images),
        "probe": probed,
        "probe, stop_early": probed_early,
        "torchvision feature extractor": lambda: extractor(images),
        "timm forward_intermediates": lambda: model.forward_intermediates(images),
    }
    ways |= conditioned(model, images)
    if options.model.startswith("vit_base"):
        ways |= hidden_states(options)
    return ways, probe


def peak_mb(options: argparse.Namespace, way: str) -> float:
    """By how much a second pass, in a process of its own, raises the memory held before the first (Linux)."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3

    run = all_ways(options)[0][way]
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before = status("VmRSS")
    with torch.no_grad():
        for _ in range(2):
            run()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ways, probe = all_ways(options)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # in the processes below, what is freed goes back at once
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as one_process:
        peaks = dict(zip(ways, one_process.map(partial(peak_mb, options), ways), strict=True))
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if way in ("bare", "probe"):
                print(f"first pass, {way}: {(time.perf_counter() - start) * 1e3:.0f} ms")
            run()  # where arguments hold numbers, two passes are followed
        for _ in range(options.rounds):
            for way in random.sample(list(ways), k=len(ways)):
                start = time.perf_counter()
                ways[way]()
                times[way].append(time.perf_counter() - start)
    kept = probe.representations
    captured = sum(one.tokens.nbytes + one.prefix.nbytes for one in kept.values())
    print(f"{options.model}: {len(kept)} layers, {captured / 1e6:.0f} MB captured a pass, {options.rounds} rounds")
    for way, values in times.items():
        base = next((base for base in times if base == f"{way.split(',')[0]}, bare"), "bare")
        print(
            f"{way:36s} {statistics.median(values) * 1e3:6.0f} ms  "
            f"{statistics.median(values) / statistics.median(times[base]) - 1:+6.1%} by medians  "
            f"{min(values) / min(times[base]) - 1:+6.1%} by fastest passes  "
            f"{peaks[way] - peaks[base]:+6.0f} MB"
        )


if __name__ == "__main__":
    main()
