"""What it brings to keep freed memory: forward passes on a CPU with and without it, in processes that alternate.

    python benchmarks/freed_memory.py [--model tf_efficientnet_lite0] [--images 64] [--rounds 3] [--threads 2]

Prints the median milliseconds per image of each, and their ratio.
"""

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import timm
import torch

from rsm_probe.execution import keep_freed_memory

# Passes before those that are timed, after which free blocks of the right sizes lie in the heap.
WARM, TIMED = 6, 6


def milliseconds(model: str, images: int, threads: int, keep: bool) -> float:
    """Time forward passes in this process, in milliseconds per image."""
    if keep and not keep_freed_memory():
        raise SystemExit("this C library cannot be told to keep freed memory")
    torch.set_num_threads(threads)
    module, x, times = timm.create_model(model).eval(), torch.randn(images, 3, 224, 224), []
    with torch.no_grad():
        for _ in range(WARM + TIMED):
            start = time.perf_counter()
            module(x)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[WARM:]) / images


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.model}, {options.threads} threads, PyTorch {torch.__version__}")
    for images in options.images:
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.rounds):
            for keep, times in found.items():
                # A process of its own: the setting stays.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    times.append(pool.submit(milliseconds, options.model, images, options.threads, keep).result())
        plain, kept = (statistics.median(found[keep]) for keep in (False, True))
        print(f"{images} images: {plain:.1f} ms an image, {kept:.1f} with freed memory kept: {plain / kept:.2f} times")


if __name__ == "__main__":
    main()
