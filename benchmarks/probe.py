"""What a probe costs: forward passes of a ResNet-50 with and without hooks on its 16 blocks, shuffled in one run.

    python benchmarks/probe.py [--images 8] [--size 224] [--rounds 25] [--threads 2]

Prints the medians of both and the overhead by medians and by fastest passes. On a machine that does other work, single
passes scatter by more than the overhead: take many rounds.
"""

import argparse
import random
import statistics
import time

import torch
import torchvision

from rsm_probe import Probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    images = torch.randn(options.images, 3, options.size, options.size)

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(images)
        return time.perf_counter() - start

    probe = Probe(model, "blocks")

    def probed_forward() -> float:
        with probe:
            return forward()

    kinds = {"bare": forward, "probed": probed_forward}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for run in kinds.values():
        run()  # first calls ask for memory that later ones find
    for _ in range(options.rounds):
        for kind in random.sample(list(kinds), k=len(kinds)):
            times[kind].append(kinds[kind]())
    captured = sum(kept.tokens.nbytes for kept in probe.representations.values())
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"captured {captured / 1e6:.0f} MB a pass")
    print(f"bare {medians['bare'] * 1e3:.0f} ms, probed {medians['probed'] * 1e3:.0f} ms")
    print(
        f"overhead: {medians['probed'] / medians['bare'] - 1:+.1%} by medians, "
        f"{min(times['probed']) / min(times['bare']) - 1:+.1%} by fastest passes, {options.rounds} rounds"
    )


if __name__ == "__main__":
    main()
