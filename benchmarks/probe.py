"""What a probe costs: forward passes of a ResNet-50 with and without hooks on its 16 blocks, alternating in one run.

    python benchmarks/probe.py [--images 8] [--size 224] [--rounds 15] [--threads 2]

Prints the median of each, and the median of the ratios of neighbouring passes, which a drifting clock does not touch.
"""

import argparse
import statistics
import time

import torch
import torchvision

from rsm_probe import Probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
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

    bare, probed = [], []
    forward()
    for _ in range(options.rounds):
        bare.append(forward())
        with Probe(model, "blocks") as probe:
            forward()  # the first pass under a probe has to ask for memory that later ones find
            probed.append(forward())
        captured = sum(kept.tokens.nbytes for kept in probe.representations.values())
        del probe
    ratios = [b / a for a, b in zip(bare, probed, strict=True)]
    print(f"bare {statistics.median(bare) * 1e3:.0f} ms, probed {statistics.median(probed) * 1e3:.0f} ms")
    print(f"captured {captured / 1e6:.0f} MB a pass")
    print(f"overhead: {statistics.median(ratios) - 1:+.1%} (median of {len(ratios)} neighbouring pairs)")


if __name__ == "__main__":
    main()
