"""What a sweep costs beside its bounds, and whether its memory grows with the number of images.

    python benchmarks/sweep.py time [--images 100] [--batch 50] [--layers layer1.0]
    python benchmarks/sweep.py memory [--few 500] [--many 5000]

`time` runs, in one process: the device's work alone (forward passes and affinity products), the matchings alone on one
core, and the sweep. The sweep can be no faster than the larger of the first and the second divided by the cores.
`memory` runs a sweep over few and over many images, each in a process of its own, and compares their peaks.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch

import rsm_probe
from rsm_probe.execution.executors import available_cores
from rsm_probe.matching.matching import Pairs
from rsm_probe.matching.registry import get_matching
from rsm_probe.pairs.affinities import block_slices
from rsm_probe.sources import NetworkConfig, TrainingConfig, digits, normalise, scenes, train


def trained(steps: int = 100) -> rsm_probe.sources.LoadedModel:
    recipe = TrainingConfig(steps=steps, network=NetworkConfig(stem_stride=2))
    return rsm_probe.sources.LoadedModel("net", train(recipe).module, normalise)


def measure_time(count: int, batch: int, layer: str) -> None:
    model, images = trained(), digits(count=count)
    options = {"layers": [layer], "batch_size": batch}
    rsm_probe.sweep(model, images.subset(range(8)), **{**options, "batch_size": 8})  # first calls are slower

    start = time.perf_counter()
    kept = []
    with torch.no_grad(), rsm_probe.Probe(model.module, layer) as probe:
        for numbers in np.array_split(np.random.default_rng(0).permutation(count), -(-count // batch)):
            model.module(torch.stack([normalise(images[int(k)]) for k in numbers]))
            kept.append(probe.representations[layer].tokens.contiguous())
    blocks = [torch.matmul(z[rows], z[column].T).numpy() for z in kept for rows, column in block_slices(z, z)]
    device = time.perf_counter() - start

    _, method = get_matching("optimal")
    start = time.perf_counter()
    for block in blocks:
        numbers = np.arange(len(block))
        method.solve(Pairs(numbers, numbers, affinity=block))
    matching = time.perf_counter() - start
    pairs, cores = sum(len(block) for block in blocks), available_cores()
    del blocks

    start = time.perf_counter()
    rsm_probe.sweep(model, images, **options)
    wall = time.perf_counter() - start
    bound = max(device, matching / cores)
    print(f"{count} images in batches of {batch}, {layer}: S = {kept[0].shape[1]}, {pairs} pairs, {cores} cores")
    print(f"device work {device:.2f} s; matching {matching:.2f} s on one core ({matching / pairs * 1e3:.2f} ms a pair)")
    print(f"sweep {wall:.2f} s = {wall / bound:.2f} times the bound of {bound:.2f} s")


def measure_memory(few: int, many: int) -> None:
    peaks = {}
    for count in (few, many):
        done = subprocess.run(
            [sys.executable, __file__, "peak", "--images", str(count)], check=True, capture_output=True, text=True
        )
        peaks[count] = float(done.stdout)
        print(f"{count} images: peak {peaks[count]:.0f} MB")
    print(f"difference: {peaks[many] - peaks[few]:+.0f} MB")


def peak(count: int) -> None:
    images = scenes(count=count)
    rsm_probe.sweep(trained(steps=0), images, ["layer3.0", "layer4.0"], batch_size=50, centering="location-mean")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory", "peak"])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--layers", default="layer1.0")
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--many", type=int, default=5000)
    options = parser.parse_args()
    if options.what == "time":
        measure_time(options.images, options.batch, options.layers)
    elif options.what == "memory":
        measure_memory(options.few, options.many)
    else:
        peak(options.images)


if __name__ == "__main__":
    main()
