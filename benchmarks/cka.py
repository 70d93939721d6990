"""The layer by layer CKA of two ResNet-50s by this project, torch_cka and ckatorch.

    pip install torch_cka ckatorch
    python benchmarks/cka.py [--images 512] [--batch 64] [--threads 2]

Each way runs in a process of its own, over the outputs of all blocks for crops of photographs. Time is what it takes
above the bare forward passes of both models, timed in the same process right before; memory is the highest use above
what the process holds before, and above that of the bare passes. torch_cka averages HSICs over batches and ckatorch
averages CKAs, all by the unbiased estimator; this project's ratio of summed HSICs is what torch_cka computes.
"""

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rsm_probe.sources import normalise, photos

WAYS = ("rsm_probe", "torch_cka", "ckatorch")


def model(seed: int, images: torch.Tensor) -> nn.Module:
    """A random ResNet-50 whose normalisation knows the images, so that these differ at every depth."""
    torch.manual_seed(seed)
    # Blocks that begin as the identity would make neighbouring layers equal.
    module = timm.create_model("resnet50", zero_init_last=False).train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the plain mean over what it sees
    module(images)
    return module.eval()


def run_rsm_probe(first: nn.Module, second: nn.Module, images: DataLoader, layers: list[str]) -> np.ndarray:
    from rsm_probe import Accumulator, Probe

    accumulator = Accumulator(matchings=("identity",), estimators=("unbiased",))
    # Layers are compared as they run, so that no pass is held as a whole.
    probes = (Probe(net, layers, reduce=accumulator.reducer(name)) for net, name in ((first, "a"), (second, "b")))
    with accumulator, next(probes) as a, next(probes) as b:
        for (batch,) in images:
            first(batch)
            second(batch)
            accumulator.update({"a": a, "b": b})
    grid = accumulator.cka.values
    return grid[: len(layers), len(layers) :]


def run_torch_cka(first: nn.Module, second: nn.Module, images: DataLoader, layers: list[str]) -> np.ndarray:
    from torch_cka import CKA

    tool = CKA(first, second, "a", "b", layers, layers, device="cpu")
    tool.compare(images, images)
    return tool.export()["CKA"].numpy()


def run_ckatorch(first: nn.Module, second: nn.Module, images: DataLoader, layers: list[str]) -> np.ndarray:
    """Its class takes no maps, so that its function is called for every pair of layers, as the class would."""
    from ckatorch.core import cka_base

    kept: list[dict[str, torch.Tensor]] = [{}, {}]
    for module, features in zip((first, second), kept, strict=True):
        for name in layers:

            def keep(_: nn.Module, __: object, output: torch.Tensor, name: str = name, into: dict = features) -> None:
                into[name] = output.flatten(1)

            module.get_submodule(name).register_forward_hook(keep)
    grids = []
    for (batch,) in images:
        first(batch)
        second(batch)
        pairs = [[cka_base(kept[0][a], kept[1][b], "linear", unbiased=True) for b in layers] for a in layers]
        grids.append(torch.tensor(pairs))
    return torch.stack(grids).mean(dim=0).numpy()


def peak_and_now() -> tuple[float, float]:
    """MB: the highest use so far, and the use now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak, now = (next(line for line in lines if line.startswith(f)).split()[1] for f in ("VmHWM", "VmRSS"))
    return int(peak) / 1e3, int(now) / 1e3


def measured(work: Callable[[], object]) -> tuple[object, float, float]:
    """What a call returns, its seconds, and the highest use of memory above the use before, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before = peak_and_now()[1]
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, peak_and_now()[0] - before


def measure(options: argparse.Namespace, way: str) -> dict[str, object]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    layers = [f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), start=1) for block in range(count)]
    crops = photos(count=options.images, size=options.size)
    pixels = torch.stack([normalise(crop) for crop in crops])
    with torch.no_grad():
        first, second = (model(seed, pixels[:32]) for seed in (0, 1))
    images = DataLoader(TensorDataset(pixels), options.batch)

    def bare() -> None:
        for (batch,) in images:
            first(batch)
            second(batch)

    run = {"rsm_probe": run_rsm_probe, "torch_cka": run_torch_cka, "ckatorch": run_ckatorch}[way]
    with torch.no_grad():
        _, bare_seconds, bare_peak = measured(bare)
        values, seconds, peak = measured(lambda: run(first, second, images, layers))
    return {"way": way, "values": values, "bare_s": bare_seconds, "s": seconds, "bare_mb": bare_peak, "mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, help="a CSV file for the figures")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # in the processes below, what is freed goes back at once
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as one_process:
        found = list(one_process.map(partial(measure, options), options.ways))
    columns = ("way", "bare_s", "above_bare_s", "bare_peak_mb", "peak_mb", "above_bare_peak_mb", "largest_difference")
    rows = []
    for result in found:
        above, memory = result["s"] - result["bare_s"], result["mb"] - result["bare_mb"]
        difference = np.abs(np.asarray(result["values"]) - np.asarray(found[0]["values"])).max()
        numbers = (result["bare_s"], above, result["bare_mb"], result["mb"], memory, difference)
        rows.append([result["way"], *(f"{number:.6g}" for number in numbers)])
    writers = [csv.writer(sys.stdout)]
    if options.out:
        stream = options.out.open("w", newline="")
        writers.append(csv.writer(stream))
    for writer in writers:
        writer.writerows([columns, *rows])


if __name__ == "__main__":
    main()
