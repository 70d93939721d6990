"""A sweep over several models on a Dask cluster of local processes, beside one process with one thread.

    python benchmarks/spread.py [--models 4] [--images 200] [--size 96] [--batch 50] [--processes 2] [--rounds 2]

Both compute the same sweep with `out=`: random ResNet-18s, crops of photographs, the outputs of all blocks, matched by
`identity` and `optimal`. The one process has one core: beside the thread that matches, its main thread computes
affinities, and would fill a second one. The rounds alternate between the two, after a first sweep over one mini-batch
in each: imports and compilation take seconds in every process, once. Processes load models and images within the time.
The grids of both must be equal. Every round also times fixed work in one process and in all at once, before and after
the sweep on the cluster, because virtual cores may share a core: their ratio is what the machine allows.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from concurrent.futures import Executor
from pathlib import Path

import features
import numpy as np
import torch
from distributed import LocalCluster

import rsm_probe
from rsm_probe.execution import cluster
from rsm_probe.sources import photos

OUT = Path(__file__).parent / "results" / "spread.csv"


def sweep(options: argparse.Namespace, count: int, out: str, executor: object = None) -> tuple[float, np.ndarray]:
    """Seconds, and the grid."""
    images = photos(count=count, size=options.size)
    models = {
        f"net{seed}": rsm_probe.load_model("timm:resnet18", None, seed=seed, preprocess="imagenet", size=options.size)
        for seed in range(options.models)
    }
    cores = os.sched_getaffinity(0)
    if executor is None:
        os.sched_setaffinity(0, {min(cores)})
    start = time.perf_counter()
    result = rsm_probe.sweep(
        models, images, options.layers or "blocks", batch_size=options.batch, out=out, workers=1, executor=executor
    )
    seconds = time.perf_counter() - start
    os.sched_setaffinity(0, cores)
    return seconds, result.cka.values


def work(seed: int) -> float:
    """Seconds of matching the pairs of some tokens in one thread."""
    tokens = torch.randn(40, 576, 64, generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    rsm_probe.rsm(tokens, workers=1)
    return time.perf_counter() - start


def allowed(executor: Executor, processes: int) -> float:
    """Time of the same work in all processes, divided by that in one after another."""
    executor.submit(work, 0).result()
    start = time.perf_counter()
    executor.submit(work, 0).result()
    one = time.perf_counter() - start
    start = time.perf_counter()
    for future in [executor.submit(work, seed) for seed in range(processes)]:
        future.result()
    return (time.perf_counter() - start) / (processes * one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--layers", nargs="*", help="instead of all blocks")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the figures to the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone, spread, bounds = [], [], []
    with (
        LocalCluster(n_workers=options.processes, threads_per_worker=1, dashboard_address=None) as local,
        cluster(local.scheduler_address) as executor,
    ):
        with tempfile.TemporaryDirectory() as folder:
            sweep(options, 8, f"{folder}/one")
            sweep(options, 8, f"{folder}/spread", executor)
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                seconds, expected = sweep(options, options.images, f"{folder}/one")
                alone.append(seconds)
                before = allowed(executor, options.processes)
                seconds, values = sweep(options, options.images, f"{folder}/spread", executor)
                spread.append(seconds)
                np.testing.assert_array_equal(values, expected)
                bounds.append((before + allowed(executor, options.processes)) / 2)
                print(
                    f"one process {alone[-1]:.1f} s, {options.processes} processes {spread[-1]:.1f} s; the machine "
                    f"allows {bounds[-1]:.2f}",
                    flush=True,
                )
    shares = [b / a for a, b in zip(alone, spread, strict=True)]
    row = {
        "models": options.models, "images": options.images, "size": options.size, "batch": options.batch,
        "processes": options.processes, "one_process_s": f"{statistics.median(alone):.1f}",
        "spread_s": f"{statistics.median(spread):.1f}", "share": f"{statistics.median(shares):.3f}",
        "allowed": f"{statistics.median(bounds):.3f}",
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    if options.write:
        with OUT.open("w", newline="") as stream:
            stream.write(f"# {features.machine().replace('one core', f'{options.processes} cores')}\n")
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
